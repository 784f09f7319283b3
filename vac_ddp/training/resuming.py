"""Going on from a checkpoint: is it of this run, which best weights belong to it, and what is promised."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vac_ddp import files
from vac_ddp.errors import UserError
from vac_ddp.models import Loaded, VideoModel, load_model, rebuild_model
from vac_ddp.models.build import OF_ARCHITECTURE
from vac_ddp.models.torch_file import read_torch
from vac_ddp.report.run_reader import read_classes
from vac_ddp.runtime import distributed
from vac_ddp.runtime.data_parallel import load_optimizer_state
from vac_ddp.settings import Config
from vac_ddp.text import printable
from vac_ddp.training import run_directory, same_run
from vac_ddp.training.best_weights import BestFile, is_file
from vac_ddp.training.checkpoint_content import check_fits
from vac_ddp.training.data_setup import Data, data_hashes, seen_by_weights
from vac_ddp.training.optimization import Group
from vac_ddp.training.saving import Saver

REPORT = "load_report.json"


@dataclass(kw_only=True)
class Resumed:
    """What a run goes on from: the state on rank 0, the facts on every rank; both None in a new run."""

    state: dict[str, Any] | None
    facts: dict[str, Any] | None
    source: Path | None

    @property
    def yes(self) -> bool:
        """Whether there is something to go on from."""
        return self.facts is not None

    def part(self, name: str) -> Any:
        """A part of the state, on rank 0."""
        return self.state[name] if self.state is not None else None

    def check_fits(self, model: VideoModel, groups: list[Group], *, averaged: bool) -> None:
        """UserError, on every rank, where the state is not of `model` and the optimizer's `groups`."""

        def compare() -> None:
            assert self.source is not None, "rank 0 has read it"
            check_fits(self.state, self.source, model, groups, averaged=averaged)

        distributed.main_first(compare, lambda: None)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        """Give every rank rank 0's state of the optimizer; each keeps its share where it is sharded."""
        load_optimizer_state(optimizer, self.part("optimizer"))
        scale = distributed.broadcast_object(self.part("scaler"))
        if scaler is not None and scale is not None:
            scaler.load_state_dict(scale)


def load(config: Config, data: Data, resumed: Resumed) -> Loaded:
    """The model of a run: with the weights of the settings, or, resumed, ready for those of the checkpoint.

    Settings that describe an architecture which the weights bring along become those of `config`.
    """
    architecture = None if resumed.facts is None else resumed.facts.get("architecture")
    if resumed.facts is not None and architecture is not None:
        saved = resumed.facts["config"]["model"]
        kept = {name: saved[name] for name in OF_ARCHITECTURE if name in saved}
        config.model = dataclasses.replace(config.model, **kept)
        loaded = rebuild_model(config.model, config.clip, data.classes, architecture, seed=config.seed)
        loaded.report.head = str(resumed.facts.get("head"))
        given = resumed.facts.get("replaced", {})
        loaded.replaced = {name: (value, kept[name]) for name, value in given.items() if name in kept}
        return loaded
    loaded = distributed.main_first(
        *2 * (lambda: load_model(config.model, config.clip, data.classes, seed=config.seed),)
    )
    config.model = dataclasses.replace(config.model, **{name: value for name, (_, value) in loaded.replaced.items()})
    if note := seen_by_weights(loaded.report.file, data):
        loaded.report.notes.append(note)
    return loaded


def check(resumed: Resumed, data: Data) -> None:
    """UserError, on every rank, where the checkpoint is not of a run on this data."""

    def compare() -> None:
        assert resumed.facts is not None, "only for a resumed run"
        assert resumed.source is not None, "rank 0 has read it"
        same_run.check_data(resumed.facts, data_hashes(data), resumed.source)
        home = run_directory.run_of(resumed.source)
        if home is None or not (home / "classes.json").exists():
            return
        if read_classes(home) != [printable(name) for name in data.classes]:
            raise UserError(
                f"{resumed.source} cannot be resumed with this data: classes: {home / 'classes.json'} has others"
            )

    distributed.main_first(compare, lambda: None)


