"""`vac runs DIR`: the runs below a folder, with their state, their best figures, and the settings that differ."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from vac_ddp.arguments import ArgumentParser
from vac_ddp.commands.items import each
from vac_ddp.errors import DONE, FINDINGS, UserError
from vac_ddp.report.run_reader import Run, differing, find_runs, read_run

ABOUT = "List the runs below a folder: state, step, best validation figures, and the settings in which they differ."


def main(argv: list[str]) -> int:
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


def table(runs: Sequence[Run]) -> list[str]:
    """Lines for people: a row a run, and below it the values of the settings that differ."""
    differ = differing([run.settings for run in runs])
    width = max([3, *(len(run.name) for run in runs)])
    columns = shutil.get_terminal_size((100, 24)).columns
    out = [f"{'run':<{width}}  {'state':<9}  {'step':>13}  {'val acc':>7}  {'loss':>7}  {'epoch':>5}  last change"]
    for run in runs:
        step = f"{run.step}/{run.steps}" if run.steps is not None else str(run.step)
        one = run.best
        best = ("", "", "") if one is None else (f"{one.top1:.4f}", f"{one.loss:.4f}", str(one.epoch))
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        out.append(
            f"{run.name:<{width}}  {run.state:<9}  {step:>13}  {best[0]:>7}  {best[1]:>7}  {best[2]:>5}  {changed}"
        )
        values = ((name, run.settings.get(name, "-")) for name in differ)
        own = "  ".join(f"{name}={'null' if value is None else value}" for name, value in values)
        if own:
            out += textwrap.wrap(own, max(40, columns), initial_indent="    ", subsequent_indent="    ")
    return out
