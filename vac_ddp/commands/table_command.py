"""`vac table RUN...`: best validation figures of several runs, a line a setting, folds and seeds together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vac_ddp.arguments import ArgumentParser
from vac_ddp.commands.items import each
from vac_ddp.errors import DONE, FINDINGS, UserError
from vac_ddp.files import write_text
from vac_ddp.report.lines import read_metrics
from vac_ddp.report.run_reader import Best, best_validation, differing, read_settings

ABOUT = "A table of the best validation accuracy of several runs; folds and seeds of one setting as mean and deviation."
REPEATED = ("seed", "data.fold")  # settings in which runs of one line may differ

Result = tuple[dict[str, Any], Best]  # the settings of a run by dotted name, and its best validation


@dataclass(frozen=True, kw_only=True)
class Line:
    """Runs that differ by seed and fold only. Figures are those of each run's best validation."""

    words: tuple[str, ...]
    top1: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def name(self) -> str:
        """The settings of the line."""
        return " ".join(self.words)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the top-1 of several runs."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


def read_result(run: Path) -> Result:
    """Settings and best validation of a run. UserError where there is none."""
    settings, best = read_settings(run), best_validation(read_metrics(run))
    if best is None:
        raise UserError(f"{run} has not been validated yet: leave it out, or let it train on")
    return settings, best


def lines(results: Sequence[Result]) -> list[Line]:
    """The runs by what they were set to, in the order given."""
    differ = differing([settings for settings, _ in results], besides=REPEATED)
    grouped: dict[tuple[str, ...], list[Best]] = {}
    for settings, best in results:
        grouped.setdefault(tuple(f"{name}={settings.get(name)}" for name in differ), []).append(best)
    return [
        Line(words=words, top1=tuple(one.top1 for one in bests), loss=tuple(one.loss for one in bests))
        for words, bests in grouped.items()
    ]


def text(table: Sequence[Line]) -> list[str]:
    """The table for people."""
    names = [line.name or "all" for line in table]
    width = max(len(name) for name in [*names, "setting"])
    out = [f"{'setting':<{width}}  runs   top-1             loss"]
    for name, line in zip(names, table, strict=True):
        spread = " " * 10 if line.deviation is None else f" +- {line.deviation:.4f}"
        out.append(
            f"{name:<{width}}  {len(line.top1):>4}   {statistics.mean(line.top1):.4f}{spread}  "
            f"{statistics.mean(line.loss):.4f}"
        )
    return out


def csv_text(table: Sequence[Line]) -> str:
    """The table as CSV."""
    rows = ["setting,runs,top1,top1_deviation,loss"]
    for line in table:
        spread = "" if line.deviation is None else f"{line.deviation:.6f}"
        means = f"{statistics.mean(line.top1):.6f},{spread},{statistics.mean(line.loss):.6f}"
        rows.append(f"{line.name},{len(line.top1)},{means}")
    return "\n".join(rows) + "\n"


def main(argv: list[str]) -> int:
    """Read the runs and print the table; returns the exit status: 3 where a run was left out."""
    parser = ArgumentParser(prog="vac table", description=ABOUT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", metavar="CSV", help="write the table as CSV as well")
    options = parser.parse_args(argv)
    results, problems = each([Path(run).expanduser() for run in options.runs], read_result)
    if not results:
        raise UserError(problems[0])
    table = lines(results)
    print("best validation accuracy, mean and deviation over seeds and folds")
    print("\n".join(text(table)))
    if options.out:
        write_text(options.out, csv_text(table))
    if problems:
        print("\n".join(["left out", *problems]))
    return FINDINGS if problems else DONE
