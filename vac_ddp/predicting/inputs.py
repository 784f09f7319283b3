"""What is predicted: the index of a folder, or a part of the run's own data."""

from __future__ import annotations

from pathlib import Path

from vac_ddp.data.frame_cache_setup import for_clips
from vac_ddp.data.grouping import known_sources
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.index_file import cache_name
from vac_ddp.data.split import read_split
from vac_ddp.errors import UserError
from vac_ddp.predicting.part_files import FOLDER
from vac_ddp.runtime import distributed
from vac_ddp.runtime.ranks import say
from vac_ddp.settings import Config


def read_index(root: Path, config: Config, classes: list[str] | None, out: Path, *, labelled: bool) -> Index:
    """Rank 0 scans, or reads the cached index; the others read what it left in OUT/parts.

    classes: what the labels are numbers of; default: the classes of the data.
    """

    def read() -> Index:
        index = open_index(
            root,
            labelled=labelled,
            settings=config.data,
            classes=classes if labelled else None,
            scan=distributed.is_main(),
            cache_file=out / FOLDER / cache_name(root, labelled=labelled, settings=config.data),
        )
        return for_clips(index, config)

    return distributed.main_first(read, read)


def part_of(index: Index, run: Path, config: Config, part: str) -> tuple[Index, list[str]]:
    """The videos of the run's training or validation part, and the source of each, by its split.csv."""
    if part == "val" and config.data.val:
        return index, sources_by_name(config, index)
    split = read_split(run / "split.csv", index)
    videos = split.train if part == "train" else split.val
    if not len(videos):
        raise UserError(f"{run / 'split.csv'} has no {part} part: give --data DIR")
    return index.take(videos), [split.groups[video] for video in videos.tolist()]


def sources_by_name(config: Config, index: Index) -> list[str]:
    """The source of every labelled video, for the interval; empty where names do not tell."""
    names, labels = list(index.names), index.labels.tolist()
    if not labels or min(labels) < 0:
        return [""] * len(names)
    return known_sources(names, [index.classes[label] for label in labels], config.data, say)
