"""What torch has no public name for, or another one in every version. No other file may use such a thing."""

from __future__ import annotations

import datetime
import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode  # re-exported


def move_towards(values: Sequence[Tensor], targets: Sequence[Tensor], share: Tensor | float) -> None:
    """Add `share` of the way to `targets` to each of `values`, in place, by one kernel for many tensors."""
    way: Any = torch._foreach_sub(list(targets), list(values))
    torch._foreach_mul_(way, share)
    torch._foreach_add_(list(values), way)


def skip_where(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Let the next step of a fused optimizer do nothing if `found_inf`, () float32 on its device, is 1."""
    inner: Any = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer keeps that of its shard there
    inner.found_inf, inner.grad_scale = found_inf, None


def uncompile(module: nn.Module) -> None:
    """Undo `nn.Module.compile` in `module` and all below it."""
    for part in module.modules():
        part._compiled_call_impl = None


def compile_whole_blocks() -> None:
    """Inside DDP's forward, compile a module as it is: by default it is cut where DDP's buckets end."""
    import torch._dynamo.config as dynamo

    dynamo.optimize_ddp = False


def graphs_compiled() -> int:
    """Graphs that were compiled in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported before something is compiled
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def resize_into(images: Tensor, out: Tensor) -> None:
    """Resample images (N, C, H, W) uint8 into `out` (N, C, h, w) uint8, antialiased bilinear.

    What F.interpolate(..., mode="bilinear", antialias=True) calls, but straight into its place: no copy behind it.
    """
    torch.ops.aten._upsample_bilinear2d_aa.out(images, out.shape[2:], False, out=out)


def end_workers(batches: Iterable[Any]) -> None:
    """End the processes behind the iterator of a DataLoader; without any, do nothing."""
    end = getattr(batches, "_shutdown_workers", None)
    if end is not None:
        end()


def no_buffer_broadcast() -> dict[str, Any]:
    """The argument by which DistributedDataParallel leaves buffers alone."""
    known = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}  # torch 2.15


def backends(group: dist.ProcessGroup) -> list[Any]:
    """The backends of a process group, one for each type of device."""
    return [group._get_backend(device) for device in group._device_types]


def set_backend_timeout(backend: Any, timeout: datetime.timedelta) -> None:
    """Change the longest wait of one backend's later collectives; torch's own function sets all of a group."""
    backend._set_default_timeout(timeout)


def default_store() -> dist.Store:
    """The store of the default process group."""
    return dist.distributed_c10d._get_default_store()
