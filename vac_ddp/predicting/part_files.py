"""What a prediction or embedding has finished so far: files in OUT/parts that a killed run leaves, to be resumed from.

A part is one .npy of records (video, damaged, failed, and the arrays of the video), written atomically; its name ends
in the start of its SHA-256, so that a part that was damaged later is noticed. `fingerprint.json` beside them says what
they are parts of.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vac_ddp import files
from vac_ddp.errors import UserError
from vac_ddp.predicting.fingerprint import differences
from vac_ddp.results.features_file import FeaturesHead
from vac_ddp.results.logits_file import ViewsHead
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.schema import read_json

CHUNK_BYTES = 64 << 20  # of an array in memory at a time while parts are joined
FOLDER = "parts"
FINGERPRINT = "fingerprint.json"

Head = TypeVar("Head", bound=ViewsHead | FeaturesHead)


@dataclass(frozen=True, kw_only=True)
class Output:
    """The file that all parts are joined to.

    name: of the file; beside: names of what is made from it; noun, doing: what makes it, in messages; not_finite: the
    line about a video with values that are not finite numbers; remedy: what to give where another one is there.
    fingerprint: reads that of a whole file; write: (path, head, blocks of each array) to a whole file.
    """

    name: str
    beside: tuple[str, ...]
    noun: str
    doing: str
    not_finite: str
    fingerprint: Callable[[Path], dict[str, str]]
    write: Callable[[Path, Any, Mapping[str, Iterable[np.ndarray]]], None]
    remedy: str = "another --out, or --overwrite"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part file that holds what was written, and of each of its videos: number, damaged frames, whether it failed.

    The arrays of the videos stay on the disk.
    """

    path: Path
    videos: np.ndarray
    damaged: np.ndarray
    failed: np.ndarray

    def rows(self, name: str, places: np.ndarray) -> np.ndarray:
        """The array `name` of the videos at these places, (len(places), ...)."""
        rows: np.ndarray = _mapped(self.path)[name][places]
        return rows


def record_type(arrays: Mapping[str, np.ndarray]) -> np.dtype[Any]:
    """One video: its number, damaged frames, whether nothing could be read, and arrays of these dtypes and shapes."""
    of_arrays = [(name, array.dtype.newbyteorder("<"), array.shape) for name, array in arrays.items()]
    return np.dtype([("video", "<i8"), ("damaged", "<i8"), ("failed", "?"), *of_arrays], align=True)


def save_part(out: Path, records: np.ndarray) -> str:
    """Write records to OUT/parts; returns the name of the file."""
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    data = buffer.getbuffer()
    name = f"part-{int(records['video'][0]):08}-{hashlib.sha256(data).hexdigest()[:16]}.npy"
    files.write_atomic(out / FOLDER / name, lambda stream: stream.write(data))
    return name


def read_part(out: Path, name: str, kind: np.dtype[Any]) -> Part:
    """Check and read a part. OSError where its bytes are not those that were written, ValueError for other records."""
    PROCESS.progress()  # rank 0 reads and joins for as long as it takes
    path = out / FOLDER / name
    if files.sha256(path)[:16] != path.stem.rpartition("-")[2]:
        raise OSError(errno.EIO, "it is not what was written", str(path))
    records = _mapped(path)
    if records.dtype != kind or records.ndim != 1:
        raise ValueError(f"{path} has records of another type")
    return Part(
        path=path,
        videos=np.array(records["video"]),
        damaged=np.array(records["damaged"]),
        failed=np.array(records["failed"]),
    )


def _mapped(path: Path) -> np.ndarray:
    records: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return records


def read_parts(
    out: Path, kind: np.dtype[Any], videos: int, say: Callable[[str], None]
) -> tuple[list[Part], np.ndarray]:
    """The good parts in OUT/parts, and the sorted numbers of the videos in them.

    A damaged part, or one with a video that another one has, is named and removed: its videos are computed again.
    """
    parts: list[Part] = []
    done = np.zeros(videos, bool)
    for path in sorted((out / FOLDER).glob("part-*.npy")):
        reason = "repeats or misses videos"
        try:
            part = read_part(out, path.name, kind)
            own = part.videos
            good = own.min() >= 0 and own.max() < videos and not done[own].any()
        except ValueError:
            good = False
        except Exception:  # numpy reads its header as Python, with whatever that raises
            good, reason = False, "is damaged"
        if good:
            done[own] = True
            parts.append(part)
            continue
        say(f"{path} {reason}: its videos are computed again")
        path.unlink(missing_ok=True)
    return parts, np.flatnonzero(done)


