"""The frames of video files, kept as encoded images in one file per video, so that later epochs need not decode it.

    frames/<hash>.frames   the images one behind the other; the table: start (int64), length and CRC-32 (uint32) of each
                           of N frames; the end: magic, version, N, CRC-32 of the table
    frames/size            the bytes of these files together; locked by who adds one

A name is the hash of all that the content depends on: processes that write the same file write the same bytes. A file
appears whole; one that was damaged later is found by its length and CRCs, and written again. A frame of length 0 does
not decode.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vac_ddp.data.video_frames import DOES_NOT_DECODE, Encoding, VideoFrames, encoded_frames, numbering
from vac_ddp.data.video_reader import VideoFile
from vac_ddp.data.video_stream import DamagedVideo
from vac_ddp.files import PARTIAL, write_atomic
from vac_ddp.version import installed

FOLDER, SIZE, ENDING = "frames", "size", ".frames"

_VERSION = 1
_MAGIC = b"vacframe"
_END = struct.Struct("<8sIII")  # magic, version, frames, CRC-32 of the table
_ROW = np.dtype([("start", "<i8"), ("length", "<u4"), ("crc", "<u4")])
_STALE_S = 3600.0  # a writer adds to its file more often
_LIBRARIES = ("av", "simplejpeg", "pillow", "pillow-simd")  # they decode and encode


class _NotKept(Exception):
    """There is no room for a file, or another process was faster."""


class _Damaged(Exception):
    """A file of the cache is not as it was written."""


@dataclass(kw_only=True)
class FrameCache:
    """How the frames of video files are read: from the cache, or decoded, which gives the same bytes.

    folder: of the cache, None for none; limit: bytes that it may hold, 0: what is there is read and nothing is added;
    closed: a video did not fit, or nothing can be written: this process adds no more.
    """

    folder: Path | None = None
    encoding: Encoding = field(default_factory=Encoding)
    limit: int = 0
    closed: bool = False

    def reader(self, path: Path) -> Callable[[int], bytes]:
        """A function from a frame's number to its image file, for one thread. It raises OSError where there is none."""
        decoded = VideoFrames(path, self.encoding)
        kept = self._kept(path)
        if kept is None:
            return decoded

        def read(frame: int) -> bytes:
            try:
                return kept.read(frame)
            except _Damaged:
                _remove(kept.path)  # whoever reads the video next writes it again
                return decoded(frame)

        return read

    def file_of(self, path: Path) -> Path:
        """Where the frames of a video file are kept. Raises OSError where there is no such video file."""
        assert self.folder is not None
        status = path.stat()
        text = f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n{self.encoding}\n{_made_by()}"
        name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self.folder / FOLDER / (name + ENDING)

    def count(self) -> int:
        """Count the bytes of the cache anew, and remove what killed writers left. Raises OSError: it can't be used."""
        assert self.folder is not None
        folder = self.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"*{PARTIAL}"):
            with contextlib.suppress(OSError):
                if partial.stat().st_mtime < time.time() - _STALE_S:
                    partial.unlink()
        with _locked(folder) as total:
            total.bytes = _sum(folder)
            return total.bytes

    def _kept(self, path: Path) -> _KeptFrames | None:
        """The frames of a video file in the cache, put there first if need be; None: they are not there."""
        if self.folder is None:
            return None
        try:
            target = self.file_of(path)
        except OSError:  # whoever decodes it says why
            return None
        kept = _open(target)
        if kept is not None or self.closed or not self.limit:
            return kept
        try:
            with contextlib.suppress(_NotKept):
                self._write(path, target)
        except (DamagedVideo, ValueError):  # not one frame decodes
            return None
        except OSError:
            self.closed = True
            return None
        return _open(target)

    def _write(self, path: Path, target: Path) -> None:
        """Decode a video file and keep its frames. Raises _NotKept."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent) as total:
            room = self.limit - total.bytes

        def write(stream: BinaryIO) -> None:
            size = _write_frames(path, self.encoding, stream, room)
            with _locked(target.parent) as total:
                if target.exists():
                    raise _NotKept
                if size > min(room, self.limit - total.bytes):
                    self.closed = True
                    raise _NotKept
                total.bytes += size

        write_atomic(target, write)


def _write_frames(path: Path, encoding: Encoding, stream: BinaryIO, room: int) -> int:
    """Write the file of the frames of a video; returns its size. Stops where that is more than `room`."""
    listed = VideoFile(path=path).listed()
    stamps, lengths, crcs, size = [], [], [], 0
    for stamp, image in encoded_frames(path, encoding):
        stream.write(image)
        stamps.append(stamp)
        lengths.append(len(image))
        crcs.append(zlib.crc32(image))
        size += len(image)
        if size > room:
            return size
    if not stamps:
        raise DamagedVideo("no frame decodes")
    numbers = list(range(len(stamps))) if listed is None else numbering(listed, stamps)
    table = np.zeros(len(stamps) if listed is None else len(listed), _ROW)
    decoded = np.flatnonzero(np.array(numbers) >= 0)
    places = np.array(numbers)[decoded]
    starts = np.cumsum(lengths) - lengths
    for column, values in (("start", starts), ("length", lengths), ("crc", crcs)):
        table[column][places] = np.asarray(values)[decoded]
    data = table.tobytes()
    stream.write(data + _END.pack(_MAGIC, _VERSION, len(table), zlib.crc32(data)))
    return size + len(data) + _END.size


class _KeptFrames:
    """The frames of one video in the cache."""

    def __init__(self, path: Path) -> None:
        """Raise FileNotFoundError where the file is not there, _Damaged where it is not whole."""
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        end = os.fstat(self._handle).st_size - _END.size
        last = os.pread(self._handle, _END.size, max(0, end))
        magic, version, count, crc = _END.unpack(last) if len(last) == _END.size else (b"", 0, 0, 0)
        size = count * _ROW.itemsize
        if (magic, version) != (_MAGIC, _VERSION) or size > end:
            raise _Damaged
        data = os.pread(self._handle, size, end - size)
        if len(data) != size or zlib.crc32(data) != crc:
            raise _Damaged
        self._rows = np.frombuffer(data, _ROW)

    def read(self, frame: int) -> bytes:
        """The image file of a frame. Raises OSError where the frame does not decode, _Damaged."""
        if not 0 <= frame < len(self._rows):
            raise OSError(errno.EIO, f"its video has {len(self._rows)} frames, not {frame}")
        start, length, crc = self._rows[frame].item()
        if not length:
            raise OSError(errno.EIO, DOES_NOT_DECODE)
        data = os.pread(self._handle, length, start)
        if len(data) != length or zlib.crc32(data) != crc:
            raise _Damaged
        return data

    def __del__(self) -> None:
        if "_handle" in self.__dict__:
            os.close(self._handle)


def _open(path: Path) -> _KeptFrames | None:
    """The frames in a file; None where there is none, or a damaged one, which is removed."""
    try:
        return _KeptFrames(path)
    except _Damaged:
        _remove(path)
    except OSError:
        pass
    return None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


@dataclass(kw_only=True)
class _Total:
    bytes: int


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[_Total]:
    """The bytes of the cache, which no other process changes meanwhile; what is set is written."""
    with (folder / SIZE).open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        text = stream.read(32)
        total = _Total(bytes=int(text) if text.isdigit() else _sum(folder))
        before = total.bytes
        yield total
        if total.bytes != before or not text.isdigit():
            stream.truncate(0)
            stream.write(b"%d" % total.bytes)


def _sum(folder: Path) -> int:
    """Bytes of the files of frames, and of those that are being written."""
    found = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if ENDING in entry.name:
                with contextlib.suppress(FileNotFoundError):
                    found += entry.stat().st_size
    return found


@functools.cache
def _made_by() -> str:
    """What the content of a file depends on beside the video and the encoding."""
    return "\n".join([f"format {_VERSION}", *(f"{name} {installed(name)}" for name in _LIBRARIES)])
