"""Bytes of an image file in, upright 8-bit RGB out. Knows numpy, libjpeg-turbo (simplejpeg) and Pillow, not torch."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

from vac_ddp.data.file_kinds import meaning

FORMATS = ("PNG", "WEBP", "BMP", "GIF")  # what Pillow may open beside JPEG: it has formats that start programs (EPS)
MAX_PIXELS = 50_000_000  # more are never decoded: a JPEG is reduced to less, other formats are refused
ANY_FILE_PIXELS = 10_000_000  # decoded from a file of any size: an even frame packs into almost nothing
PIXELS_PER_BYTE = 1032  # beyond ANY_FILE_PIXELS: what deflate packs into a byte; a Huffman-coded JPEG reaches 512

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


class DamagedFrame(Exception):
    """A frame that cannot be decoded as a whole; the message is a short reason."""


def decode_frame(
    data: bytes,
    *,
    factor: int | Callable[[int, int], int] = 1,
    tolerant: bool = False,
    buffer: np.ndarray | None = None,
) -> np.ndarray:
    """Decode an image file to upright RGB, (H, W, 3) uint8.

    Parameters
    ----------
    data : bytes
        JPEG of any kind, PNG, WebP, BMP or GIF, recognised by its content. Grey, palette, CMYK and 16-bit images
        become 8-bit RGB (16 bits keep their upper 8), transparency is left out, an EXIF orientation is applied, of
        an animation the first image counts.
    factor : 1, 2, 4 or 8, or a function of (height, width)
        Decode a JPEG at 1/factor of its size, rounded up. A frame of more than `MAX_PIXELS` is reduced further.
    tolerant : bool
        For a file that was found damaged: take what can be decoded; the rest of the picture is grey or black.
    buffer : contiguous (H, W, 3) uint8 array, optional
        Where the pixels of a JPEG of just this size go; the result is then `buffer` itself.

    Raises
    ------
    DamagedFrame
        The file is empty, not an image, damaged or incomplete (or, tolerant, nothing of it decodes), too large, or
        its header claims more pixels than a file of its size can hold. The last two are found before any memory is
        allocated for the pixels.

    """
    try:
        if data[:2] != b"\xff\xd8":
            image, orientation = _decode_pillow(data, tolerant)
        else:
            height, width, colour = _jpeg_header(data)
            orientation = _orientation(data)
            if not isinstance(factor, int):
                factor = factor(width, height) if orientation > 4 else factor(height, width)
            image = _decode_jpeg(data, height, width, colour, bounded_factor(height, width, factor), tolerant, buffer)
    except (DamagedFrame, MemoryError):
        raise
    except Exception as error:  # decoders raise a dozen kinds, up to struct.error and SyntaxError
        raise DamagedFrame(_reason(data, error)) from error
    if tolerant and (image == image[0, 0]).all():
        raise DamagedFrame("nothing of it can be decoded")
    return image if orientation == 1 else np.ascontiguousarray(_turn(image, orientation))


def frame_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an image file as it is shown, from its header. Raises DamagedFrame as `decode_frame` does."""
    try:
        if data[:2] == b"\xff\xd8":
            height, width, _ = _jpeg_header(data)
            bounded_factor(height, width, 1)
            orientation = _orientation(data)
        else:
            with _open_pillow(data) as image:
                height, width, orientation = image.height, image.width, _exif_orientation(image.getexif)
    except DamagedFrame:
        raise
    except Exception as error:
        raise DamagedFrame(_reason(data, error)) from error
    return (width, height) if orientation > 4 else (height, width)


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an upright JPEG in colour or grey that may be decoded in full, None for all else.

    Its header says so; whether the picture is whole, only decoding tells.
    """
    if data[:2] != b"\xff\xd8" or _orientation(data) != 1:
        return None
    try:
        height, width, colour = _jpeg_header(data)
    except Exception:  # a broken header raises more than one kind
        return None
    return None if colour in ("CMYK", "YCCK") or height * width > MAX_PIXELS else (height, width)


def decode_plain_jpeg(data: bytes, factor: int, out: np.ndarray) -> bool:
    """Decode a JPEG of which `plain_jpeg_size` told the size, at 1/factor of it, rounded up, into `out` of that size.

    False: it is damaged, `decode_frame` says how. Saves what `decode_frame` does beside decoding.
    """
    height, width = out.shape[:2]
    try:
        simplejpeg.decode_jpeg(data, "RGB", False, False, height, width, factor, out)
    except MemoryError:
        raise
    except Exception:
        return False
    return True


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    """(height, width, colour space) of a JPEG. Raises DamagedFrame where decoding it would take too much memory."""
    height, width, colour, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    if height * width > ANY_FILE_PIXELS:
        _check_pixels(height, width, len(data))
        if height * width > MAX_PIXELS and _has_many_scans(data):
            raise DamagedFrame(f"{width}x{height} pixels are too many for a progressive JPEG (limit {MAX_PIXELS})")
    return height, width, colour


def _check_pixels(height: int, width: int, size: int) -> None:
    if height * width > max(ANY_FILE_PIXELS, PIXELS_PER_BYTE * size):
        raise DamagedFrame(f"its header claims {width}x{height} pixels, too many for a file of {size} bytes")


def _has_many_scans(data: bytes) -> bool:
    """Whether libjpeg keeps all coefficients of this JPEG, at full size however much it is reduced."""
    at, components = 2, 0
    while (at := data.find(b"\xff", at)) >= 0 and at + 5 < len(data):
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # no segment follows
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            if marker & 3 == 2:  # progressive
                return True
            components = data[at + 9] if at + 9 < len(data) else 0
        if marker == 0xDA:  # start of scan
            return data[at + 4] < components
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _decode_jpeg(
    data: bytes, height: int, width: int, colour: str, factor: int, tolerant: bool, buffer: np.ndarray | None
) -> np.ndarray:
    if factor == 1:
        least = {}
    else:
        height, width = -(-height // factor), -(-width // factor)
        least = {"min_height": height, "min_width": width, "min_factor": factor}
    space = "CMYK" if colour in ("CMYK", "YCCK") else "RGB"
    if space == "RGB" and buffer is not None and buffer.shape[:2] == (height, width):
        image = buffer
    else:
        image = np.empty((height, width, len(space)), np.uint8)
    decoded = simplejpeg.decode_jpeg(data, space, buffer=image, strict=not tolerant, **least)
    if decoded.shape != image.shape:
        raise DamagedFrame(f"decodes to {decoded.shape[:2]} where {image.shape[:2]} was promised")
    if space == "CMYK":
        np.subtract(255, image, out=image)  # inverted in the file, as Adobe does
        image = np.array(Image.frombuffer("CMYK", (width, height), image, "raw", "CMYK", 0, 1).convert("RGB"))
    return image


def _decode_pillow(data: bytes, tolerant: bool) -> tuple[np.ndarray, int]:
    """Pixels (H, W, 3) as they are stored, and their orientation."""
    with _open_pillow(data) as image:
        try:
            image.load()
            if image.format == "PNG" and _lacks_rows(image, data):
                raise DamagedFrame("the image data ends before its last row")
        except Exception:
            if not tolerant:
                raise
            image.tile = []  # keep the rows decoded so far: nothing is left to load
        return _as_rgb(image), _exif_orientation(image.getexif)


def upright_rgb(image: Image.Image) -> np.ndarray:
    """The pixels (H, W, 3) uint8 of an image of Pillow, by the rules of `decode_frame`."""
    return np.ascontiguousarray(_turn(_as_rgb(image), _exif_orientation(image.getexif)))


def _as_rgb(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) as they are stored."""
    if image.mode.startswith("I"):  # 16-bit grey; convert() would cut it off at 255
        grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _open_pillow(data: bytes) -> ImageFile.ImageFile:
    """An image that is not a JPEG, its pixels not decoded yet. Raises DamagedFrame where it has too many of them."""
    kind, height, width = _claimed_size(data)
    _check_other(kind, height, width, len(data))
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_other(image.format or kind, image.height, image.width, len(data))
    return image


