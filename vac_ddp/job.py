"""From settings to a training run that is ready to go: here the rooms are tied together."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from vac_ddp import config as settings_io
from vac_ddp import distributed, files
from vac_ddp.data.augment import flip_guard
from vac_ddp.data.dataset import TestViews, TrainClips
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.loader import Batch, test_loader, to_device, train_loader, worker_count
from vac_ddp.data.sampler import StepSampler
from vac_ddp.data.split import Split, make_split, read_split, write_split
from vac_ddp.engine import checkpoint, health, run_dir
from vac_ddp.engine.ema import Ema
from vac_ddp.engine.evaluate import rank_places, video_logits
from vac_ddp.engine.fit import fit_clips
from vac_ddp.engine.loop import Loop, Validation
from vac_ddp.engine.optim import group_table, make_groups, make_optimizer
from vac_ddp.engine.schedule import count_warmup_steps, learning_rate, resolve_lr
from vac_ddp.engine.signals import Agreement, StopRequest
from vac_ddp.engine.step import Stepper
from vac_ddp.engine.stopping import Stopping
from vac_ddp.errors import UserError
from vac_ddp.metrics import classification_metrics
from vac_ddp.models import Loaded, file_state, load_model
from vac_ddp.report.tracker import Tracker
from vac_ddp.settings import Config

Result = TypeVar("Result")

# Bytes a parameter takes in a checkpoint: weights and two moments in float32; an average is one more.
BYTES_A_PARAMETER = 12


@dataclass(kw_only=True)
class Data:
    """Training and validation videos. `val_index` is another index where data.val is set."""

    index: Index
    val_index: Index
    split: Split

    @property
    def classes(self) -> list[str]:
        """Class names; a label is a place in this list."""
        return self.index.classes


@dataclass(kw_only=True)
class Job:
    """A run between opening and closing."""

    loop: Loop
    run: run_dir.OpenRun | None
    folder: Path
    tracker: Tracker

    def finish(self) -> None:
        """Say what is where and what to type next."""
        stopping = self.loop.stopping
        if stopping.best is not None:
            self.tracker.say(f"best validation accuracy {stopping.best:.4f} after epoch {stopping.best_epoch}")
        self.tracker.say(f"best weights  {self.loop.best_path}")
        self.tracker.say(f"log, figures  {self.folder / 'log.txt'}, {self.folder / 'metrics.jsonl'}")
        self.tracker.say(f"next          vac predict --run {self.folder} --data data_test")

    def facts(self) -> dict[str, Any]:
        """For the status file."""
        return {"run": str(self.folder), "step": self.loop.position.step}


# ---------------------------------------------------------------- one after the other on rank 0, then on all


def on_main_first(first: Callable[[], Result], later: Callable[[], Result]) -> Result:
    """`first()` on rank 0, then `later()` on the others; an error of one is an error of all."""
    result: Result | None = None
    for mains_turn in (True, False):
        error: BaseException | None = None
        if distributed.is_main() == mains_turn:
            try:
                result = first() if mains_turn else later()
            except (UserError, OSError, RuntimeError, ValueError) as caught:
                error = caught
        distributed.raise_together(error)
    return result  # type: ignore[return-value]  # each rank had its turn


@contextlib.contextmanager
def open_job(config: Config, device: torch.device) -> Iterator[Job]:
    """Build a run from its settings, hand it out, and close it whether it went well or not."""
    stop = StopRequest()
    stop.install()
    tracker: Tracker | None = None
    pulse: health.Pulse | None = None
    loaders: list[Any] = []
    run: run_dir.OpenRun | None = None
    try:
        early: list[str] = []
        run = _open_run(config, early.append)
        folder = Path(config.run.dir)
        tracker = Tracker(folder, config.log, rank=distributed.rank())
        for line in early:
            tracker.say(line)
        data = read_data(config, folder, resumed=_resumed(run), say=tracker.say)
        pulse = health.Pulse()
        job = _build(config, device, run, data, tracker, stop, pulse, loaders)
        if run is not None:
            run.begin()
        pulse.start()
        try:
            yield job
        except RuntimeError as error:
            raise _explain(error, pulse) from error
        except UserError as error:
            error.own = True  # type: ignore[attr-defined]  # only this rank may have met it: it speaks for itself
            raise
    finally:
        for loader in loaders:
            loader.close()
        if pulse is not None:
            pulse.stop()
        if tracker is not None:
            tracker.close()
        if run is not None:
            run.discard()
            run.lock.release()
        stop.restore()


def _explain(error: RuntimeError, pulse: health.Pulse) -> RuntimeError:
    """Name the rank that does not answer, where a collective ran into its timeout or lost its peer."""
    text = str(error)
    if any(sign in text for sign in ("Timed out", "timeout", "Connection", "NCCL")):
        first = distributed.first_cause()
        silent = "" if first else pulse.silent_ranks()
        if first or silent:
            return RuntimeError(first or f"{silent}: {text.splitlines()[0]}")
    return error


def _open_run(config: Config, say: Callable[[str], None]) -> run_dir.OpenRun | None:
    """The run directory, by rank 0; the others learn whether it went well."""
    return on_main_first(
        lambda: run_dir.open_run(config.run, settings_io.to_dict(config), say),
        lambda: None,
    )


def _resumed(run: run_dir.OpenRun | None) -> bool:
    return distributed.broadcast_object(run is not None and run.state is not None)


# ---------------------------------------------------------------- data


def read_data(config: Config, folder: Path, *, resumed: bool, say: Callable[[str], None]) -> Data:
    """Index and split. Rank 0 scans (or reads the cached index), the others read what it wrote."""
    first = distributed.is_main()

    def read() -> Data:
        index = _index(config, config.data.train, folder / "index.cache", None, scan=first)
        val = index
        if config.data.val:
            val = _index(config, config.data.val, folder / "index.val.cache", index.classes, scan=first)
        table = folder / "split.csv"
        if not first or (resumed and table.exists()):
            split = read_split(table, index)
        else:
            split = make_split(index, config.data, seed=config.seed)
            write_split(table, index, split)
        if config.data.val:
            split.val = np.arange(len(val), dtype=np.int64)
        if config.data.limit is not None:
            split.train, split.val = (_limited(part, config.data.limit) for part in (split.train, split.val))
        return Data(index=index, val_index=val, split=split)

    data = on_main_first(read, read)
    if len(data.classes) < 2:
        raise UserError(f"{config.data.train} has a single class ({data.classes[0]}): there is nothing to tell apart")
    for index in (data.index, data.val_index):
        health.check_labels(torch.from_numpy(np.asarray(index.labels)), len(data.classes), list(index.names))
    for note in [*data.index.notes, *data.split.notes]:
        say(note)
    parts = f"{len(data.split.train)} videos to train on, {len(data.split.val)} to validate"
    say(f"data: {len(data.classes)} classes, {parts}")
    return data


def _index(config: Config, root: str, cache: Path, classes: list[str] | None, *, scan: bool) -> Index:
    return open_index(root, labelled=True, settings=config.data, classes=classes, scan=scan, cache_file=cache)


def _limited(videos: np.ndarray, limit: int) -> np.ndarray:
    """A handful of videos spread evenly over the classes, which stand one after the other."""
    if len(videos) <= limit:
        return videos
    return videos[np.linspace(0, len(videos) - 1, limit).round().astype(int)]


def debug_data(config: Config, given: list[str]) -> None:
    """Make a small synthetic data set for --debug where there is none and none was named."""
    if Path(config.data.train).exists() or any(word.startswith("data.train=") for word in given):
        return
    from vac_ddp.tools import synth

    made = Path(config.run.dir).with_name("debug_data")
    if not (made / "data_train").is_dir():
        print(f"no {config.data.train} here: making a few synthetic videos in {made}")
        synth.main([str(made), "--videos-per-class", "4", "--test-per-class", "1"])
    config.data.train = str(made / "data_train")


# ---------------------------------------------------------------- model and loop


def precision_of(config: Config, device: torch.device) -> str:
    """The precision that train.precision=auto means on this device."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if device.type == "cuda" else "fp32"


