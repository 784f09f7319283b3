"""The official train/test lists of HMDB51 and UCF101."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.text import printable

UNUSED, TRAIN, TEST = 0, 1, 2  # as HMDB51 codes them


@dataclass(kw_only=True)
class OfficialLists:
    """One of the three official splits."""

    kind: str  # "hmdb51" or "ucf101"
    parts: dict[str, int]  # video name without .avi -> UNUSED, TRAIN or TEST
    classes: dict[str, str]  # video name without .avi -> class


def read_official(folder: str | Path, split: int) -> OfficialLists:
    """Read split 1, 2 or 3 from a folder of HMDB51 (`<class>_test_split1.txt`) or UCF101 (`trainlist01.txt`) lists."""
    folder = Path(folder).expanduser()
    if split not in (1, 2, 3):
        raise UserError(f"data.official_split={split}: there are the splits 1, 2 and 3")
    if not folder.is_dir():
        raise UserError(f"no such folder: data.official_lists={folder}")
    tail = f"_test_split{split}.txt"
    hmdb51 = sorted(path for path in folder.iterdir() if path.name.endswith(tail))
    ucf101 = [folder / f"{part}list{split:02d}.txt" for part in ("train", "test")]
    lists = OfficialLists(kind="hmdb51" if hmdb51 else "ucf101", parts={}, classes={})
    if hmdb51:
        for path in hmdb51:
            _read_hmdb51(path, path.name.removesuffix(tail), lists)
        return lists
    if not all(path.is_file() for path in ucf101):
        raise UserError(
            f"data.official_lists={folder} has neither HMDB51 lists (<class>{tail}) "
            f"nor UCF101 lists ({ucf101[0].name}, {ucf101[1].name})"
        )
    for path, part in zip(ucf101, (TRAIN, TEST), strict=True):
        _read_ucf101(path, part, lists)
    return lists


def _read_hmdb51(path: Path, class_name: str, lists: OfficialLists) -> None:
    for number, line in enumerate(_lines(path), start=1):
        name, _, code = line.rpartition(" ")
        if not name or code not in ("0", "1", "2"):
            raise UserError(f"{path} line {number} is not `name.avi 0|1|2`: {line}")
        _enter(lists, name.strip(), int(code), class_name, path)


def _read_ucf101(path: Path, part: int, lists: OfficialLists) -> None:
    for number, line in enumerate(_lines(path), start=1):
        where, space, label = line.rpartition(" ")
        name = PurePosixPath(where if space and label.isdigit() else line)  # test lists have no labels
        if len(name.parts) < 2:
            raise UserError(f"{path} line {number} is not `Class/v_Class_gXX_cYY.avi`: {line}")
        _enter(lists, name.name, part, name.parts[-2], path)


def _lines(path: Path) -> list[str]:
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    return [printable(line.strip()) for line in text.split("\n") if line.strip()]


def _enter(lists: OfficialLists, name: str, part: int, class_name: str, path: Path) -> None:
    name = name.removesuffix(".avi")
    if name in lists.parts:
        raise UserError(f"{path} names {name} a second time: the lists of one split must not overlap")
    lists.parts[name] = part
    lists.classes[name] = class_name


def official_parts(lists: OfficialLists, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The part of each video, (V,) int64 of UNUSED, TRAIN, TEST, and notes on what did not match.

    Videos are known by their own name, with or without .avi; one that the lists do not have is unused.
    """
    videos = [PurePosixPath(name).name.removesuffix(".avi") for name in names]
    if len(set(videos)) < len(videos):
        twice = next(video for video in videos if videos.count(video) > 1)
        raise UserError(f"the official lists know videos by name, and two are called {twice}: remove one")
    parts = np.array([lists.parts.get(video, UNUSED) for video in videos], np.int64)
    unknown = [name for name, video in zip(names, videos, strict=True) if video not in lists.parts]
    absent = set(lists.parts) - set(videos)
    used = sum(lists.parts[name] != UNUSED for name in absent)
    notes = []
    if unknown:
        notes.append(
            f"warning: {len(unknown)} videos are in no official list and stay unused: {', '.join(unknown[:3])}"
        )
    if used:
        notes.append(f"warning: {used} videos of the official split are not there: {', '.join(sorted(absent)[:3])}")
    for part, what in ((TRAIN, "training"), (TEST, "test")):
        if not (parts == part).any():
            raise UserError(f"none of the {len(names)} videos is in the official {lists.kind} {what} list: other data?")
    return parts, notes
