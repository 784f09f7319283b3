"""Read a packed set: the frames of many videos, byte for byte, in few large files.

    pack.json        version, labelled or not, the files with their sizes and SHA-256
    index.npz        videos, classes, labels, frame names (as in a cached index)
    offsets.npy      (N+1,) int64: frame n of all N is the bytes offsets[n] to offsets[n+1] of the shards in a row
    shard-00000.bin  files of frames one after the other; no frame is cut in two by the end of a shard

`vac pack` writes it. A frame that could not be read when it was packed has no bytes.
"""

from __future__ import annotations

import bisect
import os
from pathlib import Path
from typing import Any

import numpy as np

from vac_ddp.data.index_file import read_scan
from vac_ddp.data.scan import Scan
from vac_ddp.errors import UserError
from vac_ddp.files import read_json

MARK = "pack.json"
INDEX = "index.npz"
OFFSETS = "offsets.npy"
VERSION = 1

_MAX_OPEN = 256  # shards that are kept open; the others are opened for each read


class PackedFrames:
    """The frames of a packed set. `pread` has no file position: threads and forked workers can share it."""

    def __init__(self, folder: Path, shards: list[tuple[str, int]], counts: np.ndarray) -> None:
        """`shards`: (file name, bytes) in order. `counts`: frames of each video, (V,) int64."""
        self.folder = folder
        self.shards = [name for name, _ in shards]
        self.ends = np.cumsum([size for _, size in shards], dtype=np.int64).tolist()
        self.counts = counts
        self.starts = np.cumsum(counts) - counts
        self._offsets: np.ndarray | None = None
        self._open: dict[int, int] = {}

    def read(self, video: int, frame: int) -> bytes:
        """One frame's file; b"" for one that was unreadable when it was packed. OSError where a shard is broken."""
        if not 0 <= frame < self.counts[video]:
            raise IndexError(f"video {video} has no frame {frame}")
        if self._offsets is None:
            self._offsets = np.load(self.folder / OFFSETS, mmap_mode="r", allow_pickle=False)
        number = int(self.starts[video]) + frame
        begin, end = int(self._offsets[number]), int(self._offsets[number + 1])
        if begin == end:
            return b""
        shard = bisect.bisect_right(self.ends, begin)
        place = begin - (self.ends[shard - 1] if shard else 0)
        handle = self._handle(shard)
        try:
            data = os.pread(handle, end - begin, place)
        finally:
            if shard not in self._open:
                os.close(handle)
        if len(data) != end - begin:
            raise OSError(f"{self.folder / self.shards[shard]} ends before frame {frame} of video {video}")
        return data

    def _handle(self, shard: int) -> int:
        """A file descriptor of the shard. Without a lock: a fork could catch another thread holding it."""
        kept = self._open.get(shard)
        if kept is not None:
            return kept
        handle = os.open(self.folder / self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        if len(self._open) >= _MAX_OPEN:
            return handle
        kept = self._open.setdefault(shard, handle)
        if kept != handle:  # another thread was faster
            os.close(handle)
        return kept

    def take(self, videos: np.ndarray) -> PackedFrames:
        """The same frames for the videos of the numbers `videos` (n,) int64."""
        part = PackedFrames(self.folder, [], self.counts[videos])
        part.shards, part.ends, part.starts = self.shards, self.ends, self.starts[videos]
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_offsets": None, "_open": {}}

    def __del__(self) -> None:
        for handle in self.__dict__.get("_open", {}).values():
            os.close(handle)


def is_pack(root: Path) -> bool:
    """Whether `root` is a packed set."""
    return (root / MARK).is_file()


def read_pack(root: Path, *, labelled: bool) -> tuple[Scan, PackedFrames]:
    """The videos of a packed set, and the reader of their frames.

    Raises UserError where a file is missing or shorter than it was written, or labels are asked for and not there.
    """
    facts = read_facts(root)
    if labelled and not facts["labelled"]:
        raise UserError(f"{root} is a packed set without classes: it can be predicted, not trained on")
    found = read_scan(root / INDEX)
    if found is None:
        raise UserError(f"{root / INDEX} is damaged or missing: pack the data again")
    if not labelled:
        found.labels = np.full(len(found.names), -1, np.int64)
        found.classes = []
    shards = [(shard["file"], shard["bytes"]) for shard in facts["shards"]]
    return found, PackedFrames(root.resolve(), shards, found.frames.counts)


def read_facts(root: Path) -> dict[str, Any]:
    """What pack.json says, after a look at the sizes of the files it names."""
    try:
        facts = read_json(root / MARK)
        version, files = facts["version"], [*facts["shards"], *facts["files"]]
        sizes = {entry["file"]: entry["bytes"] for entry in files}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / MARK} is damaged: pack the data again") from error
    if version != VERSION:
        raise UserError(f"{root} was packed in version {version} of the format, this program reads {VERSION}")
    for name, size in sizes.items():
        path = root / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            what = "is missing" if there is None else f"has {there} bytes instead of {size}"
            raise UserError(f"{path} {what}: copy the packed set again, or pack the data again")
    return facts
