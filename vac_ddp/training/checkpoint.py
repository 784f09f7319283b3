"""Checkpoints that are whole or absent: numbered by step, hashed, written in the background by rank 0.

`step-00000120.pt` holds plain tensors, numbers and strings (`torch.load(weights_only=True)`); its JSON companion of the
same name holds size, SHA-256 and what a person wants to know. A checkpoint without a companion does not exist.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch

from vac_ddp import files
from vac_ddp.errors import UserError
from vac_ddp.models.torch_file import read_torch, write_tensors
from vac_ddp.runtime.ranks import world_size
from vac_ddp.schema import Count, Sha256, read_json
from vac_ddp.training import discarded_runs
from vac_ddp.version import installed

if TYPE_CHECKING:
    from vac_ddp.training.best_weights import BestFile

FORMAT = 1  # of the companion, which says so; the first version's said nothing
NAME = re.compile(r"step-(\d{8})\.pt")
_REMEDY = "give run.resume=auto or another checkpoint"


class Companion(TypedDict):
    """What the JSON beside every checkpoint says of the file; `checkpoint_content.Facts` has the rest."""

    format: NotRequired[Count]
    step: Count
    bytes: Count
    sha256: Sha256


def write(folder: Path, step: int, state: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`: first the tensors, then the companion that makes it count."""
    path = folder / f"step-{step:08d}.pt"
    with contextlib.suppress(FileNotFoundError):
        path.with_suffix(".json").unlink()
    size, digest = write_tensors(path, state)
    files.write_json(
        path.with_suffix(".json"), {"format": FORMAT, **facts, "step": step, "bytes": size, "sha256": digest}
    )
    return path


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a folder by step, oldest first; without those that have no companion."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if NAME.fullmatch(entry.name)]
    return sorted(entry for entry in found if entry.with_suffix(".json").exists())


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, facts) of a checkpoint, checked by size and hash. UserError where it is missing or damaged."""
    try:
        facts = read_json(path.with_suffix(".json"), Companion, remedy=_REMEDY)
        size, digest = facts["bytes"], facts["sha256"]
        form = facts.get("format", FORMAT)
    except FileNotFoundError:
        where = "no such file" if not path.exists() else f"{path.with_suffix('.json').name} beside it is missing"
        raise UserError(f"checkpoint {path}: {where}; give run.resume=auto or another checkpoint") from None
    if form > FORMAT:
        raise UserError(f"checkpoint {path} has format {form}, this version reads up to {FORMAT}: update vac_ddp")
    if not path.exists():
        raise UserError(f"checkpoint {path}: no such file; give run.resume=auto or another checkpoint")
    if path.stat().st_size != size:
        raise UserError(f"checkpoint {path} is damaged: {path.stat().st_size} bytes, {size} were written")
    if files.sha256(path) != digest:
        raise UserError(f"checkpoint {path} is damaged: its SHA-256 is not the one that was written")
    return read_torch(path), facts


def read_newest(
    folder: Path, say: Callable[[str], None], check: Callable[[Any, Any, Path], None] = lambda *_: None
) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """The newest checkpoint that is whole; a damaged one is named through `say` and the one before it is taken.

    check: raises UserError for content (state, facts, path) that a run cannot go on from; it counts as damaged.
    None where there has never been one. UserError where there are some and none is whole.
    """
    paths = numbered(folder)
    for path in reversed(paths):
        try:
            state, facts = read(path)
            check(state, facts, path)
            return path, state, facts
        except UserError as error:
            say(f"{error}; the one before it is used")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} is whole; run.overwrite=true starts anew")
    return None


def snapshot(value: Any) -> Any:
    """A copy of a nested state on the CPU that later steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(v) for v in value)
    return value