def _build(
    config: Config,
    device: torch.device,
    run: run_dir.OpenRun | None,
    data: Data,
    tracker: Tracker,
    stop: StopRequest,
    pulse: health.Pulse,
    loaders: list[Any],
) -> Job:
    folder, world = Path(config.run.dir), distributed.world_size()
    state, facts = (run.state, run.facts) if run is not None else (None, None)
    resumed = _resumed(run)
    torch.manual_seed(config.seed)
    loaded = _load(config, data.classes, from_scratch=resumed)
    if not resumed:
        for line in loaded.report.lines():
            tracker.say(line)
    model = loaded.model.to(device)
    precision = precision_of(config, device)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    model.checkpointing = config.train.checkpointing
    groups = make_groups(model, config.optim, config.train.freeze_depth)
    clips_per_gpu = _clips_per_gpu(config, model, device, autocast, facts)
    if resumed:
        _broadcast_state(model, state["model"] if state is not None else None)
    ema = Ema(model, config.train.ema_decay) if config.train.ema_decay is not None else None
    if resumed and ema is not None:
        _broadcast_state(ema.module, state["ema"] if state is not None else None)
    if config.train.compile if config.train.compile is not None else device.type == "cuda":
        model.compile_blocks()
    network = _wrap(model, config, device)

    sampler = StepSampler(
        data.split.train,
        seed=config.seed,
        global_batch=config.train.global_batch,
        clips_per_gpu=clips_per_gpu,
        rank=distributed.rank(),
        world=world,
        repeats=config.augment.repeats,
        balance=config.data.balance,
        labels=data.index.labels[data.split.train],
    )
    total = sampler.steps_per_epoch * config.train.epochs
    total = min(total, config.train.max_steps) if config.train.max_steps is not None else total
    peak, minimum, warmup_start = resolve_lr(config.optim, config.train.global_batch, config.augment.repeats)
    warmup = count_warmup_steps(config.optim.warmup_epochs, epochs=config.train.epochs, total_steps=total)

    def rate(step: int) -> float:
        return learning_rate(
            step, total_steps=total, warmup_steps=warmup, peak=peak, minimum=minimum, warmup_start=warmup_start
        )

    optimizer = make_optimizer(groups, config.optim, lr=rate(0))
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    if resumed:
        _restore_optimizer(optimizer, scaler, state)
    workers = worker_count(config.data.workers, local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    pin = device.type == "cuda"
    dataset = TrainClips(data.index, data.split.train, config, model.noise_size, config.seed)
    loader = train_loader(dataset, sampler, workers=workers, pin=pin)
    loaders.append(loader)

    def loads(epoch: int, start_step: int) -> Iterator[Batch]:
        sampler.set_epoch(epoch, start_step=start_step)
        return to_device(loader, device)

    stepper = Stepper(
        config=config,
        model=model,
        network=network,
        optimizer=optimizer,
        ema=ema,
        scaler=scaler,
        device=device,
        autocast=autocast,
        clips_per_gpu=clips_per_gpu,
        num_classes=len(data.classes),
        mean=tuple(loaded.mean),
        std=tuple(loaded.std),
        class_weights=_class_weights(config, data, device),
        world_size=world,
    )
    main_facts = {
        **checkpoint.environment_facts(),
        "revision": checkpoint.revision(),
        "config": settings_io.to_dict(config),
        "clips_per_gpu": clips_per_gpu,
        "total_steps": total,
    }
    stopping = Stopping(patience=config.train.patience)
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
        validate=None,
        best_content=lambda validation: _best_content(config, data, loaded, stepper, validation),
        best_path=folder / f"best_{config.model.name}.pt",
        facts=main_facts,
        writer=checkpoint.Writer(folder / "checkpoints", config.checkpoint.keep) if distributed.is_main() else None,
        tracker=tracker,
        stop=stop,
        agreement=Agreement(distributed.control_group(timeout_s=config.health.start_timeout_s)),
        stopping=stopping,
        pulse=pulse,
    )
    if len(data.split.val):
        loop.validate = _validator(config, data, stepper, loop, workers, loaders)
    if resumed:
        _resume_loop(loop, state, facts, main_facts, run, tracker)
    else:
        _start_fresh(config, folder, data, loaded, groups, model, tracker)
        _describe(tracker, config, loop, precision, world, peak)
    tracker.connect(settings_io.to_dict(config), folder.name, state["wandb_id"] if state is not None else None)
    return Job(loop=loop, run=run, folder=folder, tracker=tracker)


