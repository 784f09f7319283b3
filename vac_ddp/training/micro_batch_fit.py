"""How many clips fit into one micro-batch on this GPU: tried, before DDP is built."""

from __future__ import annotations

import gc

import torch

from vac_ddp.errors import UserError
from vac_ddp.models import VideoModel
from vac_ddp.models.compilation import train_pass
from vac_ddp.settings import ClipSettings

HEADROOM = 0.9  # of the memory that is free: gradients' buckets, optimizer and fragmentation come later


def fit_clips(
    model: VideoModel, clip: ClipSettings, *, autocast: torch.dtype | None, most: int, device: torch.device
) -> int:
    """The largest number of clips, at most `most`, whose forward and backward pass fit on a CUDA `device`.

    Room is kept for AdamW's two moments and DDP's buckets (three float32 copies of the weights). Doubling, then
    halving the gap. UserError where not even one clip fits.
    """
    ballast = [torch.empty_like(p, dtype=torch.float32) for p in model.parameters() for _ in range(3)]
    good, bad = 0, most + 1
    size = 1
    try:
        while good < size < bad:
            if _passes(model, clip, autocast, size, device):
                good = size
                size = min(2 * size, most) if bad > most else (good + bad) // 2
            else:
                bad = size
                size = (good + bad) // 2
    finally:
        del ballast
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    if not good:
        raise UserError(
            "CUDA out of memory with a single clip: lower clip.frames or clip.size, raise train.checkpointing, "
            "or take a smaller model"
        )
    return good


def _passes(
    model: VideoModel, clip: ClipSettings, autocast: torch.dtype | None, size: int, device: torch.device
) -> bool:
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        train_pass(model, clip, size, device, autocast)
        return torch.cuda.max_memory_reserved(device) < HEADROOM * total
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
