"""Mutated image files to the decoder, in a process of 2 GiB: python -m tests.drivers.fuzz_images COUNT [SEED].

Every mutation goes through everything that decodes frames: strict, tolerant, reduced, the header alone, and the short
way for plain JPEGs. Each must end in pixels or in DamagedFrame; anything else ends the program with the mutation's
number. torch is not imported, so the limit on the address space is a limit on what decoding takes.
"""

from __future__ import annotations

import resource
import struct
import sys
import zlib

import numpy as np
from PIL import Image

from tests.image_files import claiming, encode, peak_mib
from vac_ddp.data.decode import DamagedFrame, decode_frame, decode_plain_jpeg, frame_size, plain_jpeg_size
from vac_ddp.data.video_scan import decodes

LIMIT = 2 << 30
SIZES = (0, 1, 2, 255, 4096, 7000, 16383, 16384, 50000, 65500, 65535, 1 << 24, (1 << 31) - 1, (1 << 32) - 1)
EXIF_TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def seeds() -> list[bytes]:
    """Small images of every format and of the variants that decode differently."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(40), np.arange(56))[..., None] * np.array([1, 2, 3])
    rgb = Image.fromarray((smooth + rng.integers(0, 30, (40, 56, 3))).clip(0, 255).astype(np.uint8))
    other = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    animated = {"save_all": True, "append_images": [other]}
    palette = rgb.quantize(64)
    return [
        encode(rgb, "JPEG"),
        encode(rgb, "JPEG", progressive=True, subsampling=0),
        encode(rgb.convert("L"), "JPEG", exif=EXIF_TURNED),
        encode(rgb.convert("CMYK"), "JPEG", progressive=True),
        encode(rgb, "JPEG", restart_marker_blocks=2),
        encode(rgb, "PNG"),
        encode(palette, "PNG"),
        encode(rgb.convert("RGBA"), "PNG", exif=EXIF_TURNED),
        encode(Image.fromarray(rng.integers(0, 65536, (40, 56)).astype(np.uint16)), "PNG"),
        encode(rgb, "PNG", **animated),
        encode(rgb, "WEBP"),
        encode(rgb.convert("RGBA"), "WEBP", lossless=True, exif=EXIF_TURNED),
        encode(rgb, "WEBP", **animated),
        encode(rgb, "BMP"),
        encode(palette, "BMP"),
        encode(palette, "GIF"),
        encode(palette, "GIF", **animated),
        encode(rgb, "TIFF"),
        encode(rgb, "PPM"),
    ]


def mutate(sources: list[bytes], number: int, seed: int) -> bytes:
    """Mutation `number`: one to three changes of one source; in PNGs, mostly, the checksums are set right again."""
    rng = np.random.default_rng([seed, number])
    data = bytearray(sources[number % len(sources)])
    if rng.random() < 0.3:
        data = bytearray(claiming(bytes(data), *(int(size) for size in rng.choice(SIZES, 2))))
        if rng.random() < 0.5:
            return bytes(data)
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.integers(0, 7)
        at = int(rng.integers(0, min(len(data), 64) if rng.random() < 0.5 else len(data)))
        length = int(rng.integers(1, 64))
        if kind == 0:
            data[at] = int(rng.integers(0, 256))
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 2 and len(data) > 40:
            del data[max(20, at) :]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[int(rng.integers(0, len(data))) :][:length]
        elif kind == 5:
            size = int(rng.choice(SIZES))
            form = str(rng.choice(["<H", ">H", "<I", ">I"]))
            packed = struct.pack(form, size & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
            data[at : at + len(packed)] = packed
        else:
            other = sources[int(rng.integers(0, len(sources)))]
            data[at:] = other[int(rng.integers(0, len(other))) :]
        if not data:
            break
    return with_checksums(bytes(data)) if rng.random() < 0.8 else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """The same PNG with the right CRC in every whole chunk; other files as they are."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def short_way(data: bytes) -> np.ndarray:
    """The decoder of the loader: only for what the header calls a plain JPEG."""
    size = plain_jpeg_size(data)
    if size is None:
        raise DamagedFrame("not plain")
    out = np.zeros((*size, 3), np.uint8)
    if not decode_plain_jpeg(data, 1, out):
        raise DamagedFrame("damaged")
    return out


def scanned(data: bytes) -> np.ndarray:
    """What indexing a data set does with a first frame."""
    if not decodes(data):
        raise DamagedFrame("damaged")
    return decode_frame(data, factor=8)


def header(data: bytes) -> np.ndarray:
    """The size of the image as it is shown."""
    height, width = frame_size(data)
    assert height > 0, height
    assert width > 0, width
    return np.zeros((1, 1, 3), np.uint8)


WAYS = {
    "strict": decode_frame,
    "tolerant": lambda data: decode_frame(data, tolerant=True),
    "reduced": lambda data: decode_frame(data, factor=8, tolerant=True),
    "header": header,
    "short": short_way,
    "scanned": scanned,
}


def main(count: int, seed: int) -> None:
    """Decode `count` mutations and print how many decoded each way, and the most memory that this took."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    sources = seeds()
    decoded = dict.fromkeys(WAYS, 0)
    for number in range(count):
        data = mutate(sources, number, seed)
        for name, way in WAYS.items():
            try:
                pixels = way(data)
            except DamagedFrame:
                continue
            except BaseException:
                print(f"mutation {number} of seed {seed}, {name}: {data[:64]!r}", file=sys.stderr)
                raise
            assert pixels.dtype == np.uint8, (number, name, pixels.dtype)
            assert pixels.ndim == 3, (number, name, pixels.shape)
            assert pixels.shape[2] == 3, (number, name, pixels.shape)
            decoded[name] += 1
    assert "torch" not in sys.modules
    assert min(decoded.values()) > count // 100, decoded  # mutations that break every header test nothing
    print(f"{count} mutations, decoded {' '.join(f'{k} {v}' for k, v in decoded.items())}, peak {peak_mib()} MiB")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
