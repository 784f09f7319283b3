"""The epochs: steps, agreement, log, validation, checkpoints. Everything in it happens on all ranks alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vac_ddp.data.loader import Batch
from vac_ddp.errors import Interrupted
from vac_ddp.report.epoch_table import TABLE, one_of_few, table_row
from vac_ddp.report.tracker import Tracker
from vac_ddp.runtime import distributed
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.signals import Agreed, Agreement, StopRequest, signal_name
from vac_ddp.training import checkpoint, health
from vac_ddp.training.early_stopping import Stopping
from vac_ddp.training.meters import Meters, collected_by_hand, peak_memory
from vac_ddp.training.progress import Position, Tally, Validation
from vac_ddp.training.saving import Saver
from vac_ddp.training.step import Stepper
from vac_ddp.training.validation import Validator

LONGER_S = 30.0  # a collective waits longer than the monitor, which can say why


@dataclass(kw_only=True)
class Loop:
    """A training run that is ready to go."""

    stepper: Stepper
    loader: Callable[[int, int], Iterator[Batch]]  # (epoch, first step) -> loads of this rank
    loads_of_step: Callable[[int], int]  # (step in epoch) -> loads of this rank
    samples_of_step: Callable[[int], int]  # (step in epoch) -> clips of all ranks
    steps_per_epoch: int
    total_steps: int
    epochs: int
    rate: Callable[[int], float]
    damaged: Callable[[], int]  # damaged frames that this rank's loaders have met so far
    validator: Validator | None
    best_content: Callable[[Validation | None], dict[str, Any]]
    saver: Saver
    tracker: Tracker
    stop: StopRequest
    agreement: Agreement
    stopping: Stopping
    meters: Meters
    position: Position = field(default_factory=Position)
    bad_in_row: int = 0
    said_speed: bool = False
    said_table: bool = False
    said_damaged: int = 0
    epoch_began: float = field(default_factory=time.perf_counter)
    epoch_clips_per_s: float = 0.0
    timeouts_short: bool = False
    since_line: Tally = field(default_factory=Tally)
    since_epoch: Tally = field(default_factory=Tally)

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Train to the end. Raises Interrupted after saving where somebody asked to stop."""
        where = self.position
        PROCESS.watch(self.stepper.config.health.start_timeout_s)
        self.stepper.warm_up()
        with collected_by_hand():
            if where.validation_due:
                self._end_epoch()
            # A run that was stopped right after its last step has that epoch to end.
            while (where.step < self.total_steps or where.step_in_epoch) and not where.stopped_early:
                self._epoch()
                self._end_epoch()
                gc.collect()
        with self.meters.phase("saving"):
            self._finish_saving()
        if distributed.is_main():
            self.meters.measure_again(self.stepper.autocast)
        self._say_speed(self.tracker.say)
        self.tracker.write("speed", where.step, **self.meters.seconds)
        distributed.raise_together(None)
        PROCESS.release()  # what is left may take its time, and other ranks may be done

    def _epoch(self) -> None:
        where, config = self.position, self.stepper.config
        clips = [self.samples_of_step(step) for step in range(self.steps_per_epoch)]
        clips = clips[: where.step_in_epoch + self.total_steps - where.step]
        done = sum(clips[: where.step_in_epoch])
        self.tracker.progress(f"epoch {where.epoch + 1}/{self.epochs}", sum(clips), done)
        loads = self.loader(where.epoch, where.step_in_epoch)
        mark = self.epoch_began = time.perf_counter()
        waited = 0.0
        self.stepper.last_end = None
        while where.step_in_epoch < self.steps_per_epoch and where.step < self.total_steps:
            began = time.perf_counter()
            batches = [next(loads) for _ in range(self.loads_of_step(where.step_in_epoch))]
            waited += time.perf_counter() - began
            for batch in batches:
                self.damage(batch.damage)
            self.stepper.run(
                batches,
                step=where.step,
                samples=self.samples_of_step(where.step_in_epoch),
                lr=self.rate(where.schedule_step),
                began=began,
            )
            where.schedule_step += self._stepped()
            where.step += 1
            where.step_in_epoch += 1
            PROCESS.progress(where.step)
            if not self.timeouts_short:
                self._shorten_timeouts(config.health.timeout_s)
            agreed = self._agree()
            if self._log_due():
                mark, waited = self._log(mark, waited), 0.0
            else:
                if self._health_due():
                    self._read_records()
                self.tracker.advance(clips[where.step_in_epoch - 1])
            every = config.health.checksum_every
            if every and where.step % every == 0:
                health.check_same_weights(self.stepper.model, where.step)
            self._answer(agreed)
        self._read_records()
        self.meters.spend(time.perf_counter() - mark, waited)
        self.epoch_clips_per_s = (sum(clips) - done) / (time.perf_counter() - self.epoch_began)
        where.epoch += 1
        where.step_in_epoch = 0
        where.validation_due = True

    def _shorten_timeouts(self, limit_s: float) -> None:
        """After the first step: nothing is compiled or scanned any more. The monitor comes before the collectives."""
        for group in (None, self.agreement.group):
            distributed.set_timeout(limit_s + LONGER_S, group)
        PROCESS.watch(limit_s)
        self.timeouts_short = True

    def _stepped(self) -> int:
        """1 where the schedule goes on. In fp16 a skipped step does not count, and only there is it known at once."""
        if self.stepper.scaler is None:
            return 1
        return int(not bool(self.stepper.records[-1].found_inf))

    def damage(self, lines: list[str]) -> None:
        """Say what a loader met; it names each damaged frame once."""
        for line in lines:
            self.tracker.say(line, everywhere=True)

    # ------------------------------------------------------------ agreement

    def _agree(self) -> Agreed:
        due = self.saver.due(self.stepper.config.checkpoint.every_minutes)
        return self.agreement.exchange(stop=self.stop.wanted(), save=due, save_failed=self.saver.poll())

    def _answer(self, agreed: Agreed) -> None:
        where = self.position
        if agreed.save_failed:
            self.saver.answer_failure()
        if agreed.stop:
            self._interrupt(agreed.stop)
        every = self.stepper.config.checkpoint.every_steps
        if agreed.save or (every and where.step % every == 0):
            self.save()

    def _interrupt(self, number: int) -> None:
        """Save, tell all how it went, and leave by Interrupted."""
        where = self.position
        self.tracker.end_progress()
        self.tracker.say(f"{signal_name(number)}: saving at step {where.step} and ending")
        self.save()
        failed = self.saver.join()
        if failed:
            raise RuntimeError(f"stopped by {signal_name(number)} and could not save: {failed}")
        raise Interrupted(
            f"stopped by {signal_name(number)} at step {where.step}, saved; start the same command with "
            "run.resume=auto to go on",
            step=where.step,
        )

    # ------------------------------------------------------------ log

    def _log_due(self) -> bool:
        config = self.stepper.config
        return self.position.step % config.log.every_steps == 0 or self.position.step == self.total_steps

    def _health_due(self) -> bool:
        """Long gaps between lines must not hide that steps are skipped."""
        return len(self.stepper.records) >= self.stepper.config.health.max_bad_steps

    def _log(self, mark: float, waited: float) -> float:
        """Write the line of the steps since `mark`; returns the mark of the next one."""
        where = self.position
        summary = self._read_records()
        assert summary is not None, "a line is due after a step"
        now = time.perf_counter()  # only now is the device done with them
        self.meters.spend(now - mark, waited)
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
        self.tracker.advance(self.samples_of_step(where.step_in_epoch - 1), **means)
        return now

    def _read_records(self) -> health.Summary | None:
        """Take what the last steps left on the devices into the tallies, and look after the health of all ranks."""
        where, config, records = self.position, self.stepper.config, list(self.stepper.records)
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
            self.tracker.write(
                "event", where.step, event="non-finite", steps=summary.bad_steps, samples=summary.bad_samples
            )
        for record in records:
            self.bad_in_row = self.bad_in_row + 1 if record.step in summary.bad_steps else 0
            if self.bad_in_row >= config.health.max_bad_steps and self.stepper.scaler is None:
                raise RuntimeError(
                    f"{self.bad_in_row} steps in a row were not finite; {line}: "
                    "lower optim.lr, set optim.clip_norm, or look at these samples"
                )
        for rank in health.slow_ranks(summary.busy_s, config.health.slow_factor):
            times = summary.busy_s[rank] / max(1e-9, health.median_of_others(summary.busy_s, rank))
            self.tracker.say(f"rank {rank} is slow: {times:.1f} times the work time of the others")
        return summary

    # ------------------------------------------------------------ the end of an epoch

    def _end_epoch(self) -> None:
        where, config = self.position, self.stepper.config
        self.tracker.end_progress()
        last = where.step >= self.total_steps
        best = False
        validation = None
        if self.validator is not None and (last or where.epoch % config.train.val_every == 0):
            with self.meters.phase("validation"):
                validation = self.validator.run(self._stop_now)
            if validation is None:
                self._interrupt(self._stop_number)
            assert validation is not None
            best, where.stopped_early = distributed.broadcast_object(
                self.stopping.update(validation.top1, where.epoch) if distributed.is_main() else None
            )
            if not distributed.is_main():
                self.stopping.update(validation.top1, where.epoch)
        elif self.validator is None and last:
            best = True
        where.validation_due = False
        self._say_epoch(validation, best)
        if not self.said_speed:
            self._say_speed(self.tracker.note)  # not into the table of epochs
        if where.stopped_early:
            self.tracker.say(f"no better validation accuracy for {self.stopping.since_best} validations: ending early")
        if best and distributed.is_main():
            self.saver.best.offer(self.best_content(validation), where.epoch)
        self.save()

    def _stop_now(self) -> bool:
        PROCESS.progress()
        self._stop_number = self.agreement.now(stop=self.stop.wanted())
        return self._stop_number > 0

    def _say_epoch(self, validation: Validation | None, best: bool) -> None:
        where = self.position
        damaged = sum(distributed.all_gather_objects(self.damaged()))
        entry: dict[str, Any] = {"epoch": where.epoch, **self.since_epoch.means("train_")}
        if validation is not None:
            entry |= {f"val_{name}": value for name, value in validation.figures.items()}
        if damaged:
            entry["damaged_frames"] = damaged
        if not self.said_table:
            self.tracker.say(TABLE)
            self.said_table = True
        took = time.perf_counter() - self.epoch_began
        row = table_row(entry, self.epochs, where.step, self.epoch_clips_per_s, took)
        row += "  best" if best and validation is not None else ""
        shown = validation is not None or (self.validator is None and one_of_few(where.epoch, self.epochs))
        (self.tracker.say if shown or where.step >= self.total_steps else self.tracker.note)(row)
        if damaged > self.said_damaged:
            self.said_damaged = damaged
            self.tracker.say(f"  {damaged} damaged frames so far; log.txt and logs/ name them")
        self.tracker.write("epoch", where.step, **entry, best=best)
        self.since_epoch = Tally()

    def _say_speed(self, say: Callable[[str], None]) -> None:
        """The speed so far, after the first epoch and at the end."""
        self.said_speed = True
        if line := self.meters.end_line():
            say(f"speed         {line}")

    # ------------------------------------------------------------ saving

    def state(self) -> dict[str, Any]:
        """Everything a run goes on from, as plain values. A collective."""
        self._read_records()
        stepper = self.stepper
        optimizer = stepper.optimizer
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict(to=0)
        state = optimizer.state_dict() if distributed.is_main() else {}
        return {
            "model": stepper.model.state_dict(),
            "ema": stepper.ema.module.state_dict() if stepper.ema is not None else None,
            "optimizer": state,
            "scaler": stepper.scaler.state_dict() if stepper.scaler is not None else None,
            "position": asdict(self.position),
            "stopping": self.stopping.state(),
            "tallies": {"since_line": asdict(self.since_line), "since_epoch": asdict(self.since_epoch)},
            "bad_in_row": self.bad_in_row,
            "random": torch.get_rng_state(),
            "wandb_id": self.tracker.wandb_id,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over position and counters of a saved state; model, average and optimizer are loaded elsewhere."""
        self.position = Position(**state["position"])
        self.stopping.restore(state["stopping"])
        self.since_line = Tally(**state["tallies"]["since_line"])
        self.since_epoch = Tally(**state["tallies"]["since_epoch"])
        self.bad_in_row = state["bad_in_row"]
        torch.set_rng_state(state["random"])

    def save(self) -> None:
        """Snapshot on all ranks, write in the background on rank 0."""
        PROCESS.progress()
        with self.meters.phase("saving"):
            if self.saver.join():
                self.saver.answer_failure()
            state = self.state()
            if distributed.is_main():
                state = checkpoint.snapshot(state)
            self.saver.start(self.position.step, state, epoch=self.position.epoch)
        PROCESS.progress()

    def _finish_saving(self) -> None:
        """Everything is on the disk, or the run does not end well."""
        if self.agreement.read().save_failed:
            self.saver.answer_failure()
        if distributed.is_main() and self.saver.best.empty:
            self.tracker.say("no validation gave best weights: the last ones are saved instead")
            self.saver.best.offer(self.best_content(None), self.position.epoch)
        self.saver.finish()
