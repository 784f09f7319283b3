"""Pixel operations on planar uint8 clips (N, T, 3, H, W), each with one value a clip, as Pillow defines them.

What is measured (histogram, mean) is measured per frame, as when a clip is augmented frame by frame. The results are
Pillow's to the last bit, except for :func:`resample`. Nothing here waits for the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vac_ddp.data.randaugment import Op

FIXED = frozenset({Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, Op.BRIGHTNESS})  # see fixed_table

FILL = 128.0  # what comes from outside the frame: the grey of timm and of the VideoMAE recipe


def fixed_table(op: Op, value: float) -> np.ndarray:
    """The (256,) uint8 table of an operation that needs nothing of the picture but each grey level by itself."""
    level = np.arange(256)
    if op is Op.INVERT:
        table = 255 - level
    elif op is Op.POSTERIZE:
        table = level & (256 - (1 << (8 - int(value))))
    elif op is Op.SOLARIZE:
        table = np.where(level < value, level, 255 - level)
    elif op is Op.SOLARIZE_ADD:
        table = np.where(level < 128, np.minimum(level + int(value), 255), level)
    elif op is Op.BRIGHTNESS:
        table = np.clip(level.astype(np.float32) * np.float32(value), 0, 255)
    else:
        raise ValueError(f"{op!r} is not one table for every picture")
    return table.astype(np.uint8)


def lookup(clips: Tensor, tables: Tensor) -> Tensor:
    """Replace every grey level by its entry in `tables`, uint8 and broadcastable to (N, T, 3, 256)."""
    n, t, c, h, w = clips.shape
    rows = tables.expand(n, t, c, 256).reshape(-1, 256)
    return rows.gather(1, clips.reshape(-1, h * w).long()).view_as(clips)


def autocontrast(clips: Tensor) -> Tensor:
    """Stretch every channel of every frame to 0..255; one of a single grey level stays."""
    flat = clips.flatten(3)
    low, high = flat.amin(3, keepdim=True).double(), flat.amax(3, keepdim=True).double()
    level = torch.arange(256, device=clips.device, dtype=torch.float64)
    scale = 255.0 / (high - low)
    table = torch.where(high > low, level * scale + -low * scale, level)
    return lookup(clips, table.clamp(0, 255).to(torch.uint8))


def equalize(clips: Tensor) -> Tensor:
    """Make the grey levels of every channel of every frame equally frequent."""
    h, w = clips.shape[-2:]
    level = clips.reshape(-1, h * w).long()
    counts = torch.zeros(len(level), 256, dtype=torch.int64, device=clips.device)
    counts.scatter_add_(1, level, torch.ones((), dtype=torch.int64, device=clips.device).expand_as(level))
    last = counts.gather(1, level.amax(1, keepdim=True))
    step = (h * w - last) // 255
    below = counts.cumsum(1) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=clips.device)).to(torch.uint8)
    return table.gather(1, level).view_as(clips)


def contrast(clips: Tensor, factor: Tensor) -> Tensor:
    """Move every frame away from (factor > 1) or towards (< 1) its mean grey level; `factor` (N,) float32."""
    mean = grey(clips).sum((2, 3, 4), dtype=torch.int64).double() / (clips.shape[3] * clips.shape[4])
    mean = (mean + 0.5).floor().float()[:, :, None, None]  # (N, T, 1, 1)
    level = torch.arange(256, device=clips.device, dtype=torch.float32)
    return lookup(clips, blend(mean, level, factor[:, None, None, None]))


def color(clips: Tensor, factor: Tensor) -> Tensor:
    """Move every pixel away from or towards its own grey; `factor` (N,) float32, 0: black and white, 1: unchanged."""
    return blend(grey(clips).float(), clips.float(), factor[:, None, None, None, None])


def sharpness(clips: Tensor, factor: Tensor) -> Tensor:
    """Move every pixel away from or towards the smoothed frame; `factor` (N,) float32, 0: smoothed, 1: unchanged.

    Smoothed is the mean of 3 x 3 pixels with the centre counted five times; the outermost pixels stay as they are.
    """
    if min(clips.shape[-2:]) < 3:
        return clips
    wide = clips.float()
    inner = wide[..., 1:-1, 1:-1]
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4)
    smooth = total.mul_(1 / 13).add_(0.5).floor_()  # a sum is at least 1/26 from a tie: no rounding error matters
    out = clips.clone()
    out[..., 1:-1, 1:-1] = blend(smooth, inner, factor[:, None, None, None, None])
    return out


def resample(clips: Tensor, matrix: Tensor) -> Tensor:
    """Move the pixels of each clip by an affine map, bicubic, with grey where the source lies outside the frame.

    `matrix` (N, 2, 3) float32 leads from places in the result to places in `clips`, in pixels from the upper left
    corner. Beside Pillow: the cubic's slope is -0.75 (Pillow: -1), and the result is rounded (Pillow cuts it off).
    """
    n, t, c, h, w = clips.shape
    x = torch.arange(w, device=clips.device, dtype=torch.float32) + 0.5
    y = (torch.arange(h, device=clips.device, dtype=torch.float32) + 0.5)[:, None]
    m = matrix[:, :, :, None, None]
    source = m[:, :, 0] * x + m[:, :, 1] * y + m[:, :, 2]  # (N, 2, H, W): x and y
    limit = torch.stack((torch.full_like(x[0], w), torch.full_like(x[0], h))).view(2, 1, 1)
    inside = ((source >= 0) & (source < limit)).all(1)[:, None]
    grid = (source * (2 / limit) - 1).permute(0, 2, 3, 1)
    planes = clips.reshape(n, t * c, h, w).float()
    moved = functional.grid_sample(planes, grid, mode="bicubic", padding_mode="border", align_corners=False)
    moved = torch.where(inside, moved, FILL)
    return moved.round_().clamp_(0, 255).to(torch.uint8).view_as(clips)


MEASURED = {Op.AUTOCONTRAST: autocontrast, Op.EQUALIZE: equalize}
ENHANCED = {Op.COLOR: color, Op.CONTRAST: contrast, Op.SHARPNESS: sharpness}


def grey(clips: Tensor) -> Tensor:
    """Luma of (..., 3, H, W) uint8 as (..., 1, H, W) int32 (ITU-R 601-2 in 16-bit integers, rounded)."""
    red, green, blue = clips.to(torch.int32).split(1, dim=-3)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


def blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Go from `start` (factor 0) to `end` (factor 1) and beyond, cut to 0..255: float32 in, uint8 out."""
    return (factor * (end - start) + start).clamp_(0, 255).to(torch.uint8)


