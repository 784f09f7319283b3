"""The feature map of a timm model, and the means of its regions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models.video_model import check_grid, region_means


def feature_map(backbone: Any, features: Tensor) -> Tensor:
    """The map (N, H, W, C) in what a timm model's `forward_features` gives: a map, or the tokens of one.

    UserError where the tokens form no square.
    """
    if features.ndim == 4:
        return features if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features.movedim(1, -1)
    patches = features[:, getattr(backbone, "num_prefix_tokens", 0) or 0 :]
    side = math.isqrt(patches.shape[1])
    if features.ndim != 3 or side * side != patches.shape[1]:
        raise UserError(f"model.spatial_grid: the features of {type(backbone).__name__} form no map; set it to 1")
    return patches.unflatten(1, (side, side))


def pool_frames(backbone: Any, features: Tensor, grid: int) -> Tensor:
    """Features (N, D) of what `forward_features` gives: as timm's head pools it, or means of grid x grid regions."""
    if grid == 1:
        return backbone.forward_head(features, pre_logits=True)
    return region_means(feature_map(backbone, features), grid)


class _Map(nn.Module):
    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, frames: Tensor) -> Tensor:
        return feature_map(self.backbone, self.backbone.forward_features(frames))


def freeze_above_map(backbone: Any, *, size: int, grid: int) -> list[str]:
    """Freeze a timm model's parameters that its feature map does not use, and return their names.

    Found without computing, for frames of size x size pixels. DDP waits in vain for the gradient of such parameters.
    UserError where the map has fewer than grid x grid places.
    """
    module = _Map(backbone)
    parameters = {
        name: torch.empty_like(tensor, device="meta", requires_grad=True) for name, tensor in module.named_parameters()
    }
    buffers = {name: torch.empty_like(tensor, device="meta") for name, tensor in module.named_buffers()}
    frames = (torch.empty(1, 3, size, size, device="meta"),)
    maps = torch.func.functional_call(module, parameters | buffers, frames)
    check_grid(grid, *maps.shape[1:3])
    gradients = torch.autograd.grad(maps.sum(), list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for name in unused:
        module.get_parameter(name).requires_grad_(False)
    return [name.removeprefix("backbone.") for name in unused]
