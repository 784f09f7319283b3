"""Ranks: start, end, agree, sum counts, gather rows by index. Knows nothing of models or data.

Without torchrun (no RANK in the environment) everything works in one process, without a process group.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vac_ddp.errors import USER_ERROR, Cause, UserError, exit_status, plain
from vac_ddp.runtime import torch_compat
from vac_ddp.runtime.gpus import Gpu, check_kernels, cuda_available, gpu_of
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.parent import signal_when_parent_dies
from vac_ddp.runtime.ranks import is_main, local_rank, rank, under_torchrun, world_size

Result = TypeVar("Result")


def active() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def pick_device() -> torch.device:
    """The GPU of this local rank, or the CPU. More ranks than GPUs is an error, not a shared GPU.

    UserError also where there is a GPU that the installed torch cannot use, unless CUDA_VISIBLE_DEVICES hides it.
    """
    if not cuda_available():
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank()} wants GPU {local_rank()}, this machine has {torch.cuda.device_count()}: "
            "lower --nproc_per_node, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", local_rank())
    check_kernels(device)
    return device


def weakest_gpu(device: torch.device) -> Gpu | None:
    """The GPU of the lowest compute capability among those of all ranks; None on CPUs. A collective."""
    found = [gpu for gpu in all_gather_objects(gpu_of(device)) if gpu is not None]
    return min(found, key=lambda gpu: (gpu.bf16, gpu.capability), default=None)


# NCCL ends the process where a collective runs into its timeout, gloo raises: gloo and the monitor come before it.
NCCL_LONGER_S = 60.0


def start(device: torch.device | None = None, *, timeout_s: float) -> torch.device:
    """Join the process group and return this rank's device (None: its GPU, or the CPU).

    Objects and tensors of the CPU travel by gloo, those of a GPU by NCCL. A failed start raises: no run falls back to
    one rank. A rank that cannot have its device, or has one of another type, is an error of all.
    """
    error: UserError | None = None
    if device is None:
        try:
            device = pick_device()
        except UserError as caught:
            error = caught
    if under_torchrun() and not active():
        timeout = datetime.timedelta(seconds=timeout_s)
        store = _rendezvous(timeout)
        check_devices(dist.PrefixStore("vac_ddp/devices", store), device, error)
        assert device is not None, "an error was raised"
        dist.init_process_group(
            backends(device.type == "cuda"), timeout=timeout, store=store, rank=rank(), world_size=world_size()
        )
        set_timeout(timeout_s)
    if active():
        _side_store()
    PROCESS.connect(sys.modules[__name__])
    raise_together(error)
    assert device is not None, "an error was raised"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def backends(cuda: bool) -> str:
    """The backends of the process group by type of device, as torch takes them."""
    return "cpu:gloo,cuda:nccl" if cuda else "gloo"


def check_devices(store: dist.Store, device: torch.device | None, error: UserError | None) -> None:
    """UserError, the same on every rank, where a rank has an `error` in place of a device, or ranks see other types.

    By the store alone: a process group of GPUs does not come up where a rank has none.
    """
    mine = {"host": socket.gethostname(), "type": device and device.type, "error": error and str(error)}
    store.set(f"{rank()}", json.dumps(mine))
    everyone = [json.loads(store.get(f"{other}")) for other in range(world_size())]
    problem = next((told["error"] for told in everyone if told["error"] is not None), None)
    if problem is None and len({told["type"] for told in everyone}) > 1:
        seen = ", ".join(f"rank {other} {told['type']} ({told['host']})" for other, told in enumerate(everyone))
        problem = (
            f"the ranks see different types of devices: {seen}; give each rank a GPU, or hide the GPUs on all "
            "machines with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    if problem is None:
        return
    store.set(f"{rank()} has read", "")
    with contextlib.suppress(RuntimeError):  # the store may be of a rank that leaves now
        store.wait([f"{other} has read" for other in range(world_size())], datetime.timedelta(seconds=20))
    raise UserError(problem)


def _rendezvous(timeout: datetime.timedelta) -> dist.Store:
    """The store where the ranks of this attempt meet."""
    store = _attempt_store(timeout)
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", rank(), world_size(), timeout=timeout))
        store = dist.PrefixStore("default_pg", store)  # as init_process_group does
    return store


def _attempt_store(timeout: datetime.timedelta) -> dist.Store | None:
    """The agent's store under a prefix of this attempt, on one machine; None: as torch meets by default.

    torchrun's agent keeps its store over --max-restarts, so that a restarted rank could read the address that its
    neighbour had in the attempt before, and fail (seen with torch 2.15). Agents of several machines count restarts
    each for itself: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes the store new (the SLURM scripts set it).
    Ranks whose agent is killed are signalled: nobody else would end them, and they hold the run's lock.
    """
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not one_machine:
        return None
    signal_when_parent_dies(signal.SIGTERM)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # the store is older than this process; torch would try for as long as the timeout
        socket.create_connection((host, port), timeout=60).close()
    except OSError as error:
        raise UserError(f"no torchrun at {host}:{port}, which started this rank ({error}): was it killed?") from error
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def set_timeout(timeout_s: float, group: dist.ProcessGroup | None = None) -> None:
    """Change the longest wait of later collectives; NCCL's is NCCL_LONGER_S longer than gloo's."""
    if not active():
        return
    group = group or dist.group.WORLD
    assert group is not None, "active"
    for backend in torch_compat.backends(group):
        longer = NCCL_LONGER_S if dist.is_nccl_available() and isinstance(backend, dist.ProcessGroupNCCL) else 0.0
        torch_compat.set_backend_timeout(backend, datetime.timedelta(seconds=timeout_s + longer))


def side_store(prefix: str) -> Any:
    """A connection of its own to the store of the process group, safe to use from a thread; None without a group."""
    if not active():
        return None
    return dist.PrefixStore(f"vac_ddp/{prefix}", torch_compat.default_store().clone())


def report_cause(cause: Cause) -> Cause:
    """Leave the cause of a failure where the other ranks find it; returns the one that was left first."""
    if active():
        with contextlib.suppress(RuntimeError):  # the store went away with its rank
            return _cause(_side_store().compare_set("cause", "", json.dumps(asdict(cause))))
    return cause


def first_cause() -> Cause | None:
    """Why the first rank that failed did so, if it could say it. May be called from any thread."""
    if active():
        with contextlib.suppress(RuntimeError):
            store = _side_store()
            if store.check(["cause"]):
                return _cause(store.get("cause"))
    return None


def _cause(data: bytes) -> Cause:
    return Cause(**json.loads(data))


@functools.cache
def _side_store() -> Any:
    """One connection for causes: the main thread's own is in use while it waits in it."""
    return side_store("causes")


