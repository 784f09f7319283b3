"""Signals set a flag; the ranks agree on it at the step boundary, one step late and without waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from vac_ddp.runtime.monitor import PROCESS, SAME_KEY_S, STOP_SIGNALS


class StopRequest:
    """Whether somebody, or the end of the allocation, asked this process to save and end.

    The first signal sets a flag and does nothing else. After a Ctrl-C a second one ends at once, with 130; torchrun
    hands the second one down as SIGTERM. What arrives within a second of the first is the same key press, which a
    terminal sends to the process and torchrun forwards. Before it is installed there is nothing to save, see `monitor`.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.number = 0
        self.since = 0.0
        self.deadline = deadline
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take over SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 (main thread only)."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._set)
        self.number = self.number or PROCESS.pending
        PROCESS.saving = True

    def restore(self) -> None:
        """Give the signals back to who had them; nothing where they were never taken."""
        PROCESS.saving = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _set(self, number: int, frame: FrameType | None) -> None:
        PROCESS.reacted = True
        again = time.monotonic() - self.since > SAME_KEY_S
        if self.number == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM) and again:
            os._exit(130)
        if not self.number:
            self.number, self.since = int(number), time.monotonic()

    def wanted(self) -> int:
        """The signal's number; SIGALRM's where the deadline (time.time() seconds) has come; 0 for none."""
        if self.number:
            return self.number
        if self.deadline is not None and time.time() >= self.deadline:
            return int(signal.SIGALRM)
        return 0


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The largest wish of any rank, the same on every rank."""

    stop: int = 0
    save: int = 0
    save_failed: int = 0
    end: int = 0


class Agreement:
    """An all-reduce(MAX) of small wishes over a gloo group that is read one call later.

    Nothing waits for it in the step: by the next step boundary it has long arrived.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.pending: tuple[torch.Tensor, Any] | None = None

    def exchange(self, *, stop: int, save: bool, save_failed: bool, end: bool = False) -> Agreed:
        """Send this rank's wishes, and read what all had wished at the call before."""
        before = self.read()
        values = torch.tensor([stop, int(save), int(save_failed), int(end)], dtype=torch.int32)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group, async_op=True) if self.group else None
        self.pending = (values, work)
        return before

    def read(self) -> Agreed:
        """What the last exchange came to; waits for it. Nothing wished where there was none."""
        if self.pending is None:
            return Agreed()
        values, work = self.pending
        self.pending = None
        if work is not None:
            with PROCESS.waits():
                work.wait()
        stop, save, failed, end = values.tolist()
        return Agreed(stop=stop, save=save, save_failed=failed, end=end)

    def now(self, *, stop: int) -> int:
        """Agree on a stop at once, waiting for all ranks: for places outside the step.

        The other wishes are not answered here: the next `exchange` or `read` returns them, with the stop.
        """
        earlier = self.read()
        self.exchange(
            stop=max(stop, earlier.stop),
            save=bool(earlier.save),
            save_failed=bool(earlier.save_failed),
            end=bool(earlier.end),
        )
        agreed = self.read()
        wishes = [agreed.stop, agreed.save, agreed.save_failed, agreed.end]
        self.pending = (torch.tensor(wishes, dtype=torch.int32), None)
        return agreed.stop


def end_of_allocation(environment: Mapping[str, str] = os.environ) -> float | None:
    """When the SLURM job around this process ends, in time.time() seconds.

    None outside of SLURM, for a job without an end, and where SLURM does not answer. SLURM before 23.02 has no
    SLURM_JOB_END_TIME: there squeue is asked, so call it on one rank.
    """
    if environment.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(environment["SLURM_JOB_END_TIME"])
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:  # one task of an array has the number of the whole array
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%e"], capture_output=True, text=True, timeout=20
        )
        return time.mktime(time.strptime(asked.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def save_by(end: float | None, margin_s: float, *, now: float) -> float | None:
    """When to save, for an allocation that ends at `end`: `margin_s` before, or in the middle of a short rest.

    All in time.time() seconds; None without an end or with a margin of 0.
    """
    if end is None or margin_s <= 0:
        return None
    return end - min(margin_s, max(0.0, end - now) / 2)


def signal_name(number: int) -> str:
    """SIGTERM for 15, and so on; 'end of the allocation' for the deadline."""
    if number == signal.SIGALRM:
        return "the end of the allocation"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
