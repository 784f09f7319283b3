"""Check what is read from disk against a declaration before anything uses it.

A declaration is a type: `int`, `float`, `str`, `bool`, `None`, `list[X]`, `tuple[X, Y]`, `dict[str, X]`, `X | Y`,
`Literal[...]`, a TypedDict (other keys are allowed: later versions may add some), or `Annotated[X, rule]` with the
rules `Within`, `Matching` and, for numpy arrays, `Array`. What does not fit is a UserError of one line that names the
file, the field, what was expected and found, and the remedy.
"""

from __future__ import annotations

import functools
import json
import math
import re
import struct
import types
import typing
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from vac_ddp.errors import UserError

_SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True, kw_only=True)
class Within:
    """Numbers from `low` to `high`, both included; NaN is in no range."""

    low: float = -np.finfo(np.float64).max
    high: float = np.finfo(np.float64).max


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Texts that match `pattern` as a whole; `meaning` says so in words."""

    pattern: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Array:
    """Little-endian arrays of a numpy type ("f4"; "f" or "U" of any width), with finite values from `low` to `high`.

    shape: sizes, or names that stand for the same size in all arrays of a file. mapped: the array is read once to be
    checked, in small pieces, and then memory-mapped.
    """

    kind: str
    shape: tuple[int | str, ...]
    low: float | None = None
    high: float | None = None
    mapped: bool = False


Count = Annotated[int, Within(low=0, high=2**62)]
Finite = Annotated[float, Within()]
FileName = Annotated[
    str, Matching(pattern=r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,255}", meaning="the name of a file in that folder")
]
Sha256 = Annotated[str, Matching(pattern="[0-9a-f]{64}", meaning="64 hexadecimal digits")]


class _Mismatch(Exception):
    """Field, what was expected there, what was found."""

    def __str__(self) -> str:
        field, wanted, found = self.args
        return f"{f'{field}: ' if field else ''}expected {wanted}, found {found}"


# ---------------------------------------------------------------- checking values


def check(value: Any, kind: Any, *, file: str | Path, remedy: str) -> Any:
    """Return `value`, which was read from `file`, if it is of the declared `kind`; raise UserError otherwise."""
    if problem := fault(value, kind):
        raise UserError(f"{file}: {problem}; {remedy}")
    return value


def fault(value: Any, kind: Any) -> str:
    """What keeps `value` from being of the declared `kind`: field, expected, found. Empty where it is."""
    try:
        _check(value, kind, "")
    except _Mismatch as error:
        return str(error)
    return ""


def mismatch(file: str | Path, field: str, expected: str, found: str, remedy: str) -> UserError:
    """The error for content that is not as declared. field: dotted name, "" for the whole content."""
    return UserError(f"{file}: {_Mismatch(field, expected, found)}; {remedy}")


def _check(value: Any, kind: Any, field: str) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        if fault(value, arguments[0]) or not _keeps(value, arguments[1]):
            raise _Mismatch(field, expected(kind), shown(value))
    elif origin in (typing.Union, types.UnionType):
        _check_union(value, kind, arguments, field)
    elif typing.is_typeddict(kind):
        _check_object(value, kind, field)
    elif origin in (list, tuple, dict):
        _check_container(value, kind, field)
    elif not _is(value, kind):
        raise _Mismatch(field, expected(kind), shown(value))


def _check_union(value: Any, kind: Any, options: tuple[Any, ...], field: str) -> None:
    deepest: _Mismatch | None = None
    for option in options:
        try:
            return _check(value, option, field)
        except _Mismatch as error:
            if error.args[0] != field:  # the outside fits, something inside does not
                deepest = error
    raise deepest or _Mismatch(field, expected(kind), shown(value))


def _check_object(value: Any, kind: Any, field: str) -> None:
    if not isinstance(value, dict):
        raise _Mismatch(field, "an object", shown(value))
    for name, annotation in _hints(kind).items():
        inside = f"{field}.{name}" if field else name
        optional = typing.get_origin(annotation) is typing.NotRequired
        if name in value:
            _check(value[name], typing.get_args(annotation)[0] if optional else annotation, inside)
        elif not optional:
            raise _Mismatch(inside, expected(annotation), "nothing")


def _check_container(value: Any, kind: Any, field: str) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if not isinstance(value, dict if origin is dict else (list, tuple)):
        raise _Mismatch(field, expected(kind), shown(value))
    if isinstance(value, dict):
        for key, inside in value.items():
            _check(key, arguments[0], f"{field}: key")
            _check(inside, arguments[1], f"{field}.{_short(key)}" if field else _short(key))
        return
    kinds = arguments if origin is tuple else arguments * len(value)
    if len(kinds) != len(value):
        raise _Mismatch(field, expected(kind), shown(value))
    for i, (inside, one) in enumerate(zip(value, kinds, strict=True)):
        _check(inside, one, f"{field}[{i}]")


def _is(value: Any, kind: Any) -> bool:
    """Whether `value` is of a type that has no parts. A whole number is a number; true and false are neither."""
    if kind is Any or kind is None or kind is type(None):
        return kind is Any or value is None
    if typing.get_origin(kind) is typing.Literal:
        return any(type(value) is type(option) and value == option for option in typing.get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _keeps(value: Any, rule: Any) -> bool:
    if isinstance(rule, Within):
        return bool(rule.low <= value <= rule.high)
    if isinstance(rule, Matching):
        return re.fullmatch(rule.pattern, value, re.DOTALL) is not None
    return True


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


# ---------------------------------------------------------------- words for messages


def expected(kind: Any) -> str:
    """A declaration in words: "a list of whole numbers from 0"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.NotRequired:
        return expected(arguments[0])
    if origin is Annotated:
        return _ruled(arguments[0], arguments[1])
    if origin is typing.Literal:
        return " or ".join(json.dumps(option) for option in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(expected, arguments))
    if origin is list:
        return f"a list ({expected(arguments[0])} each)"
    if origin is tuple:
        return f"a list of {len(arguments)} ({expected(arguments[0])} each)"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return words.get(kind, "an object" if origin is dict or typing.is_typeddict(kind) else "null")


