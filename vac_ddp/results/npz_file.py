"""npz files that are written block by block, and whose arrays can be memory-mapped; those about videos, read."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.files import write_atomic
from vac_ddp.schema import check, mismatch, parse_json, read_npz
from vac_ddp.text import printable

ALIGNMENT = 64  # bytes; numpy's header is a multiple of it, so the data begins where the member does
_PADDING_ID = 0xD935  # the extra field that zipalign pads with
_LOCAL_HEADER, _ZIP64_FIELD, _FIELD_HEAD = 30, 20, 4  # bytes in front of a member, beside its name


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """An array of `shape`, whose first axis comes in blocks (c, ...), one in memory at a time."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]


def write_npz(path: str | Path, arrays: dict[str, np.ndarray | Blocks]) -> None:
    """Write an uncompressed npz file atomically, each array at a multiple of 64 bytes.

    Dates are fixed: the same content gives the same bytes. Raises ValueError if blocks do not add up to their shape.
    """

    def write(stream: BinaryIO) -> None:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, value in arrays.items():
                with archive.open(_member(name, stream.tell()), "w", force_zip64=True) as member:
                    if isinstance(value, Blocks):
                        _write_blocks(member, name, value)
                    else:
                        np.lib.format.write_array(member, value, allow_pickle=False)

    write_atomic(path, write)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A type of npz file about videos.

    name: of the file in a folder; noun, command: what it has and what writes it, in messages; number: its version;
    arrays, about: the declarations of its arrays (ids, classes and labels among them) and of the JSON text `about`.
    """

    name: str
    noun: str
    command: str
    number: int
    arrays: Any
    about: Any
    remedy: str


def read_videos(path: str | Path, form: Format) -> tuple[Path, dict[str, Any]]:
    """Read a file about videos, or the one in a folder: (its path, arrays by name).

    Arrays of text are lists of printable texts, `about` is a dict. UserError if the file is missing or invalid.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / form.name
    try:
        values: dict[str, Any] = read_npz(path, form.arrays, remedy=form.remedy)
        about = check(parse_json(str(values["about"])), form.about, file=f"{path}: about", remedy=form.remedy)
    except FileNotFoundError:
        raise UserError(f"no {form.noun} file at {path}: `{form.command}` writes one") from None
    except ValueError as error:
        raise UserError(f"{path}: about: expected JSON, found {error}; {form.remedy}") from None
    if about["format"] != form.number:
        raise UserError(f"{path} has {form.noun} format {about['format']}, this version reads {form.number}")
    for name, array in values.items():
        if array.dtype.kind == "U" and array.ndim:
            values[name] = [printable(text) for text in array.tolist()]
    labels, classes = values["labels"], len(values["classes"])
    if labels.size and labels.max() >= classes:
        raise mismatch(path, "labels", f"numbers below {classes}", str(labels.max()), form.remedy)
    for name in ("ids", "classes"):
        if len(set(values[name])) < len(values[name]):
            raise mismatch(path, name, "different names", "one twice", form.remedy)
    return path, {**values, "about": about}


def text_array(values: Sequence[str]) -> np.ndarray:
    """Texts as an array (n,) of the width of the longest."""
    return np.array(list(values), dtype=np.str_) if len(values) else np.zeros(0, dtype="<U1")


def _write_blocks(stream: Any, name: str, array: Blocks) -> None:
    header = {"descr": array.dtype, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_2_0(stream, header)
    rows = 0
    for block in array.blocks:
        if block.shape[1:] != array.shape[1:]:
            raise ValueError(f"a block of {name} of shape {block.shape} in an array of shape {array.shape}")
        stream.write(np.ascontiguousarray(block, array.dtype).tobytes())
        rows += len(block)
    if rows != array.shape[0]:
        raise ValueError(f"{rows} rows of {name} for {array.shape[0]} videos")


def _member(name: str, start: int) -> zipfile.ZipInfo:
    """The member of an array whose local header begins at byte `start`, padded so that its data is aligned."""
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.external_attr = 0o644 << 16
    padding = -(start + _LOCAL_HEADER + len(info.filename) + _ZIP64_FIELD + _FIELD_HEAD) % ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    return info
