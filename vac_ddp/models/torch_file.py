"""Write and read a PyTorch file: tensors and plain values only, no code, no more memory than the file has bytes for."""

from __future__ import annotations

import argparse  # noqa: TID251 - checkpoints hold its Namespace
import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vac_ddp import files
from vac_ddp.errors import UserError
from vac_ddp.schema import mismatch, stored_zip

REMEDY = "fetch or copy it again"
_TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_TYPES |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_SHARED = 4  # tied weights are one storage: together the tensors may be this much larger than the file
_SMALL = 1 << 20


def read_torch(path: Path) -> dict[str, Any]:
    """The dictionary in a PyTorch file, read with weights_only: a file with code in it is a UserError, never run.

    Its tensors are dense, on the CPU, of common number types and together not much larger than the file.
    """
    refuse_pointer(path)
    try:
        if zipfile.is_zipfile(path):
            stored_zip(path, remedy=REMEDY)
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise _explained(error, path) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    check_tensors(content, path)
    return content


def numpy_scalar(dtype: np.dtype, data: bytes) -> float | int | bool:
    """What numpy's own function of this place in a pickle makes of a number, as a Python number.

    Raises ValueError for anything but one number.
    """
    if dtype.kind not in "biuf" or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise ValueError(f"a numpy scalar of type {dtype} that is not one number")
    return np.frombuffer(data, dtype)[0].item()


# Plain values beside the tensors of official checkpoints: arguments (attributes, no code) and numbers of numpy.
_SAFE: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
    *((numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def _explained(error: Exception, path: Path) -> UserError:
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"cannot read {path}: {error.strerror}")
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return UserError(
            f"{path} holds a Python object ({found[1]}) beside tensors; loading it would run code from the file, "
            "so it is not done: where you trust the file, save its bare state dict and load that"
        )
    reason = re.search(r"WeightsUnpickler error: *(\S.*)", str(error))
    said = (
        reason[1]
        if reason
        else "not what torch.save writes"
        if isinstance(error, pickle.UnpicklingError)
        else first_line(error)
    )
    return UserError(f"{path} is damaged or no PyTorch file ({said.split('. ')[0]}): {REMEDY}")


def check_tensors(content: Any, path: Path) -> None:
    """Raise UserError for a tensor anywhere in `content` that is not plain numbers, or that claims more than `path`
    can hold.
    """
    total = 0
    for name, tensor in tensors_in(content):
        if problem := _not_plain(tensor):
            raise mismatch(path, name, "a dense tensor of numbers", problem, "save it as one, or give another file")
        total += tensor.numel() * tensor.element_size()
    size = path.stat().st_size
    if total > _SHARED * size + _SMALL:
        raise mismatch(path, "", f"tensors of about {size} bytes", f"{total} bytes in repeated values", REMEDY)


def _not_plain(tensor: Tensor) -> str:
    """What makes a tensor unusable here, in words; empty where nothing does."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"a {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')} one"
    if tensor.device.type != "cpu":
        return f"one on the device {tensor.device.type}, without values"
    if tensor.is_quantized or tensor.dtype not in _TYPES:
        return f"one of {str(tensor.dtype).removeprefix('torch.')}"
    return ""


def tensors_in(content: Any) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of all tensors in nested dicts and lists; what is in two places is met once."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}" if name else str(key)[:200], inside) for key, inside in pairs]


def refuse_pointer(path: Path) -> None:
    """A git clone without LFS leaves text files that name the weights."""
    try:
        with path.open("rb") as stream:
            start = stream.read(40)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` there, or use `hf download`")


def first_line(error: BaseException) -> str:
    """The first line of an exception's text."""
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:200]


def write_tensors(path: Path, state: dict[str, Any]) -> tuple[int, str]:
    """Write `state` by torch.save, atomically; returns (size in bytes, SHA-256)."""
    made: list[_Hashing] = []

    def save(stream: BinaryIO) -> None:
        made.append(_Hashing(stream))
        torch.save(state, made[0])  # type: ignore[arg-type]  # it needs no more of a file than write and flush

    files.write_atomic(path, save)
    return made[0].size, made[0].sha256.hexdigest()


class _Hashing:
    """A file that hashes what passes through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.sha256, self.size = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()