def settle(
    resumed: Resumed, saver: Saver, run: run_directory.OpenRun | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """The state of a checkpoint but for its tensors, on every rank, with the best weights that belong to it in place.

    The run begins here. UserError where it would have another length.
    """
    assert resumed.facts is not None, "only for a resumed run"
    # With train.max_minutes total_steps is what was decided, and step_bound what the settings say.
    before, now = (facts.get("step_bound", facts["total_steps"]) for facts in (resumed.facts, saver.facts))
    if before != now:
        raise UserError(
            f"the run had {before} steps and would have {now} now: the data or the length changed; start a new run.dir"
        )
    rest = None
    if run is not None and resumed.state is not None and resumed.source is not None:
        run.begin(say)
        rest = {k: v for k, v in resumed.state.items() if k not in ("model", "ema", "optimizer", "scaler")}
        rest["stopping"] = settle_best(saver.best, resumed.source, resumed.facts, rest["stopping"], say)
    settled: dict[str, Any] = distributed.broadcast_object(rest)
    return settled


def promised(resumed: Resumed, now: Mapping[str, Any], step: int, moved: int) -> list[str]:
    """Lines on where a run resumes, and which of the two promises about the rest of it holds.

    now: facts of its next checkpoints; moved: lines of metrics.jsonl behind `step`.
    """
    facts, source, lines = resumed.facts, resumed.source, []
    assert facts is not None, "only for a resumed run"
    if unsaid := same_run.unsaid(facts):
        lines.append(f"{source} is of an earlier version and does not say: {', '.join(unsaid)}; taken as they are now")
    lines.append(f"resumed at step {step} of {now['total_steps']} from {source}: {same_run.promise(facts, now)}")
    if moved:
        lines.append(f"{moved} lines behind step {step} moved to metrics.discarded.jsonl")
    return lines


def settle_best(
    best: BestFile, source: Path, facts: dict[str, Any], stopping: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Make the best file the one that checkpoint `source` knows; returns the state of early stopping that goes with it.

    Another file in its place is set aside. Where the checkpoint's own is not to be had, the best is looked for anew.
    """
    folder = best.path.parent
    home = run_directory.run_of(source)
    candidate = best.path if home is None or home == folder.resolve() else home / best.path.name
    record = _record(candidate, facts, stopping)
    if record is not None and stopping["best_epoch"] in (None, record["epoch"]):
        best.written = record
        if candidate != best.path:
            _copy(candidate, best.path)
            if (candidate.parent / "validation.npz").exists():
                _copy(candidate.parent / "validation.npz", folder / "validation.npz")
        return stopping
    if best.path.exists():
        moved = run_directory.set_aside(best.path, folder / "checkpoints" / "discarded")
        say(f"{best.path.name} is not that of {source.name}: moved to {moved}")
    if stopping["best"] is None:
        return stopping
    say(
        f"the best weights so far ({stopping['best']:.4f} after epoch {stopping['best_epoch']}) are not there: the "
        "best validation is looked for anew"
    )
    return {**stopping, "best": None, "best_epoch": None, "since_best": 0}


def _record(path: Path, facts: dict[str, Any], stopping: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of the best file of a checkpoint, where `path` is that file."""
    if "best" in facts:
        record = facts["best"]
        return record if record is not None and is_file(path, record) else None
    if not path.exists():
        return None
    # A checkpoint of the first version: by the accuracy that the file says.
    try:
        metrics = read_torch(path).get("metrics")
    except (OSError, UserError):
        return None
    if (metrics.get("top1") if isinstance(metrics, dict) else None) != stopping["best"]:
        return None
    return {"epoch": stopping["best_epoch"], "bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as stream:
        files.write_atomic(target, lambda out: shutil.copyfileobj(stream, out))


def copy_report(source: Path, folder: Path) -> None:
    """Take the load report of the run that `source` lies in over into a new run directory."""
    home = run_directory.run_of(source)
    if home is not None and (home / REPORT).exists() and not (folder / REPORT).exists():
        _copy(home / REPORT, folder / REPORT)