def joined(parts: Sequence[Part], head: Head, kind: np.dtype[Any]) -> tuple[Head, dict[str, Iterator[np.ndarray]]]:
    """The head with what the parts say of damage, and blocks (c, ...) of each array in the order of the videos.

    Raises RuntimeError where a video of the head is in no part, or in two.
    """
    columns = [(part.videos, part.damaged, part.failed) for part in parts]
    videos, damaged, failed = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.argsort(videos, kind="stable")
    if not np.array_equal(videos[order], np.arange(len(head.ids))):
        raise RuntimeError(
            f"the parts have {len(videos)} videos, {len(np.unique(videos))} different ones, of {len(head.ids)}"
        )
    part_of = np.repeat(np.arange(len(parts)), [len(part.videos) for part in parts])[order]
    row_of = np.concatenate([np.arange(len(part.videos)) for part in parts])[order]

    def blocks(name: str) -> Iterator[np.ndarray]:
        one: np.dtype[Any] = kind[name]
        step = max(1, CHUNK_BYTES // one.itemsize)
        for start in range(0, len(order), step):
            PROCESS.progress()
            numbers, places = part_of[start : start + step], row_of[start : start + step]
            rows = np.empty((len(numbers), *one.shape), one.base)
            for number in np.unique(numbers).tolist():
                rows[numbers == number] = parts[number].rows(name, places[numbers == number])
            yield rows

    arrays = [name for name in kind.names or () if name not in ("video", "damaged", "failed")]
    return replace(head, damaged=damaged[order], failed=failed[order]), {name: blocks(name) for name in arrays}


@dataclass(kw_only=True)
class Found:
    """What is in OUT already: all of it, or parts and the videos they hold."""

    complete: bool
    parts: list[Part]
    done: np.ndarray


def open_out(
    out: Path,
    output: Output,
    fingerprint: dict[str, str],
    kind: np.dtype[Any],
    videos: int,
    *,
    overwrite: bool,
    say: Callable[[str], None],
) -> Found:
    """Make or enter the folder of a prediction or embedding (one rank only).

    UserError where it holds another one and `overwrite` was not asked: it names what differs.
    """
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        for folder in (out, out / FOLDER):
            files.sweep_partials(folder)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; give another folder with --out") from error
    stored = out / FOLDER / FINGERPRINT
    if overwrite:
        clear(out, output)
    elif (out / output.name).exists():
        _refuse_other(output.fingerprint(out / output.name), fingerprint, out / output.name, output, say)
        return Found(complete=True, parts=[], done=np.arange(videos))
    elif stored.exists():
        found = read_json(stored, dict[str, str], remedy="--overwrite starts anew")
        _refuse_other(found, fingerprint, out / FOLDER, output, say)
        parts, done = read_parts(out, kind, videos, say)
        return Found(complete=False, parts=parts, done=done)
    elif foreign := [name for name in output.beside if (out / name).exists()]:
        raise UserError(f"{out} holds a {foreign[0]} of something else: give {output.remedy} to write over it")
    files.write_json(stored, fingerprint)
    return Found(complete=False, parts=[], done=np.zeros(0, np.int64))


def clear(out: Path, output: Output) -> None:
    """Remove all that a prediction or embedding left in `out`, and nothing else."""
    drop_parts(out)
    for name in (output.name, *output.beside):
        (out / name).unlink(missing_ok=True)


def drop_parts(out: Path) -> None:
    """Remove OUT/parts, as far as other machines let go of it."""
    with contextlib.suppress(OSError):
        shutil.rmtree(out / FOLDER)


def _refuse_other(
    stored: dict[str, str], now: dict[str, str], where: Path, output: Output, say: Callable[[str], None]
) -> None:
    """UserError that names the differences where `where` has another fingerprint; `say` what it is too old to have."""
    changed, missing = differences(stored, now)
    if changed:
        raise UserError(
            f"{where} is of another {output.noun}: {', '.join(changed)} changed; give {output.remedy} to discard it"
        )
    if missing:
        say(f"{where} is of an earlier version, which did not record {', '.join(missing)}: assumed to be the same")
