"""What a video file's container says is in it, read from its bytes: readers do not mind where something is missing."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np


def bytes_missing(source: Path) -> str | None:
    """Compare a file's length with what its container declares; a line where bytes are missing.

    Known: RIFF (AVI), boxes (MP4, MOV, 3GP), EBML (Matroska, WebM), packets of 188 bytes (MPEG-TS).
    """
    length = source.stat().st_size
    with source.open("rb") as stream:
        head = stream.read(12)
        if head[:4] == b"RIFF":
            declared = 8 + int.from_bytes(head[4:8], "little")
        elif head[4:8] == b"ftyp":
            declared = _end_of_boxes(stream, length)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            declared = _end_of_segment(stream)
        elif _is_transport_stream(stream):
            declared = -(-length // 188) * 188
        else:
            return None
    return f"cut off: {length} of {declared} bytes are there" if declared > length else None


def _is_transport_stream(stream: BinaryIO) -> bool:
    """Whether the first packets begin as those of an MPEG-TS do (ISO 13818-1, 2.4.3.2)."""
    return all(stream.seek(188 * i) == 188 * i and stream.read(1) == b"G" for i in range(5))


def avi_packets(source: Path, stream: int) -> int:
    """How many packets of video the index of an AVI lists for its stream number `stream`; empty ones do not count.

    0 where there is no index. A file of several RIFF parts lists those of its first part.
    """
    entry = np.dtype([("id", "S4"), ("flags", "<u4"), ("offset", "<u4"), ("size", "<u4")])
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.rfind(b"idx1")
        if at < 0:
            return 0
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        listed = data[at + 8 : at + 8 + size]
    table = np.frombuffer(listed[: len(listed) // entry.itemsize * entry.itemsize], entry)
    mine = np.isin(table["id"], [b"%02ddc" % stream, b"%02ddb" % stream])
    return int((mine & (table["size"] > 0)).sum())


def _end_of_boxes(stream: BinaryIO, length: int) -> int:
    """Where the last box of an MP4 ends (ISO 14496-12, 4.2)."""
    end = 0
    while end < length:
        stream.seek(end)
        head = stream.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8:  # 0: up to the end of the file
            return end
        end += size
    return end


def _end_of_segment(stream: BinaryIO) -> int:
    """Where the segment of a Matroska file ends, 0 where it does not say (RFC 8794: identifier, length, content)."""
    stream.seek(4)
    _, header = _element_length(stream)
    stream.seek(header, os.SEEK_CUR)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    known, size = _element_length(stream)
    return stream.tell() + size if known else 0


def _element_length(stream: BinaryIO) -> tuple[bool, int]:
    first = stream.read(1) or b"\x01"
    width = 9 - first[0].bit_length()
    value = (first[0] & ((1 << (8 - width)) - 1)) << 8 * (width - 1) | int.from_bytes(stream.read(width - 1), "big")
    return value != (1 << 7 * width) - 1, value