def normal_noise(seeds: list[int], sizes: list[int], device: torch.device) -> Tensor:
    """Standard normal numbers, float32 (sum of sizes,): sizes[i] of them from seeds[i], one stretch after the other.

    Each is a pure function of its seed and its place in its stretch, the same on every device to rounding, without
    the state of a generator: a 32-bit integer hash (Wellons' lowbias32 with constants whose products fit int64) and
    the inverse of the normal distribution. Seeds lie in 0 to 2**32 - 1.
    """
    mask, total = 0xFFFFFFFF, sum(sizes)

    def scatter(x: Tensor) -> Tensor:
        x = (x ^ (x >> 16)) * 0x21F0AAAD & mask
        x = (x ^ (x >> 15)) * 0x735A2D97 & mask
        return x ^ (x >> 15)

    def spread(values: Tensor) -> Tensor:
        values, lengths = values.to(device, non_blocking=True), torch.tensor(sizes).to(device, non_blocking=True)
        return values if len(sizes) == 1 else torch.repeat_interleave(values, lengths, output_size=total)

    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    place = torch.arange(total, device=device) - spread(starts)
    bits = scatter(scatter(place) + spread(torch.tensor(seeds)) & mask) >> 9  # 23 bits: the half below is exact
    return torch.erfinv((bits.float() + 0.5) * 2.0**-22 - 1).mul_(2**0.5)
