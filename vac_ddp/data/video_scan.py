"""One look at a video, a folder of frames or a file: how many frames a file has, whether one decodes."""

# ruff: noqa: PTH113, PTH116, PTH122, PTH123 - paths stay text: a million Path objects cost more than the reads

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vac_ddp.data.video_frames import Encoding, VideoFrames
from vac_ddp.data.video_reader import SUFFIXES, VideoFile, need_av
from vac_ddp.data.video_stream import DamagedVideo
from vac_ddp.errors import UserError, reason

_PAD, _ENDING = 4, ".jpg"  # of the names of its frames: as `vac extract` writes them


GOOD, EMPTY, MISSING, UNREADABLE, DAMAGED = range(5)
STATES = ("good", "no frames in it", "no such folder", "cannot be read", "no frame decodes")


@dataclass(kw_only=True)
class FoundFile:
    """state: GOOD, or why it is not; frames: what its container lists, or what decodes; faults: one line each."""

    state: int = MISSING
    frames: int = 0
    faults: list[str] = field(default_factory=list)


def is_video_file(name: str) -> bool:
    """Whether a file name is that of a video."""
    return name.lower().endswith(SUFFIXES)


def without_ending(name: str) -> str:
    """The name of the video in a file: as that of the folder that `vac extract` makes of it."""
    return os.path.splitext(name)[0]


def look_at(path: str, *, check: bool) -> FoundFile:
    """Count the frames of a video file. check: decode the first one.

    The packets of MP4 and Matroska files tell how many there are; other files are decoded. Raises UserError where PyAV
    is missing; whatever is wrong with the file is in the result.
    """
    need_av()
    video = VideoFile(path=Path(path))
    found = FoundFile(faults=video.faults)
    if not os.path.isfile(path):
        return found
    try:
        found.frames = len(table := video.table())
        if check:
            VideoFrames(video.path, Encoding(), table).pixels(0)
        found.state = GOOD if found.frames else DAMAGED
    except UserError:
        raise
    except Exception as error:  # whatever is wrong with one file, the others are looked at
        found.state = DAMAGED if os.access(path, os.R_OK) else UNREADABLE
        found.faults.append(str(error) if isinstance(error, DamagedVideo) else reason(error))
    return found


def frames_of_file(count: int) -> list[tuple[str, str, int, int, int, int]]:
    """The names of the frames of a video file, as a run (see `frame_names.Run`)."""
    return [("", _ENDING, _PAD, 1, 1, count)] if count else []


def damaged_before_good(folder: str, frames: Sequence[str]) -> int:
    """How many of the files `frames` are damaged before one decodes; all if none does."""
    for number, name in enumerate(frames):
        try:
            with open(f"{folder}/{name}", "rb", buffering=0) as stream:
                data = stream.read()
        except OSError:
            continue
        if decodes(data):
            return number
    return len(frames)


def decodes(data: bytes) -> bool:
    """Whether these bytes are a whole image, by the rule of training (`decode_frame`), at 1/8 of the size."""
    from vac_ddp.data.decode import DamagedFrame, decode_frame

    try:
        decode_frame(data, factor=8)
    except DamagedFrame:
        return False
    return True


def mtime_of(path: str) -> int:
    """The mtime of a folder or file in ns, -1 where there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1
