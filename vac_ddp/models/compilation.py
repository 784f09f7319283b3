"""torch.compile for the blocks of a model where it works, and the passes of zeros that try it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vac_ddp.errors import UserError
from vac_ddp.models.batch_norm import statistics_unchanged
from vac_ddp.models.precision import autocast
from vac_ddp.models.video_model import VideoModel
from vac_ddp.runtime.torch_compat import uncompile
from vac_ddp.settings import ClipSettings

# Micro-batches of a training. Compiling takes about half a minute; a micro-batch that fills a GPU takes 0.3 s or more,
# of which a compiled model saves a fifth: 500 of them save half a minute.
WORTH_COMPILING = 500


def compile_if_it_works(
    model: VideoModel,
    first_pass: Callable[[], None],
    *,
    setting: str,
    wanted: bool | None,
    default: bool,
    gather: Callable[[str | None], list[Any]],
    say: Callable[[str], None],
) -> bool:
    """Compile the blocks of a model where it is `wanted`, or `default` where nothing is said; whether they are.

    first_pass: runs the model at the size that counts, so that this size gets kernels of its own. Where nobody asked
    for it and that fails on any rank, all ranks go on without, and the reason is said; where it was asked for,
    UserError. gather: the values of all ranks. To be called before DDP is built.
    """
    if not (wanted if wanted is not None else default):
        return False
    model.compile_blocks()
    reason = None
    try:
        first_pass()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a dozen kinds: no compiler, no Triton, an operation that it does not know
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    model.zero_grad(set_to_none=True)
    reasons = [told for told in gather(reason) if told]
    if not reasons:
        return True
    if wanted:
        raise UserError(f"{setting}=true, but the blocks cannot be compiled ({reasons[0]}); set {setting}=false")
    uncompile(model)
    say(f"compile off: {reasons[0]}")
    return False


def zero_clips(clip: ClipSettings, clips: int, device: torch.device) -> Tensor:
    """Clips (B, T, 3, S, S) of zeros, in memory as `normalize` leaves them: for other strides it is compiled anew."""
    return torch.zeros(clips, clip.frames, clip.size, clip.size, 3, device=device).permute(0, 1, 4, 2, 3)


def zeros_loss(
    model: VideoModel, clip: ClipSettings, clips: int, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """A loss of zero, with a graph, of a forward pass of `clips` clips of zeros under autocast to `dtype`."""
    noise = torch.full((clips, model.noise_size), 0.5, device=device)
    with autocast(device, dtype), statistics_unchanged(model):
        loss: Tensor = model(zero_clips(clip, clips, device), noise).float().sum() * 0.0
    return loss


def train_pass(
    model: VideoModel, clip: ClipSettings, clips: int, device: torch.device, dtype: torch.dtype | None
) -> None:
    """A forward and backward pass of clips of zeros."""
    zeros_loss(model, clip, clips, device, dtype).backward()
