"""Clip augmentation on the device, whole batch at once.

Parameters are drawn per sample on the CPU and stay in host memory (they are a few hundred bytes); the device sees only
what it computes with. A clip's result depends on its own pixels and parameters alone, whatever batch it sits in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vac_ddp.settings import AugmentSettings


def draw_crop_box(
    rng: np.random.Generator, augment: AugmentSettings, height: int, width: int
) -> tuple[int, int, int, int]:
    """The random resized crop (top, left, height, width) in pixels of a frame of `height` x `width`.

    Area and log aspect ratio (width / height) are uniform; ten tries, then the largest centre crop within the ratios
    (the method of torchvision's `RandomResizedCrop`).
    """
    (low, high), (flat, wide) = augment.crop_scale, augment.crop_ratio
    for _ in range(10):
        area = height * width * rng.uniform(low, high)
        ratio = math.exp(rng.uniform(math.log(flat), math.log(wide)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < flat:
        h = max(1, round(width / flat))
    elif width / height > wide:
        w = max(1, round(height * wide))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_parameters(
    rng: np.random.Generator, augment: AugmentSettings, *, frames: int, size: int
) -> dict[str, np.ndarray]:
    """What happens to one clip of `frames` frames of `size` x `size` pixels, as arrays of fixed shapes."""
    return {"flip": np.array(rng.random() < augment.flip, dtype=np.bool_)}


def normalise(
    clips: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, dtype: torch.dtype
) -> Tensor:
    """Clips (B, T, H, W, 3) uint8 as (B, T, 3, H, W) `dtype`: value / 255, minus `mean`, over `std` (3 values each)."""
    return _normalise_planar(clips.permute(0, 1, 4, 2, 3), mean, std, dtype)


def augment_clips(
    clips: Tensor,
    params: dict[str, Tensor],
    augment: AugmentSettings,
    *,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Augmented and normalised clips: (B, T, H, W, 3) uint8 -> (B, T, 3, H, W) `dtype`."""
    flip = params["flip"].to(clips.device, non_blocking=True)
    planar = clips.permute(0, 1, 4, 2, 3)
    planar = torch.where(flip[:, None, None, None, None], planar.flip(-1), planar)
    return _normalise_planar(planar, mean, std, dtype)


def _normalise_planar(
    planar: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, dtype: torch.dtype
) -> Tensor:
    mean = torch.as_tensor(mean, dtype=torch.float32).to(planar.device, non_blocking=True).view(3, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32).to(planar.device, non_blocking=True).view(3, 1, 1)
    pixels = planar.to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.mul_(1 / (255 * std)).sub_(mean / std).to(dtype)
