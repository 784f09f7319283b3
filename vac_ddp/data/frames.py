"""Frames of a video to uint8 clips: crop and resize in one resampling, and what to do with a damaged frame.

Frames are decoded into one buffer and resampled many at once, antialiased, in integer arithmetic: there is no float
image.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from vac_ddp.data.decode import (
    DamagedFrame,
    bounded_factor,
    decode_frame,
    decode_plain_jpeg,
    frame_size,
    plain_jpeg_size,
)
from vac_ddp.errors import reason
from vac_ddp.runtime.torch_compat import resize_into

_Made = TypeVar("_Made")
Box = tuple[int, int, int, int]  # top, left, height, width in pixels
Size = tuple[int, int]  # height, width in pixels
Frame = bytes | np.ndarray  # the file of a frame, or its pixels (H, W, 3) uint8

REDUCTIONS = (8, 4, 2)  # what libjpeg decodes at little cost (Wallace's DCT, scaled in the frequency domain)
CHUNK_BYTES = 1 << 22  # decoded frames held for one resampling (measured best: 2 to 4 MiB)


class NoFrame(Exception):
    """A video of which no frame at all can be decoded; `damaged` has every frame's reason."""

    def __init__(self, damaged: dict[int, str]) -> None:
        super().__init__(f"none of {len(damaged)} frames can be decoded")
        self.damaged = damaged


def resize_crop(frames: torch.Tensor, box: Box, out: torch.Tensor) -> None:
    """Cut `box` out of frames (N, H, W, 3) uint8 and resample it into `out` (N, size, size, 3) uint8.

    Antialiased bilinear in integer arithmetic, as Pillow's `crop(...).resize(..., BILINEAR)`, to one grey level.
    """
    top, left, height, width = box
    pixels = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2)
    resize_into(pixels, out.permute(0, 3, 1, 2))


def view_boxes(height: int, width: int, *, size: int, short_side: int, crops: int) -> list[Box]:
    """Boxes of a scored frame: its short side as if resized to `short_side`, crops of `size` along the long one.

    crops=1: the centre. crops=3: both ends and the centre of the long side (of the width where both are equal).
    The aspect ratio is kept; `size` <= `short_side`.
    """
    side = max(1, round(min(height, width) * size / short_side))
    boxes = []
    for i in range(crops):
        along = 0.5 if crops == 1 else i / (crops - 1)
        y, x = (0.5, along) if width >= height else (along, 0.5)
        boxes.append((round((height - side) * y), round((width - side) * x), side, side))
    return boxes


