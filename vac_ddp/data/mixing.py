"""Mixup and cutmix for pairs of clips.

A clip is mixed with its partner and the partner with it, with the same share and the same box, so a pair is one draw
and the result does not depend on the batch around it. Cutmix cuts on the last two axes (height and width) through all
frames. Mixup: Zhang et al. 2018, cutmix: Yun et al. 2019; draws as in timm's `Mixup` (mode "batch", here per pair).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vac_ddp.data.frames import Box
from vac_ddp.settings import AugmentSettings


def draw_mixing(rng: np.random.Generator, augment: AugmentSettings, *, size: int) -> dict[str, np.ndarray]:
    """How one pair of clips of `size` x `size` pixels is mixed; every clip of the pair carries the same values.

    Returns
    -------
    mix_keep : () float32 in [0, 1]
        Share of a clip that stays its own: lambda of mixup, and for cutmix the area outside the box; 1: not mixed.
    mix_box : (4,) int64
        top, left, height, width of the box that cutmix pastes; empty for mixup.
    mix_cut : () bool
        Whether it is cutmix.

    """
    mixup, cutmix = augment.mixup > 0, augment.cutmix > 0
    keep, box, cut = 1.0, (0, 0, 0, 0), False
    if (mixup or cutmix) and rng.random() < augment.mix_probability:
        cut = rng.random() < augment.mix_switch if mixup and cutmix else cutmix
        alpha = augment.cutmix if cut else augment.mixup
        keep = rng.beta(alpha, alpha)
        if cut:
            box = cutmix_box(rng, keep, size, size)
            keep = 1.0 - box[2] * box[3] / (size * size)
    return {
        "mix_keep": np.array(keep, dtype=np.float32),
        "mix_box": np.array(box, dtype=np.int64),
        "mix_cut": np.array(cut, dtype=np.bool_),
    }


def cutmix_box(rng: np.random.Generator, lam: float, height: int, width: int) -> Box:
    """A box (top, left, height, width) of about (1 - lam) of the area around a uniform centre, cut at the borders."""
    ratio = np.sqrt(1.0 - lam)
    cut_height, cut_width = int(height * ratio), int(width * ratio)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - cut_height // 2, 0), min(y + (cut_height + 1) // 2, height)
    left, right = max(x - cut_width // 2, 0), min(x + (cut_width + 1) // 2, width)
    return top, left, bottom - top, right - left


def mix(clips: Tensor, partner: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mix each clip with its partner.

    Parameters
    ----------
    clips : (B, T, C, H, W) float
        Normalized clips; not changed. B may be 0.
    partner : (B,) int64
        Row of the partner; its own row: the clip stays as it is, whatever `params` say.
    params : dict of tensors
        `mix_keep` (B,), `mix_box` (B, 4), `mix_cut` (B,) of :func:`draw_mixing`, equal for the two rows of a pair,
        on the host or the device.

    Returns
    -------
    clips : (B, T, C, H, W), dtype as given
    keep : (B,) float32
        Share of the clip's own label, for :func:`soft_targets`.

    """
    device = clips.device
    partner = partner.to(device, non_blocking=True)
    keep, box, cut = (params[name].to(device, non_blocking=True) for name in ("mix_keep", "mix_box", "mix_cut"))
    alone = partner == torch.arange(len(clips), device=device)
    keep = torch.where(alone, torch.ones_like(keep), keep)

    y = torch.arange(clips.shape[-2], device=device)
    x = torch.arange(clips.shape[-1], device=device)
    top, left, height, width = box.split(1, dim=1)
    rows = (y >= top) & (y < top + height)
    columns = (x >= left) & (x < left + width)
    outside = ~(rows[:, :, None] & columns[:, None, :])
    own = torch.where(cut[:, None, None], outside.to(keep.dtype), keep[:, None, None])
    own = own[:, None, :, :, None]  # (B, 1, H, W, 1)
    wide = clips.movedim(2, -1).float()  # a share in bfloat16 would be off by up to 0.4 %
    mixed = torch.lerp(wide.index_select(0, partner), wide, own)
    return mixed.to(clips.dtype).movedim(-1, 2), keep


def soft_targets(labels: Tensor, partner_labels: Tensor, keep: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Targets of mixed clips: (B, K) float32, rows sum to 1.

    `labels`, `partner_labels` (B,) int64 in [0, K), `keep` (B,) share of the own label, `smoothing` in [0, 1): every
    class gets smoothing / K and the label 1 - smoothing more, as in timm's `mixup_target`.
    """
    off = smoothing / num_classes
    on = 1.0 - smoothing + off

    def smoothed(classes: Tensor) -> Tensor:
        targets = torch.full((len(classes), num_classes), off, dtype=torch.float32, device=classes.device)
        return targets.scatter_(1, classes[:, None], on)

    share = keep.to(torch.float32)[:, None]
    return smoothed(labels) * share + smoothed(partner_labels) * (1 - share)