def _check_other(kind: str, height: int, width: int, size: int) -> None:
    if height * width > MAX_PIXELS:
        raise DamagedFrame(f"{width}x{height} pixels are too many for a {kind} (limit {MAX_PIXELS})")
    _check_pixels(height, width, size)


def _claimed_size(data: bytes) -> tuple[str, int, int]:
    """(format, height, width) by the first bytes, zeros where they are unknown.

    Asked before Pillow, which warns about large images, and libwebp, which allocates when it opens one.
    """

    def number(start: int, size: int, order: Literal["little", "big"] = "little") -> int:
        return int.from_bytes(data[start : start + size], order)

    webp = data[12:16] if data[:4] == b"RIFF" else b""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG", number(20, 4, "big"), number(16, 4, "big")
    if data[:4] == b"GIF8":
        return "GIF", number(8, 2), number(6, 2)
    if data[:2] == b"BM" and number(14, 4) == 12:
        return "BMP", number(20, 2), number(18, 2)
    if data[:2] == b"BM":
        height = number(22, 4)
        return "BMP", min(height, (1 << 32) - height), number(18, 4)  # negative: from top to bottom
    if webp == b"VP8X":
        return "WEBP", number(27, 3) + 1, number(24, 3) + 1
    if webp == b"VP8L":
        return "WEBP", (number(21, 4) >> 14 & 0x3FFF) + 1, (number(21, 4) & 0x3FFF) + 1
    if webp == b"VP8 ":
        return "WEBP", number(28, 2) & 0x3FFF, number(26, 2) & 0x3FFF
    return "", 0, 0


