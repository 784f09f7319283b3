"""The run directory: new, resumed or replaced on request, never a mixture of two runs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vac_ddp import files
from vac_ddp.errors import UserError
from vac_ddp.runtime.lock import RunLock
from vac_ddp.runtime.ranks import restarts
from vac_ddp.settings import RunSettings
from vac_ddp.training import checkpoint, discarded_runs, same_run
from vac_ddp.training.checkpoint_content import check_content

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
    "overwrote.json",  # of the first version
    discarded_runs.RECORD,
    "debug_run.txt",
    "wandb_id",
    "checkpoints",
    "features",
    "predictions",
    "logs",
    "tensorboard",
    "wandb",
)

FOLDERS = ("checkpoints", "features", "predictions", "logs", "tensorboard", "wandb")  # of these; the rest are files

# Where the first version kept a run that it was overwriting.
OVERWRITTEN = ".overwritten"
# What only a run has that has come somewhere: without a checkpoint it is not started again in the same place.
RESULTS = ("predictions", "report.html")
# What a run keeps that was killed before its first checkpoint: its log, its name for W&B, what it overwrote, and the
# features of a probe, which are resumed by themselves.
KEPT = ("log.txt", "wandb_id", "debug_run.txt", "features", discarded_runs.RECORD)
DEBUG_NOTE = "Made by --debug. The next --debug run in this directory replaces it.\n"


@dataclass(kw_only=True)
class OpenRun:
    """A run directory that is ours now; `state` and `facts` are what the run goes on from, None for a new one.

    Until `begin` nothing is changed for good: `discard` undoes the opening of a run that cannot start.
    new: whether the directory held no run. named: whether the checkpoint was given by its path. set_aside: the run
    that this start has renamed to replace it. discarded: all overwritten runs that go after the next checkpoint (of
    earlier attempts, too).
    """

    folder: Path
    lock: RunLock
    state: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None
    source: Path | None = None
    new: bool = True
    named: bool = False
    set_aside: Path | None = None
    discarded: list[Path] = field(default_factory=list)
    begun: bool = False

    def begin(self, say: Callable[[str], None]) -> None:
        """The run starts: from now on `discard` leaves it alone. Checkpoints behind the resumed one are set aside."""
        if self.facts is not None and not self.begun:
            _set_aside_later(self.folder / "checkpoints", self.facts["step"], say)
            if self.named:  # later attempts of this start resume from what they find
                discarded_runs.write_record(self.folder, _start(), discarded_runs.recorded(self.folder))
        self.begun = True

    def discard(self) -> None:
        """The run could not start: a new run leaves nothing, and what it would have overwritten comes back."""
        if self.begun or not self.new:
            return
        _remove(_ours(self.folder))
        if self.set_aside is not None:
            discarded_runs.put_back(self.folder, self.set_aside)
        self.lock.release()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def restarted() -> bool:
    """Whether this is a later attempt of the same start, by torchrun or SLURM."""
    return any(restarts(name) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _start() -> str | None:
    """What all attempts of one start have in common."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")


def _begun_before(folder: Path) -> bool:
    """Whether what an earlier attempt of this start was told (overwrite, resume PATH) is done already."""
    return restarted() and discarded_runs.read_record(folder).get("start") == _start() is not None


