"""One model on many ranks: DDP, equal weights, and an optimizer whose state is spread over the ranks (ZeRO stage 1)."""

from __future__ import annotations

from dataclasses import dataclass
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
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # its copies to the host are asynchronous, and it does not wait for them
    return optimizer.state_dict() if distributed.is_main() else {}


@dataclass(frozen=True, kw_only=True)
class _Described:
    """A tensor that is sent by itself."""

    shape: torch.Size
    dtype: torch.dtype


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None) -> None:
    """Load rank 0's `state` of an optimizer on every rank (None elsewhere); `state` itself is left alone.

    Tensors are broadcast one by one to where their parameters are. A rank of a sharded optimizer keeps its shard.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shard: Any = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer keeps that of its shard there
    own = {id(parameter) for group in shard.param_groups for parameter in group["params"]}
    saved = {} if state is None else state["state"]
    described = {number: {name: _describe(value) for name, value in entry.items()} for number, entry in saved.items()}
    groups, entries = distributed.broadcast_object((state and state["param_groups"], described))
    received: dict[int, dict[str, Any]] = {}
    for number, entry in entries.items():
        parameter = parameters[number]
        values = {
            name: _broadcast(value, saved.get(number, {}).get(name), parameter.device) for name, value in entry.items()
        }
        received[number] = values if id(parameter) in own else {}
    optimizer.load_state_dict({"state": received, "param_groups": groups})


def _describe(value: Any) -> Any:
    """The description of a tensor; scalars, as the number of steps, are sent as they are."""
    return _Described(shape=value.shape, dtype=value.dtype) if isinstance(value, Tensor) and value.ndim else value


def _broadcast(value: Any, source: Tensor | None, device: torch.device) -> Any:
    if not isinstance(value, _Described):
        return value
    tensor = torch.empty(value.shape, dtype=value.dtype, device=device)
    if source is not None:
        tensor.copy_(source)
    if distributed.active():
        dist.broadcast(tensor, src=0)
    return tensor
