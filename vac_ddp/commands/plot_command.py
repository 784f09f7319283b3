"""`vac plot RUN...`: curves of several runs side by side, as one PNG."""

from __future__ import annotations

from pathlib import Path

from vac_ddp.arguments import ArgumentParser
from vac_ddp.commands.items import each
from vac_ddp.errors import DONE, FINDINGS, UserError
from vac_ddp.files import write_bytes
from vac_ddp.report import plots
from vac_ddp.report.lines import METRICS, MetricsLine, read_metrics

ABOUT = "Draw loss, accuracy, learning rate and speed of several runs side by side."


def main(argv: list[str]) -> int:
    """Read the runs and write the picture; returns the exit status: 3 where a run was left out."""
    parser = ArgumentParser(prog="vac plot", description=ABOUT)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories")
    parser.add_argument("--out", metavar="FILE", default="curves.png", help="what to write (default: curves.png)")
    options = parser.parse_args(argv)
    out = Path(options.out).expanduser()
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: a name that ends in .png")
    paths = named(options.runs)
    curves, problems = each(paths, lambda name: (name, read_curves(Path(paths[name]))))
    if not curves:
        raise UserError(problems[0])
    write_bytes(out, plots.compare(dict(curves)))
    print("\n".join([f"curves  {out}", *problems]))
    return FINDINGS if problems else DONE


def named(runs: list[str]) -> dict[str, str]:
    """The runs by the ends of their paths, as short as they differ."""
    parts = [Path(run).expanduser().resolve().parts for run in dict.fromkeys(runs)]
    length = 1
    while len({path[-length:] for path in parts}) < len({*parts}):
        length += 1
    return {"/".join(path[-length:]): str(Path(*path)) for path in parts}


def read_curves(run: Path) -> list[MetricsLine]:
    """The lines of metrics.jsonl that have curves."""
    lines = [line for line in read_metrics(run) if line["kind"] in ("train", "epoch")]
    if not lines:
        raise UserError(f"{run / METRICS} has no figures yet: wait for the first {run.name} writes, or leave it out")
    return lines
