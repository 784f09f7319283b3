"""`vac table RUN...`: best validation figures of several runs, a line a setting, folds and seeds together."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vac_ddp import config as settings_io
from vac_ddp.arguments import ArgumentParser
from vac_ddp.commands.items import each
from vac_ddp.errors import DONE, FINDINGS, UserError
from vac_ddp.files import write_text
from vac_ddp.report.lines import number, read_metrics
from vac_ddp.training.same_run import flat

ABOUT = "A table of the best validation accuracy of several runs; folds and seeds of one setting as mean and deviation."
REPEATED = ("seed", "data.fold")  # settings in which runs of one line may differ
IGNORED = ("run.", "log.", "health.", "checkpoint.", "data.cache", "data.workers", "data.prefetch", "data.rescan")


@dataclass(frozen=True, kw_only=True)
class Line:
    """Runs that differ by seed and fold only. Figures are those of each run's best validation."""

    words: tuple[str, ...]
    top1: tuple[float, ...]
    loss: tuple[float, ...]


def best_validation(run: Path) -> tuple[float, float]:
    """(top-1, loss) of the validation with the best top-1, the first of equals. UserError where there is none."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run} is no run directory: it has no metrics.jsonl")
    found = [line for line in read_metrics(run) if line["kind"] == "epoch" and line.get("val_top1") is not None]
    if not found:
        raise UserError(f"{run} has not been validated yet: leave it out, or let it train on")
    best = max(found, key=lambda line: line["val_top1"])
    return best["val_top1"], number(best.get("val_loss"))


def lines(runs: Sequence[Path]) -> list[Line]:
    """The runs by what they were set to, in the order given."""
    settings = [flat(settings_io.to_dict(settings_io.read_yaml(run / "config.yaml"))) for run in runs]
    differ = [
        name
        for name in settings[0]
        if name not in REPEATED and not name.startswith(IGNORED) and len({repr(s.get(name)) for s in settings}) > 1
    ]
    grouped: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for run, own in zip(runs, settings, strict=True):
        grouped.setdefault(tuple(f"{name}={own.get(name)}" for name in differ), []).append(best_validation(run))
    return [
        Line(words=words, top1=tuple(t for t, _ in found), loss=tuple(v for _, v in found))
        for words, found in grouped.items()
    ]


def text(table: Sequence[Line]) -> list[str]:
    """The table for people."""
    names = [" ".join(line.words) or "all" for line in table]
    width = max(len(name) for name in [*names, "setting"])
    out = [f"{'setting':<{width}}  runs   top-1             loss"]
    for name, line in zip(names, table, strict=True):
        spread = f" +- {statistics.stdev(line.top1):.4f}" if len(line.top1) > 1 else " " * 10
        out.append(
            f"{name:<{width}}  {len(line.top1):>4}   {statistics.mean(line.top1):.4f}{spread}  "
            f"{statistics.mean(line.loss):.4f}"
        )
    return out


def main(argv: list[str] | None = None) -> int:
    """Read the runs and print the table; returns the exit status: 3 where a run was left out."""
    parser = ArgumentParser(prog="vac table", description=ABOUT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", metavar="CSV", help="write the table as CSV as well")
    options = parser.parse_args(argv)
    runs = [Path(run).expanduser() for run in options.runs]
    good, problems = each(runs, check)
    if not good:
        raise UserError(problems[0])
    table = lines(good)
    print("best validation accuracy, mean and deviation over seeds and folds")
    print("\n".join(text(table)))
    if options.out:
        rows = ["setting,runs,top1,top1_deviation,loss"]
        for line in table:
            spread = f"{statistics.stdev(line.top1):.6f}" if len(line.top1) > 1 else ""
            means = f"{statistics.mean(line.top1):.6f},{spread},{statistics.mean(line.loss):.6f}"
            rows.append(f"{' '.join(line.words)},{len(line.top1)},{means}")
        write_text(options.out, "\n".join(rows) + "\n")
    if problems:
        print("\n".join(["left out", *problems]))
    return FINDINGS if problems else DONE


def check(run: Path) -> Path:
    """The run, whose settings and best validation can be read; else an error says why not."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run directory: it has no config.yaml")
    settings_io.read_yaml(run / "config.yaml")
    best_validation(run)
    return run


if __name__ == "__main__":
    from vac_ddp.runtime.exit_status import run_command

    sys.exit(run_command(main, sys.argv[1:]))
