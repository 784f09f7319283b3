"""Bytes of an image file in, upright 8-bit RGB out. Knows numpy, libjpeg-turbo (simplejpeg) and Pillow, not torch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps

MAX_PIXELS = 50_000_000  # more are never decoded: a JPEG is reduced to less, other formats are refused


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
        JPEG of any kind, PNG, WebP or what else Pillow reads; told by its content. Grey, palette, CMYK and 16-bit
        images become 8-bit RGB (16 bits keep their upper 8), transparency is left out, an EXIF orientation is
        applied, of an animation the first image counts.
    factor : 1, 2, 4 or 8, or a function of (height, width)
        Decode a JPEG at 1/factor of its size, rounded up. A frame of more than `MAX_PIXELS` is reduced further.
    tolerant : bool
        For a file that was found damaged: take what can be decoded; the rest of the picture is grey or black.
    buffer : contiguous (H, W, 3) uint8 array, optional
        Where the pixels of a JPEG of just this size go; the result is then `buffer` itself.

    Raises
    ------
    DamagedFrame
        The file is empty, no image, damaged (or, tolerant, nothing of it decodes), or too large.

    """
    try:
        if data[:2] != b"\xff\xd8":
            return _decode_pillow(data, tolerant)
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        orientation = _orientation(data)
        if not isinstance(factor, int):
            factor = factor(width, height) if orientation > 4 else factor(height, width)
        factor = bounded_factor(height, width, factor)
        if colour in ("CMYK", "YCCK"):
            return _decode_pillow(data, tolerant, factor)
        image = _decode_jpeg(data, height, width, factor, tolerant, buffer)
    except (DamagedFrame, MemoryError):
        raise
    except Exception as error:  # decoders raise a dozen kinds, up to struct.error and SyntaxError
        raise DamagedFrame(_reason(data, error)) from error
    return image if orientation == 1 else np.ascontiguousarray(_turn(image, orientation))


def frame_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an image file as it is shown, from its header. Raises DamagedFrame as `decode_frame` does."""
    try:
        if data[:2] == b"\xff\xd8":
            height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            bounded_factor(height, width, 1)
            return (width, height) if _orientation(data) > 4 else (height, width)
        with _open_pillow(data) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except DamagedFrame:
        raise
    except Exception as error:
        raise DamagedFrame(_reason(data, error)) from error


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an upright JPEG in colour or grey that may be decoded in full, None for all else.

    Its header says so; whether the picture is whole, only decoding tells.
    """
    if data[:2] != b"\xff\xd8" or _orientation(data) != 1:
        return None
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception:  # a broken header raises more than one kind
        return None
    return None if colour in ("CMYK", "YCCK") or height * width > MAX_PIXELS else (height, width)


def is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a whole, upright JPEG in colour or grey, as far as can be seen without decoding it."""
    return plain_jpeg_size(data) is not None and data.rstrip(b"\x00").endswith(b"\xff\xd9")


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


def _decode_jpeg(
    data: bytes, height: int, width: int, factor: int, tolerant: bool, buffer: np.ndarray | None
) -> np.ndarray:
    if factor == 1:
        least = {}
    else:
        height, width = -(-height // factor), -(-width // factor)
        least = {"min_height": height, "min_width": width, "min_factor": factor}
    image = buffer if buffer is not None and buffer.shape[:2] == (height, width) else None
    if image is None:
        image = np.empty((height, width, 3), np.uint8)
    decoded = simplejpeg.decode_jpeg(data, "RGB", buffer=image, strict=not tolerant, **least)
    if decoded.shape != image.shape:
        raise DamagedFrame(f"decodes to {decoded.shape[:2]} where {image.shape[:2]} was promised")
    return _something(image) if tolerant else image


def _something(image: np.ndarray) -> np.ndarray:
    if (image == image[0, 0]).all():
        raise DamagedFrame("nothing of it can be decoded")
    return image


def _decode_pillow(data: bytes, tolerant: bool, factor: int = 1) -> np.ndarray:
    kept = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
    try:
        with _open_pillow(data) as image:
            if image.format == "JPEG":
                image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey; convert() would cut it off at 255
                grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                pixels = np.repeat(grey[..., None], 3, axis=2)
            else:
                pixels = np.array(upright.convert("RGB"))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = kept
    return _something(pixels) if tolerant else pixels


def _open_pillow(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides, and says so
        image = Image.open(io.BytesIO(data))
    if image.format != "JPEG" and image.width * image.height > MAX_PIXELS:
        raise DamagedFrame(
            f"{image.width}x{image.height} pixels are too many for a {image.format} (limit {MAX_PIXELS})"
        )
    return image


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
    try:
        exif = Image.Exif()
        exif.load(data[start : start + int.from_bytes(data[start - 2 : start], "big")])
        value = exif.get(0x0112, 1)
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
    if not data:
        return "empty file"
    text = " ".join(str(error).split())
    if "Could not determine subsampling" in text or "cannot identify image file" in text:
        return "not an image, or without a readable header"
    return text.removeprefix("Corrupt JPEG data: ") or type(error).__name__
