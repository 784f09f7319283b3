"""Image files for tests, without torch: encoded, with another size in their header, PNGs by hand."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GIF_IMAGE = b"\x2c\0\0\0\0"  # the descriptor of an image at the upper left corner


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def claiming(data: bytes, height: int, width: int) -> bytes:
    """An image file with another size where its format has it, as far as the fields reach; else as it is."""
    out = bytearray(data)
    if out[:2] == b"\xff\xd8":
        at = next(i for i in range(len(out)) if out[i] == 0xFF and out[i + 1] in (0xC0, 0xC1, 0xC2))
        out[at + 5 : at + 9] = struct.pack(">HH", min(height, 0xFFFF), min(width, 0xFFFF))
    elif out[:4] == b"\x89PNG":
        out[16:24] = struct.pack(">II", width, height)
        out[29:33] = zlib.crc32(out[12:29]).to_bytes(4, "big")
    elif out[:3] == b"GIF":
        at = out.index(GIF_IMAGE) + len(GIF_IMAGE)
        out[6:10] = out[at : at + 4] = struct.pack("<HH", min(width, 0xFFFF), min(height, 0xFFFF))
    elif out[:2] == b"BM":
        out[18:26] = struct.pack("<II", width, height)
    elif out[12:16] == b"VP8X":
        for at, size in ((24, width), (27, height)):
            out[at : at + 3] = min(max(size, 1) - 1, (1 << 24) - 1).to_bytes(3, "little")
    elif out[12:16] == b"VP8L":
        sides = [min(max(size, 1) - 1, 0x3FFF) for size in (width, height)]
        out[21:25] = (sides[0] | sides[1] << 14).to_bytes(4, "little")
    elif out[12:16] == b"VP8 ":
        out[26:30] = struct.pack("<HH", min(width, 0x3FFF), min(height, 0x3FFF))
    return bytes(out)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(rows: np.ndarray, height: int, *, width: int | None = None, interlaced: bool = False) -> bytes:
    """A PNG of `height` rows whose stream holds `rows` (N, W, 3) uint8 only, and is properly ended."""
    width = rows.shape[1] if width is None else width
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def peak_mib() -> int:
    """The most memory this process held since it was started, in MiB (`ru_maxrss` begins at the parent's)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) >> 10
