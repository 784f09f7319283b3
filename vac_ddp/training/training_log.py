"""What a run logs of its steps and epochs, and the one place where the counters on the devices are read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from vac_ddp.data.augment import flip_guard
from vac_ddp.report.epoch_table import TABLE, one_of_few, table_row
from vac_ddp.report.tracker import Tracker
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.training import health
from vac_ddp.training.lr_schedule import Schedule
from vac_ddp.training.meters import Meters, peak_memory
from vac_ddp.training.objective import Classification
from vac_ddp.training.optimization import group_table, make_groups
from vac_ddp.training.progress import Position, Tally, Validation
from vac_ddp.training.step import Stepper


@dataclass(kw_only=True)
class TrainingLog:
    """Tallies of the steps, and the lines of steps and epochs. waited: seconds for data since the last line."""

    config: Config
    tracker: Tracker
    stepper: Stepper
    meters: Meters
    schedule: Schedule
    validates: bool
    since_line: Tally = field(default_factory=Tally)
    since_epoch: Tally = field(default_factory=Tally)
    bad_in_row: int = 0
    waited: float = 0.0
    _mark: float = field(default_factory=time.perf_counter)  # the last line
    _epoch_began: float = field(default_factory=time.perf_counter)
    _clips_per_s: float = 0.0
    _said_speed: bool = False
    _said_table: bool = False
    _said_damaged: int = 0

    # ------------------------------------------------------------ the start

    def describe_model(self, objective: Classification) -> None:
        """Where the weights of a new run are from, and how its parameters are trained."""
        say, settings = self.tracker.say, self.config
        for line in objective.loaded.report.lines():
            say(line)
        mirrored = flip_guard(objective.data.classes) if settings.augment.flip > 0 else []
        if mirrored:
            say(f"left and right may make these classes: {', '.join(mirrored[:6])}; consider augment.flip=0")
        groups = make_groups(objective.model, settings.optim, settings.train.freeze_depth)
        self.tracker.note(group_table(groups, objective.model))

    def describe_run(self) -> None:
        """How large the run and its steps are."""
        stepper, schedule, batch = self.stepper, self.schedule, self.config.train.global_batch
        world, say = distributed.world_size(), self.tracker.say
        count = sum(p.numel() for p in stepper.model.parameters())
        accumulation = math.ceil(batch / (world * stepper.clips_per_gpu))
        peak = max(schedule.lr(step) for step in range(schedule.total_steps))
        say(
            f"{self.config.model.name}, {count / 1e6:.1f} M parameters, {stepper.precision}; "
            f"global batch {batch} = {world} rank{'s' if world > 1 else ''} x "
            f"{stepper.clips_per_gpu} clips x {accumulation}; peak lr {peak:.3g}"
        )
        if kept := stepper.model.train_tokens:
            last = self.config.train.full_token_epochs
            say(
                f"tokens       {kept.count} of {stepper.model.token_count} a clip, {kept.policy}"
                + (f"; all in the last {last} epochs" if last else "")
            )
        say(self.meters.start_line())
        limit = self.config.train.max_minutes
        length = f"{schedule.epochs} epochs of {schedule.steps_per_epoch} steps, {schedule.total_steps} steps in all"
        say(length + ("" if limit is None else f", at most: train.max_minutes={limit:g} will fix how many"))

    # ------------------------------------------------------------ steps

    def begin_epoch(self) -> None:
        """The steps of an epoch, or what is left of them, begin."""
        self._mark = self._epoch_began = time.perf_counter()
        self.waited = 0.0

    def end_step(self, where: Position, clips: int) -> None:
        """A step over `clips` clips of all ranks was made: its line, where one is due. All ranks must call it."""
        if where.step % self.config.log.every_steps == 0 or where.step == self.schedule.total_steps:
            self._write_line(where, clips)
            return
        if len(self.stepper.records) >= self.config.health.max_bad_steps:  # skipped steps are not hidden for long
            self.read(where.step)
        self.tracker.advance(clips)

    def _write_line(self, where: Position, clips: int) -> None:
        summary = self.read(where.step)
        assert summary is not None, "a line is due after a step"
        now = time.perf_counter()  # only now is the device done with them
        self.meters.spend(now - self._mark, self.waited)
        self._mark, self.waited = now, 0.0
        means = self.since_line.means()
        self.tracker.write(
            "train",
            where.step,
            epoch=where.epoch,
            **means,
            lr=summary.lr,
            grad_norm=summary.norm,
            **self.meters.line(),
        )
        self.since_line = Tally()
        self.tracker.advance(clips, **means)

    def read(self, step: int) -> health.Summary | None:
        """Add what the last steps left on the devices to the tallies, and watch the health of all ranks.

        None where there is nothing to read. RuntimeError after too many non-finite steps. All ranks must call it.
        """
        records = list(self.stepper.records)
        if not records:
            return None
        self.stepper.records.clear()
        summary = health.summarise(records, self.stepper.device, peak_memory(self.stepper.device))
        self.meters.take(summary)
        self.since_line.add(summary)
        self.since_epoch.add(summary)
        if summary.bad_steps:
            line = health.describe_bad(summary)
            self.tracker.say(line)
            self.tracker.write("event", step, event="non-finite", steps=summary.bad_steps, samples=summary.bad_samples)
        for record in records:
            self.bad_in_row = self.bad_in_row + 1 if record.step in summary.bad_steps else 0
            if self.bad_in_row >= self.config.health.max_bad_steps and self.stepper.scaler is None:
                raise RuntimeError(
                    f"{self.bad_in_row} steps in a row were not finite; {line}: "
                    "lower optim.lr, set optim.clip_norm, or look at these samples"
                )
        for rank in health.slow_ranks(summary.busy_s, self.config.health.slow_factor):
            times = summary.busy_s[rank] / max(1e-9, health.median_of_others(summary.busy_s, rank))
            self.tracker.say(f"rank {rank} is slow: {times:.1f} times the work time of the others")
        return summary

    # ------------------------------------------------------------ epochs

    def end_steps(self, step: int, clips: int) -> None:
        """The steps of an epoch are made, over `clips` clips since `begin_epoch`."""
        self.read(step)
        now = time.perf_counter()
        self.meters.spend(now - self._mark, self.waited)
        self._clips_per_s = clips / (now - self._epoch_began)

    def end_epoch(self, where: Position, validation: Validation | None, *, best: bool, damaged: int) -> None:
        """The line of an epoch. damaged: frames of all ranks so far."""
        say, epochs = self.tracker.say, self.schedule.epochs
        entry: dict[str, Any] = {"epoch": where.epoch, **self.since_epoch.means("train_")}
        if validation is not None:
            entry |= {f"val_{name}": value for name, value in validation.figures.items()}
        if damaged:
            entry["damaged_frames"] = damaged
        if not self._said_table:
            say(TABLE)
            self._said_table = True
        took = time.perf_counter() - self._epoch_began
        row = table_row(entry, epochs, where.step, self._clips_per_s, took)
        row += "  best" if best and validation is not None else ""
        shown = validation is not None or (not self.validates and one_of_few(where.epoch, epochs))
        (say if shown or where.step >= self.schedule.total_steps else self.tracker.note)(row)
        if damaged > self._said_damaged:
            self._said_damaged = damaged
            say(f"  {damaged} damaged frames so far; log.txt and logs/ name them")
        self.tracker.write("epoch", where.step, **entry, best=best)
        self.since_epoch = Tally()
        if not self._said_speed:
            self.say_speed(self.tracker.note)  # not into the table of epochs

    def say_speed(self, say: Callable[[str], None]) -> None:
        """The speed so far, after the first epoch and at the end."""
        self._said_speed = True
        if line := self.meters.end_line():
            say(f"speed         {line}")

    # ------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Any]:
        """Its part of a checkpoint, so that a resumed run prints the same."""
        tallies = {"since_line": asdict(self.since_line), "since_epoch": asdict(self.since_epoch)}
        return {"tallies": tallies, "bad_in_row": self.bad_in_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.since_line = Tally(**state["tallies"]["since_line"])
        self.since_epoch = Tally(**state["tallies"]["since_epoch"])
        self.bad_in_row = state["bad_in_row"]
