"""Read a packed set: the frames of many videos in few large files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vac_ddp.data.scan import Scan

MARK = "pack.json"


class PackedFrames:
    """Frames in shard files (being built)."""

    def read(self, video: int, frame: int) -> bytes:
        """One frame's file."""
        raise NotImplementedError

    def take(self, videos: np.ndarray) -> PackedFrames:
        """The same for some of the videos."""
        raise NotImplementedError


def is_pack(root: Path) -> bool:
    """Whether `root` is a packed set."""
    return (root / MARK).is_file()


def read_pack(root: Path, *, labelled: bool) -> tuple[Scan, PackedFrames]:
    """The videos of a packed set, and the reader of their frames."""
    raise NotImplementedError