def control_group(*, timeout_s: float) -> dist.ProcessGroup | None:
    """A gloo group for small host-side agreements, beside the one that carries gradients."""
    if not active():
        return None
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup), "all ranks are in it"
    return group


def end(status: int) -> None:
    """Leave the process group and the process, in an order in which gloo does not abort.

    Interpreter shutdown with live gloo threads ended in "terminate called without an active exception"
    in half of the good runs; leaving by os._exit after destroy_process_group never did.
    """
    if active():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if under_torchrun():
        os._exit(status)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for all ranks, on the host."""
    if active():
        with PROCESS.waits():
            dist.all_reduce(torch.zeros(1), group=group)


def broadcast_object(value: Any, *, source: int = 0) -> Any:
    """`value` of rank `source`, on every rank."""
    if not active():
        return value
    box = [value]
    with PROCESS.waits():
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


def all_gather_objects(value: Any) -> list[Any]:
    """The values of all ranks in rank order, on every rank. For small host objects."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    with PROCESS.waits():
        dist.all_gather_object(values, value)
    return values


def sum_in_place(tensor: torch.Tensor) -> None:
    """Add up `tensor` over the ranks, in place and on its device."""
    if active():
        dist.all_reduce(tensor)


def raise_together(error: BaseException | None) -> None:
    """Raise on every rank if any rank has an error; the first rank's comes out on all of them.

    Call it at points that all ranks reach, so that none waits for one that is gone.
    """
    error = None if error is None else plain(error)
    if not active():
        if error is not None:
            raise error
        return
    causes = all_gather_objects(error and Cause(rank=rank(), status=exit_status(error), message=_described(error)))
    first = next((cause for cause in causes if cause is not None), None)
    if first is None:
        return
    if error is not None and first.rank == rank():
        raise error
    if first.status == USER_ERROR:
        raise UserError(first.message)
    raise RuntimeError(f"rank {first.rank} failed: {first.message}")


def _described(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def main_first(first: Callable[[], Result], later: Callable[[], Result]) -> Result:
    """`first()` on rank 0, then `later()` on the others; an error of one is an error of all."""
    result: Result | None = None
    for mains_turn in (True, False):
        error: BaseException | None = None
        if is_main() == mains_turn:
            try:
                result = first() if mains_turn else later()
            except Exception as caught:  # told to all ranks, whatever it is
                error = caught
        raise_together(error)
    return result  # type: ignore[return-value]  # each rank had its turn


def gather_rows(index: torch.Tensor, rows: torch.Tensor, *, total: int) -> torch.Tensor | None:
    """Put the rows of all ranks together by their index, on rank 0 (None elsewhere).

    index: (n,) int64, the row's place among `total`; rows: (n, ...) of any dtype. Ranks may hold different
    numbers of rows, also none. A place that no rank or two ranks filled is an error.
    """
    index, rows = index.cpu(), rows.cpu()
    if active():
        all_index, all_rows = _gather_ragged(index), _gather_ragged(rows)
        if all_index is None or all_rows is None:
            return None
        index, rows = all_index, all_rows
    counts = torch.bincount(index, minlength=total) if len(index) else torch.zeros(total, dtype=torch.int64)
    if len(counts) != total or not bool((counts == 1).all()):
        missing = int((counts[:total] == 0).sum())
        twice = int((counts > 1).sum())
        raise RuntimeError(f"gathered rows are not whole: {missing} of {total} missing, {twice} present twice")
    out = torch.empty((total, *rows.shape[1:]), dtype=rows.dtype)
    out[index] = rows
    return out


def _gather_ragged(rows: torch.Tensor) -> torch.Tensor | None:
    """Concatenate tensors (n_r, ...) of all ranks on rank 0, point to point: one rank at a time is in memory."""
    counts = all_gather_objects((len(rows), tuple(rows.shape[1:])))
    tail = next((t for n, t in counts if n), tuple(rows.shape[1:]))
    if rank() != 0:
        if len(rows):
            dist.send(rows.contiguous(), dst=0)
        return None
    parts = [rows.reshape(len(rows), *tail)]
    for source in range(1, world_size()):
        count = counts[source][0]
        if count:
            part = torch.empty((count, *tail), dtype=rows.dtype)
            with PROCESS.waits():
                dist.recv(part, src=source)
            parts.append(part)
    return torch.cat(parts)
