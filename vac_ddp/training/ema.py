"""A moving average of the weights, kept of the bare module so that no wrapper's prefix gets into a file."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from vac_ddp.runtime.torch_compat import move_towards

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """Exponential moving average of a model's parameters; buffers are copied.

    The decay rises as min(decay, (1 + step) / (10 + step)), so that a short run is not an average with its start
    (the rule of TensorFlow's ExponentialMovingAverage). A step whose `found_inf` is 1 leaves the average as it is.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.module: Model = copy.deepcopy(model)
        self.module.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, found_inf: torch.Tensor | None = None) -> None:
        """Take in the weights after optimizer step `step` (from 0), without a synchronisation."""
        share: torch.Tensor | float = 1.0 - min(self.decay, (1 + step) / (10 + step))
        if found_inf is not None:
            share = share * (1.0 - found_inf)
        move_towards(list(self.module.parameters()), list(model.parameters()), share)
        for kept, current in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(current)
