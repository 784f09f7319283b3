"""What a path that is given as data is: one video, or a set of videos with or without labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from vac_ddp.data.pack import is_pack, read_facts
from vac_ddp.data.scan import IMAGE_SUFFIXES, looks_labelled
from vac_ddp.data.video_reader import SUFFIXES
from vac_ddp.errors import UserError

Kind = Literal["video file", "frames", "test", "labelled"]
ONE_VIDEO: tuple[Kind, ...] = ("video file", "frames")


def kind_of(data: Path) -> Kind:
    """What `data` is, by a first look; "frames" are those of one video. UserError if it is not there."""
    if not data.exists():
        raise UserError(f"no such data: {data} (expected a folder of videos, one video, a packed set, or a CSV)")
    if data.is_file() and data.suffix.lower() in SUFFIXES:
        return "video file"
    if is_pack(data):
        return "labelled" if read_facts(data)["labelled"] else "test"
    if data.is_dir():
        with os.scandir(data) as entries:
            own = [e.name for e in entries if not e.name.startswith(".") and e.name.lower().endswith(IMAGE_SUFFIXES)]
            if own:
                return "frames"
    return "labelled" if looks_labelled(data) else "test"
