"""What run directories say about themselves: for `vac runs`, `table` and `plot`, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from vac_ddp import config as settings_io
from vac_ddp.errors import UserError
from vac_ddp.report.lines import METRICS, MetricsLine, number, read_metrics
from vac_ddp.runtime.lock import is_held
from vac_ddp.schema import Count, mismatch, read_json, shown
from vac_ddp.text import printable

DISCARDED = ".discarded-"  # in the name of a run that a new one has replaced
# Where a run lives and how it is watched makes no other result.
NO_RESULT = ("run.", "log.", "data.cache", "data.workers", "data.prefetch", "data.rescan", "health.", "checkpoint.")
DEEP = 4  # folders below the given one that are looked into
CLASSES_REMEDY = 'write it again from best_<model>.pt, whose "classes" are the same list'


class Length(TypedDict):
    """What is read of a checkpoint's companion."""

    total_steps: Count


@dataclass(frozen=True, kw_only=True)
class Best:
    """The validation with the best top-1; the first of equals."""

    top1: float
    loss: float
    epoch: int


@dataclass(kw_only=True)
class Run:
    """One run. state: running, done, stopped (saved, to be resumed) or broke off. changed: seconds since 1970."""

    name: str
    state: str
    step: int
    steps: int | None
    changed: float
    best: Best | None
    settings: dict[str, Any]


def is_run(folder: Path) -> bool:
    """Whether this is a run directory."""
    return (folder / "config.yaml").is_file() and (folder / "log.txt").is_file()


def find_runs(root: Path) -> list[Path]:
    """Run directories at or below `root`, in the order of their names."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give one with run directories in it")
    if is_run(root):
        return [root]
    found: list[Path] = []
    level = [root]
    for _ in range(DEEP):
        folders = sorted(path for folder in level for path in folder.iterdir() if path.is_dir())
        below = [path for path in folders if not path.name.startswith(".") and DISCARDED not in path.name]
        found += [path for path in below if is_run(path)]
        level = [path for path in below if not is_run(path)]
    return sorted(found)


def read_run(path: Path, name: str) -> Run:
    """What a run directory says about itself."""
    metrics = path / METRICS
    lines = read_metrics(path) if metrics.exists() else []
    step = max((line["step"] for line in lines), default=0)
    steps = _total_steps(path)
    return Run(
        name=name if name != "." else path.resolve().name,
        state=_state(path, step, steps, lines),
        step=step,
        steps=steps,
        changed=(metrics if metrics.exists() else path / "log.txt").stat().st_mtime,
        best=best_validation(lines),
        settings=read_settings(path),
    )


def read_settings(run: Path) -> dict[str, Any]:
    """The settings of a run by their dotted names. UserError where it is no run directory."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run directory: it has no config.yaml")
    return settings_io.flat(settings_io.to_dict(settings_io.read_yaml(path)))


def differing(settings: Sequence[dict[str, Any]], *, besides: Sequence[str] = ()) -> list[str]:
    """Names of the settings that change the result and are not the same in all runs, `besides` left out."""
    names = dict.fromkeys(name for own in settings for name in own)
    return [
        name
        for name in names
        if name not in besides and not name.startswith(NO_RESULT) and len({repr(own.get(name)) for own in settings}) > 1
    ]


def best_validation(lines: Sequence[MetricsLine]) -> Best | None:
    """The best validation among the lines of metrics.jsonl; None where there is none."""
    top1s = [(top1, line) for line in lines if (top1 := line.get("val_top1")) is not None]
    if not top1s:
        return None
    top1, line = max(top1s, key=lambda pair: pair[0])
    return Best(top1=top1, loss=number(line.get("val_loss")), epoch=line.get("epoch", 0))


def _total_steps(path: Path) -> int | None:
    """Steps of the whole run, as its newest checkpoint says."""
    for companion in sorted((path / "checkpoints").glob("step-*.json"), reverse=True):
        try:
            return read_json(companion, Length, remedy="it is left out")["total_steps"]
        except (UserError, OSError):
            continue
    return None


def _state(path: Path, step: int, steps: int | None, lines: Sequence[MetricsLine]) -> str:
    if is_held(path):
        return "running"
    if any(line["kind"] == "speed" for line in lines) or (steps is not None and step >= steps):
        return "done"
    return "stopped" if (path / "interrupted.json").exists() else "broke off"


def read_classes(run: Path) -> list[str]:
    """The class names in classes.json of a run, in the order of the logits. UserError where they are damaged."""
    path = run / "classes.json"
    try:
        classes = [printable(name) for name in read_json(path, list[str], remedy=CLASSES_REMEDY)]
    except FileNotFoundError:
        raise UserError(f"{run} is no run directory: it has no {path.name}") from None
    if not classes or len(set(classes)) < len(classes):
        raise mismatch(path, "", "different class names", shown(classes), CLASSES_REMEDY)
    return classes