def reduction(boxes: Sequence[Box], size: int) -> int:
    """The largest of 1, 2, 4, 8 by which a frame may be reduced so that every box still has `size` pixels a side."""
    least = min(min(height, width) for _, _, height, width in boxes)
    return next((factor for factor in REDUCTIONS if least // factor >= size), 1)


def scale_box(box: Box, source: tuple[int, int], target: tuple[int, int]) -> Box:
    """`box` of a frame of `source` (height, width), on a frame of `target` (height, width), within its borders."""
    if source == target:
        return box
    spans = []
    for start, length, old, new in zip(box[:2], box[2:], source, target, strict=True):
        first = min(round(start * new / old), new - 1)
        last = min(max(round((start + length) * new / old), first + 1), new)
        spans.append((first, last - first))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def neighbours(frame: int, n_frames: int) -> Iterator[int]:
    """The other frames of a video, the nearest first, the earlier of two equally near ones first."""
    for distance in range(1, n_frames):
        if frame - distance >= 0:
            yield frame - distance
        if frame + distance < n_frames:
            yield frame + distance


class FrameReader:
    """The frames of one video, with damaged ones replaced and noted."""

    def __init__(self, read: Callable[[int], Frame], n_frames: int, tolerant: bool) -> None:
        self.read, self.n_frames, self.tolerant = read, n_frames, tolerant
        self.damaged: dict[int, str] = {}
        self._files: dict[int, Frame] = {}
        self._last: tuple[int, Frame] | None = None

    def use(self, frame: int, make: Callable[[Frame, bool], _Made]) -> _Made:
        """What `make(data, tolerant)` returns for `frame` or for what stands in for it.

        That is: the frame, as a whole; as far as it decodes (tolerant); the nearest whole one; the nearest of which
        anything decodes (tolerant).
        """
        for candidate, tolerant in self._candidates(frame):
            if not tolerant and candidate in self.damaged:
                continue
            try:
                return make(self.bytes_of(candidate), tolerant)
            except DamagedFrame as error:
                self.damaged.setdefault(candidate, str(error))
            except Exception as error:  # a broken packed set, no memory: one frame ends no run
                self.damaged.setdefault(candidate, reason(error))
        raise NoFrame(self.damaged)

    def _candidates(self, frame: int) -> Iterator[tuple[int, bool]]:
        yield frame, False
        if self.tolerant:
            yield frame, True
        yield from ((other, False) for other in neighbours(frame, self.n_frames))
        if self.tolerant:
            yield from ((other, True) for other in neighbours(frame, self.n_frames))

    def fetch(self, frames: Sequence[int]) -> list[Frame | None]:
        """The files of `frames`, kept until the next call; None for one that cannot be read, which `use` then meets."""
        self._files = {}
        for frame in frames:
            with contextlib.suppress(Exception):
                self._files[frame] = self._last[1] if self._last and self._last[0] == frame else self.read(frame)
        return [self._files.get(frame) for frame in frames]

    def bytes_of(self, frame: int) -> Frame:
        """The file of a frame; of those that were not fetched the last is kept. Raises OSError: it cannot be read."""
        if frame in self._files:
            return self._files[frame]
        if self._last is None or self._last[0] != frame:
            self._last = (frame, self.read(frame))
        return self._last[1]


_kept = threading.local()


def _scratch(*shape: int) -> np.ndarray:
    """A buffer to decode into, uint8, that this thread uses again: a fresh one costs a page fault every 4 KiB.

    It begins 16 bytes beside a multiple of 32: into rows on a multiple libjpeg-turbo writes past the caches, where the
    resampling then has to fetch them from memory (a tenth of the time of both).
    """
    size = math.prod(shape)
    if getattr(_kept, "buffer", None) is None or _kept.buffer.size < size:
        memory = np.empty(size + 48, dtype=np.uint8)
        start = (16 - memory.ctypes.data) % 32
        _kept.buffer = memory[start : start + size]
    return _kept.buffer[:size].reshape(shape)


def _size(data: Frame, _: bool) -> tuple[Size, bool]:
    """(height, width) of a frame, and whether it is to be decoded."""
    return ((data.shape[0], data.shape[1]), False) if isinstance(data, np.ndarray) else (frame_size(data), True)


def _decode(data: Frame, tolerant: bool, *, factor: Callable[[int, int], int], buffer: np.ndarray) -> np.ndarray:
    return data if isinstance(data, np.ndarray) else decode_frame(data, factor=factor, tolerant=tolerant, buffer=buffer)


def read_clip(
    read: Callable[[int], Frame],
    frames: np.ndarray,
    boxes: Callable[[int, int], Sequence[Box]],
    out: torch.Tensor,
    *,
    n_frames: int,
    reduced: bool = True,
    tolerant: bool = False,
) -> dict[int, str]:
    """Read frames of one video and make R crops of them; every frame is decoded once.

    Parameters
    ----------
    read : callable
        The file of a frame by its number, or its pixels (H, W, 3) uint8; an OSError makes it a damaged frame.
    frames : (..., T) integers
        Frame numbers in [0, n_frames), in any order, also several times.
    boxes : callable
        R boxes for a frame of (height, width), asked once, for the first frame. On frames of other sizes they are
        the same shares of height and width.
    out : (R, ..., T, size, size, 3) uint8
        Where the clips go.
    n_frames : int
        Frames of the video, among which a damaged one finds its replacement.
    reduced : bool
        Decode JPEGs at 1/2, 1/4 or 1/8 of their size where every box still has `size` pixels a side.
    tolerant : bool
        Of a damaged frame use what decodes before its neighbour.

    Returns what is wrong with the damaged frames that were met, by frame number. Each was replaced by the nearest good
    one. Raises NoFrame where no frame of the video can be decoded.

    """
    source = FrameReader(read, n_frames, tolerant)
    frames = np.asarray(frames, dtype=np.int64)
    alone = len(out) == 1 or frames.size == frames.shape[-1]  # clips lie in `out` one behind the other
    in_place = alone and bool((np.diff(frames.reshape(-1)) > 0).all())
    wanted, places = (frames.reshape(-1), None) if in_place else np.unique(frames, return_inverse=True)
    shape, coded = source.use(int(wanted[0]), _size)
    crops = list(boxes(*shape))
    shape_of_all = (len(crops), len(wanted), *out.shape[-3:])
    once = out.view(shape_of_all) if in_place else out.new_empty(shape_of_all)
    _crop_frames(source, wanted, shape, crops, once, reduced=reduced and coded)
    if places is not None:
        rows = torch.from_numpy(places.reshape(frames.shape))
        for window in np.ndindex(frames.shape[:-1]):
            for crop, clips in zip(once, out, strict=True):
                torch.index_select(crop, 0, rows[window], out=clips[window])
    return source.damaged


def _crop_frames(
    source: FrameReader, wanted: np.ndarray, shape: Size, crops: list[Box], out: torch.Tensor, *, reduced: bool
) -> None:
    """Put the crops of the frames `wanted` (n,) into `out` (R, n, size, size, 3); boxes are of a frame of `shape`."""

    @functools.cache
    def factor(height: int, width: int) -> int:
        scaled = [scale_box(box, shape, (height, width)) for box in crops]
        return reduction(scaled, out.shape[-2]) if reduced else 1

    least = bounded_factor(*shape, factor(*shape))
    expected = (-(-shape[0] // least), -(-shape[1] // least), 3)
    chunk = min(len(wanted), max(1, CHUNK_BYTES // math.prod(expected)))
    buffer = _scratch(chunk, *expected)
    pixels, slots = torch.from_numpy(buffer), list(buffer)

    def resample(stack: torch.Tensor, end: int) -> None:
        count, height, width, _ = stack.shape
        for number, box in enumerate(crops):
            resize_crop(stack, scale_box(box, shape, (height, width)), out[number, end - count : end])

    # All files, then all pictures, then all crops: each finds its code and data in the caches.
    for first in range(0, len(wanted), chunk):
        part = wanted[first : first + chunk].tolist()
        held = 0
        for number, (frame, file) in enumerate(zip(part, source.fetch(part), strict=True)):
            slot = slots[held]
            if isinstance(file, bytes) and plain_jpeg_size(file) == shape and decode_plain_jpeg(file, least, slot):
                held += 1
                continue
            image = source.use(frame, functools.partial(_decode, factor=factor, buffer=slot))
            if image.shape == expected:
                if image is not slot:
                    slot[:] = image
                held += 1
                continue
            if held:
                resample(pixels[:held], first + number)
                held = 0
            resample(torch.from_numpy(image[None]), first + number + 1)
        if held:
            resample(pixels[:held], first + len(part))