def check_space(folder: Path, needed: int) -> None:
    """UserError where `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free and the checkpoints need {needed / 1e9:.2f} GB: "
            "free some, lower checkpoint.keep, or set run.dir elsewhere"
        )


def attempt(action: Callable[[], Any]) -> str | None:
    """Do something that writes; the reason in words where that fails."""
    try:
        action()
    except Exception as problem:  # in a thread, where nobody else would say which save it was
        return reason(problem)
    return None


def reason(problem: Exception) -> str:
    """Why a file could not be written. torch.save turns a failed write into a RuntimeError of its own."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = " ".join(str(problem).split())[:200]
    return text if isinstance(problem, OSError | RuntimeError) else f"{type(problem).__name__}: {text}"


@dataclass(kw_only=True)
class Saved:
    """How the save that was in flight ended."""

    step: int
    seconds: float
    error: str | None
    notes: list[str] = field(default_factory=list)


class Writer:
    """Writes one checkpoint at a time in a thread of rank 0. The next save, and the end, wait for the one before.

    discarded: directories of overwritten runs, removed after the first checkpoint.
    """

    def __init__(self, folder: Path, keep: int, *, discarded: Sequence[Path] = ()) -> None:
        self.folder, self.keep, self.discarded = folder, keep, list(discarded)
        self.thread: threading.Thread | None = None
        self.result: Saved | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, step: int, state: dict[str, Any], facts: dict[str, Any], *, best: BestFile | None) -> None:
        """Begin to write a snapshot (already on the CPU), after the best weights that are pending in `best`."""
        assert self.thread is None, "join the save before"
        self.thread = threading.Thread(target=self._write, args=(step, state, facts, best), name="checkpoint")
        self.thread.start()

    def _write(self, step: int, state: dict[str, Any], facts: dict[str, Any], best: BestFile | None) -> None:
        begun = time.monotonic()
        errors, notes = [], []
        if best is not None:
            if error := attempt(best.write):
                errors.append(f"the best weights could not be written and are kept in memory: {error} ({best.path})")
            facts = {**facts, "best": best.written}
        if error := attempt(lambda: write(self.folder, step, state, facts)):
            errors.append(f"could not be written: {error} ({self.folder})")
        else:
            self._drop_old()
            notes = discarded_runs.remove(self.discarded)
            self.discarded.clear()
        self.result = Saved(step=step, seconds=time.monotonic() - begun, error="; ".join(errors) or None, notes=notes)

    def _drop_old(self) -> None:
        for path in numbered(self.folder)[: -self.keep]:
            with contextlib.suppress(OSError):
                path.with_suffix(".json").unlink()
                path.unlink()

    def poll(self) -> Saved | None:
        """The result of a save that has ended since the last call, without waiting."""
        return self.join() if self.thread is not None and not self.thread.is_alive() else None

    def join(self) -> Saved | None:
        """Wait for the save in flight; its result, or None where there was none."""
        if self.thread is None:
            return None
        self.thread.join()
        self.thread = None
        result, self.result = self.result, None
        if result is None:
            return Saved(step=-1, seconds=0.0, error="the writing thread died")
        return result


def sweep(folder: Path) -> list[Path]:
    """Remove what a killed writer left: partial files, and tensors without a companion."""
    if not folder.is_dir():
        return []
    swept = files.sweep_partials(folder)
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) and not path.with_suffix(".json").exists():
            with contextlib.suppress(OSError):
                path.unlink()
                swept.append(path)
    return swept


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(state_bytes, state.values()))
    return sum(map(state_bytes, state)) if isinstance(state, list | tuple) else 0


def revision() -> str | None:
    """The commit of the code, where it runs from a git checkout."""
    head = Path(__file__).resolve().parents[2] / ".git" / "HEAD"
    with contextlib.suppress(OSError):
        text = head.read_text(encoding="utf-8").strip()
        if not text.startswith("ref: "):
            return text
        return (head.parent / text.removeprefix("ref: ")).read_text(encoding="utf-8").strip()
    return None


def environment_facts() -> dict[str, Any]:
    """What bit-for-bit equality of a resumed run depends on, beside the settings. The device is that of this rank."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        **{name: installed(name) for name in ("numpy", "simplejpeg", "pillow", "timm", "transformers")},
        "cuda": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if cuda else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "world_size": world_size(),
        "revision": revision(),
    }


def device_name() -> str:
    """The GPU of this rank, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
