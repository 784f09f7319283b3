"""`vac export RUN OUT`: write a run's best model for others: a Hugging Face directory, and ONNX with --onnx."""

from __future__ import annotations

from pathlib import Path

from vac_ddp.arguments import ArgumentParser

ABOUT = (
    "Write a run's best model so that others can load it: a Hugging Face directory, with --onnx an ONNX file as well. "
    "With --check DIR: check a directory that was written."
)


def main(argv: list[str]) -> int:
    """Export or check, and print what was written and compared; UserError for what cannot be."""
    parser = ArgumentParser(prog="vac export", description=ABOUT)
    parser.add_argument("run", nargs="?", help="run directory, or its best_<model>.pt")
    parser.add_argument("out", nargs="?", help="directory to write; must not exist")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx as well, or alone where HF has no class")
    parser.add_argument("--fp16", action="store_true", help="with --onnx: float16 inside, half the size")
    parser.add_argument("--data", metavar="DIR", help="videos to compare on; default: the run's own")
    parser.add_argument("--license", metavar="ID", default="unknown", help="licence in the model card, as apache-2.0")
    parser.add_argument("--check", metavar="DIR", help="check files and logits of a directory that was exported")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the directory to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    options = parser.parse_args(argv)
    checked = options.check is not None
    if checked == (options.run is not None) or checked == (options.out is not None):
        parser.error("give RUN and OUT, or --check DIR")
    if options.fp16 and not options.onnx:
        parser.error("--fp16 is an option of --onnx")
    from vac_ddp.export.check_file import check_directory  # torch: only once the arguments are good
    from vac_ddp.export.hub import check_push, push
    from vac_ddp.export.run_export import Options, export

    if options.push is not None:
        check_push(options.push)
    folder = Path(options.check if checked else options.out)
    if checked:
        lines = check_directory(folder)
    else:
        wanted = Options(
            onnx=options.onnx, half=options.fp16, data=options.data, license=options.license, repo=options.push
        )
        lines = export(Path(options.run), folder, wanted)
    for line in lines:
        print(line)
    if options.push is not None:
        print(f"uploaded: {push(folder, options.push, private=options.private)}")
    return 0
