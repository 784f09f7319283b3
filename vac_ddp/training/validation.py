"""Validation without padding: every video once, rows keyed by their place, the bare module on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from vac_ddp.data.batch import TestBatch
from vac_ddp.data.clip_sampling import window_count
from vac_ddp.data.dataset import TestViews
from vac_ddp.data.grouping import known_sources
from vac_ddp.data.loader import views_loader
from vac_ddp.report.tracker import Tracker
from vac_ddp.results.logits_file import ViewsHead, write_views
from vac_ddp.results.metrics import classification_metrics
from vac_ddp.runtime import distributed
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.scoring.engine import scored_videos
from vac_ddp.scoring.scorer import Scorer
from vac_ddp.settings import Config
from vac_ddp.training.data_setup import Data
from vac_ddp.training.progress import Validation
from vac_ddp.training.step import Stepper

ASK_EVERY = 8  # batches


class Validator:
    """The validation part of a run and its loader: figures of the model as it is, as often as they are asked for."""

    def __init__(
        self, config: Config, data: Data, stepper: Stepper, tracker: Tracker, *, workers: int, room: int
    ) -> None:
        self.config, self.data, self.stepper, self.tracker = config, data, stepper, tracker
        self.videos, world = data.split.val, distributed.world_size()
        self.places = list(range(distributed.rank(), len(self.videos), world))  # ranks differ by one video at most
        at_once = max(1, stepper.clips_per_gpu // (window_count(config.val) * config.val.crops))
        self.rounds = math.ceil(math.ceil(len(self.videos) / world) / at_once)  # batches of the rank that has most
        self.loader = views_loader(
            TestViews(
                data.val_index,
                self.videos,
                config.clip,
                config.val,
                tolerant=False,
                reduced=config.data.reduced_decode,
            ),
            self.places,
            videos_per_batch=at_once,
            workers=min(workers, len(self.places)),
            prefetch=config.data.prefetch,
            pin=stepper.device.type == "cuda",
            room=room,
        )
        self._stopped = False

    def run(self, stop: Callable[[], bool]) -> Validation | None:
        """Validate once, on all ranks: figures, or None where `stop`, an agreement of all ranks, said yes."""
        self._stopped = False
        self.tracker.progress("validation", len(self.places), unit="videos")
        logits = self._logits(stop)
        self.tracker.end_progress()
        if self._stopped:
            return None
        figures = None
        if logits is not None:
            labels = self.data.val_index.labels[self.videos]
            figures = classification_metrics(logits, labels, self.data.classes).figures()
        figures = distributed.broadcast_object(figures)
        return Validation(top1=figures["top1"], loss=figures["loss"], figures=figures, logits=logits)

    def _logits(self, stop: Callable[[], bool]) -> np.ndarray | None:
        """Mean logits of the views of every video (V, K) float32, on rank 0; None elsewhere, and if it was stopped."""
        stepper = self.stepper
        scorer = Scorer(
            model=stepper.eval_model,
            device=stepper.device,
            autocast=stepper.autocast,
            mean=stepper.objective.mean,
            std=stepper.objective.std,
            flip=self.config.val.flip,
            clips_per_gpu=stepper.clips_per_gpu,
            pad=stepper.compiled and stepper.ema is None,
            setting="train.clips_per_gpu",
        )
        was_training = scorer.model.training
        places, rows = [], [np.zeros((0, len(self.data.classes)), np.float32)]
        try:
            for video in scored_videos(scorer, self._batches(stop)):
                assert video.outputs is not None, "validation refuses videos that cannot be decoded"
                places.append(video.place)
                rows.append(video.outputs.mean(axis=0, keepdims=True))
        finally:
            scorer.model.train(was_training)
        if self._stopped:
            return None
        gathered = distributed.gather_rows(
            torch.tensor(places, dtype=torch.int64), torch.from_numpy(np.concatenate(rows)), total=len(self.videos)
        )
        return None if gathered is None else gathered.numpy()

    def _batches(self, stop: Callable[[], bool]) -> Iterator[TestBatch]:
        """Batches of this rank, until `stop` said yes; all ranks ask it equally often, whatever they have left."""
        own = iter(self.loader)
        for turn in range(self.rounds):
            if turn % ASK_EVERY == 0 and stop():
                self._stopped = True
                return
            batch = next(own, None)
            if batch is None:
                continue
            PROCESS.progress()
            self._say_damage(batch.damage)
            self.tracker.advance(len(batch.places))
            yield batch

    def _say_damage(self, lines: list[str]) -> None:
        for line in lines:
            self.tracker.say(line, everywhere=True)

    def write(self, path: Path, validation: Validation, epoch: int) -> None:
        """Write the logits of a validation as a views file: one row a video, the mean over the views of `config.val`.

        On rank 0. OSError where that fails.
        """
        assert validation.logits is not None, "only on rank 0"
        views, index = self.config.val, self.data.val_index
        names = [index.names[video] for video in self.videos.tolist()]
        head = ViewsHead(
            ids=names,
            classes=list(self.data.classes),
            views=np.zeros((1, 3), np.int64),
            labels=index.labels[self.videos],
            sources=self._sources(names),
            damaged=np.zeros(len(names), np.int64),
            failed=np.zeros(len(names), bool),
            about={"epoch": epoch, "averaged": window_count(views) * views.crops * (2 if views.flip else 1)},
        )
        write_views(path, head, [validation.logits[:, None]])

    def _sources(self, names: list[str]) -> list[str]:
        data = self.data
        if not self.config.data.val:
            return [data.split.groups[video] for video in self.videos.tolist()]
        labels = data.val_index.labels[self.videos].tolist()
        return known_sources(names, [data.classes[label] for label in labels], self.config.data, lambda text: None)
