"""The videos of a run: index and split, read by rank 0 and then by the others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vac_ddp.data import synthetic
from vac_ddp.data.frame_cache_setup import for_clips
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.split import Split, make_split, read_split, split_rows, write_split
from vac_ddp.errors import UserError
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config


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


def read_data(
    config: Config, folder: Path, *, resumed: bool, say: Callable[[str], None], keep_frames: bool = True
) -> Data:
    """Index and split. Rank 0 scans (or reads the cached index), the others read what it wrote.

    keep_frames: the frames of video files are kept in the cache, for the next epochs.
    """
    first = distributed.is_main()

    def read() -> Data:
        index = _index(config, config.data.train, folder / "index.cache", None, scan=first, keep=keep_frames)
        val = index
        if config.data.val:
            val = _index(
                config, config.data.val, folder / "index.val.cache", index.classes, scan=first, keep=keep_frames
            )
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
        check_labels(torch.from_numpy(np.asarray(index.labels)), len(data.classes), list(index.names))
    for note in [*data.index.notes, *data.split.notes]:
        say(note)
    parts = f"{len(data.split.train)} videos to train on, {len(data.split.val)} to validate"
    say(f"data: {len(data.classes)} classes, {parts}")
    return data


def check_labels(labels: torch.Tensor, num_classes: int, names: list[str]) -> None:
    """UserError that names the first video whose label is not a class."""
    bad = ((labels < 0) | (labels >= num_classes)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{names[bad[0]]} has the label {int(labels[bad[0]])}, classes are 0 to {num_classes - 1}"
            + (f" ({len(bad)} such videos)" if len(bad) > 1 else "")
        )


def seen_by_weights(file: str | None, data: Data) -> str | None:
    """A line on validation videos whose group the initial weights were trained on, by the split.csv beside `file`.

    None if there is none, if the weights are of a run on other videos, or if data.val is set.
    """
    split = Path(file).parent / "split.csv" if file else None
    if split is None or not split.exists() or data.val_index is not data.index:
        return None
    try:
        rows = split_rows(split)
    except UserError as error:
        return f"warning: whether these weights were trained on validation videos is not known: {error}"
    if not {row[0] for row in rows} & set(data.index.names):
        return None
    trained = {row[2] for row in rows if row[3] == "train"}
    seen = sum(data.split.groups[video] in trained for video in data.split.val.tolist())
    if not seen:
        return None
    return (
        f"warning: {seen} of {len(data.split.val)} validation videos have their group in the training split of these "
        f"weights ({split}): validation accuracy will be too high; fit the weights on the same split (data.fold or "
        "data.val_fraction, and seed), or give a data.val that they have not seen"
    )


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


def _index(config: Config, root: str, cache: Path, classes: list[str] | None, *, scan: bool, keep: bool) -> Index:
    index = open_index(root, labelled=True, settings=config.data, classes=classes, scan=scan, cache_file=cache)
    return for_clips(index, config, keep=keep, note=scan)


def _limited(videos: np.ndarray, limit: int) -> np.ndarray:
    """A handful of videos spread evenly over the classes, which stand one after the other."""
    if len(videos) <= limit:
        return videos
    return videos[np.linspace(0, len(videos) - 1, limit).round().astype(int)]


def debug_data(config: Config, given: list[str]) -> None:
    """Make a small synthetic data set for --debug where there is none and none was named."""
    if Path(config.data.train).exists() or any(word.startswith("data.train=") for word in given):
        return
    made = Path(config.run.dir).with_name("debug_data")
    if not (made / "data_train").is_dir():
        print(f"no {config.data.train} here: making a few synthetic videos in {made}")
        recipe = synthetic.Recipe(videos_per_class=4, test_per_class=1)
        print("\n".join(synthetic.make_dataset(made, recipe, workers=len(os.sched_getaffinity(0)))))
    config.data.train = str(made / "data_train")
