"""What a prediction has finished so far: files in OUT/parts that a killed run leaves and the next one goes on from.

A part is one .npy of records (video, damaged, failed, logits), written atomically; its name ends in the start of its
SHA-256, so that a part that was damaged later is noticed. `fingerprint.json` beside them says what they are parts of.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.files import sweep_partials, write_atomic, write_json
from vac_ddp.predicting.fingerprint import differences
from vac_ddp.results.logits_file import NAME, ViewsHead, read_views
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.schema import read_json

CHUNK_BYTES = 64 << 20  # logits in memory at a time while they are put together
FOLDER = "parts"
FINGERPRINT = "fingerprint.json"
RESULTS = (NAME, "submission.csv", "scores.csv", "metrics.json", "per_class.csv", "confusion.csv")


def record_type(views: int, classes: int) -> np.dtype[Any]:
    """One video: its number, damaged frames, whether nothing could be read, logits (n, K)."""
    return np.dtype(
        [("video", "<i8"), ("damaged", "<i8"), ("failed", "?"), ("logits", "<f4", (views, classes))], align=True
    )


def save_part(out: Path, records: np.ndarray) -> str:
    """Write records to OUT/parts; returns the name of the file."""
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    data = buffer.getbuffer()
    name = f"part-{int(records['video'][0]):08}-{hashlib.sha256(data).hexdigest()[:16]}.npy"
    write_atomic(out / FOLDER / name, lambda stream: stream.write(data))
    return name


def read_part(out: Path, name: str) -> np.ndarray:
    """The records of a part as a memory map. OSError where its bytes are not those that were written."""
    PROCESS.progress()  # rank 0 reads and joins for as long as it takes
    path = out / FOLDER / name
    if hashlib.sha256(path.read_bytes()).hexdigest()[:16] != path.stem.rpartition("-")[2]:
        raise OSError(errno.EIO, "it is not what was written", str(path))
    records: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return records


def read_parts(
    out: Path, kind: np.dtype[Any], videos: int, say: Callable[[str], None]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The good parts in OUT/parts as memory maps, and the sorted numbers of the videos in them.

    A damaged part, or one with a video that another one has, is named and removed: its videos are computed again.
    """
    parts: list[np.ndarray] = []
    done = np.zeros(videos, bool)
    for path in sorted((out / FOLDER).glob("part-*.npy")):
        reason = "is damaged"
        try:
            part = read_part(out, path.name)
        except Exception:  # numpy reads its header as Python, with whatever that raises
            part = None
        if part is not None:
            own = np.asarray(part["video"]) if part.dtype == kind and part.ndim == 1 and len(part) else np.array([-1])
            if own.min() >= 0 and own.max() < videos and not done[own].any():
                done[own] = True
                parts.append(part)
                continue
            reason = "repeats or misses videos"
        say(f"{path} {reason}: its videos are computed again")
        path.unlink(missing_ok=True)
    return parts, np.flatnonzero(done)


def joined(parts: Sequence[np.ndarray], head: ViewsHead, kind: np.dtype[Any]) -> tuple[ViewsHead, Iterator[np.ndarray]]:
    """The head with what the parts say of damage, and their logits (c, n, K) in the order of the videos, in chunks.

    Raises RuntimeError where a video of the head is in no part, or in two.
    """
    columns = [(part["video"], part["damaged"], part["failed"]) for part in parts]
    videos, damaged, failed = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.argsort(videos, kind="stable")
    if not np.array_equal(videos[order], np.arange(len(head.ids))):
        raise RuntimeError(
            f"the parts have {len(videos)} videos, {len(np.unique(videos))} different ones, of {len(head.ids)}"
        )
    part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order]
    row_of = np.concatenate([np.arange(len(part)) for part in parts])[order]

    def chunks() -> Iterator[np.ndarray]:
        step = max(1, CHUNK_BYTES // kind.itemsize)
        for start in range(0, len(order), step):
            PROCESS.progress()
            numbers, places = part_of[start : start + step], row_of[start : start + step]
            rows = np.empty((len(numbers), *kind["logits"].shape), np.float32)
            for number in np.unique(numbers).tolist():
                rows[numbers == number] = parts[number]["logits"][places[numbers == number]]
            yield rows

    return replace(head, damaged=damaged[order], failed=failed[order]), chunks()


@dataclass(kw_only=True)
class Found:
    """What is in OUT already: all of it, or parts and the videos they hold."""

    complete: bool
    parts: list[np.ndarray]
    done: np.ndarray


def open_out(
    out: Path,
    fingerprint: dict[str, str],
    kind: np.dtype[Any],
    videos: int,
    *,
    overwrite: bool,
    say: Callable[[str], None],
) -> Found:
    """Make or enter the folder of a prediction (one rank only).

    UserError where it holds another prediction and `overwrite` was not asked: it names what differs.
    """
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        for folder in (out, out / FOLDER):
            sweep_partials(folder)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; give another folder with --out") from error
    stored = out / FOLDER / FINGERPRINT
    if overwrite:
        clear(out)
    elif (out / NAME).exists():
        _compare(read_views(out / NAME).about.get("fingerprint", {}), fingerprint, out / NAME, say)
        return Found(complete=True, parts=[], done=np.arange(videos))
    elif stored.exists():
        _compare(read_json(stored, dict[str, str], remedy="--overwrite starts anew"), fingerprint, out / FOLDER, say)
        parts, done = read_parts(out, kind, videos, say)
        return Found(complete=False, parts=parts, done=done)
    elif foreign := [name for name in RESULTS if (out / name).exists()]:
        raise UserError(
            f"{out} holds a {foreign[0]} of something else: give another --out, or --overwrite to write over it"
        )
    write_json(stored, fingerprint)
    return Found(complete=False, parts=[], done=np.zeros(0, np.int64))


def clear(out: Path) -> None:
    """Remove all that a prediction left in `out`, and nothing else."""
    drop_parts(out)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def drop_parts(out: Path) -> None:
    """Remove OUT/parts, as far as other machines let go of it."""
    with contextlib.suppress(OSError):
        shutil.rmtree(out / FOLDER)


def _compare(stored: dict[str, str], now: dict[str, str], where: Path, say: Callable[[str], None]) -> None:
    changed, missing = differences(stored, now)
    if changed:
        raise UserError(
            f"{where} is of another prediction: {', '.join(changed)} changed; give another --out, "
            "or --overwrite to discard it"
        )
    if missing:
        say(f"{where} is of an earlier version, which did not record {', '.join(missing)}: assumed to be the same")
