"""BatchNorm layers: on the statistics that they came with, or on those of the micro-batch (`model.batch_norm`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of a model."""
    return [module for module in model.modules() if isinstance(module, _TYPES)]


def batch_norm_note(model: nn.Module, setting: str, *, trained: bool) -> list[str]:
    """What the load report says of a model's BatchNorm layers. trained: they came with weights."""
    norms = len(batch_norms(model))
    if not norms:
        return ["model.batch_norm=batch changes nothing: no BatchNorm layers"] if setting == "batch" else []
    if setting == "batch":
        return [f"{norms} BatchNorm layers use the statistics of each micro-batch in training"]
    notes = [f"{norms} BatchNorm layers keep their statistics in training"]
    if not trained:
        notes.append("BatchNorm from scratch has no statistics to keep: pretrained weights are advised")
    return notes


@contextlib.contextmanager
def statistics_unchanged(model: nn.Module) -> Iterator[None]:
    """Run BatchNorm layers on their stored statistics inside: a pass of zeros must not change these."""
    training = [module for module in batch_norms(model) if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of a model's BatchNorm layers."""
    names = ("running_mean", "running_var")
    found = [getattr(module, name) for module in batch_norms(model) for name in names]
    return [tensor for tensor in found if tensor is not None]
