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
from typing import Any, Literal, TypedDict

import numpy as np

from vac_ddp.data.index_file import load_scan
from vac_ddp.data.scan import Scan
from vac_ddp.errors import UserError
from vac_ddp.schema import Count, FileName, Sha256, mismatch, read_array_header, read_json

MARK = "pack.json"
INDEX = "index.npz"
OFFSETS = "offsets.npy"
VERSION = 1
REMEDY = "copy the packed set again, or pack the data again"

_MAX_OPEN = 256  # shards that are kept open; the others are opened for each read
_CHUNK = 1 << 20  # offsets that are looked at together


class FileFacts(TypedDict):
    """A file of a packed set."""

    file: FileName
    bytes: Count
    sha256: Sha256


class PackVersion(TypedDict):
    """What every version of pack.json has."""

    version: int


class PackFacts(TypedDict):
    """The content of pack.json."""

    version: Literal[1]
    labelled: bool
    videos: Count
    frames: Count
    shards: list[FileFacts]
    files: list[FileFacts]


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
    found = load_scan(root / INDEX, remedy=REMEDY)
    if len(found.names) != facts["videos"]:
        raise mismatch(root / INDEX, "names", f"{facts['videos']} videos", str(len(found.names)), REMEDY)
    if facts["labelled"] and not (found.classes and len(found.names) and found.labels.min() >= 0):
        raise mismatch(root / INDEX, "labels", "a class for every video", "videos without one", REMEDY)
    counts = found.frames.counts
    _check_offsets(root, facts["shards"], frames=int(counts.sum()))
    if not labelled:
        found.labels = np.full(len(found.names), -1, np.int64)
        found.classes = []
    shards = [(shard["file"], shard["bytes"]) for shard in facts["shards"]]
    return found, PackedFrames(root.resolve(), shards, counts)


def read_facts(root: Path) -> PackFacts:
    """What pack.json says, after a look at the sizes of the files it names."""
    path = root / MARK
    version = read_json(path, PackVersion, remedy=REMEDY)["version"]
    if version != VERSION:
        raise UserError(f"{root} was packed in version {version} of the format, this program reads {VERSION}")
    facts = read_json(path, PackFacts, remedy=REMEDY)
    entries = [*facts["shards"], *facts["files"]]
    names = [entry["file"] for entry in entries]
    if len(set(names)) < len(names) or {entry["file"] for entry in facts["files"]} != {INDEX, OFFSETS}:
        raise mismatch(path, "files", f"{INDEX}, {OFFSETS} and shards, once each", ", ".join(names)[:200], REMEDY)
    for entry in entries:
        part = root / entry["file"]
        there = part.stat().st_size if part.is_file() else None
        if there != entry["bytes"]:
            what = "is missing" if there is None else f"has {there} bytes instead of {entry['bytes']}"
            raise UserError(f"{part} {what}: {REMEDY}")
    return facts


def _check_offsets(root: Path, shards: list[FileFacts], *, frames: int) -> None:
    """Raise UserError where the offsets do not cut the shards into `frames` frames, from the first byte to the last."""
    path = root / OFFSETS
    try:
        with path.open("rb") as stream:
            shape, _, kind = read_array_header(stream)
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); {REMEDY}") from None
    if kind != np.dtype("<i8") or shape != (frames + 1,):
        raise mismatch(path, "", f"{frames + 1} numbers of the type <i8", f"{kind.str} of the shape {shape}", REMEDY)
    ends = np.cumsum([0, *(shard["bytes"] for shard in shards)])
    if int(offsets[0]) != 0 or int(offsets[-1]) != int(ends[-1]):
        raise mismatch(path, "", f"offsets from 0 to {ends[-1]}", f"{offsets[0]} to {offsets[-1]}", REMEDY)
    for start in range(0, frames, _CHUNK):
        part = np.asarray(offsets[start : start + _CHUNK + 1])
        falls = np.flatnonzero(part[1:] < part[:-1])
        if len(falls):
            frame = start + int(falls[0])
            raise mismatch(path, "", "offsets that never fall", f"{offsets[frame + 1]} after {offsets[frame]}", REMEDY)
        shard = np.searchsorted(ends, part[:-1], side="right")
        cut = np.flatnonzero((part[1:] > part[:-1]) & (part[1:] > ends[np.minimum(shard, len(ends) - 1)]))
        if len(cut):
            frame = start + int(cut[0])
            raise mismatch(path, "", "frames within one shard", f"frame {frame} on the end of one", REMEDY)
