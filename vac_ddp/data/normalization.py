"""From uint8 pixels to what a model takes: one function for training, validation, prediction and export."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Values = Sequence[float] | Tensor


def normalize(clips: Tensor, mean: Values, std: Values, dtype: torch.dtype) -> Tensor:
    """Clips (B, T, H, W, 3) uint8 as (B, T, 3, H, W) `dtype`: value / 255, minus `mean`, over `std` (3 values each).

    The channels of a pixel stay neighbours in memory: one pass without a transposition, and `VideoMAE.embed` takes
    patches out in long runs.
    """
    batch, frames, height, width, _ = clips.shape
    mean, std = torch.as_tensor(mean, dtype=torch.float32), torch.as_tensor(std, dtype=torch.float32)
    scale, shift = (value.repeat(width).to(clips.device, non_blocking=True) for value in (1 / (255 * std), mean / std))
    out = clips.reshape(batch, frames, height, width * 3).to(torch.float32, copy=True)
    return out.mul_(scale).sub_(shift).to(dtype).view(clips.shape).permute(0, 1, 4, 2, 3)
