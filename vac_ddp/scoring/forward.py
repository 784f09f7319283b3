"""Clips through the model: forward passes of full size over the clips of neighbouring videos, logits a video."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vac_ddp.data.loader import TestBatch
from vac_ddp.data.normalization import normalize
from vac_ddp.errors import UserError
from vac_ddp.models import VideoModel
from vac_ddp.settings import ClipSettings

WORTH_DOUBLING = 0.98  # of the time a clip takes: a larger pass must bring at least that
AUTO_CLIPS = {"cpu": 8, "cuda": 64}  # a GPU that cannot hold them gets half as many until it can


@dataclass(kw_only=True)
class Scorer:
    """The model and how clips go through it.

    pad: fill the last, short pass with zeros, because a compiled model would be compiled again for its size.
    """

    model: VideoModel
    device: torch.device
    autocast: torch.dtype | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    clips_per_gpu: int | str
    pad: bool = False


def pass_size(scorer: Scorer, clip: ClipSettings, *, most: int) -> int:
    """The clips of a pass: as set, or on a GPU as many as fit, up to `most`, while more of them take less time each.

    Doubled from the usual size; each size is run twice with clips of zeros, and the second run counts.
    """
    if isinstance(scorer.clips_per_gpu, int):
        return scorer.clips_per_gpu
    size = AUTO_CLIPS[scorer.device.type]
    if scorer.device.type != "cuda" or most <= size:
        return size
    good, before = size, float("inf")
    while size <= most:
        try:
            seconds = _pass_seconds(scorer, clip, size)
        except torch.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
        if seconds / size > WORTH_DOUBLING * before:
            break
        good, before, size = size, seconds / size, 2 * size
    return good


def first_pass(scorer: Scorer, clip: ClipSettings, size: int) -> None:
    """One pass of clips of zeros."""
    zeros = torch.zeros(size, clip.frames, clip.size, clip.size, 3, dtype=torch.uint8, device=scorer.device)
    _Stream(scorer, size).pass_(zeros)


def _pass_seconds(scorer: Scorer, clip: ClipSettings, size: int) -> float:
    seconds = 0.0
    for _ in range(2):
        torch.cuda.synchronize(scorer.device)
        start = time.perf_counter()
        first_pass(scorer, clip, size)
        torch.cuda.synchronize(scorer.device)
        seconds = time.perf_counter() - start
    return seconds


@dataclass(kw_only=True)
class Scored:
    """One video: its number, logits (n, K) float32 (None where nothing could be decoded), how many damaged frames."""

    video: int
    logits: np.ndarray | None
    damaged: int


def scored_videos(scorer: Scorer, videos: Iterable[tuple[TestBatch, int]]) -> Iterator[Scored]:
    """Send videos, each a batch of one and its number of damaged frames, through the model in passes of full size.

    Clips of neighbouring videos share a pass, so that the last pass alone is short. Videos come out in their order.
    """
    size = scorer.clips_per_gpu if isinstance(scorer.clips_per_gpu, int) else AUTO_CLIPS[scorer.device.type]
    stream = _Stream(scorer, size)
    waiting: deque[_Waiting] = deque()
    scorer.model.eval()
    for batch, damaged in videos:
        (clips,), decoded = batch.clips, bool(batch.decoded)
        waiting.append(
            _Waiting(
                video=int(batch.videos),
                clips=len(clips) if decoded else 0,
                clip_of_view=None if batch.clip_of_view is None else batch.clip_of_view.numpy(),
                damaged=damaged,
            )
        )
        if decoded:
            stream.put(clips)
        yield from _ready(waiting, stream)
    stream.flush()
    yield from _ready(waiting, stream)


@dataclass(kw_only=True)
class _Waiting:
    """A video whose `clips` clips are on their way through the model; `clip_of_view` as in `TestBatch`."""

    video: int
    clips: int
    clip_of_view: np.ndarray | None
    damaged: int


def _ready(waiting: deque[_Waiting], stream: _Stream) -> Iterator[Scored]:
    while waiting and stream.available() >= waiting[0].clips:
        video = waiting.popleft()
        logits = stream.take(video.clips, video.clip_of_view) if video.clips else None
        yield Scored(video=video.video, logits=logits, damaged=video.damaged)


class _Stream:
    """Clips in, logits out, in the same order; one pass is under way on a GPU while the one before is read."""

    def __init__(self, scorer: Scorer, size: int) -> None:
        self.scorer = scorer
        self.views = 2 if scorer.flip else 1
        self.size = size
        self._clips: deque[Tensor] = deque()
        self._count = 0
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._logits: deque[np.ndarray] = deque()
        self._have = 0

    def put(self, clips: Tensor) -> None:
        """Add clips (C, T, S, S, 3) uint8."""
        self._clips.append(clips.to(self.scorer.device, non_blocking=True))
        self._count += len(clips)
        while self._count * self.views >= self.size:
            self._forward(max(1, self.size // self.views))
            self._collect(keep=1)

    def flush(self) -> None:
        """Send what is left through the model."""
        while self._count:
            self._forward(min(self._count, max(1, self.size // self.views)))
        self._collect(keep=0)

    def available(self) -> int:
        """Clips whose logits are there."""
        return self._have

    def take(self, count: int, clip_of_view: np.ndarray | None) -> np.ndarray:
        """Logits (n * views, K) float32 of the n views that have the next `count` clips, mirrored ones behind.

        clip_of_view: (n,) which of these clips each view has; None: view i has clip i.
        """
        taken = []
        while count:
            rows = self._logits.popleft()
            taken.append(rows[:count])
            if len(rows) > count:
                self._logits.appendleft(rows[count:])
            count -= len(taken[-1])
            self._have -= len(taken[-1])
        rows = np.concatenate(taken)
        return (rows if clip_of_view is None else rows[clip_of_view]).reshape(-1, rows.shape[-1])

    def _forward(self, count: int) -> None:
        taken = []
        while count:
            clips = self._clips.popleft()
            taken.append(clips[:count])
            if len(clips) > count:
                self._clips.appendleft(clips[count:])
            count -= len(taken[-1])
        clips = torch.cat(taken) if len(taken) > 1 else taken[0]
        self._count -= len(clips)
        if self.views == 2:
            clips = torch.stack([clips, clips.flip(-2)], dim=1).flatten(0, 1)
        logits = self._logits_of(clips).unflatten(0, (-1, self.views))
        if logits.is_cuda:
            host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
            host.copy_(logits, non_blocking=True)
            self._under_way.append((host, torch.cuda.current_stream().record_event()))
        else:
            self._under_way.append((logits, None))

    def _logits_of(self, clips: Tensor) -> Tensor:
        """Float32 logits (B, K) of clips (B, T, S, S, 3) uint8; halves the pass where the GPU is too small for it."""
        while True:
            try:
                return torch.cat([self.pass_(part) for part in clips.split(self.size)])
            except torch.OutOfMemoryError:
                if self.scorer.clips_per_gpu != "auto" or self.size == 1:
                    raise UserError(
                        f"CUDA out of memory with {self.size} clips in a pass: lower predict.clips_per_gpu, or use "
                        "train.precision=bf16"
                    ) from None
            self.size = max(1, self.size // 2)
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def pass_(self, clips: Tensor) -> Tensor:
        """Logits (B, K) float32 on the device of at most `size` clips (B, T, S, S, 3) uint8."""
        scorer, count = self.scorer, len(clips)
        full = self.size // self.views * self.views
        if scorer.pad and count < full:
            clips = torch.cat([clips, clips.new_zeros(full - count, *clips.shape[1:])])
        pixels = normalize(clips, scorer.mean, scorer.std, torch.float32)
        enabled = scorer.autocast is not None
        with torch.autocast(scorer.device.type, dtype=scorer.autocast or torch.bfloat16, enabled=enabled):
            return scorer.model(pixels).float()[:count]

    def _collect(self, *, keep: int) -> None:
        while len(self._under_way) > (keep if self.scorer.device.type == "cuda" else 0):
            logits, event = self._under_way.popleft()
            if event is not None:
                event.synchronize()
            self._logits.append(logits.numpy())
            self._have += len(logits)
