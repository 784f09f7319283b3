"""A training run: built from its settings by `build_trainer`, then epochs of steps, validation and checkpoints.

Everything in it happens on all ranks alike.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vac_ddp import config as settings_io
from vac_ddp.data.batch import Batch
from vac_ddp.data.loader import Loader, loaders_line, to_device, train_loader, worker_count
from vac_ddp.data.sampler import StepSampler
from vac_ddp.errors import Interrupted
from vac_ddp.report.tracker import Tracker
from vac_ddp.runtime import distributed
from vac_ddp.runtime.data_parallel import optimizer_state
from vac_ddp.runtime.host_memory import memory_limit
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.ranks import local_world_size
from vac_ddp.runtime.signals import Agreed, Agreement, signal_name
from vac_ddp.settings import Config
from vac_ddp.training import checkpoint, health, resuming, run_files
from vac_ddp.training.data_setup import read_data
from vac_ddp.training.early_stopping import Stopping
from vac_ddp.training.lr_schedule import Schedule, make_schedule
from vac_ddp.training.meters import collected_by_hand
from vac_ddp.training.objective import Classification
from vac_ddp.training.progress import Position, Validation
from vac_ddp.training.saving import Saver
from vac_ddp.training.session import Session, open_session
from vac_ddp.training.step import Stepper, make_stepper
from vac_ddp.training.time_limit import TimeLimit, make_time_limit
from vac_ddp.training.training_log import TrainingLog
from vac_ddp.training.validation import Validator

LONGER_S = 30.0  # a collective waits longer than the monitor, which can say why


@contextlib.contextmanager
def open_trainer(
    config: Config, device: torch.device, *, debug: bool = False, notes: Sequence[str] = ()
) -> Iterator[Trainer]:
    """A trainer that is ready to run, in a session that is closed whether it went well or not (see `open_session`)."""
    with open_session(config, debug=debug, notes=notes) as session:
        trainer = build_trainer(config, session, device)
        session.begin()
        yield trainer


def build_trainer(config: Config, session: Session, device: torch.device) -> Trainer:
    """From settings to everything that a run consists of, at the place where it begins or resumes."""
    resumed, tracker = session.resumed, session.tracker
    data = read_data(config, session.folder, resumed=resumed.yes, say=tracker.say)
    if resumed.facts is not None:
        # A run from before there was a second version resumes as what it is.
        config.model.lsvit_version = resumed.facts["config"]["model"].get("lsvit_version", 1)
        resuming.check(resumed, data)
    torch.manual_seed(config.seed)
    objective = Classification(config, data, resuming.load(config, data, resumed), device)
    stepper, meters = make_stepper(config, objective, resumed, device, tracker.say)
    sampler = StepSampler(
        data.split.train,
        seed=config.seed,
        global_batch=config.train.global_batch,
        clips_per_gpu=stepper.clips_per_gpu,
        rank=distributed.rank(),
        world=distributed.world_size(),
        repeats=config.augment.repeats,
        balance=config.data.balance,
        even=config.train.even_steps,
        labels=data.index.labels[data.split.train],
    )
    schedule = make_schedule(config, sampler.steps_per_epoch)
    workers = worker_count(config.data.workers, local_ranks=local_world_size())
    room = memory_limit() // local_world_size()  # of both loaders: the next epoch's batches come during validation
    loader = train_loader(objective.dataset(), sampler, workers=workers, pin=device.type == "cuda", room=room)
    session.loaders.append(loader)
    validator = None
    if len(data.split.val):
        validator = Validator(config, data, stepper, tracker, workers=workers, room=room - loader.host_bytes)
        session.loaders.append(validator.loader)
    trainer = Trainer(
        config=config,
        session=session,
        objective=objective,
        stepper=stepper,
        sampler=sampler,
        loader=loader,
        validator=validator,
        schedule=schedule,
        saver=run_files.make_saver(config, session, objective, stepper, schedule.total_steps),
        agreement=Agreement(distributed.control_group(timeout_s=config.health.start_timeout_s)),
        log=TrainingLog(
            config=config,
            tracker=tracker,
            stepper=stepper,
            meters=meters,
            schedule=schedule,
            validates=validator is not None,
        ),
        stopping=Stopping(patience=config.train.patience),
        limit=make_time_limit(config, schedule, stepper, validation_videos=len(data.split.val)),
    )
    trainer.start()
    return trainer


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run, and where it is."""

    config: Config
    session: Session
    objective: Classification
    stepper: Stepper
    sampler: StepSampler
    loader: Loader
    validator: Validator | None
    schedule: Schedule
    saver: Saver
    agreement: Agreement
    log: TrainingLog
    stopping: Stopping
    limit: TimeLimit | None = None
    position: Position = field(default_factory=Position)
    timeouts_short: bool = False
    stop_number: int = 0  # the signal that ended a validation
    metadata: dict[str, bytes] = field(default_factory=dict)  # files that say what the run is, by name; on rank 0

    @property
    def tracker(self) -> Tracker:
        """What writes log and figures."""
        return self.session.tracker

    def start(self) -> None:
        """Take the place of the checkpoint, or begin; say which, and write the files that say what the run is."""
        session, config, resumed = self.session, self.config, self.session.resumed
        say = session.tracker.say
        if resumed.yes:
            self._restore(resuming.settle(resumed, self.saver, session.run, say))
            where = self.position
            moved = session.tracker.rewind(where.step, where.epoch - int(where.validation_due))
            for line in resuming.promised(resumed, self.saver.facts, where.step, moved):
                say(line)
        else:
            self.log.describe_model(self.objective)
            distributed.main_first(lambda: run_files.check_space(config, self.stepper), lambda: None)
            self.log.describe_run()
            if self.loader.workers:
                say(loaders_line(session.loaders))
        self.metadata = distributed.main_first(
            lambda: run_files.write_metadata(
                config, self.objective.loaded.report, self.objective.data.classes, self.saver.facts, resumed.source
            ),
            dict,
        )
        described = {**settings_io.to_dict(config), "revision": self.saver.facts["revision"]}
        session.tracker.connect(described, session.folder.name, resumed.part("wandb_id"), self.position.step)

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Train to the end. Raises Interrupted after saving where somebody asked to stop."""
        where, log = self.position, self.log
        PROCESS.watch(self.config.health.start_timeout_s)
        self.stepper.warm_up()
        with collected_by_hand():
            if where.validation_due:
                self._end_epoch()
            # A run that was stopped right after its last step has that epoch to end.
            while (where.step < self.schedule.total_steps or where.step_in_epoch) and not where.stopped_early:
                self._epoch()
                self._end_epoch()
                gc.collect()
        with log.meters.phase("saving"):
            self._finish_saving()
        if distributed.is_main():
            log.meters.measure_again(self.stepper.autocast)
        log.say_speed(self.tracker.say)
        self.tracker.write("speed", where.step, **log.meters.seconds)
        distributed.raise_together(None)
        PROCESS.release()  # what is left may take its time, and other ranks may be done

    def _epoch(self) -> None:
        where, sampler = self.position, self.sampler
        clips = [sampler.samples_of_step(step) for step in range(sampler.steps_per_epoch)]
        done = sum(clips[: where.step_in_epoch])
        planned = sum(clips[: where.step_in_epoch + self.schedule.total_steps - where.step])
        self.tracker.progress(f"epoch {where.epoch + 1}/{self.schedule.epochs}", planned, done)
        sampler.set_epoch(where.epoch, start_step=where.step_in_epoch)
        self.objective.begin_epoch(where.epoch, self.schedule.epochs)
        batches = to_device(self.loader, self.stepper.device)
        self.log.begin_epoch()
        self.stepper.last_end = None
        while where.step_in_epoch < sampler.steps_per_epoch and where.step < self.schedule.total_steps:
            self._step(batches, clips[where.step_in_epoch])
        self.log.end_steps(where.step, sum(clips[: where.step_in_epoch]) - done)
        where.epoch += 1
        where.step_in_epoch = 0
        where.validation_due = True

    def _step(self, loader: Iterator[Batch], clips: int) -> None:
        """One optimizer step over `clips` clips of all ranks, and what is due at its end."""
        where, config = self.position, self.config
        began = time.perf_counter()
        if self.limit is not None:
            self.limit.begin()
        batches = [next(loader) for _ in range(self.sampler.loads_of_step(where.step_in_epoch))]
        self.log.waited += time.perf_counter() - began
        for batch in batches:
            for line in batch.damage:  # each damaged frame once
                self.tracker.say(line, everywhere=True)
        self.stepper.run(batches, step=where.step, samples=clips, lr=self.schedule.lr(where.schedule_step), began=began)
        where.schedule_step += self.stepper.counts_last_step()
        where.step += 1
        where.step_in_epoch += 1
        PROCESS.progress(where.step)
        if not self.timeouts_short:
            self._shorten_timeouts(config.health.timeout_s)
        agreed = self._agree()
        fixed = self.limit is not None and self._follow(self.limit.end_step(where, late=bool(agreed.end)))
        self.log.end_step(where, clips)
        every = config.health.checksum_every
        if every and where.step % every == 0:
            health.check_same_weights(self.stepper.model, where.step)
        self._answer(agreed, save=fixed)

    def _follow(self, line: str) -> bool:
        """Take over the total steps of the time limit where they are new; `line` says so, or is empty."""
        if line:
            self.tracker.say(line)
            self._end_at_limit()
            self.objective.begin_epoch(self.position.epoch, self.schedule.epochs)
        return bool(line)

    def _end_at_limit(self) -> None:
        if self.limit is not None and self.limit.total_steps is not None:
            self.saver.facts["total_steps"] = total = self.limit.total_steps
            self.schedule = make_schedule(self.config, self.sampler.steps_per_epoch, total_steps=total)
            self.log.schedule = self.schedule

    def _shorten_timeouts(self, limit_s: float) -> None:
        """After the first step: nothing is compiled or scanned any more. The monitor comes before the collectives."""
        for group in (None, self.agreement.group):
            distributed.set_timeout(limit_s + LONGER_S, group)
        PROCESS.watch(limit_s)
        self.timeouts_short = True

    # ------------------------------------------------------------ agreement

    def _agree(self) -> Agreed:
        due, failed = self.saver.due(self.config.checkpoint.every_minutes), self.saver.poll()
        late = self.limit is not None and self.limit.late()
        return self.agreement.exchange(stop=self.session.stop.wanted(), save=due, save_failed=failed, end=late)

    def _answer(self, agreed: Agreed, *, save: bool) -> None:
        if agreed.save_failed:
            self.saver.answer_failure()
        if agreed.stop:
            self._interrupt(agreed.stop)
        every = self.config.checkpoint.every_steps
        if save or agreed.save or (every and self.position.step % every == 0):
            self.save()

    def _interrupt(self, number: int) -> None:
        """Save, tell all how it went, and leave by Interrupted."""
        step, tracker = self.position.step, self.tracker
        tracker.end_progress()
        tracker.say(f"{signal_name(number)}: saving at step {step} and ending")
        self.save()
        failed = self.saver.join()
        if failed:
            raise RuntimeError(f"stopped by {signal_name(number)} and could not save: {failed}")
        raise Interrupted(
            f"stopped by {signal_name(number)} at step {step}, saved; start the same command with run.resume=auto to "
            "go on",
            step=step,
        )

    # ------------------------------------------------------------ the end of an epoch

    def _end_epoch(self) -> None:
        where, tracker = self.position, self.tracker
        tracker.end_progress()
        if self.limit is not None:
            self._follow(self.limit.begin_epoch_end(where))
        last = where.step >= self.schedule.total_steps
        if not last:  # the next epoch's first batches are decoded while the model is validated
            self.sampler.set_epoch(where.epoch)
            self.loader.start()
        best = False
        validation = None
        if self.validator is not None and (last or where.epoch % self.config.train.val_every == 0):
            with self.log.meters.phase("validation"):
                validation = self.validator.run(self._stop_now)
            if validation is None:
                self._interrupt(self.stop_number)
            assert validation is not None
            best, where.stopped_early = self._judge(validation)
        elif self.validator is None and last:
            best = True
        where.validation_due = False
        damaged = sum(distributed.all_gather_objects(sum(loader.damaged for loader in self.session.loaders)))
        self.log.end_epoch(where, validation, best=best, damaged=damaged)
        if where.stopped_early:
            tracker.say(f"no better validation accuracy for {self.stopping.since_best} validations: ending early")
            self.loader.close()
        if best and distributed.is_main():
            self._keep_best(validation)
        self.save()
        if self.limit is not None:
            self.limit.end_epoch(validated=validation is not None)

    def _stop_now(self) -> bool:
        PROCESS.progress()
        self.stop_number = self.agreement.now(stop=self.session.stop.wanted())
        return self.stop_number > 0

    def _judge(self, validation: Validation) -> tuple[bool, bool]:
        """(Is it the best, should training end), as rank 0 says."""
        own = self.stopping.update(validation.top1, self.position.epoch)
        best, stops = distributed.broadcast_object(own)
        return best, stops

    # ------------------------------------------------------------ saving

    def state(self) -> dict[str, Any]:
        """Everything a run resumes from, as plain values (`checkpoint_content.State`). A collective."""
        self.log.read(self.position.step)
        stepper = self.stepper
        return {
            "model": stepper.model.state_dict(),
            "ema": stepper.ema.module.state_dict() if stepper.ema is not None else None,
            "optimizer": optimizer_state(stepper.optimizer),
            "scaler": stepper.scaler.state_dict() if stepper.scaler is not None else None,
            "position": asdict(self.position),
            "stopping": self.stopping.state(),
            **self.log.state(),
            "random": torch.get_rng_state(),
            "wandb_id": self.tracker.wandb_id,
            "time_limit": self.limit.state() if self.limit is not None else None,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over position and counters of a saved state; `make_stepper` has loaded the rest."""
        self.position = Position(**state["position"])
        self.stopping.restore(state["stopping"])
        self.log.restore(state)
        torch.set_rng_state(state["random"])
        if self.limit is not None and state.get("time_limit") is not None:
            self.limit.restore(state["time_limit"])
            self._end_at_limit()

    def save(self) -> None:
        """Snapshot on all ranks, write in the background on rank 0."""
        PROCESS.progress()
        with self.log.meters.phase("saving"):
            if self.saver.join():
                self.saver.answer_failure()
            state = self.state()
            if distributed.is_main():
                state = checkpoint.snapshot(state)
            self.saver.start(self.position.step, state, epoch=self.position.epoch)
        PROCESS.progress()

    def _keep_best(self, validation: Validation | None) -> None:
        """Offer the weights as the best, and write the logits of their validation; on rank 0."""
        path, epoch = self.session.folder / run_files.VALIDATION, self.position.epoch
        if self.validator is not None and validation is not None:
            try:
                self.validator.write(path, validation, epoch)
            except OSError as error:
                self.tracker.say(f"{path} could not be written: {error.strerror}")
        figures = validation.figures if validation is not None else {}
        content = run_files.best_content(
            self.config,
            self.objective.data,
            self.stepper.eval_model,
            figures,
            architecture=self.objective.loaded.architecture,
            precision=self.stepper.precision,
        )
        self.saver.best.offer(content, epoch)

    def _finish_saving(self) -> None:
        """Everything is on the disk, or the run does not end well."""
        if self.agreement.read().save_failed:
            self.saver.answer_failure()
        if distributed.is_main() and self.saver.best.empty:
            self.tracker.say("no validation gave best weights: the last ones are saved instead")
            self._keep_best(None)
        self.saver.finish()
