"""train.max_minutes: how many steps fit into the time. Rank 0 decides once, from measured steps; all ranks follow.

Until then the run has the length of train.epochs and train.max_steps, and their learning rates. The decision is part of
every checkpoint: a resumed run makes the same steps. Only where the time is used up before them is the run cut short.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vac_ddp.data.clip_sampling import window_count
from vac_ddp.runtime import distributed, ranks
from vac_ddp.settings import Config
from vac_ddp.training.lr_schedule import Schedule
from vac_ddp.training.progress import Position
from vac_ddp.training.step import Stepper

SKIPPED = 2  # first steps of a start: they compile, allocate, and wait for the first batches
MEASURED = 20  # steps whose mean duration counts; fewer where they take more than `MEASURING` of the limit
MEASURING = 0.05
RESERVE, LEAST_RESERVE_S = 0.05, 15.0  # for a restart, steps that become slower, and the report
WRITTEN_PER_S, END_S = 100e6, 5.0  # bytes of the last checkpoint and the best weights; report, end of the processes


def process_seconds() -> float:
    """Seconds since this run was started: since torchrun's agent was, or this process where it restarted the ranks."""
    of_agent = ranks.under_torchrun() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    stat = Path(f"/proc/{os.getppid() if of_agent else os.getpid()}/stat").read_text(errors="replace")
    ticks = int(stat.rpartition(")")[2].split()[19])  # since boot, see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the length of a run depends on beside the clock. full_epochs, full_factor: last epochs with all tokens."""

    bound: int
    steps_per_epoch: int
    val_every: int
    full_epochs: int = 0
    full_factor: float = 1.0

    def rest_s(self, total: int, where: Position, step_s: float, ends: dict[bool, float]) -> float:
        """Seconds from `where` to the end of `total` steps. ends: of an epoch's end without and with a validation."""
        steps, epochs = total - where.step, -(-total // self.steps_per_epoch)
        full = min(steps, self.full_epochs * self.steps_per_epoch)
        validations = epochs // self.val_every - where.epoch // self.val_every + int(epochs % self.val_every > 0)
        plain = epochs - where.epoch - validations
        return (steps + full * (self.full_factor - 1)) * step_s + validations * ends[True] + plain * ends[False]

    def fitting_steps(self, seconds: float, where: Position, step_s: float, ends: dict[bool, float]) -> int:
        """The largest number of total steps whose rest fits into `seconds`; at least those that were made."""
        low, high = where.step, self.bound
        while low < high:
            middle = (low + high + 1) // 2
            if self.rest_s(middle, where, step_s, ends) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


@dataclass(kw_only=True)
class TimeLimit:
    """The time of a run, on every rank; only rank 0 looks at its clock.

    before_s: spent by earlier starts, up to their checkpoint; total_steps: as decided; ends: the longest end of an
    epoch so far without and with a validation; final_s: writing the last files, and the report.
    """

    limit_s: float
    plan: Plan
    validation_clips: float  # in clips of a training step
    final_s: float
    before_s: float = 0.0
    total_steps: int | None = None
    step_s: float = 0.0
    ends: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    device: torch.device = torch.device("cpu")
    _mark: float = 0.0
    _durations: list[float] = field(default_factory=list)
    _validated: bool = False

    def spent(self) -> float:
        """Seconds of all starts of this run."""
        return self.before_s + process_seconds()

    def begin(self) -> None:
        """A step begins."""
        self._mark = self.spent() if distributed.is_main() else 0.0

    def end_step(self, where: Position, *, late: bool) -> str:
        """A step was made. A line where the number of total steps is fixed now, else nothing. All ranks must call it.

        late: the ranks have agreed that only the end of the run fits into what is left.
        """
        if late and where.step < (self.total_steps or self.plan.bound):
            return self._cut(where)
        if self.total_steps is not None:
            return ""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._durations.append(self.spent() - self._mark if distributed.is_main() else 0.0)
        decided = distributed.broadcast_object(self._decide(where) if distributed.is_main() else None)
        if decided is None:
            return ""
        self.total_steps, self.step_s, self.ends = decided
        return self._line(where)

    def begin_epoch_end(self, where: Position) -> str:
        """The steps of an epoch are made. A line where another step and its validation would be too late."""
        self.begin()
        if where.step >= (self.total_steps or self.plan.bound):
            return ""
        return self._cut(where) if distributed.broadcast_object(self.late(more=True)) else ""

    def end_epoch(self, *, validated: bool) -> None:
        """What follows the steps of an epoch is done."""
        took = self.spent() - self._mark if distributed.is_main() else 0.0
        first = validated and not self._validated  # until then it was estimated
        self.ends[validated] = took if first else max(self.ends[validated], took)
        self._validated = self._validated or validated

    def _cut(self, where: Position) -> str:
        planned, self.total_steps = self.total_steps or self.plan.bound, where.step
        return (
            f"time limit    {self.limit_s / 60:g} min are used up: ends at step {where.step} of {planned}, before the "
            "learning rate has come down"
        )

    def _decide(self, where: Position) -> tuple[int, float, dict[bool, float]] | None:
        measured, took = self._durations[SKIPPED:], sum(self._durations)
        enough = len(measured) >= MEASURED and (self._validated or not self.validation_clips)
        enough = enough or (bool(measured) and took >= MEASURING * self.limit_s) or took >= self.limit_s / 4
        if not enough:
            return None
        measured = measured or self._durations
        step_s = sum(measured) / len(measured)
        ends = dict(self.ends)
        if not self._validated:
            ends[True] = step_s * self.validation_clips + ends[False]
        left = self.limit_s - self.spent() - self.reserve_s - self.final_s
        return self.plan.fitting_steps(left, where, step_s, ends), step_s, ends

    @property
    def reserve_s(self) -> float:
        """What the plan leaves unused."""
        return max(RESERVE * self.limit_s, LEAST_RESERVE_S)

    def late(self, *, more: bool = False) -> bool:
        """Whether only the end of the run fits into what is left, on rank 0. more: not even after an epoch's end."""
        after = self.ends[True] + self.final_s + (self.step_s + self.ends[True] if more else 0.0)
        return distributed.is_main() and self.spent() + after > self.limit_s

    def _line(self, where: Position) -> str:
        """What was decided, for the log."""
        assert self.total_steps is not None, "it was decided"
        steps = max(0, self.total_steps - where.step) * self.step_s
        rest = self.plan.rest_s(self.total_steps, where, self.step_s, self.ends)
        return (
            f"time limit    {self.limit_s / 60:g} min: {self.total_steps} total steps "
            f"({self.total_steps / self.plan.steps_per_epoch:.3g} epochs; upper bound {self.plan.bound}) at "
            f"{self.step_s:.3g} s per step; {self.spent():.0f} s spent, {max(0.0, rest - steps):.0f} s for validation "
            f"and checkpoints, {self.final_s + self.reserve_s:.0f} s reserved"
        )

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "seconds": self.spent(),
            "total_steps": self.total_steps,
            "step_s": self.step_s,
            "end_s": self.ends[False],
            "validated_end_s": self.ends[True],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; what is not decided is measured anew."""
        self.before_s, self.total_steps, self.step_s = state["seconds"], state["total_steps"], state["step_s"]
        self.ends = {False: state["end_s"], True: state["validated_end_s"]}


def make_time_limit(
    config: Config, schedule: Schedule, stepper: Stepper, *, validation_videos: int
) -> TimeLimit | None:
    """The time limit of the settings; None where there is none."""
    train, views = config.train, config.val
    if train.max_minutes is None:
        return None
    views_per_video = window_count(views) * views.crops * (2 if views.flip else 1)
    return TimeLimit(
        limit_s=60 * train.max_minutes,
        plan=Plan(
            bound=schedule.total_steps,
            steps_per_epoch=schedule.steps_per_epoch,
            val_every=train.val_every,
            full_epochs=train.full_token_epochs,
            full_factor=1 / train.keep_tokens,
        ),
        # A view costs no more than a training clip with as many tokens.
        validation_clips=validation_videos * views_per_video / train.global_batch / train.keep_tokens,
        device=stepper.device,
        final_s=sum(p.numel() for p in stepper.model.parameters()) * 20 / WRITTEN_PER_S + END_S,
    )
