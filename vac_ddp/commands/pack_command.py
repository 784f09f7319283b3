"""`vac pack DATA OUT`: the frames of many videos in few large files, for file systems that dislike small ones."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vac_ddp.arguments import ArgumentParser, number
from vac_ddp.data.index import Index, open_as_it_is
from vac_ddp.data.index_file import write_scan
from vac_ddp.data.pack import INDEX, MARK, OFFSETS, VERSION, is_pack, read_facts
from vac_ddp.data.scan import looks_labelled
from vac_ddp.errors import DONE, FINDINGS, UserError
from vac_ddp.files import sha256, whole_folder, write_atomic, write_json
from vac_ddp.settings import DataSettings

_BATCH = 64  # frames that one thread reads at a time
_NAMED = 5


@dataclass(kw_only=True)
class Packed:
    """What was packed."""

    videos: int
    frames: int
    bytes: int
    shards: int
    unreadable: list[str] = field(default_factory=list)  # frames that have no bytes in the packed set


def main(argv: list[str]) -> int:
    """The command. Returns the exit status: 0, or 3 where frames could not be read or a check failed."""
    parser = ArgumentParser(
        prog="vac pack", description="Pack the frames of a data set into few large files, byte for byte."
    )
    parser.add_argument("data", type=Path, help="<class>/<video>/*.jpg, <video>/*.jpg, or a CSV")
    parser.add_argument("out", type=Path, nargs="?", help="folder to write; must not exist or be empty")
    parser.add_argument("--verify", action="store_true", help="check the packed set DATA against its hashes instead")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--labelled", dest="labelled", action="store_true", default=None, help="DATA has class folders")
    kind.add_argument("--unlabelled", dest="labelled", action="store_false", help="DATA has none (default: by a look)")
    parser.add_argument(
        "--shard-mib",
        type=number(int, low=1, high=10**6),
        default=1024,
        help="size of the large files, in MiB (%(default)s)",
    )
    parser.add_argument(
        "--workers", type=number(int, low=1, high=1024), default=8, help="threads that read (%(default)s)"
    )
    parser.add_argument("--frame-pattern", metavar="X", help="data.frame_pattern, where folders hold other pictures")
    parser.add_argument("--cache", help="folder of cached indexes (default: ~/.cache/vac_ddp)")
    options = parser.parse_args(argv)
    if options.verify:
        broken = verify(options.data)
        print(f"{options.data}: {'; '.join(broken) if broken else 'every file is as it was written'}")
        return FINDINGS if broken else DONE
    if options.out is None:
        parser.error("the folder to write is missing: vac pack DATA OUT")
    done = pack(
        options.data,
        options.out,
        labelled=options.labelled,
        settings=DataSettings(cache=options.cache, frame_pattern=options.frame_pattern),
        shard_bytes=options.shard_mib << 20,
        workers=options.workers,
    )
    print(f"packed {done.videos} videos, {done.frames} frames, {done.bytes / 1e6:.1f} MB into {done.shards} files")
    if done.unreadable:
        some = ", ".join(done.unreadable[:_NAMED])
        print(f"{len(done.unreadable)} frames could not be read and are empty in the packed set: {some}")
    out = shlex.quote(str(options.out))
    print(f"use it as data.train={out} or --data {out}")
    return FINDINGS if done.unreadable else DONE


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
    if shard_bytes < 1 or workers < 1:
        raise UserError("--shard-mib and --workers must be at least 1")
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


def _write_shards(
    index: Index, folder: Path, shard_bytes: int, workers: int
) -> tuple[Packed, list[dict[str, Any]], np.ndarray]:
    from tqdm import tqdm

    total = int(index.frame_counts.sum())
    offsets = np.zeros(total + 1, np.int64)
    shards: list[dict[str, Any]] = []
    done = Packed(videos=len(index), frames=total, bytes=0, shards=0)
    stream: BinaryIO | None = None
    digest, size, number = hashlib.sha256(), 0, 0

    def close() -> None:
        nonlocal stream, digest, size
        if stream is not None:
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            shards.append({"file": Path(stream.name).name, "bytes": size, "sha256": digest.hexdigest()})
        stream, digest, size = None, hashlib.sha256(), 0

    try:
        with tqdm(total=total, unit="frame", disable=None) as bar:
            for video, frame, data in _read_all(index, workers):
                if data is None:
                    done.unreadable.append(index.frame_name(video, frame))
                    data = b""
                if stream is not None and size and size + len(data) > shard_bytes:
                    close()
                if stream is None and data:
                    stream = (folder / f"shard-{len(shards):05d}.bin").open("wb")
                if data:
                    stream.write(data)
                    digest.update(data)
                    size += len(data)
                number += 1
                offsets[number] = offsets[number - 1] + len(data)
                bar.update()
        close()
    finally:
        if stream is not None:
            stream.close()
    done.bytes, done.shards = int(offsets[-1]), len(shards)
    return done, shards, offsets


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


def _file_facts(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
