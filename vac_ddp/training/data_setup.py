"""The videos of a run: index and split, read by rank 0 and then by the others, and validation on them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vac_ddp.data.dataset import TestViews
from vac_ddp.data.grouping import find_sources
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.loader import test_loader, to_device
from vac_ddp.data.split import Split, make_split, read_split, write_split
from vac_ddp.errors import UserError
from vac_ddp.results.logits_file import ViewsHead, write_views
from vac_ddp.results.metrics import classification_metrics
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.training import health
from vac_ddp.training.loop import Loop
from vac_ddp.training.progress import Validation
from vac_ddp.training.step import Stepper
from vac_ddp.training.validation import rank_places, video_logits


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

    data = distributed.main_first(read, read)
    if len(data.classes) < 2:
        raise UserError(f"{config.data.train} has a single class ({data.classes[0]}): there is nothing to tell apart")
    for index in (data.index, data.val_index):
        health.check_labels(torch.from_numpy(np.asarray(index.labels)), len(data.classes), list(index.names))
    for note in [*data.index.notes, *data.split.notes]:
        say(note)
    parts = f"{len(data.split.train)} videos to train on, {len(data.split.val)} to validate"
    say(f"data: {len(data.classes)} classes, {parts}")
    return data


def data_hashes(data: Data) -> dict[str, str]:
    """SHA-256 of what a resumed run must find as it was: the classes; names and labels of both parts; their frames."""
    parts = (("train", data.index, data.split.train), ("val", data.val_index, data.split.val))
    split, frames = hashlib.sha256(), hashlib.sha256()
    for part, index, videos in parts:
        labels = index.labels.tolist()
        for video in videos.tolist():
            split.update(f"{part}\0{labels[video]}\0{index.names[video]}\n".encode("utf-8", "surrogateescape"))
        frames.update(np.asarray(index.frame_counts, "<i8")[videos].tobytes())
    classes = hashlib.sha256("\n".join(data.classes).encode("utf-8", "surrogateescape"))
    return {"classes": classes.hexdigest(), "split": split.hexdigest(), "frames": frames.hexdigest()}


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
    from vac_ddp.commands import synth_command

    made = Path(config.run.dir).with_name("debug_data")
    if not (made / "data_train").is_dir():
        print(f"no {config.data.train} here: making a few synthetic videos in {made}")
        synth_command.main([str(made), "--videos-per-class", "4", "--test-per-class", "1"])
    config.data.train = str(made / "data_train")


def make_validation(
    config: Config, data: Data, stepper: Stepper, loop: Loop, workers: int, loaders: list[Any]
) -> Callable[[Callable[[], bool]], Validation | None]:
    """A function that validates once, on all ranks: figures, or None where it was interrupted."""
    videos, world = data.split.val, distributed.world_size()
    places = rank_places(len(videos), distributed.rank(), world)
    dataset = TestViews(
        data.val_index,
        videos,
        config.clip,
        config.val,
        tolerant=False,
        reduced=config.data.reduced_decode,
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
        loop.tracker.progress("validation", len(places), unit="videos")
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
        return Validation(top1=figures["top1"], loss=figures["loss"], figures=figures, logits=logits)

    return validate


def keep_validation(path: Path, config: Config, data: Data, validation: Validation, epoch: int) -> None:
    """Write the logits of a validation as a views file: one row a video, the mean over the views of `config.val`."""
    assert validation.logits is not None, "only on rank 0"
    videos, views = data.split.val, config.val
    windows = len(views.offsets) if views.windows == "offsets" else views.count
    names = [data.val_index.names[video] for video in videos.tolist()]
    head = ViewsHead(
        ids=names,
        classes=list(data.classes),
        views=np.zeros((1, 3), np.int64),
        labels=data.val_index.labels[videos],
        sources=_val_sources(config, data, names),
        damaged=np.zeros(len(videos), np.int64),
        failed=np.zeros(len(videos), bool),
        about={"epoch": epoch, "averaged": windows * views.crops * (2 if views.flip else 1)},
    )
    write_views(path, head, [validation.logits.numpy()[:, None]])


def _val_sources(config: Config, data: Data, names: list[str]) -> list[str]:
    if not config.data.val:
        return [data.split.groups[video] for video in data.split.val.tolist()]
    try:
        labels = data.val_index.labels[data.split.val].tolist()
        found = find_sources(names, [data.classes[label] for label in labels], config.data)
    except UserError:  # the names of these videos do not tell, or not by this rule
        return [""] * len(names)
    return [""] * len(names) if found.grammar == "none" else list(found.groups)
