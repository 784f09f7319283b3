"""`vac runs DIR`: the runs below a folder, with their state, their best figures, and the settings that differ."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from vac_ddp import config as settings_io
from vac_ddp.arguments import ArgumentParser
from vac_ddp.commands.items import each
from vac_ddp.errors import DONE, FINDINGS, UserError
from vac_ddp.report.lines import MetricsLine, number, read_metrics
from vac_ddp.runtime.lock import is_held
from vac_ddp.schema import Count, read_json
from vac_ddp.training import discarded_runs
from vac_ddp.training.same_run import flat

ABOUT = "List the runs below a folder: state, step, best validation figures, and the settings in which they differ."
# Where a run lives and how it is watched makes no other result.
LEFT_OUT = ("run.", "log.", "data.cache", "data.workers", "data.prefetch", "data.rescan", "health.", "checkpoint.")
DEEP = 4  # folders below DIR that are looked into
NEVER = "-"


class Length(TypedDict):
    """What is read of a checkpoint's companion."""

    total_steps: Count


@dataclass(kw_only=True)
class Run:
    """One run. best: (top-1, loss, epoch) of the validation with the best top-1, None without one."""

    name: str
    state: str
    step: int
    steps: int | None
    changed: float
    best: tuple[float, float, int] | None
    settings: dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status: 3 where a run cannot be read."""
    parser = ArgumentParser(prog="vac runs", description=ABOUT)
    parser.add_argument("folder", metavar="DIR", help="a folder with run directories in it")
    options = parser.parse_args(argv)
    root = Path(options.folder).expanduser()
    found = find_runs(root)
    if not found:
        raise UserError(f"{root} has no run in it: no folder with a config.yaml and a log.txt")
    runs, problems = each(found, lambda path: read_run(path, str(path.relative_to(root))))
    print("\n".join(table(runs) + problems))
    return FINDINGS if problems else DONE


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
        below = sorted(path for folder in level for path in folder.iterdir() if path.is_dir() and not _left_out(path))
        found += [path for path in below if is_run(path)]
        level = [path for path in below if not is_run(path)]
    return sorted(found)


def _left_out(folder: Path) -> bool:
    return folder.name.startswith(".") or discarded_runs.MARK in folder.name


def read_run(path: Path, name: str) -> Run:
    """What a run directory says about itself."""
    metrics = path / "metrics.jsonl"
    lines = read_metrics(path) if metrics.exists() else []
    scored = [line for line in lines if line.get("val_top1") is not None]
    best = max(scored, key=lambda line: line["val_top1"]) if scored else None
    step = max((line["step"] for line in lines), default=0)
    steps = _total_steps(path)
    return Run(
        name=name if name != "." else path.resolve().name,
        state=_state(path, step, steps, lines),
        step=step,
        steps=steps,
        changed=(metrics if metrics.exists() else path / "log.txt").stat().st_mtime,
        best=None if best is None else (best["val_top1"], number(best.get("val_loss")), best.get("epoch", 0)),
        settings=flat(settings_io.to_dict(settings_io.read_yaml(path / "config.yaml"))),
    )


def _total_steps(path: Path) -> int | None:
    """Steps of the whole run, as its newest checkpoint says."""
    for facts in sorted((path / "checkpoints").glob("step-*.json"), reverse=True):
        try:
            return read_json(facts, Length, remedy="it is left out")["total_steps"]
        except (UserError, OSError):
            continue
    return None


def _state(path: Path, step: int, steps: int | None, lines: list[MetricsLine]) -> str:
    """running, done, stopped (saved, to be resumed), or ended: it broke off, or the machine did."""
    if is_held(path):
        return "running"
    if any(line["kind"] == "speed" for line in lines) or (steps is not None and step >= steps):
        return "done"
    return "stopped" if (path / "interrupted.json").exists() else "broke off"


# ---------------------------------------------------------------- text


def differing(runs: list[Run]) -> list[str]:
    """Settings that are not the same in all runs."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    return [
        name
        for name in names
        if not name.startswith(LEFT_OUT) and len({repr(run.settings.get(name)) for run in runs}) > 1
    ]


def table(runs: list[Run]) -> list[str]:
    """Lines for people: a row a run, and below it the values of the settings that differ."""
    differ = differing(runs)
    width = max(len(run.name) for run in [*runs]) if runs else 0
    width = max(width, 3)
    columns = shutil.get_terminal_size((100, 24)).columns
    out = [f"{'run':<{width}}  {'state':<9}  {'step':>13}  {'val acc':>7}  {'loss':>7}  {'epoch':>5}  last change"]
    for run in runs:
        step = f"{run.step}/{run.steps}" if run.steps is not None else str(run.step)
        best = ("", "", "") if run.best is None else (f"{run.best[0]:.4f}", f"{run.best[1]:.4f}", str(run.best[2]))
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        out.append(
            f"{run.name:<{width}}  {run.state:<9}  {step:>13}  {best[0]:>7}  {best[1]:>7}  {best[2]:>5}  {changed}"
        )
        own = "  ".join(f"{name}={_shown(run.settings.get(name, NEVER))}" for name in differ)
        if own:
            out += textwrap.wrap(own, max(40, columns), initial_indent="    ", subsequent_indent="    ")
    return out


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


if __name__ == "__main__":
    from vac_ddp.runtime.exit_status import run_command

    sys.exit(run_command(main, sys.argv[1:]))
