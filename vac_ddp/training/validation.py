"""Validation without padding: every video once, rows keyed by their place, the bare module on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vac_ddp.data.clip_sampling import window_count
from vac_ddp.data.dataset import TestViews
from vac_ddp.data.grouping import find_sources
from vac_ddp.data.loader import TestBatch, test_loader, to_device
from vac_ddp.data.normalization import normalize
from vac_ddp.errors import UserError
from vac_ddp.models.precision import autocast as autocast_to
from vac_ddp.report.tracker import Tracker
from vac_ddp.results.logits_file import ViewsHead, write_views
from vac_ddp.results.metrics import classification_metrics
from vac_ddp.runtime import distributed
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.settings import Config
from vac_ddp.training.data_setup import Data
from vac_ddp.training.progress import Validation
from vac_ddp.training.step import Stepper

ASK_EVERY = 8


def rank_places(total: int, rank: int, world: int) -> list[int]:
    """The videos of one rank: its places among `total`, dealt in turns. Ranks may differ by one, or get none."""
    return list(range(rank, total, world))


@torch.no_grad()
def video_logits(
    model: nn.Module,
    batches: Iterable[TestBatch],
    *,
    rounds: int,
    total: int,
    num_classes: int,
    clips_per_gpu: int,
    flip: bool,
    device: torch.device,
    autocast: torch.dtype | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    stop: Callable[[], bool],
    advance: Callable[[int], None],
    damage: Callable[[list[str]], None],
) -> tuple[torch.Tensor | None, bool]:
    """Mean logits of the views of every video, on rank 0: ((total, K) float32 or None, whether it was stopped).

    batches: this rank's videos, on `device`. rounds: the largest number of batches of any rank, so that all ask `stop`,
    an agreement of all ranks, equally often; once it says yes, all return (None, True).
    """
    was_training = model.training
    model.eval()
    places, rows = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, num_classes)]
    mine = iter(batches)
    try:
        for turn in range(rounds):
            if turn % ASK_EVERY == 0 and stop():
                return None, True
            batch = next(mine, None)
            if batch is None:
                continue
            PROCESS.progress()
            damage(batch.damage)
            advance(len(batch.places))
            parts = []
            for clips in batch.clips.flatten(0, 1).split(clips_per_gpu):
                pixels = normalize(clips, mean, std, torch.float32)
                with autocast_to(device, autocast):
                    logits = model(pixels).float()
                    parts.append((logits + model(pixels.flip(-1)).float()) / 2 if flip else logits)
            logits = torch.cat(parts).view(*batch.clips.shape[:2], -1)
            if batch.clip_of_view is not None:
                logits = logits[:, batch.clip_of_view]
            rows.append(logits.mean(1).cpu())
            places.append(batch.places)
    finally:
        model.train(was_training)
    return distributed.gather_rows(torch.cat(places), torch.cat(rows), total=total), False


class Validator:
    """The validation part of a run and its loader: figures of the model as it is, as often as they are asked for."""

    def __init__(self, config: Config, data: Data, stepper: Stepper, tracker: Tracker, *, workers: int) -> None:
        self.config, self.data, self.stepper, self.tracker = config, data, stepper, tracker
        self.videos = data.split.val
        self.places = rank_places(len(self.videos), distributed.rank(), distributed.world_size())
        views = window_count(config.val) * config.val.crops
        self.at_once = max(1, stepper.clips_per_gpu // views)
        dataset = TestViews(
            data.val_index,
            self.videos,
            config.clip,
            config.val,
            tolerant=False,
            reduced=config.data.reduced_decode,
        )
        self.loader = test_loader(
            dataset,
            self.places,
            videos_per_batch=self.at_once,
            workers=min(workers, len(self.places)),
            prefetch=config.data.prefetch,
            pin=stepper.device.type == "cuda",
        )

    def run(self, stop: Callable[[], bool]) -> Validation | None:
        """Validate once, on all ranks: figures, or None where `stop`, an agreement of all ranks, said yes."""
        stepper, tracker = self.stepper, self.tracker
        tracker.progress("validation", len(self.places), unit="videos")
        logits, stopped = video_logits(
            stepper.eval_model,
            to_device(self.loader, stepper.device),
            rounds=math.ceil(math.ceil(len(self.videos) / distributed.world_size()) / self.at_once),
            total=len(self.videos),
            num_classes=len(self.data.classes),
            clips_per_gpu=stepper.clips_per_gpu,
            flip=self.config.val.flip,
            device=stepper.device,
            autocast=stepper.autocast,
            mean=stepper.objective.mean,
            std=stepper.objective.std,
            stop=stop,
            advance=tracker.advance,
            damage=self._say_damage,
        )
        tracker.end_progress()
        if stopped:
            return None
        figures = None
        if logits is not None:
            labels = self.data.val_index.labels[self.videos]
            figures = classification_metrics(logits, labels, self.data.classes).figures()
        figures = distributed.broadcast_object(figures)
        return Validation(top1=figures["top1"], loss=figures["loss"], figures=figures, logits=logits)

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
        write_views(path, head, [validation.logits.numpy()[:, None]])

    def _sources(self, names: list[str]) -> list[str]:
        config, data = self.config, self.data
        if not config.data.val:
            return [data.split.groups[video] for video in self.videos.tolist()]
        try:
            labels = data.val_index.labels[self.videos].tolist()
            found = find_sources(names, [data.classes[label] for label in labels], config.data)
        except UserError:  # the names of these videos do not tell, or not by this rule
            return [""] * len(names)
        return [""] * len(names) if found.grammar == "none" else list(found.groups)