def check_debug(folder: Path) -> None:
    """UserError where `folder` is a file, or holds something that a debug run must not replace."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"run.dir={folder} is a file or a broken link: give a directory")
    if folder.is_dir() and not (folder / "debug_run.txt").exists():
        names = {path.name for path in folder.iterdir() if not path.name.startswith("run.lock")}
        there = sorted(names - {discarded_runs.RECORD})  # alone, it is of a start that was killed at once
        if there:
            raise UserError(
                f"--debug: {folder} is not a debug run ({', '.join(there[:3])}...): give run.dir=DIR, a new or empty "
                "directory, or remove it"
            )


def open_run(
    settings: RunSettings, values: dict[str, Any], say: Callable[[str], None], *, debug: bool = False
) -> OpenRun:
    """Take the directory for this run: rank 0 only.

    values: the settings of this start as nested dicts, compared with those of the run that is resumed. debug: replace
    a debug run, and nothing else. UserError where the directory is in use, holds a run and neither resume nor
    overwrite was asked, or cannot be written.
    """
    folder = Path(settings.dir)
    begun = _begun_before(folder)
    overwrite = (settings.overwrite or (debug and settings.resume == "none")) and not begun
    resume = "auto" if settings.resume == "none" and restarted() and not overwrite else settings.resume
    if begun and checkpoint.numbered(folder / "checkpoints"):
        resume = "auto"
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
        if debug:
            check_debug(folder)
        run = _open_locked(folder, lock, overwrite, resume, explicit, values, say)
        if debug:
            files.write_text(folder / "debug_run.txt", DEBUG_NOTE)
        else:  # --debug must not replace what goes on as a run
            (folder / "debug_run.txt").unlink(missing_ok=True)
        for line in discarded_runs.describe(folder):
            say(line)
        if (folder / OVERWRITTEN).exists():
            say(f"found {folder / OVERWRITTEN}: a run that was being overwritten when that start was killed; not used")
        run.discarded = discarded_runs.recorded(folder)
        return run
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
        others = [entry for entry in folder.iterdir() if entry not in present and entry.name != "run.lock"]
        aside = discarded_runs.set_aside(folder, others, _start()) if present else None
        if aside is None:
            discarded_runs.write_record(folder, _start(), [])
        return OpenRun(folder=folder, lock=lock, set_aside=aside)
    _check_kinds(present)
    if explicit is not None:
        return _open_explicit(folder, lock, explicit, values, say)
    if resume == "none":
        if present:
            raise UserError(
                f"{folder} holds a run already: run.resume=auto goes on with it, run.overwrite=true discards it, "
                "or set another run.dir"
            )
        if foreign:
            raise UserError(f"{folder} is not empty ({', '.join(sorted(foreign)[:3])}): set run.dir to a new directory")
        return OpenRun(folder=folder, lock=lock)
    for path in checkpoint.sweep(folder / "checkpoints"):
        say(f"removed {path.name}, left by a save that was killed")
    newest = checkpoint.read_newest(folder / "checkpoints", say, check_content)
    if newest is None:
        if present:
            _refuse_results(folder, present)
            say(f"{folder} has no checkpoint yet: starting from the beginning")
            _remove([p for p in present if p.name not in KEPT])
        return OpenRun(folder=folder, lock=lock)
    path, state, facts = newest
    for note in same_run.check_settings(facts, values, path):
        say(note)
    return OpenRun(folder=folder, lock=lock, state=state, facts=facts, source=path, new=False)


def _open_explicit(
    folder: Path, lock: RunLock, path: Path, values: dict[str, Any], say: Callable[[str], None]
) -> OpenRun:
    """Resume from the checkpoint that was named: in its own run directory, or in a new one."""
    state, facts = checkpoint.read(path)
    check_content(state, facts, path)
    notes, present = same_run.check_settings(facts, values, path), _ours(folder)
    own = folder.resolve() in path.resolve().parents
    if present and not own:
        if not _begun_before(folder):
            raise UserError(f"{folder} holds another run than {path}: set run.dir to a new directory")
        _remove([p for p in present if p.name not in KEPT])  # an earlier attempt had no checkpoint yet
    for note in notes:
        say(note)
    if not own:
        discarded_runs.write_record(folder, _start(), [])
    split = run_of(path)
    if not own and split is not None and (split / "split.csv").exists():
        files.write_bytes(folder / "split.csv", (split / "split.csv").read_bytes())
    return OpenRun(folder=folder, lock=lock, state=state, facts=facts, source=path, new=not own, named=True)


def run_of(path: Path) -> Path | None:
    """The run directory that a checkpoint lies in; None where it was copied out of one."""
    return next((folder for folder in path.resolve().parents[:3] if (folder / "config.yaml").exists()), None)


def _refuse_results(folder: Path, present: list[Path]) -> None:
    """UserError where a run has results but no checkpoint: somebody removed those, and the results are not ours to."""
    results = [path.name for path in present if path.name in RESULTS]
    if results:
        raise UserError(
            f"{folder} has {', '.join(sorted(results))} but no checkpoint to resume from: set another run.dir, or "
            "give run.overwrite=true to discard it"
        )


def _ours(folder: Path) -> list[Path]:
    return [e for e in folder.iterdir() if e.name in OURS or (e.name.startswith("best_") and e.suffix == ".pt")]


def _check_kinds(present: list[Path]) -> None:
    """UserError where a folder has the name of a file that a run needs, or a file that of a folder."""
    for path in present:
        wanted = path.name in FOLDERS
        if (
            path.name in OURS and path.is_dir() != wanted and path.name != "report.html"
        ):  # a report that fails is a line
            raise UserError(f"{path} is {'not a folder' if wanted else 'a folder, not a file'}: move it away")


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
                set_aside(part, folder / "discarded")
            say(f"{path.name} is later than the checkpoint that is resumed: moved to {folder / 'discarded'}")


def set_aside(path: Path, folder: Path) -> Path:
    """Move a file into `folder`, beside what has the same name there; returns where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (path.name if number == 1 else f"{path.stem}-{number}{path.suffix}" for number in range(1, 1000))
    target = next(folder / name for name in names if not (folder / name).exists())
    path.rename(target)
    return target


def check_space(folder: Path, needed: int) -> None:
    """UserError where `folder` has fewer than `needed` bytes free; what is overwritten goes later and counts."""
    kept = discarded_runs.recorded(folder)
    try:
        checkpoint.check_space(folder, needed)
    except UserError as error:
        if not kept:
            raise
        raise UserError(f"{error}; the run that is overwritten is kept until the first checkpoint") from None
