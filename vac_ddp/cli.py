"""`vac COMMAND ...`: the entry point of every command."""

from __future__ import annotations

import difflib
import importlib
import sys

from vac_ddp import errors
from vac_ddp.runtime.exit_status import run_command
from vac_ddp.version import VERSION

GROUPS = {
    "Look at the data": {
        "init": ("vac_ddp.commands.init_command", "look at a folder and write settings that fit it"),
        "audit": ("vac_ddp.commands.audit_command", "find leaks, damage and shortcut features in a data set"),
        "extract": ("vac_ddp.commands.extract_command", "cut video files into folders of frames"),
        "pack": ("vac_ddp.commands.pack_command", "put the frames of many videos into few large files"),
        "synth": ("vac_ddp.commands.synth_command", "make a synthetic motion data set to try everything out"),
    },
    "Train": {
        "probe": ("vac_ddp.probe", "select a classifier on the features of a frozen encoder (minutes)"),
        "train": ("vac_ddp.commands.train_command", "train or fine-tune a classifier (hours)"),
        "ensemble": (
            "vac_ddp.commands.ensemble_command",
            "train folds and seeds, and score their predictions together",
        ),
        "soup": ("vac_ddp.commands.soup_command", "average the weights of several runs of one model"),
        "audio": ("vac_ddp.commands.audio_command", "train a classifier on the videos' sound"),
        "embed": ("vac_ddp.embed", "write the features that a frozen encoder gives for videos"),
    },
    "Predict and hand on": {
        "predict": ("vac_ddp.predict", "predict a test folder, evaluate a labelled one, or classify one video"),
        "score": ("vac_ddp.commands.score_command", "average logits files: ensembles, figures, a submission"),
        "bundle": ("vac_ddp.commands.bundle_command", "collect wheels and weights for a machine without internet"),
        "export": ("vac_ddp.commands.export_command", "write a run as a model that others can load"),
    },
    "Look at runs": {
        "report": ("vac_ddp.commands.report_command", "write report.html of a run"),
        "runs": (
            "vac_ddp.commands.runs_command",
            "list the runs of a folder: state, best figures, settings that differ",
        ),
        "table": ("vac_ddp.commands.table_command", "best validation figures of several runs side by side"),
        "plot": ("vac_ddp.commands.plot_command", "draw the curves of several runs side by side"),
        "doctor": ("vac_ddp.commands.doctor_command", "measure this machine and find the bottlenecks of a run"),
    },
    "Help": {
        "settings": ("vac_ddp.commands.settings_command", "all settings, or those about a word"),
        "presets": ("vac_ddp.commands.presets_command", "the presets, or the settings of one"),
        "completion": ("vac_ddp.commands.completion_command", "shell completion for bash or zsh"),
    },
}
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}


def usage() -> str:
    """The commands by group, one line each."""
    lines = [f"vac {VERSION}: video action classification with DDP", "", "usage: vac COMMAND ...    (vac help COMMAND)"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<12}{about}" for name, (_, about) in commands.items())]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    return run_command(_command, sys.argv[1:] if argv is None else argv)


def _command(argv: list[str]) -> int:
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [argv[1], "--help"]
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