def _lacks_rows(image: Image.Image, data: bytes) -> bool:
    """Whether the stream of a PNG that Pillow decoded ended, as a stream should, before the last row.

    Pillow does not notice, and leaves the rest at zero. So only a last row of zeros, and an interlaced image, call for
    inflating it once more and counting.
    """
    last = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    if not image.info.get("interlace") and last.strip(b"\0"):
        return False
    bits = data[24] * _PNG_CHANNELS[data[25]]
    passes = _ADAM7 if data[28] else ((0, 0, 1, 1),)
    missing = 0
    for x, y, across, down in passes:
        columns, rows = -(-(image.width - x) // across), -(-(image.height - y) // down)
        missing += rows * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    stream, at = zlib.decompressobj(), 8
    while at + 8 < len(data) and not stream.eof:
        length = int.from_bytes(data[at : at + 4], "big")
        packed = data[at + 8 : at + 8 + length] if data[at + 4 : at + 8] == b"IDAT" else b""
        while packed and not stream.eof:
            missing -= len(stream.decompress(packed, 1 << 16))
            packed = stream.unconsumed_tail
        at += 12 + length
    return missing > len(stream.flush())


def bounded_factor(height: int, width: int, factor: int) -> int:
    """`factor`, or the smallest larger one that leaves no more than `MAX_PIXELS`."""
    for larger in (1, 2, 4, 8):
        if larger >= factor and (height // larger) * (width // larger) <= MAX_PIXELS:
            return larger
    raise DamagedFrame(f"{width}x{height} pixels are too many, even at 1/8 of the size (limit {MAX_PIXELS})")


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 to 8; 1 (upright) where nothing is said. Exif stands near the start of the file."""
    start = data.find(b"Exif\x00\x00", 0, 4096)
    if start < 0:
        return 1

    def exif() -> Image.Exif:
        found = Image.Exif()
        found.load(data[start : start + int.from_bytes(data[start - 2 : start], "big")])
        return found

    return _exif_orientation(exif)


def _exif_orientation(read: Callable[[], Image.Exif]) -> int:
    try:
        value = read().get(0x0112, 1)
    except Exception:  # nonsense in the tag does not harm the picture
        return 1
    return value if value in range(1, 9) else 1


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Make an image (H, W, 3) upright that is stored in one of the eight EXIF orientations."""
    if orientation > 4:
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image


def _reason(data: bytes, error: Exception) -> str:
    """What is wrong with a file, in words."""
    if not data:
        return "empty file"
    if (known := meaning(data)) is not None:
        return f"not an image (JPEG, PNG, WebP, BMP, GIF) but {known}"
    text = " ".join(str(error).split())
    if "Could not determine subsampling" in text or "cannot identify image file" in text:
        return "not an image (JPEG, PNG, WebP, BMP, GIF), or without a readable header"
    if isinstance(error, LookupError | struct.error | EOFError) or not re.search("[a-z]{3}", text):
        return "its header is damaged or cut off"  # what the decoders raise there is a bare number or a Python error
    return text.removeprefix("Corrupt JPEG data: ")