def _load(config: Config, classes: list[str], *, from_scratch: bool) -> Loaded:
    """The model with its weights. A hub download happens on rank 0 first; a resumed run has its weights already."""
    if from_scratch and config.model.name == "videomae" and config.model.weights is None:
        return load_model(config.model, config.clip, classes, seed=config.seed)

    def load() -> Loaded:
        return load_model(config.model, config.clip, classes, seed=config.seed)

    return on_main_first(load, load)


def _wrap(model: torch.nn.Module, config: Config, device: torch.device) -> torch.nn.Module:
    if not distributed.active():
        return model
    network = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )
    if config.train.bf16_reduce:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        network.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return network


def _broadcast_state(module: torch.nn.Module, state: dict[str, Any] | None) -> None:
    """Load rank 0's state on every rank."""
    if state is not None:
        module.load_state_dict(state)
    if distributed.active():
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, state: dict[str, Any] | None
) -> None:
    """The optimizer's state of rank 0 on every rank; each keeps its share where it is sharded."""
    part = {"optimizer": state["optimizer"], "scaler": state["scaler"]} if state is not None else None
    part = distributed.broadcast_object(part)
    optimizer.load_state_dict(checkpoint.snapshot(part["optimizer"]))  # ZeRO changes its argument
    if scaler is not None and part["scaler"] is not None:
        scaler.load_state_dict(part["scaler"])


