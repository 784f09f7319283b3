"""One model on many ranks: DDP, equal weights, and an optimizer whose state is spread over the ranks (ZeRO stage 1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vac_ddp.runtime import distributed
from vac_ddp.runtime.torch_compat import no_buffer_broadcast


def wrap(model: nn.Module, device: torch.device, *, bf16_reduce: bool) -> nn.Module:
    """The model under DDP, or as it is in a single process. bf16_reduce: gradients travel in bfloat16."""
    if not distributed.active():
        return model
    network = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **no_buffer_broadcast(),
    )
    if bf16_reduce:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        network.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return network


def load_state(module: nn.Module, state: dict[str, Any] | None) -> None:
    """Load rank 0's `state` on every rank (None elsewhere)."""
    if state is not None:
        module.load_state_dict(state)
    if distributed.active():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def average(tensors: list[Tensor]) -> None:
    """Replace float32 tensors by their mean over the ranks, in place. A collective, but for no tensors."""
    if not tensors or not distributed.active():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / distributed.world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def sharded_adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """AdamW whose state is spread over the ranks; a plain one in a single process."""
    if not distributed.active():
        return torch.optim.AdamW(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer on rank 0, empty elsewhere. A collective."""
    consolidate = getattr(optimizer, "consolidate_state_dict", None)
    if consolidate is not None:
        consolidate(to=0)
    return optimizer.state_dict() if distributed.is_main() else {}
