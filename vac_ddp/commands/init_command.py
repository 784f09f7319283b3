"""`vac init DATA`: look at a folder of frames and write settings with comments that fit it."""

from __future__ import annotations

import shlex
from pathlib import Path

from vac_ddp.arguments import ArgumentParser, number
from vac_ddp.errors import UserError

ABOUT = (
    "Look at a folder of frames and write settings with comments that fit it: a probe on frozen features where videos "
    "are few or there is no GPU, else fine-tuning. Never prompts or overwrites a file."
)


def main(argv: list[str]) -> int:
    """Look, write, check that it would run, and say what was found and what to type next."""
    parser = ArgumentParser(prog="vac init", description=ABOUT)
    add = parser.add_argument
    add("data", metavar="DATA", help="<class>/<video>/*.jpg, a packed set, or a CSV (path,label)")
    add("--out", metavar="FILE", default="train.yaml", help="what to write (default: train.yaml)")
    add("--test", metavar="DIR", help="test folder, for the commands (default: data_test or test beside DATA)")
    add("--gpus", metavar="N", type=number(int, low=0, high=10_000), help="GPUs of the machine that will train "
        "(default: those of this one)")  # fmt: skip
    add("--weights", metavar="W", help="pretrained weights: hub id, directory, file, run, timm name, or null for "
        "training from scratch (default: the best that can be had here)")  # fmt: skip
    add("--backbone", metavar="NAME", help="the timm model that --weights FILE is of, where the file does not say it")
    add("--frame-pattern", metavar="X", help="data.frame_pattern, where folders hold other pictures")
    options = parser.parse_args(argv)
    from vac_ddp.init.settings_file import Asked, write_settings  # torch: only once the arguments are good

    asked = Asked(**{**vars(options), "out": Path(options.out).expanduser()})
    if asked.out.exists():
        raise UserError(f"{asked.out} is there already: nothing is overwritten; move it away, or give --out FILE")
    inside = Path(asked.data).expanduser() / "data_train"
    if inside.is_dir():
        raise UserError(f"{asked.data} holds a data_train: give that, {inside}")
    if asked.backbone is not None and asked.weights is None:
        raise UserError("--backbone names the network of --weights FILE: give both")
    written = write_settings(asked)
    print("\n".join(written.lines))
    print(f"\nwrote {asked.out}; next:")
    for command in written.commands:
        print(f"  {shlex.join(command)}")
    return 0