def _ruled(kind: Any, rule: Any) -> str:
    if isinstance(rule, Matching):
        return rule.meaning
    if not isinstance(rule, Within):
        return expected(kind)
    low = "" if rule.low < -1e300 else f" from {rule.low:g}"
    high = "" if rule.high > 1e18 else f" to {rule.high:g}"
    return f"{'a finite number' if not low and not high else expected(kind)}{low}{high}"


def shown(value: Any) -> str:
    """A value in a few words, safe to print."""
    if isinstance(value, str):
        return f"the text {_short(value)!r}" if value else "an empty text"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(_short, list(value)[:4]))}" if value else "an empty object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**_SHOWN else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value)
    return f"{type(value).__name__} {tuple(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)[: _SHOWN + 1] if isinstance(value, int) else shown(value)
    text = ascii(text[: _SHOWN + 1])[1:-1] if not text[: _SHOWN + 1].isprintable() else text
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


# ---------------------------------------------------------------- reading files


def read_json(path: str | Path, kind: Any, *, remedy: str) -> Any:
    """The content of a JSON file, checked. Raises FileNotFoundError, and UserError for what is no such content."""
    try:
        return check(parse_json(Path(path).read_bytes()), kind, file=path, remedy=remedy)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: expected JSON, found {error}; {remedy}") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, with the reason in words, for anything else."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("hundreds of nested lists or objects") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"bytes that are not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        if not text.strip():
            raise ValueError("an empty file") from None
        raise ValueError(f"something else at line {error.lineno}, column {error.colno}") from None


def stored_zip(path: str | Path, *, remedy: str) -> list[zipfile.ZipInfo]:
    """The members of a zip file that numpy or torch wrote: not compressed, and no larger together than the file.

    So nobody who reads them allocates more than the file holds. Raises UserError for another file, OSError.
    """
    size = Path(path).stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); {remedy}") from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise mismatch(path, _short(member.filename), "an uncompressed member", "a compressed one", remedy)
    total = sum(member.file_size for member in members)
    if total > size:
        raise mismatch(path, "", f"members of at most {size} bytes together", f"{total} bytes", remedy)
    if len({member.filename for member in members}) < len(members):
        raise mismatch(path, "", "different members", "two of one name", remedy)
    return members


