"""`vac init DATA`: look at a folder of frames and write settings with comments that fit it, ready to train."""

from __future__ import annotations

import shlex
from pathlib import Path

from vac_ddp.arguments import ArgumentParser
from vac_ddp.errors import UserError
from vac_ddp.init.settings_file import summary, write_settings

ABOUT = "Look at a folder of frames and write settings with comments that fit it. Asks nothing, overwrites nothing."


def main(argv: list[str]) -> int:
    """Look, write, check that it would train, and say what was found and what to type next."""
    parser = ArgumentParser(prog="vac init", description=ABOUT)
    parser.add_argument("data", metavar="DATA", help="<class>/<video>/*.jpg, a packed set, or a CSV (path,label)")
    parser.add_argument("--out", metavar="FILE", default="train.yaml", help="what to write (default: train.yaml)")
    parser.add_argument("--frame-pattern", metavar="X", help="data.frame_pattern, where folders hold other pictures")
    options = parser.parse_args(argv)
    out = Path(options.out).expanduser()
    if out.exists():
        raise UserError(f"{out} is there already: nothing is overwritten; move it away, or give --out FILE")
    inside = Path(options.data).expanduser() / "data_train"
    if inside.is_dir():
        raise UserError(f"{options.data} holds a data_train: give that, {inside}")
    metadata, split = write_settings(options.data, out, frame_pattern=options.frame_pattern)
    print("\n".join(summary(metadata)))
    print(f"parts        {len(split.train)} videos to train on, {len(split.val)} to validate")
    words = [f"data.frame_pattern={options.frame_pattern}"] if options.frame_pattern else []
    print(f"\nwrote {out}; next:")
    for command in (["vac", "audit", options.data, *words], ["vac", "train", "--config", str(out)]):
        print(f"  {shlex.join(command)}")
    return 0
