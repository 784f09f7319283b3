"""One optimizer step: the same mathematical object for any split of the global batch into ranks and micro-batches.

The loads of the step are there before it begins. The loss is the sum of the samples' losses times world size over the
number of samples in the global batch, so that DDP's mean over ranks leaves the mean over samples. Gradients are
reduced in the last micro-batch; a rank without samples takes part with weight zero.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vac_ddp.data.augment import augment_clips
from vac_ddp.data.loader import Batch
from vac_ddp.data.mixing import mix, soft_targets
from vac_ddp.models import VideoModel
from vac_ddp.models.precision import autocast
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.torch_compat import skip_where
from vac_ddp.settings import Config
from vac_ddp.training.ema import Ema
from vac_ddp.training.optimization import set_lr


@dataclass(kw_only=True)
class Prepared:
    """A load as the model takes it: clips (B, T, 3, S, S) normalised, targets (B, K), noise (B, n)."""

    clips: torch.Tensor
    targets: torch.Tensor
    noise: torch.Tensor
    samples: torch.Tensor


@dataclass(kw_only=True)
class StepRecord:
    """What a step leaves on the device until the log is written. Nothing here was waited for."""

    step: int
    samples: list[torch.Tensor]
    losses: list[torch.Tensor]
    correct: list[torch.Tensor]
    norm: torch.Tensor
    found_inf: torch.Tensor
    lr: float
    busy: tuple[Any, Any]
    marks: list[tuple[str, Any]]  # what had ended and when, from the end of the step before (see `phases`)


def phases(record: StepRecord) -> dict[str, float]:
    """Seconds of a step by phase: idle (since the step before), prepare, forward, backward, optimizer.

    On CUDA of the device, which must have come to the step's end: the host was done long before.
    """
    spent: dict[str, float] = {}
    for (_, begin), (name, end) in itertools.pairwise(record.marks):
        spent[name] = spent.get(name, 0.0) + seconds_between(begin, end)
    return spent


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds between two times of the host, or two CUDA events that have happened."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000.0


@dataclass(kw_only=True)
class Stepper:
    """What a step works on. `network` is the DDP module, or the bare `model` in a single process."""

    config: Config
    model: VideoModel
    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    scaler: torch.amp.GradScaler | None
    device: torch.device
    autocast: torch.dtype | None
    precision: str
    compiled: bool
    clips_per_gpu: int
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_weights: torch.Tensor | None
    world_size: int
    records: deque[StepRecord] = field(default_factory=deque)
    last_end: Any = None  # when the step before ended; None: something else than waiting for data came between

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and kept: the average of the weights, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def prepare(self, batch: Batch) -> Prepared:
        """Augment, normalise and mix a load on the device; soft targets."""
        augment = self.config.augment
        clips = augment_clips(batch.clips, batch.params, augment, mean=self.mean, std=self.std, dtype=torch.float32)
        partner = batch.params["partner"].to(self.device, non_blocking=True)
        if augment.mixup > 0 or augment.cutmix > 0:
            clips, keep = mix(clips, partner, batch.params)
        else:
            keep = torch.ones(len(clips), device=self.device)
        targets = soft_targets(
            batch.labels, batch.labels[partner], keep, self.num_classes, self.config.train.label_smoothing
        )
        return Prepared(clips=clips, targets=targets, noise=batch.noise, samples=batch.samples)

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy of soft targets (B, K), a sample each (B,), weighted by class where weights are set."""
        terms = targets * torch.log_softmax(logits.float(), dim=1)
        return -(terms if self.class_weights is None else terms * self.class_weights).sum(1)

    def forward(self, clips: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, K) under autocast."""
        with autocast(self.device, self.autocast):
            return self.network(clips, noise)

    def zero_weight_pass(self) -> torch.Tensor:
        """Take part in the reduction of gradients with a clip of zeros and weight zero."""
        clip = self.config.clip
        clips = torch.zeros(1, clip.frames, 3, clip.size, clip.size, device=self.device)
        noise = torch.full((1, self.model.noise_size), 0.5, device=self.device)
        loss = self.forward(clips, noise).float().sum() * 0.0
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
                prepared = (number, self.prepare(batches[number]))
                record.marks.append(("prepare", self._now()))
            rows = slice(first, first + self.clips_per_gpu)
            PROCESS.progress()
            with self._reducing(count == len(pieces)):
                loss = self._forward_piece(prepared[1], rows, record) * (self.world_size / samples)
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
        self.records.append(record)

    def _forward_piece(self, load: Prepared, rows: slice, record: StepRecord) -> torch.Tensor:
        targets = load.targets[rows]
        logits = self.forward(load.clips[rows], load.noise[rows])
        losses = self.losses(logits, targets)
        record.samples.append(load.samples[rows])
        record.losses.append(losses.detach())
        record.correct.append(logits.detach().argmax(1).eq(targets.argmax(1)))
        return losses.sum()

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
        if self.ema is not None:
            self.ema.update(self.model, record.step, record.found_inf)
