"""Files that are whole or absent: written beside, flushed, renamed; checked by size and hash when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vac_ddp.text import encoded

PARTIAL = ".partial"


def write_atomic(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part of it.

    `write` gets a binary file object. The data is on the disk before the rename, the name after it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def flush_directory(folder: Path) -> None:
    """Make a rename in `folder` durable; file systems that cannot do this are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically and with its line ends as they are; see `text.encoded`."""
    write_atomic(path, lambda stream: stream.write(encoded(text)))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; a last line that was cut off by a crash is left out."""
    with Path(path).open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n") and line.strip():
                yield json.loads(line)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sweep_partials(folder: str | Path) -> list[Path]:
    """Remove what killed writers left in `folder`; returns what was removed."""
    swept = []
    for partial in Path(folder).glob(f"*{PARTIAL}"):
        with contextlib.suppress(OSError):
            partial.unlink()
            swept.append(partial)
    return swept
