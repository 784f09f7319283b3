"""One optimizer step: the same mathematical object for any split of the global batch into ranks and micro-batches.

The batches of the step are there before it begins. The loss is the sum of the samples' losses times world size over the
number of samples in the global batch, so that DDP's mean over ranks leaves the mean over samples. Gradients are
reduced in the last micro-batch; a rank without samples takes part with weight zero.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vac_ddp.data.batch import Batch
from vac_ddp.models import VideoModel
from vac_ddp.models.batch_norm import running_statistics, statistics_unchanged
from vac_ddp.models.compilation import WORTH_COMPILING, compile_if_it_works, train_pass
from vac_ddp.models.precision import AUTOCAST, autocast, run_precision
from vac_ddp.runtime import distributed
from vac_ddp.runtime.data_parallel import average, load_state, wrap
from vac_ddp.runtime.host_memory import keep_freed_memory
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.torch_compat import graphs_compiled, skip_where
from vac_ddp.settings import Config
from vac_ddp.training.ema import Ema
from vac_ddp.training.meters import Meters, clip_flops, matmul_rate
from vac_ddp.training.micro_batch_fit import auto_clips_per_gpu
from vac_ddp.training.objective import Classification, Prepared
from vac_ddp.training.optimization import make_groups, make_optimizer, set_lr
from vac_ddp.training.resuming import Resumed
from vac_ddp.training.step_record import StepRecord


@dataclass(kw_only=True)
class Stepper:
    """What a step works on. `network` is the DDP module, or the objective's `model` in a single process."""

    config: Config
    objective: Classification
    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema[VideoModel] | None
    scaler: torch.amp.GradScaler | None
    device: torch.device
    precision: str
    compiled: bool
    clips_per_gpu: int
    statistics: list[torch.Tensor] = field(default_factory=list)  # of BatchNorm layers that follow the micro-batches
    records: deque[StepRecord] = field(default_factory=deque)
    last_end: Any = None  # when the step before ended; None: something else than waiting for data came between

    @property
    def model(self) -> VideoModel:
        """The bare model."""
        return self.objective.model

    @property
    def eval_model(self) -> VideoModel:
        """The model that is validated and kept: the average of the weights, where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def autocast(self) -> torch.dtype | None:
        """The type of autocast; None where it is off."""
        return AUTOCAST[self.precision]

    def forward(self, clips: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The network's output under autocast."""
        with autocast(self.device, self.autocast):
            output: torch.Tensor = self.network(clips, noise)
        return output

    def zero_weight_pass(self) -> torch.Tensor:
        """Take part in the reduction of gradients with zeros of weight zero: one clip, or as many as are compiled."""
        with statistics_unchanged(self.model):
            loss = self.forward(*self.objective.zeros(self.clips_per_gpu if self.compiled else 1)).float().sum() * 0.0
        return loss if self.scaler is None else self.scaler.scale(loss)

    def warm_up(self) -> None:
        """A discarded pass before the first step, fresh or resumed.

        DDP orders its buckets anew after the first backward pass, and from 3 ranks on the order of a sum changes
        with them: without this a resumed run would differ from one that was never interrupted.
        """
        self.network.train()
        self.zero_weight_pass().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self, batches: list[Batch], *, step: int, samples: int, lr: float, began: float) -> None:
        """One optimizer step over this rank's loads of a global batch of `samples` clips.

        began: time.perf_counter() when the wait for the loads began. The record is appended to `records`.
        """
        set_lr(self.optimizer, lr)
        graphs = graphs_compiled()
        record = StepRecord(
            step=step,
            samples=[],
            losses=[],
            correct=[],
            norm=torch.zeros(()),
            found_inf=torch.zeros(()),
            lr=lr,
            busy=(began, began),
            marks=[] if self.last_end is None else [("", self.last_end)],
        )
        start = self._now(began)
        record.marks.append(("idle", self._now()))
        pieces = [
            (number, first) for number, b in enumerate(batches) for first in range(0, len(b.clips), self.clips_per_gpu)
        ]
        prepared: tuple[int, Prepared] | None = None
        for count, (number, first) in enumerate(pieces, start=1):
            if prepared is None or prepared[0] != number:
                prepared = (number, self.objective.prepare(batches[number]))
                record.marks.append(("prepare", self._now()))
            rows = slice(first, first + self.clips_per_gpu)
            PROCESS.progress()
            with self._reducing(count == len(pieces)):
                loss = self._forward_piece(prepared[1][rows], record) * (distributed.world_size() / samples)
                record.marks.append(("forward", self._now()))
                if count == len(pieces):
                    record.busy = (start, record.marks[-1][1])
                    PROCESS.waiting = self.network is not self.model
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                record.marks.append(("backward", self._now()))
        if not pieces:  # a rank without samples
            loss = self.zero_weight_pass()
            record.busy = (start, self._now())
            PROCESS.waiting = True
            loss.backward()
            record.marks.append(("backward", self._now()))
        self._update(record)
        self.last_end = self._now()
        record.marks.append(("optimizer", self.last_end))
        record.compiled = graphs_compiled() > graphs
        self.records.append(record)

    def _forward_piece(self, piece: Prepared, record: StepRecord) -> torch.Tensor:
        output = self.forward(piece.clips, piece.noise)
        losses = self.objective.losses(output, piece.targets)
        record.samples.append(piece.samples)
        record.losses.append(losses.detach())
        record.correct.append(self.objective.correct(output.detach(), piece.targets))
        return losses.sum()

    def counts_last_step(self) -> int:
        """1 where the schedule goes on. In fp16 a skipped step does not count, and only there is it known at once."""
        return 1 if self.scaler is None else int(not bool(self.records[-1].found_inf))

    def _reducing(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or self.network is self.model:
            return contextlib.nullcontext()
        return self.network.no_sync()  # type: ignore[operator]  # only DDP has it

    def _now(self, host: float | None = None) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter() if host is None else host
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _update(self, record: StepRecord) -> None:
        """Clip, step where all is finite, move the average: without a synchronisation but for fp16."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        record.norm = nn.utils.get_total_norm(gradients)
        record.found_inf = (~torch.isfinite(record.norm)).float()
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip_norm, record.norm)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.config.optim.fused:
            skip_where(self.optimizer, record.found_inf)
            self.optimizer.step()
        elif not bool(record.found_inf):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        average(self.statistics)
        if self.ema is not None:
            self.ema.update(self.model, record.step, record.found_inf)


def make_stepper(
    config: Config, objective: Classification, resumed: Resumed, device: torch.device, say: Callable[[str], None]
) -> tuple[Stepper, Meters]:
    """The objective's model compiled and wrapped as set, with EMA, optimizer and scaler; restored if resumed."""
    if device.type == "cpu":
        keep_freed_memory()
    model, precision = objective.model, run_precision(config, distributed.weakest_gpu(device), resumed.facts)
    dtype = AUTOCAST[precision]
    model.checkpointing = config.train.checkpointing
    groups = make_groups(model, config.optim, config.train.freeze_depth)
    wanted = config.train.clips_per_gpu
    if isinstance(wanted, int):
        clips_per_gpu = wanted
    else:
        videos = len(objective.data.split.train)
        clips_per_gpu = auto_clips_per_gpu(config, model, device, resumed.facts, precision=precision, videos=videos)
    if resumed.yes:
        resumed.check_fits(model, groups, averaged=config.train.ema_decay is not None)
        load_state(model, resumed.part("model"))
    ema = Ema(model, config.train.ema_decay) if config.train.ema_decay is not None else None
    if resumed.yes and ema is not None:
        load_state(ema.module, resumed.part("ema"))
    flops = clip_flops(model, config.clip) if distributed.is_main() else None  # rank 0 writes the figures
    meters = Meters(
        device=device,
        world_size=distributed.world_size(),
        flops_per_clip=flops and flops[1],
        matmul=matmul_rate(device, dtype),
    )
    compiled = compile_if_it_works(
        model,
        lambda: train_pass(model, config.clip, clips_per_gpu, device, dtype),
        setting="train.compile",
        wanted=config.train.compile,
        default=compiles_unasked(config, len(objective.data.split.train), clips_per_gpu, device, say),
        gather=distributed.all_gather_objects,
        say=say,
    )
    network = wrap(model, device, bf16_reduce=config.train.bf16_reduce)
    optimizer = make_optimizer(groups, config.optim, lr=0.0)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    if resumed.yes:
        resumed.load_optimizer(optimizer, scaler)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the passes that were tried are not of the training
    stepper = Stepper(
        config=config,
        objective=objective,
        network=network,
        optimizer=optimizer,
        ema=ema,
        scaler=scaler,
        device=device,
        precision=precision,
        compiled=compiled,
        clips_per_gpu=clips_per_gpu,
        statistics=running_statistics(model) if config.model.batch_norm == "batch" else [],
    )
    return stepper, meters


def compiles_unasked(
    config: Config, videos: int, clips_per_gpu: int, device: torch.device, say: Callable[[str], None]
) -> bool:
    """Whether a run on so many training `videos` compiles where nothing is set: on CUDA, if it is long enough to gain.

    The whole run counts, so that it is the same where it resumes.
    """
    train = config.train
    if device.type != "cuda" or train.compile is not None:
        return False
    clips = train.epochs * videos * config.augment.repeats
    if train.max_steps is not None:
        clips = min(clips, train.max_steps * train.global_batch)
    passes = math.ceil(clips / (distributed.world_size() * clips_per_gpu))
    if passes < WORTH_COMPILING:
        say(f"compile off: {passes} micro-batches in all would not regain the time (train.compile=true does it anyway)")
    return passes >= WORTH_COMPILING
