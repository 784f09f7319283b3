"""How many clips fit into one micro-batch on this GPU, tried before DDP is built; and the equal pieces of a step."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from vac_ddp.data.loader import clip_bytes
from vac_ddp.data.sampler import clips_of_rank, equal_pieces, steps_of_epoch
from vac_ddp.errors import UserError
from vac_ddp.models import VideoModel
from vac_ddp.models.compilation import train_pass
from vac_ddp.models.precision import AUTOCAST
from vac_ddp.runtime import distributed
from vac_ddp.settings import ClipSettings, Config
from vac_ddp.training.checkpoint import device_name

HEADROOM = 0.9  # of the memory that is free: the rest is for fragmentation and what augmentation needs in between
CPU_CLIPS = 8


def auto_clips_per_gpu(
    config: Config,
    model: VideoModel,
    device: torch.device,
    facts: Mapping[str, Any] | None,
    *,
    precision: str,
    videos: int,
) -> int:
    """The micro-batch of train.clips_per_gpu=auto: a rank's clips of a step in as few equal pieces as fit.

    What fits is tried on GPUs, the smallest counts; 8 clips on the CPU. A run that resumes on the same devices, as
    many, keeps its pieces. facts: of the checkpoint that is resumed; videos: of the training split. A collective.
    """
    if facts is not None and same_devices(config, facts):
        return int(facts["clips_per_gpu"])
    repeats = config.augment.repeats
    per_step = config.train.global_batch // repeats
    steps = steps_of_epoch(videos, per_step)
    draws = -(-videos // steps) if config.train.even_steps else min(per_step, videos)
    clips = clips_of_rank(draws, repeats, distributed.world_size())
    most = -(-clips // (2 * repeats)) * 2 * repeats  # whole units, as the pieces are
    fit = CPU_CLIPS
    if device.type == "cuda":
        reserved = reserved_bytes(config, model, clips=most, world=distributed.world_size())
        found = fit_clips(model, config.clip, autocast=AUTOCAST[precision], most=most, reserved=reserved, device=device)
        fit = min(distributed.all_gather_objects(found))
    return equal_pieces(most, fit, repeats)


def same_devices(config: Config, facts: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a run with these devices, and with settings that need as much of their memory."""
    now = {
        "device": " + ".join(sorted(set(distributed.all_gather_objects(device_name())))),
        "device_memory": device_memory(),
        "world_size": distributed.world_size(),
        "checkpointing": config.train.checkpointing,
        "shard": config.optim.shard,
    }
    return all(facts.get(name, value) == value for name, value in now.items())


def device_memory() -> int:
    """MiB of the smallest GPU of all ranks; 0 on CPUs. A collective."""
    cuda = torch.cuda.is_available()
    own = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory >> 20 if cuda else 0
    return min(distributed.all_gather_objects(own))


def reserved_bytes(config: Config, model: VideoModel, *, clips: int, world: int) -> int:
    """Bytes of a GPU that training needs beside a pass and its gradients.

    AdamW's two moments of what is trained (a rank's share of them if sharded), the buffer of a bfloat16 reduction, the
    moving average, and the uint8 clips of a step: twice, as the next step's come before the old ones are let go.
    """
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    moments = 2 * trained // (world if config.optim.shard else 1)
    buffer = trained // 2 if config.train.bf16_reduce and world > 1 else 0
    tensors = [*model.parameters(), *model.buffers()] if config.train.ema_decay is not None else []
    average = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return moments + buffer + average + 2 * clips * clip_bytes(config.clip)


def fit_clips(
    model: VideoModel,
    clip: ClipSettings,
    *,
    autocast: torch.dtype | None,
    most: int,
    reserved: int,
    device: torch.device,
) -> int:
    """The largest number of clips, at most `most`, whose forward and backward pass fit on a CUDA `device`.

    reserved: bytes that are kept free meanwhile. Doubling, then halving the gap. UserError where not even one clip
    fits.
    """
    good, bad, size = 0, most + 1, 1
    ballast = None
    room = int(HEADROOM * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)))
    try:
        ballast = torch.empty(reserved, dtype=torch.uint8, device=device)
        while good < size < bad:
            if _passes(model, clip, autocast, size, room, device):
                good = size
                size = min(2 * size, most) if bad > most else (good + bad) // 2
            else:
                bad = size
                size = (good + bad) // 2
    except torch.OutOfMemoryError:
        good = 0  # no room for what is reserved
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
    model: VideoModel, clip: ClipSettings, autocast: torch.dtype | None, size: int, room: int, device: torch.device
) -> bool:
    torch.cuda.reset_peak_memory_stats(device)
    try:
        train_pass(model, clip, size, device, autocast)
        return torch.cuda.max_memory_reserved(device) < room
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
