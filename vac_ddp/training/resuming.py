"""Going on from a checkpoint: is it of this run, which best weights belong to it, and what is promised."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vac_ddp import files
from vac_ddp.errors import UserError
from vac_ddp.models import Loaded, load_model, rebuild_model
from vac_ddp.models.torch_file import read_torch
from vac_ddp.report.run_reader import read_classes
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.text import printable
from vac_ddp.training import run_directory, same_run
from vac_ddp.training.best_weights import BestFile, is_file
from vac_ddp.training.data_setup import Data, data_hashes
from vac_ddp.training.loop import Loop
from vac_ddp.training.model_setup import Resumed

# Of the run that a checkpoint lies in, for a new directory.
COPIED = ("load_report.json",)


def load(config: Config, data: Data, resumed: Resumed) -> Loaded:
    """The model of a run: with the weights of the settings, or, resumed, ready for those of the checkpoint."""
    architecture = None if resumed.facts is None else resumed.facts.get("architecture")
    if architecture is not None:
        loaded = rebuild_model(config.model, config.clip, data.classes, architecture, seed=config.seed)
        loaded.report.head = str(resumed.facts and resumed.facts.get("head"))
        return loaded
    return distributed.main_first(*2 * (lambda: load_model(config.model, config.clip, data.classes, seed=config.seed),))


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


def resume_loop(loop: Loop, resumed: Resumed, run: run_directory.OpenRun | None) -> None:
    """Give the loop its place back, and say which of the two promises about the rest of the run holds."""
    facts, now, say = resumed.facts, loop.saver.facts, loop.tracker.say
    assert facts is not None, "only for a resumed run"
    if facts["total_steps"] != now["total_steps"]:
        raise UserError(
            f"the run had {facts['total_steps']} steps and would have {now['total_steps']} now: "
            "the data or the length changed; start a new run.dir"
        )
    rest = None
    if run is not None and resumed.state is not None and resumed.source is not None:
        run.begin(say)
        rest = {k: v for k, v in resumed.state.items() if k not in ("model", "ema", "optimizer", "scaler")}
        rest["stopping"] = settle_best(loop.saver.best, resumed.source, facts, rest["stopping"], say)
    loop.restore(distributed.broadcast_object(rest))
    where = loop.position
    moved = loop.tracker.rewind(where.step, where.epoch - int(where.validation_due))
    if unsaid := same_run.unsaid(facts):
        say(f"{resumed.source} is of an earlier version and does not say: {', '.join(unsaid)}; taken as they are now")
    promised = same_run.promise(facts, now)
    say(f"resumed at step {loop.position.step} of {loop.total_steps} from {resumed.source}: {promised}")
    if moved:
        say(f"{moved} lines behind step {loop.position.step} moved to metrics.discarded.jsonl")


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
    for name in COPIED:
        if home is not None and (home / name).exists() and not (folder / name).exists():
            _copy(home / name, folder / name)
