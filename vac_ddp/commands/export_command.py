"""`vac export RUN OUT`: write a run's best model for others: a Hugging Face directory, and ONNX with --onnx."""

from __future__ import annotations

from pathlib import Path

from vac_ddp.arguments import ArgumentParser
from vac_ddp.export.run_export import export

ABOUT = (
    "Write a run's best model so that others can load it: a Hugging Face directory, with --onnx an ONNX file as well."
)


def main(argv: list[str]) -> int:
    """Export and print what was written and compared; UserError for what cannot be."""
    parser = ArgumentParser(prog="vac export", description=ABOUT)
    parser.add_argument("run", help="run directory, or its best_<model>.pt")
    parser.add_argument("out", help="directory to write; must not exist")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx as well, or alone where HF has no class")
    parser.add_argument("--data", metavar="DIR", help="videos to compare on; default: the run's own")
    options = parser.parse_args(argv)
    for line in export(Path(options.run), Path(options.out), onnx=options.onnx, data=options.data):
        print(line)
    return 0