def _clips_per_gpu(
    config: Config,
    model: torch.nn.Module,
    device: torch.device,
    autocast: torch.dtype | None,
    facts: dict[str, Any] | None,
) -> int:
    """The micro-batch: as set, as the run had it, 8 on the CPU, or what fits on the smallest GPU."""
    wanted = config.train.clips_per_gpu
    if isinstance(wanted, int):
        return wanted
    saved = distributed.broadcast_object(facts["clips_per_gpu"] if facts is not None else None)
    if saved is not None:
        return int(saved)
    if device.type != "cuda":
        return 8
    share = math.ceil(config.train.global_batch / distributed.world_size())
    own = fit_clips(model, config.clip, autocast=autocast, most=share, device=device)
    return min(distributed.all_gather_objects(own))


def _class_weights(config: Config, data: Data, device: torch.device) -> torch.Tensor | None:
    """Weights by inverse frequency in the training part, mean 1 over its videos; None where off."""
    if config.train.class_weights == "none":
        return None
    counts = np.bincount(data.index.labels[data.split.train], minlength=len(data.classes)).clip(min=1)
    weights = counts.sum() / (len(counts) * counts)
    return torch.tensor(weights, dtype=torch.float32, device=device)


def _validator(
    config: Config, data: Data, stepper: Stepper, loop: Loop, workers: int, loaders: list[Any]
) -> Callable[[Callable[[], bool]], Validation | None]:
    """A function that validates once, on all ranks: figures, or None where it was interrupted."""
    videos, world = data.split.val, distributed.world_size()
    places = rank_places(len(videos), distributed.rank(), world)
    dataset = TestViews(
        data.val_index, videos, config.clip, config.val, tolerant=False, reduced=config.data.reduced_decode
    )
    views = config.val.crops * (len(config.val.offsets) if config.val.windows == "offsets" else config.val.count)
    at_once = max(1, stepper.clips_per_gpu // views)
    loader = test_loader(
        dataset,
        places,
        videos_per_batch=at_once,
        workers=min(workers, len(places)),
        prefetch=config.data.prefetch,
        pin=stepper.device.type == "cuda",
    )
    loaders.append(loader)
    rounds = math.ceil(math.ceil(len(videos) / world) / at_once)
    labels = data.val_index.labels[videos]

    def validate(stop: Callable[[], bool]) -> Validation | None:
        loop.tracker.progress("validation", rounds)
        logits, stopped = video_logits(
            stepper.model if stepper.ema is None else stepper.ema.module,
            to_device(loader, stepper.device),
            rounds=rounds,
            total=len(videos),
            num_classes=len(data.classes),
            clips_per_gpu=stepper.clips_per_gpu,
            flip=config.val.flip,
            device=stepper.device,
            autocast=stepper.autocast,
            mean=stepper.mean,
            std=stepper.std,
            stop=stop,
            advance=loop.tracker.advance,
            damage=loop.damage,
        )
        loop.tracker.end_progress()
        if stopped:
            return None
        figures = None
        if logits is not None:
            figures = classification_metrics(logits, labels, data.classes).figures()
        figures = distributed.broadcast_object(figures)
        return Validation(top1=figures["top1"], loss=figures["loss"], figures=figures)

    return validate


def _best_content(
    config: Config, data: Data, loaded: Loaded, stepper: Stepper, validation: Validation | None
) -> dict[str, Any]:
    """What best_<model>.pt holds: plain types and tensors, readable with weights_only=True."""
    counts = np.bincount(data.index.labels[data.split.train], minlength=len(data.classes))
    return {
        "model": file_state(stepper.model if stepper.ema is None else stepper.ema.module),
        "classes": list(data.classes),
        "config": settings_io.to_dict(config),
        "metrics": dict(validation.figures) if validation is not None else {},
        "architecture": loaded.architecture,
        "class_counts": counts.tolist(),
    }


def _start_fresh(
    config: Config,
    folder: Path,
    data: Data,
    loaded: Loaded,
    groups: list[dict[str, Any]],
    model: torch.nn.Module,
    tracker: Tracker,
) -> None:
    """What a new run writes down before its first step, after a look at the disk."""
    mirrored = flip_guard(data.classes) if config.augment.flip > 0 else []
    if mirrored:
        tracker.say(f"left and right may make these classes: {', '.join(mirrored[:6])}; consider augment.flip=0")
    tracker.say(group_table(groups, model))

    def write() -> None:
        copies = config.checkpoint.keep + 2
        average = 4 if config.train.ema_decay is not None else 0
        size = sum(p.numel() for p in model.parameters()) * (BYTES_A_PARAMETER + average)
        checkpoint.check_space(folder, copies * size)
        run_dir.write_facts(folder, settings_io.to_yaml(config), data.classes)
        files.write_json(folder / "load_report.json", loaded.report.as_dict())

    on_main_first(write, lambda: None)


def _describe(tracker: Tracker, config: Config, loop: Loop, precision: str, world: int, peak: float) -> None:
    stepper = loop.stepper
    count = sum(p.numel() for p in stepper.model.parameters())
    accumulation = math.ceil(config.train.global_batch / (world * stepper.clips_per_gpu))
    tracker.say(
        f"{config.model.name}, {count / 1e6:.1f} M parameters, {precision}; global batch {config.train.global_batch} = "
        f"{world} rank{'s' if world > 1 else ''} x {stepper.clips_per_gpu} clips x {accumulation}; peak lr {peak:.3g}"
    )
    tracker.say(f"{loop.epochs} epochs of {loop.steps_per_epoch} steps, {loop.total_steps} steps in all")


def _resume_loop(
    loop: Loop,
    state: dict[str, Any] | None,
    facts: dict[str, Any] | None,
    now: dict[str, Any],
    run: run_dir.OpenRun | None,
    tracker: Tracker,
) -> None:
    """Give the loop its place back, and say which of the two promises about the rest of the run holds."""
    rest = None
    if state is not None:
        rest = {k: v for k, v in state.items() if k not in ("model", "ema", "optimizer", "scaler")}
    rest, facts = distributed.broadcast_object((rest, facts))
    if facts["total_steps"] != now["total_steps"]:
        raise UserError(
            f"the run had {facts['total_steps']} steps and would have {now['total_steps']} now: "
            "the data or the length changed; start a new run.dir"
        )
    loop.restore(rest)
    moved = tracker.rewind(loop.position.step)
    compared = ("torch", "threads", "device", "world_size", "clips_per_gpu")
    other = [f"{name} {facts[name]} -> {now[name]}" for name in compared if facts[name] != now[name]]
    promise = (
        f"the same batches, the loss to 1e-5 ({'; '.join(other)})"
        if other
        else "bit for bit the run that was not interrupted"
        if now["device"] == "cpu"
        else "the same batches, the loss to 1e-5 (a GPU's sums may come in another order)"
    )
    source = run.source if run is not None else "checkpoint"
    tracker.say(f"resumed at step {loop.position.step} of {loop.total_steps} from {source}: {promise}")
    if moved:
        tracker.say(f"{moved} lines behind step {loop.position.step} moved to metrics.discarded.jsonl")
