"""JPEG files that a loader process only reads: decoded, cut and resampled on the device (`data.decode=gpu`).

torchvision decodes on CUDA with nvJPEG. What that does not know (PNG, CMYK, an EXIF orientation, a cut-off file) the
loader process decodes as always and encodes anew, nearly without loss. Pixels differ from the CPU's by a few grey
levels: another inverse transform, another upsampling of colour, a resampling in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from vac_ddp.data.decode import DamagedFrame, decode_frame, frame_size, is_plain_jpeg
from vac_ddp.data.frames import Box, FrameReader, scale_box
from vac_ddp.errors import UserError


@dataclass(kw_only=True)
class Layout:
    """Where the frames of C clips of T frames are in the bytes of n files behind each other.

    ends : (n,) int64, end of each file
    files : (C, T) int64, the file of every frame, -1: zeros
    boxes : (C, T, 4) int64, top, left, height, width of what is cut out of it
    size : pixels of a side of the result
    shape : leading shape of the result, C in all
    """

    ends: np.ndarray
    files: np.ndarray
    boxes: np.ndarray
    size: int
    shape: tuple[int, ...]


def check_decoder(decode: str, device: torch.device) -> None:
    """UserError where data.decode=gpu has no GPU to decode on."""
    if decode == "gpu" and device.type != "cuda":
        raise UserError("data.decode=gpu needs a CUDA device, and this process has none: set data.decode=cpu")


class Gathering:
    """The files of the clips of one load batch."""

    def __init__(self, clips: int, frames: int) -> None:
        self.data: list[bytes] = []
        self.files = np.full((clips, frames), -1, np.int64)
        self.boxes = np.zeros((clips, frames, 4), np.int64)

    def add(
        self,
        rows: Sequence[int] | np.ndarray,
        read: Callable[[int], bytes],
        frames: np.ndarray,
        boxes: Callable[[int, int], Sequence[Box]],
        *,
        n_frames: int,
        tolerant: bool = False,
    ) -> dict[int, str]:
        """Take in windows (K, T) of one video, R crops of each: rows has R * K places, crop by crop within a window.

        The other arguments, the result and what is raised are those of `frames.read_clip`.
        """
        source = FrameReader(read, n_frames, tolerant)
        wanted, places = np.unique(np.asarray(frames, np.int64), return_inverse=True)
        shape = source.use(int(wanted[0]), lambda data, _: frame_size(data))
        crops = list(boxes(*shape))
        first = len(self.data)
        sizes = []
        for frame in wanted.tolist():
            self.data.append(source.use(frame, plain_jpeg))
            sizes.append(frame_size(self.data[-1]))
        scaled = np.array([[scale_box(box, shape, size) for size in sizes] for box in crops])  # (R, n, 4)
        places = places.reshape(-1, self.files.shape[1])
        for row, (window, crop) in zip(rows, np.ndindex(len(places), len(crops)), strict=True):
            self.files[row] = first + places[window]
            self.boxes[row] = scaled[crop, places[window]]
        return source.damaged

    def layout(self, size: int, shape: tuple[int, ...]) -> Layout:
        """What is needed to find the clips in the bytes."""
        ends = np.cumsum([len(data) for data in self.data], dtype=np.int64)
        return Layout(ends=ends, files=self.files, boxes=self.boxes, size=size, shape=shape)


def plain_jpeg(data: bytes, tolerant: bool) -> bytes:
    """A file that nvJPEG decodes as we do: `data` itself, or its pixels encoded anew. Raises DamagedFrame."""
    if is_plain_jpeg(data):
        return data
    image = decode_frame(data, tolerant=tolerant)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=98, colorsubsampling="444")


def decode_clips(data: Tensor, layout: Layout, device: torch.device) -> Tensor:
    """Clips (*shape, T, size, size, 3) uint8 on `device` of the bytes (L,) uint8 in host memory."""
    starts = [0, *layout.ends.tolist()][:-1]
    files = [data[start:end] for start, end in zip(starts, layout.ends.tolist(), strict=True)]
    images = _decode_all(files, device)
    clips, frames = layout.files.shape
    out = torch.zeros((clips, frames, layout.size, layout.size, 3), dtype=torch.uint8, device=device)
    for clip in range(clips):
        numbers, boxes = layout.files[clip].tolist(), layout.boxes[clip].tolist()
        if numbers[0] < 0:
            continue
        parts = [_cut(images[number], box) for number, box in zip(numbers, boxes, strict=True)]
        if len({part.shape for part in parts}) == 1:
            out[clip] = _resample(torch.stack(parts), layout.size)
        else:
            for frame, part in enumerate(parts):
                out[clip, frame] = _resample(part[None], layout.size)[0]
    return out.view(*layout.shape, *out.shape[1:])


def _cut(image: Tensor, box: list[int]) -> Tensor:
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def _resample(pixels: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) uint8 to (N, size, size, 3) uint8, antialiased bilinear."""
    resized = F.interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _decode_all(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """(3, H, W) uint8 on `device` for every file; what the decoder refuses is decoded on the host as far as it goes."""
    from torchvision.io import ImageReadMode, decode_jpeg

    if not files:
        return []
    where = str(device) if device.type == "cuda" else "cpu"
    try:
        return decode_jpeg(files, mode=ImageReadMode.RGB, device=where)
    except RuntimeError:
        images = []
        for file in files:
            try:
                images += decode_jpeg([file], mode=ImageReadMode.RGB, device=where)
            except RuntimeError:
                images.append(_on_host(file).to(device))
        return images


def _on_host(file: Tensor) -> Tensor:
    try:
        return torch.from_numpy(decode_frame(file.numpy().tobytes(), tolerant=True)).permute(2, 0, 1)
    except DamagedFrame as error:
        raise UserError(
            f"a frame cannot be decoded on the GPU ({error}): set data.decode=cpu, which names and replaces it"
        ) from None