def read_npz(path: str | Path, kind: Any, *, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of an npz file that the TypedDict `kind` declares by `Array`; dtype and shape are checked first.

    Those that are NotRequired may be absent. Raises FileNotFoundError, and UserError if it
    is not such a file.
    """
    sizes: dict[str, int] = {}
    found: dict[str, np.ndarray] = {}
    try:
        members = {member.filename: member for member in stored_zip(path, remedy=remedy)}
        with zipfile.ZipFile(path) as archive:
            for name, annotation in _hints(kind).items():
                member = members.get(f"{name}.npy")
                optional = typing.get_origin(annotation) is typing.NotRequired
                if member is None and optional:
                    continue
                if member is None:
                    raise mismatch(path, name, "an array", "nothing", remedy)
                declared = typing.get_args(typing.get_args(annotation)[0] if optional else annotation)[1]
                found[name] = _read_array(archive, member, declared, sizes)
    except FileNotFoundError:
        raise
    except _Mismatch as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    except (OSError, ValueError, SyntaxError, RuntimeError, RecursionError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); {remedy}") from None
    return found


def _read_array(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, declared: Array, sizes: dict[str, int]
) -> np.ndarray:
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as stream:
        shape, fortran, kind = read_array_header(stream)
        if not kind.str[1:].startswith(declared.kind) or kind.str[0] == ">":
            raise _Mismatch(name, f"an array of the type {declared.kind}", f"one of {kind.str}")
        named = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in declared.shape)
        if len(shape) != len(named) or any(a != b for a, b in zip(shape, named, strict=True) if isinstance(b, int)):
            raise _Mismatch(name, f"the shape ({', '.join(map(str, named))})", str(shape))
        sizes.update({size: n for size, n in zip(declared.shape, shape, strict=True) if isinstance(size, str)})
        head = stream.tell()
        needed, there = math.prod(shape) * kind.itemsize, member.file_size - head
        if needed != there:
            raise _Mismatch(name, f"{needed} bytes for the shape {shape}", str(there))
        data, at = np.empty(0 if declared.mapped else needed, np.uint8), 0
        while piece := stream.read(1 << 20):
            if declared.mapped:  # a whole number of values: 1 MiB is a multiple of every size of a number
                _check_values(np.frombuffer(piece, kind), declared, name)
            else:
                data[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
    order: Literal["F", "C"] = "F" if fortran else "C"
    if declared.mapped and needed:
        return np.memmap(str(archive.filename), kind, "r", _place(archive, member) + head, shape, order)
    _check_values(data.view(kind) if needed else np.empty(0, kind), declared, name)
    return np.ndarray(shape, kind, data, order=order)


def _place(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Where the data of an uncompressed member begins in the file, in bytes."""
    with Path(str(archive.filename)).open("rb") as stream:
        stream.seek(member.header_offset)
        name, extra = struct.unpack("<HH", stream.read(30)[26:])
    return member.header_offset + 30 + int(name) + int(extra)


def read_array_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) at the head of a .npy stream. Raises ValueError for anything else."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, kind = read(stream)
    except (OSError, ValueError):
        raise
    except Exception as error:  # numpy parses it as Python, with whatever that raises
        raise ValueError(f"no npy header ({type(error).__name__})") from None
    if any(size < 0 for size in shape):
        raise ValueError(f"the shape {shape}")
    return shape, fortran, kind


def _check_values(array: np.ndarray, declared: Array, name: str) -> None:
    """Raise _Mismatch for values outside the declared range, NaN and infinite ones, characters that do not exist."""
    if array.size == 0 or array.dtype.itemsize == 0:
        return
    if array.dtype.kind in "Ub":
        codes = array.view(np.uint32 if array.dtype.kind == "U" else np.uint8)
        if codes.max() > (0x10FFFF if array.dtype.kind == "U" else 1):
            raise _Mismatch(name, f"values of the type {declared.kind}", str(codes.max()))
        return
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():  # float16 has no fast minimum
        raise _Mismatch(name, "finite numbers", f"{array.size - finite.sum()} of {array.size} that are not")
    if declared.low is not None and (low := array.min()) < declared.low:
        raise _Mismatch(name, f"values from {declared.low:g}", str(low))
    if declared.high is not None and (high := array.max()) > declared.high:
        raise _Mismatch(name, f"values to {declared.high:g}", str(high))


def json_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of each whole line of a JSON-lines file; one that a crash cut off is left out.

    Raises FileNotFoundError, and UserError where the file cannot be read.
    """
    try:
        with Path(path).open(encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                if line.endswith("\n") and line.strip():
                    yield number, line
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
