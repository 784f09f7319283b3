"""Files that are whole or absent: written beside, flushed, renamed; checked by size and hash when read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vac_ddp.errors import UserError, one_line
from vac_ddp.text import encoded

PARTIAL = ".partial"  # the end of the names of what is not whole yet
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FULL = os.strerror(errno.ENOSPC)


class WriteError(UserError, OSError):
    """Something that cannot be written. Whoever goes on without it sees an OSError, a user one line."""

    def __str__(self) -> str:
        return one_line(str(self.args[0]))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors of the system, and what libraries make of a full disk, into a WriteError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "errno", None) not in _DISK and _FULL not in str(cause):
            cause = cause.__cause__ or cause.__context__
        number = error.errno if isinstance(error, OSError) else None
        if cause is not None:
            number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.ENOSPC
        if number is None:
            raise
        made = WriteError(f"cannot write {path}: {os.strerror(number)}")
        made.errno, made.strerror = number, os.strerror(number)
        raise made from error


def regular(path: Path) -> Path:
    """Where a file of this name is written: behind symbolic links. WriteError: something else than a file is there."""
    target = Path(os.path.realpath(path))
    with _writing(path):
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            return target
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        made = WriteError(f"cannot write {path}: it is {what}, not a file; give another name")
        made.strerror = f"it is {what}, not a file"
        raise made
    return target


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part of it.

    `write` gets a binary file object. The data is on the disk before the rename, the name after it. Symbolic links
    are followed. Raises WriteError (a UserError and an OSError) where that is impossible, or where the name belongs to
    anything but a regular file.
    """
    path = Path(path)
    target = regular(path)
    partial = target.with_name(_partial_name(target.name))
    with _writing(path):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    flush_directory(target.parent)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, whose files appear under `out` when all of them are written, or not at all.

    Where `out` is there, the files take their places in it, and those of the same names are replaced; else the whole
    folder takes the name. What killed writers of `out` left is removed. Raises WriteError where the disk is full, or
    as `write_atomic` does.
    """
    with _writing(out):
        there = out.is_dir()
        partial = (out if there else out.parent) / _partial_folder_name(out.name)
        sweep_folders(partial.parent, out.name)
        partial.mkdir(parents=True)
        try:
            yield partial
            paths = [partial, *partial.rglob("*")]
            for path in paths:
                _flush(path)
            if there:
                names = [path.relative_to(partial) for path in paths if path.is_file()]
                for name in names:
                    regular(out / name)
                for name in names:
                    target = regular(out / name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (partial / name).replace(target)
                flush_directory(out)
            else:
                if os.path.lexists(out):
                    raise WriteError(f"cannot write {out}: it appeared meanwhile; give another name")
                partial.rename(out)
        except WriteError as error:
            error.args = (str(error).replace(str(partial), str(out)),)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    flush_directory(out.parent)


def sweep_folders(parent: Path, name: str | None = None) -> list[Path]:
    """Remove what killed processes of this machine left of `whole_folder` in `parent`: of one folder, or of every."""
    start = "." if name is None else _partial_folder_name(name).partition("-")[0] + "-"
    swept = []
    with contextlib.suppress(OSError):
        for path in [path for path in parent.iterdir() if path.name.startswith(start)]:
            parts = _PARTIAL_FOLDER.fullmatch(path.name)
            if parts and parts["host"] == _host() and not _alive(int(parts["process"])) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
                swept.append(path)
    return swept


_PARTIAL_FOLDER = re.compile(r"\.[0-9a-f]{8}-(?P<process>[0-9]+)-(?P<host>.+)" + re.escape(PARTIAL))


def _partial_folder_name(name: str) -> str:
    """Hidden, and short: a name may be as long as the file system allows."""
    return f".{zlib.crc32(os.fsencode(name)):08x}-{os.getpid()}-{_host()}{PARTIAL}"


def _partial_name(name: str) -> str:
    """Beside a file of that name; as long names as possible."""
    ending = f".{os.getpid()}{PARTIAL}"
    return os.fsdecode(os.fsencode(name)[: 255 - len(ending)]) + ending


def _host() -> str:
    return socket.gethostname().replace("/", "_")[:64]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_directory(folder: Path) -> None:
    """Make a rename in `folder` durable; file systems that cannot do this are left alone."""
    with contextlib.suppress(OSError):
        _flush(folder)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data`, atomically."""
    write_atomic(path, lambda stream: stream.write(data))


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically and with its line ends as they are; see `text.encoded`."""
    write_bytes(path, encoded(text))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


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
