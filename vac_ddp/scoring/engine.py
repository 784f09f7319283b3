"""From views of videos to logits or features: passes of full size over clips of neighbouring videos."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vac_ddp.data.batch import TestBatch
from vac_ddp.data.loader import to_device
from vac_ddp.errors import UserError
from vac_ddp.scoring.scorer import Scorer, too_small

_Rows = TypeVar("_Rows", Tensor, np.ndarray)


@dataclass(kw_only=True)
class Scored:
    """One video: its place in the data set, its number, and what the model gave for each of its n views.

    outputs: (n, ...) float32, as logits (n, K) or features (n, T', D); None where nothing could be decoded.
    """

    place: int
    video: int
    outputs: np.ndarray | None


def scored_videos(scorer: Scorer, batches: Iterable[TestBatch]) -> Iterator[Scored]:
    """Send the videos of `batches` to the device and through the model in passes of full size; their order stays.

    Clips of neighbouring videos share a pass, so that the last pass alone is short. The views of a video stand as in
    `scoring.views.view_table`, a mirrored one behind its clip.
    """
    stream = _Stream(scorer)
    waiting: deque[_Waiting] = deque()
    scorer.model.eval()
    for batch in to_device(batches, scorer.device):
        decoded = batch.decoded.tolist()
        for place, video, good in zip(batch.places.tolist(), batch.videos.tolist(), decoded, strict=True):
            clips = batch.clips.shape[1] if good else 0
            waiting.append(_Waiting(place=place, video=video, clips=clips, clip_of_view=batch.clip_of_view))
        if any(decoded):
            stream.put((batch.clips if all(decoded) else batch.clips[batch.decoded]).flatten(0, 1))
        yield from _ready(waiting, stream)
    stream.flush()
    yield from _ready(waiting, stream)


@dataclass(kw_only=True)
class _Waiting:
    """A video whose `clips` clips are on their way through the model; `clip_of_view` as in `TestBatch`."""

    place: int
    video: int
    clips: int
    clip_of_view: Tensor | None


def _ready(waiting: deque[_Waiting], stream: _Stream) -> Iterator[Scored]:
    while waiting and stream.available >= waiting[0].clips:
        video = waiting.popleft()
        outputs = None
        if video.clips:
            rows = stream.take(video.clips)
            rows = rows if video.clip_of_view is None else rows[video.clip_of_view.numpy()]
            outputs = rows.reshape(-1, *rows.shape[2:])
        yield Scored(place=video.place, video=video.video, outputs=outputs)


class _Stream:
    """Clips in, rows out, in the same order; one pass is under way on a GPU while the one before is read."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.views = 2 if scorer.flip else 1
        self.size = scorer.clips_per_pass
        self.available = 0  # clips whose rows are there
        self._clips: deque[Tensor] = deque()
        self._count = 0
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._rows: deque[np.ndarray] = deque()

    def put(self, clips: Tensor) -> None:
        """Add clips (C, T, S, S, 3) uint8 on the device."""
        self._clips.append(clips)
        self._count += len(clips)
        while self._count * self.views >= self.size:
            self._forward(max(1, self.size // self.views))
            self._collect(keep=1)

    def flush(self) -> None:
        """Send what is left through the model."""
        while self._count:
            self._forward(min(self._count, max(1, self.size // self.views)))
        self._collect(keep=0)

    def take(self, count: int) -> np.ndarray:
        """Rows (count, 1 or 2, ...) float32 of the next `count` clips, of which the second is of the mirrored clip."""
        self.available -= count
        return np.concatenate(_first(self._rows, count))

    def _forward(self, count: int) -> None:
        taken = _first(self._clips, count)
        clips = torch.cat(taken) if len(taken) > 1 else taken[0]
        self._count -= len(clips)
        if self.views == 2:
            clips = torch.stack([clips, clips.flip(-2)], dim=1).flatten(0, 1)
        rows = self._rows_of(clips).unflatten(0, (-1, self.views))
        self._under_way.append(_to_host(rows))

    def _rows_of(self, clips: Tensor) -> Tensor:
        """What the model gives for clips (B, ...); halves the pass where the GPU is too small for it."""
        while True:
            try:
                return torch.cat([self._pass(part) for part in clips.split(self.size)])
            except torch.OutOfMemoryError:
                if self.scorer.clips_per_gpu != "auto" or self.size == 1:
                    raise UserError(too_small(self.scorer, self.size)) from None
            self.size = self.scorer.found = max(1, self.size // 2)
            torch.cuda.empty_cache()

    def _pass(self, clips: Tensor) -> Tensor:
        count, full = len(clips), self.size // self.views * self.views
        if self.scorer.pad and count < full:
            clips = torch.cat([clips, clips.new_zeros(full - count, *clips.shape[1:])])
        return self.scorer.outputs(clips)[:count]

    def _collect(self, *, keep: int) -> None:
        while len(self._under_way) > (keep if self.scorer.device.type == "cuda" else 0):
            rows, event = self._under_way.popleft()
            if event is not None:
                event.synchronize()
            self._rows.append(rows.numpy())
            self.available += len(rows)


def _to_host(rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Rows in host memory, and the event after which they are there (None: they are)."""
    if not rows.is_cuda:
        return rows, None
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    return host, torch.cuda.current_stream(rows.device).record_event()  # of the rows' device, not the current one


def _first(blocks: deque[_Rows], count: int) -> list[_Rows]:
    """Take the first `count` rows out of blocks of rows, which are cut where it has to be."""
    taken = []
    while count:
        block = blocks.popleft()
        taken.append(block[:count])
        if len(block) > count:
            blocks.appendleft(block[count:])
        count -= len(taken[-1])
    return taken
