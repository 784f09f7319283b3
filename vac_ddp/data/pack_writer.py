"""Write a packed set: the frames of many videos in few large files, for file systems that dislike small ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vac_ddp.data.index import Index, open_as_it_is
from vac_ddp.data.index_file import write_scan
from vac_ddp.data.pack import INDEX, MARK, OFFSETS, VERSION, FileFacts, is_pack, read_facts
from vac_ddp.data.scan import looks_labelled
from vac_ddp.errors import UserError
from vac_ddp.files import sha256, whole_folder, write_atomic, write_json
from vac_ddp.settings import DataSettings

_BATCH = 64  # frames that one thread reads at a time


@dataclass(kw_only=True)
class Packed:
    """What was packed."""

    videos: int
    frames: int
    bytes: int
    shards: int
    unreadable: list[str] = field(default_factory=list)  # frames that have no bytes in the packed set


def pack(
    data: Path,
    out: Path,
    *,
    labelled: bool | None = None,
    settings: DataSettings | None = None,
    shard_bytes: int = 1 << 30,
    workers: int = 8,
) -> Packed:
    """Pack `data` into the folder `out`, which is there in the end or not at all.

    Raises UserError where `out` is in use or lies in `data`, where `data` cannot be scanned, or the disk is full.
    """
    if is_pack(data):
        raise UserError(f"{data} is packed already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: give a new folder")
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise UserError(f"{out} lies inside {data}, where it would look like data: give a folder beside it")
    if labelled is None:
        labelled = data.exists() and looks_labelled(data)
    index, found = open_as_it_is(data, labelled=labelled, settings=settings or DataSettings())
    with whole_folder(out) as partial:
        done, shards, offsets = _write_shards(index, partial, shard_bytes, workers)
        write_atomic(partial / OFFSETS, lambda stream: np.save(stream, offsets))
        nowhere = replace(found, base="", watched={}, times=np.zeros_like(found.times))
        write_scan(partial / INDEX, nowhere)
        facts = {
            "version": VERSION,
            "labelled": labelled,
            "videos": done.videos,
            "frames": done.frames,
            "shards": shards,
            "files": [_file_facts(partial / name) for name in (INDEX, OFFSETS)],
        }
        write_json(partial / MARK, facts)
    return done


def verify(root: Path) -> list[str]:
    """What is wrong with the files of a packed set, one line each; sizes are a UserError already."""
    if not is_pack(root):
        raise UserError(f"{root} is no packed set: it has no {MARK}")
    facts = read_facts(root)
    entries = [*facts["shards"], *facts["files"]]
    return [f"{entry['file']} has changed" for entry in entries if sha256(root / entry["file"]) != entry["sha256"]]


class _ShardWriter:
    """Writes the files of frames one behind the other into shards of at most `limit` bytes, or of a single frame."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.shards: list[FileFacts] = []  # those that are complete
        self._stream: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append a file, to a new shard where the current one would become too large."""
        if self._stream is not None and self._size + len(data) > self.limit:
            self.finish()
        if self._stream is None:
            self._digest, self._size = hashlib.sha256(), 0
            self._stream = (self.folder / f"shard-{len(self.shards):05d}.bin").open("wb")
        self._stream.write(data)
        self._digest.update(data)
        self._size += len(data)

    def finish(self) -> None:
        """Complete the current shard, on the disk."""
        if self._stream is None:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.close()
        name = f"shard-{len(self.shards):05d}.bin"
        self.shards.append({"file": name, "bytes": self._size, "sha256": self._digest.hexdigest()})

    def close(self) -> None:
        """Close the current shard as it is."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _write_shards(
    index: Index, folder: Path, shard_bytes: int, workers: int
) -> tuple[Packed, list[FileFacts], np.ndarray]:
    """Write all frames; returns what was packed, the shards, and the offsets (N+1,) int64 of the N frames."""
    from tqdm import tqdm

    total = int(index.frame_counts.sum())
    offsets = np.zeros(total + 1, np.int64)
    done = Packed(videos=len(index), frames=total, bytes=0, shards=0)
    writer = _ShardWriter(folder, shard_bytes)
    with contextlib.closing(writer), tqdm(total=total, unit="frame", disable=None) as bar:
        for number, (video, frame, data) in enumerate(_read_all(index, workers)):
            if data is None:
                done.unreadable.append(index.frame_name(video, frame))
            if data:
                writer.write(data)
            offsets[number + 1] = offsets[number] + len(data or b"")
            bar.update()
        writer.finish()
    done.bytes, done.shards = int(offsets[-1]), len(writer.shards)
    return done, writer.shards, offsets


def _read_all(index: Index, workers: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Every frame in order, read ahead by threads; None where it cannot be read."""

    def read(video: int, frames: range) -> list[tuple[int, int, bytes | None]]:
        found: list[tuple[int, int, bytes | None]] = []
        contents = index.reader(video)
        for frame in frames:
            try:
                found.append((video, frame, contents(frame)))
            except Exception:  # one frame ends nothing; it is named
                found.append((video, frame, None))
        return found

    waiting: deque[Future[list[tuple[int, int, bytes | None]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for video, count in enumerate(index.frame_counts.tolist()):
            for start in range(0, count, _BATCH):
                waiting.append(pool.submit(read, video, range(start, min(start + _BATCH, count))))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _file_facts(path: Path) -> FileFacts:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
