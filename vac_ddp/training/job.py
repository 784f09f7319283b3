"""From settings to a training run that is ready to go: here the rooms are tied together."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.data.augment import flip_guard
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.loader import Batch, to_device, train_loader, worker_count
from vac_ddp.data.sampler import StepSampler
from vac_ddp.errors import Interrupted, exit_status
from vac_ddp.models import Loaded
from vac_ddp.report.tracker import Tracker
from vac_ddp.results.logits_file import read_views
from vac_ddp.runtime import distributed
from vac_ddp.runtime.exit_status import report
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.signals import Agreement, StopRequest, end_of_allocation, save_by
from vac_ddp.settings import Config
from vac_ddp.training import resuming, run_directory, run_files
from vac_ddp.training.data_setup import Data, read_data
from vac_ddp.training.early_stopping import Stopping
from vac_ddp.training.loop import Loop
from vac_ddp.training.lr_schedule import count_warmup_steps, learning_rate, resolve_lr
from vac_ddp.training.model_setup import Resumed, make_stepper
from vac_ddp.training.optimization import group_table
from vac_ddp.training.progress import Validation
from vac_ddp.training.step import Stepper
from vac_ddp.training.validation import Validator

# Left in the run directory by a run that was stopped and saved: scripts requeue by it, not by torchrun's status.
INTERRUPTED = "interrupted.json"

# What the best weights said about every validation video, as a views file.
VALIDATION = "validation.npz"


@dataclass(kw_only=True)
class Job:
    """A run between opening and closing."""

    loop: Loop
    run: run_directory.OpenRun | None
    folder: Path
    tracker: Tracker
    data: Data
    metadata: dict[str, bytes]  # the files that say what the run is, by name; on rank 0

    def finish(self, *, report: bool = True) -> None:
        """Write the report, say what is where and what to type next."""
        stopping = self.loop.stopping
        run_files.write_again(self.folder, self.metadata, self.tracker.say)
        self.tracker.artifact(self.loop.saver.best.path)
        if stopping.best is not None:
            self.tracker.say(f"best validation accuracy {stopping.best:.4f} after epoch {stopping.best_epoch}")
        self.tracker.say(f"best weights  {self.loop.saver.best.path}")
        self.tracker.say(f"log, figures  {self.folder / 'log.txt'}, {self.folder / 'metrics.jsonl'}")
        if report and distributed.is_main():
            self._report()
        self.tracker.say(f"next          vac predict --run {shlex.quote(str(self.folder))} --data data_test", fit=False)

    def _report(self) -> None:
        """Write report.html. A run that is done is done: what goes wrong here is one line."""
        try:
            from vac_ddp.report.page import write_report
            from vac_ddp.report.pictures import show_pictures

            kept = self.folder / VALIDATION
            views = read_views(kept) if self.loop.stopping.best is not None and kept.exists() else None
            if views is not None and views.about.get("epoch") != self.loop.stopping.best_epoch:
                views = None
            write_report(self.folder, views, self.folder / "report.html", index=self.data.val_index)
            self.tracker.say(f"report        {self.folder / 'report.html'}")
            if views is not None and self.tracker.shows_pictures:
                show_pictures(self.tracker, views, self.data.val_index, self.loop.position.step)
        except Exception as error:
            self.tracker.say(
                f"no report.html ({type(error).__name__}: {error}); "
                f"vac report {shlex.quote(str(self.folder))} makes one"
            )

    def facts(self) -> dict[str, Any]:
        """For the status file."""
        return {"run": str(self.folder), "step": self.loop.position.step}


@contextlib.contextmanager
def open_job(config: Config, device: torch.device, *, debug: bool = False, notes: Sequence[str] = ()) -> Iterator[Job]:
    """Build a run from its settings, hand it out, and close it whether it went well or not.

    debug: mark it as a debug run, and replace one; notes: lines about the settings, for the log.
    """
    stop = StopRequest(distributed.broadcast_object(_deadline(config)))
    tracker: Tracker | None = None
    loaders: list[Any] = []
    run: run_directory.OpenRun | None = None
    try:
        early = list(notes)
        run = _open_run(config, early.append, debug=debug)
        folder = Path(config.run.dir)
        tracker = Tracker(folder, config.log, rank=distributed.rank())
        for line in early:
            tracker.say(line)
        resumed = distributed.broadcast_object(run is not None and run.state is not None)
        data = read_data(config, folder, resumed=resumed, say=tracker.say)
        job = _build(config, device, run, data, tracker, stop, loaders)
        if run is not None:
            run.begin(tracker.say)
            (folder / INTERRUPTED).unlink(missing_ok=True)
        stop.install()
        try:
            yield job
        except Interrupted as error:
            if distributed.is_main():
                files.write_json(folder / INTERRUPTED, {"step": error.step, "why": str(error)})
            error.run = str(folder)
            raise
    except Interrupted:
        raise
    except (Exception, KeyboardInterrupt) as error:
        report(error)  # before files and services are closed: other ranks may wait for this one
        raise
    finally:
        PROCESS.release()
        for loader in loaders:
            loader.close()
        if tracker is not None:
            tracker.close(exit_status(sys.exc_info()[1]))
        if run is not None:
            run.discard()
            run.lock.release()
        stop.restore()


def _deadline(config: Config) -> float | None:
    """When to save because the SLURM job is about to end, in time.time() seconds; asked on rank 0 only."""
    if not distributed.is_main():
        return None
    return save_by(end_of_allocation(), config.checkpoint.before_end_s, now=time.time())


def _open_run(config: Config, say: Callable[[str], None], *, debug: bool) -> run_directory.OpenRun | None:
    """The run directory, by rank 0; the others learn whether it went well."""
    return distributed.main_first(
        lambda: run_directory.open_run(config.run, settings_io.to_dict(config), say, debug=debug),
        lambda: None,
    )


def _build(
    config: Config,
    device: torch.device,
    run: run_directory.OpenRun | None,
    data: Data,
    tracker: Tracker,
    stop: StopRequest,
    loaders: list[Any],
) -> Job:
    """Model, optimizer and loop; `loaders` gets what must be closed."""
    folder = Path(config.run.dir)
    facts = distributed.broadcast_object(run.facts if run is not None else None)
    resumed = Resumed(
        state=run.state if run is not None else None, facts=facts, source=run.source if run is not None else None
    )
    if facts is not None:
        # A run from before there was a second version resumes as what it is.
        config.model.lsvit_version = facts["config"]["model"].get("lsvit_version", 1)
        resuming.check(resumed, data)
    torch.manual_seed(config.seed)
    loaded = resuming.load(config, data, resumed)
    stepper, groups, meters = make_stepper(config, device, data, loaded, resumed, tracker.say)
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
    total, rate = make_rate(config, sampler.steps_per_epoch)
    workers = worker_count(config.data.workers, local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    dataset = TrainClips(data.index, data.split.train, config, stepper.model.noise_size, config.seed)
    loader = train_loader(dataset, sampler, workers=workers, pin=device.type == "cuda")
    loaders.append(loader)

    validator = Validator(config, data, stepper, tracker, workers=workers) if len(data.split.val) else None
    if validator is not None:
        loaders.append(validator.loader)

    def loads(epoch: int, start_step: int) -> Iterator[Batch]:
        sampler.set_epoch(epoch, start_step=start_step)
        return to_device(loader, device)

    def keep(validation: Validation) -> None:
        assert validator is not None, "there was a validation"
        try:
            validator.write(folder / VALIDATION, validation, loop.position.epoch)
        except OSError as error:
            tracker.say(f"{folder / VALIDATION} could not be written: {error.strerror}")

    loop = Loop(
        stepper=stepper,
        loader=loads,
        loads_of_step=sampler.loads_of_step,
        samples_of_step=sampler.samples_of_step,
        steps_per_epoch=sampler.steps_per_epoch,
        total_steps=total,
        epochs=math.ceil(total / sampler.steps_per_epoch),
        rate=rate,
        damaged=lambda: sum(opened.damaged for opened in loaders),
        validator=validator,
        best_content=lambda validation: run_files.best_content(config, data, loaded, stepper, validation, keep),
        saver=run_files.make_saver(config, run, data, loaded, stepper, total, tracker),
        tracker=tracker,
        stop=stop,
        agreement=Agreement(distributed.control_group(timeout_s=config.health.start_timeout_s)),
        stopping=Stopping(patience=config.train.patience),
        meters=meters,
    )
    if resumed.yes:
        resuming.resume_loop(loop, resumed, run)
    else:
        _start_fresh(config, data, loaded, groups, stepper, tracker)
        _describe(config, loop, rate)
    metadata = distributed.main_first(lambda: _write_metadata(config, data, loaded, loop, resumed), dict)
    described = {**settings_io.to_dict(config), "revision": loop.saver.facts["revision"]}
    tracker.connect(described, folder.name, resumed.part("wandb_id"), loop.position.step)
    return Job(loop=loop, run=run, folder=folder, tracker=tracker, data=data, metadata=metadata)


def _write_metadata(config: Config, data: Data, loaded: Loaded, loop: Loop, resumed: Resumed) -> dict[str, bytes]:
    if resumed.source is not None:
        resuming.copy_report(resumed.source, Path(config.run.dir))
    return run_files.write_metadata(config, data, loaded, loop.saver.facts)


def make_rate(config: Config, steps_per_epoch: int) -> tuple[int, Callable[[int], float]]:
    """(steps of the whole run, learning rate by step)."""
    total = steps_per_epoch * config.train.epochs
    if config.train.max_steps is not None:
        total = min(total, config.train.max_steps)
    peak, minimum, warmup_start = resolve_lr(config.optim, config.train.global_batch, config.augment.repeats)
    warmup = count_warmup_steps(config.optim.warmup_epochs, epochs=config.train.epochs, total_steps=total)

    def rate(step: int) -> float:
        return learning_rate(
            step, total_steps=total, warmup_steps=warmup, peak=peak, minimum=minimum, warmup_start=warmup_start
        )

    return total, rate


def _start_fresh(
    config: Config, data: Data, loaded: Loaded, groups: list[dict[str, Any]], stepper: Stepper, tracker: Tracker
) -> None:
    """What is said and looked at before the first step of a new run."""
    for line in loaded.report.lines():
        tracker.say(line)
    mirrored = flip_guard(data.classes) if config.augment.flip > 0 else []
    if mirrored:
        tracker.say(f"left and right may make these classes: {', '.join(mirrored[:6])}; consider augment.flip=0")
    tracker.note(group_table(groups, stepper.model))
    distributed.main_first(lambda: run_files.check_space(config, stepper), lambda: None)


def _describe(config: Config, loop: Loop, rate: Callable[[int], float]) -> None:
    stepper, say, world = loop.stepper, loop.tracker.say, loop.stepper.world_size
    count = sum(p.numel() for p in stepper.model.parameters())
    accumulation = math.ceil(config.train.global_batch / (world * stepper.clips_per_gpu))
    peak = max(rate(step) for step in range(loop.total_steps))
    say(
        f"{config.model.name}, {count / 1e6:.1f} M parameters, {stepper.precision}; "
        f"global batch {config.train.global_batch} = {world} rank{'s' if world > 1 else ''} x "
        f"{stepper.clips_per_gpu} clips x {accumulation}; peak lr {peak:.3g}"
    )
    say(loop.meters.start_line())
    say(f"{loop.epochs} epochs of {loop.steps_per_epoch} steps, {loop.total_steps} steps in all")
