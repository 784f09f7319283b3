"""`vac COMMAND ...`: the entry point of every command."""

from __future__ import annotations

import difflib
import importlib
import sys

from vac_ddp import errors
from vac_ddp.runtime.exit_status import run_command
from vac_ddp.version import VERSION

COMMANDS = {
    "init": ("vac_ddp.commands.init_command", "look at your frames and write settings that fit them"),
    "train": ("vac_ddp.commands.train_command", "train a classifier (--nproc N: under torchrun)"),
    "predict": ("vac_ddp.predict", "predict a test folder, or one video"),
    "embed": ("vac_ddp.embed", "write the features that a frozen encoder gives for videos"),
    "probe": ("vac_ddp.probe", "select a classifier on the features of a frozen encoder"),
    "score": ("vac_ddp.commands.score_command", "turn views files into scores, ensembles and a submission"),
    "ensemble": ("vac_ddp.commands.ensemble_command", "train folds and seeds, and score their views together"),
    "audio": (
        "vac_ddp.commands.audio_command",
        "train a classifier of the videos' sound, to be scored with the picture's",
    ),
    "soup": ("vac_ddp.commands.soup_command", "average the weights of several runs of one model"),
    "report": ("vac_ddp.commands.report_command", "write report.html of a run, with curves, confusions and mistakes"),
    "table": ("vac_ddp.commands.table_command", "best validation figures of several runs side by side"),
    "runs": ("vac_ddp.commands.runs_command", "list the runs of a folder: state, best figures, settings that differ"),
    "plot": ("vac_ddp.commands.plot_command", "draw the curves of several runs side by side"),
    "synth": ("vac_ddp.commands.synth_command", "make a motion data set to try everything out"),
    "doctor": ("vac_ddp.commands.doctor_command", "measure this machine, and say what will hold a run back"),
    "audit": ("vac_ddp.commands.audit_command", "look for leaks, damage and shortcut features in a data set"),
    "extract": ("vac_ddp.commands.extract_command", "cut video files into frame folders"),
    "pack": ("vac_ddp.commands.pack_command", "put the frames of many videos into few large files"),
    "export": ("vac_ddp.commands.export_command", "write a run as a model that others can load"),
}


def usage() -> str:
    """The commands, a line each."""
    lines = [
        f"vac {VERSION}: video action classification with DDP",
        "",
        "usage: vac COMMAND ... (--help after it)",
        "",
    ]
    return "\n".join(lines + [f"  {name:<9}{about}" for name, (_, about) in COMMANDS.items()])


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    return run_command(_command, sys.argv[1:] if argv is None else argv)


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else errors.USER_ERROR
    if argv[0] in ("-V", "--version"):
        print(VERSION)
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1)
        print(
            f"vac: unknown command {argv[0]}" + (f": did you mean {near[0]}?" if near else " (see vac --help)"),
            file=sys.stderr,
        )
        return errors.USER_ERROR
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
