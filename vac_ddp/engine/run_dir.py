"""The run directory: new, resumed or thrown away on request, never a mixture of two runs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vac_ddp import files
from vac_ddp.engine import checkpoint
from vac_ddp.engine.lock import RunLock
from vac_ddp.errors import UserError
from vac_ddp.settings import RunSettings

OURS = (
    "config.yaml",
    "classes.json",
    "split.csv",
    "index.cache",
    "index.val.cache",
    "log.txt",
    "metrics.jsonl",
    "metrics.discarded.jsonl",
    "load_report.json",
    "validation.npz",
    "report.html",
    "interrupted.json",
    "overwrote.json",
    "wandb_id",
    "checkpoints",
    "predictions",
    "logs",
    "tensorboard",
    "wandb",
)

OVERWRITTEN = ".overwritten"
# Which start threw an earlier run away: its later attempts go on with what it has made since.
OVERWROTE = "overwrote.json"
# What a run keeps that was killed before its first checkpoint: what it said, and its name for W&B.
KEPT = ("log.txt", "wandb_id", OVERWROTE)

# What may be another at a resume: it changes no sample, no gradient and no schedule.
CHANGEABLE = (
    "run.",
    "log.",
    "checkpoint.",
    "health.",
    "predict.",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.rescan",
    "data.train",
    "data.val",
    "train.clips_per_gpu",
    "train.compile",
    "train.checkpointing",
    "train.patience",
    "optim.shard",
    "model.weights",
)


@dataclass(kw_only=True)
class OpenRun:
    """A run directory that is ours now; `state` and `facts` are what the run goes on from, None for a new one.

    Until `begin` nothing of an earlier run is thrown away: `discard` undoes the opening of a run that cannot start.
    """

    folder: Path
    lock: RunLock
    state: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None
    source: Path | None = None
    begun: bool = False

    def begin(self) -> None:
        """The run starts: what it overwrites goes."""
        self.begun = True
        if (self.folder / OVERWRITTEN).exists():
            if _start() is not None:
                files.write_json(self.folder / OVERWROTE, {"start": _start()})
            shutil.rmtree(self.folder / OVERWRITTEN)

    def discard(self) -> None:
        """The run could not start: a new run leaves nothing, and what it would have overwritten comes back."""
        if self.begun or self.state is not None:
            return
        _remove(_ours(self.folder))
        old = self.folder / OVERWRITTEN
        if old.exists():
            for path in old.iterdir():
                path.replace(self.folder / path.name)
            old.rmdir()
        self.lock.release()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def restarted() -> bool:
    """Whether this is a later attempt of the same start, by torchrun or SLURM."""
    return any(int(os.environ.get(n, "0")) > 0 for n in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _start() -> str | None:
    """What all attempts of one start have in common."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def _overwrote(folder: Path) -> bool:
    """Whether an earlier attempt of this start has thrown away what was in the directory."""
    told = folder / OVERWROTE
    return restarted() and told.exists() and files.read_json(told)["start"] == _start() is not None


def open_run(settings: RunSettings, values: dict[str, Any], say: Callable[[str], None]) -> OpenRun:
    """Take the directory for this run: rank 0 only.

    values: the settings of this start as nested dicts, compared with those of the run that is resumed. UserError
    where the directory is in use, holds a run and neither resume nor overwrite was asked, or cannot be written.
    """
    folder = Path(settings.dir)
    overwrite = settings.overwrite and not _overwrote(folder)
    resume = "auto" if settings.resume == "none" and restarted() and not overwrite else settings.resume
    explicit = Path(resume) if resume not in ("auto", "none") else None
    if settings.overwrite and explicit is not None:
        raise UserError("run.overwrite=true and run.resume=PATH exclude each other: give one of them")
    if explicit is not None and not explicit.exists():
        raise UserError(f"checkpoint {explicit}: no such file; give run.resume=auto or another checkpoint")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir={folder} is a file: give a directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"run.dir={folder} cannot be written: change its permissions or set run.dir elsewhere")
    lock = RunLock(folder)
    lock.take()
    try:
        return _open_locked(folder, lock, overwrite, resume, explicit, values, say)
    except BaseException:
        lock.release()
        raise


def _open_locked(
    folder: Path,
    lock: RunLock,
    overwrite: bool,
    resume: str,
    explicit: Path | None,
    values: dict[str, Any],
    say: Callable[[str], None],
) -> OpenRun:
    present = _ours(folder)
    known = ("run.lock", OVERWRITTEN)
    foreign = [e.name for e in folder.iterdir() if e not in present and not e.name.startswith(known)]
    if overwrite:
        (folder / OVERWRITTEN).mkdir(exist_ok=True)
        for path in present:
            path.replace(folder / OVERWRITTEN / path.name)
        return OpenRun(folder=folder, lock=lock)
    if explicit is not None:
        state, facts = checkpoint.read(explicit)
        _compare(facts.get("config", {}), values, explicit)
        if folder.resolve() in explicit.resolve().parents:
            _set_aside_later(folder / "checkpoints", facts["step"], say)
        elif present:
            raise UserError(f"{folder} holds another run than {explicit}: set run.dir to a new directory")
        return OpenRun(folder=folder, lock=lock, state=state, facts=facts, source=explicit)
    if resume == "none":
        if present:
            raise UserError(
                f"{folder} holds a run already: run.resume=auto goes on with it, run.overwrite=true throws it away, "
                "or set another run.dir"
            )
        if foreign:
            raise UserError(f"{folder} is not empty ({', '.join(sorted(foreign)[:3])}): set run.dir to a new directory")
        return OpenRun(folder=folder, lock=lock)
    for path in checkpoint.sweep(folder / "checkpoints"):
        say(f"removed {path.name}, left by a save that was killed")
    newest = checkpoint.read_newest(folder / "checkpoints", say)
    if newest is None:
        if present:
            say(f"{folder} has no checkpoint yet: starting from the beginning")
            _remove([p for p in present if p.name not in KEPT])
        return OpenRun(folder=folder, lock=lock)
    path, state, facts = newest
    _compare(facts.get("config", {}), values, path)
    _set_aside_later(folder / "checkpoints", facts["step"], say)
    return OpenRun(folder=folder, lock=lock, state=state, facts=facts, source=path)


def _ours(folder: Path) -> list[Path]:
    return [e for e in folder.iterdir() if e.name in OURS or (e.name.startswith("best_") and e.suffix == ".pt")]


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _set_aside_later(folder: Path, step: int, say: Callable[[str], None]) -> None:
    """Checkpoints behind the one that is resumed belong to steps that will be made again: out of the way, not away."""
    for path in checkpoint.numbered(folder):
        if int(path.stem.removeprefix("step-")) > step:
            for part in (path, path.with_suffix(".json")):
                target = folder / "discarded" / part.name
                target.parent.mkdir(exist_ok=True)
                part.replace(target)
            say(f"{path.name} is later than the checkpoint that is resumed: moved to {folder / 'discarded'}")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def _compare(saved: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    before, now = flat(saved), flat(given)
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and not name.startswith(CHANGEABLE):
            raise UserError(
                f"{name} is {now[name]} and was {before[name]} when {path} was saved: "
                "set it back to resume, or start a new run.dir"
            )


def write_facts(folder: Path, config_yaml: str, classes: list[str]) -> None:
    """config.yaml and classes.json of a new run."""
    files.write_text(folder / "config.yaml", config_yaml)
    files.write_json(folder / "classes.json", classes)
