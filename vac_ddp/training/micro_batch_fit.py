"""How many clips fit into one micro-batch on this GPU: tried, before DDP is built."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from typing import Any

import torch

from vac_ddp.errors import UserError
from vac_ddp.models import VideoModel
from vac_ddp.models.compilation import train_pass
from vac_ddp.models.precision import AUTOCAST, precision_of
from vac_ddp.runtime import distributed
from vac_ddp.settings import ClipSettings, Config

HEADROOM = 0.9  # of the memory that is free: gradients' buckets, optimizer and fragmentation come later


def auto_clips_per_gpu(config: Config, model: VideoModel, device: torch.device, facts: Mapping[str, Any] | None) -> int:
    """The micro-batch of train.clips_per_gpu=auto: as the run had it, 8 on the CPU, or what fits on every GPU.

    facts: of the checkpoint that is resumed. A collective.
    """
    if facts is not None:
        return int(facts["clips_per_gpu"])
    if device.type != "cuda":
        return 8
    most = math.ceil(config.train.global_batch / distributed.world_size())
    dtype = AUTOCAST[precision_of(config, distributed.weakest_gpu(device))]
    return min(distributed.all_gather_objects(fit_clips(model, config.clip, autocast=dtype, most=most, device=device)))


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
