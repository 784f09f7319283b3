"""One pass over a tree of frame folders, or over the folders a CSV names: what is there, as arrays."""

# ruff: noqa: PTH112, PTH116, PTH118 - paths stay text: a million Path objects cost more than the reads

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vac_ddp.data.frame_names import FrameNames, Run, Texts, join_frames, natural_key, pack_runs, runs_of
from vac_ddp.data.frame_types import matcher, stranger, types_of
from vac_ddp.data.video_list import SUFFIXES as LIST_SUFFIXES
from vac_ddp.data.video_list import has_labels, read_list
from vac_ddp.data.video_scan import (
    DAMAGED,
    EMPTY,
    GOOD,
    MISSING,
    UNREADABLE,
    damaged_before_good,
    frames_of_file,
    is_video_file,
    look_at,
    mtime_of,
    without_ending,
)
from vac_ddp.errors import UserError
from vac_ddp.text import escaped, listed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SOUND = "audio.wav"  # may lie beside the frames of a video

_LEFTOVERS = {"__MACOSX", "@eaDir", "lost+found", "System Volume Information"}  # what systems leave behind
_THREADS = 16  # listing waits for the file system, decoding releases the GIL
_CHUNK = 64
_LOOKS = 32
_EXAMPLES = 5
_FRESH_NS = 2_000_000_000  # a folder changed this shortly before it was read may change again unseen


@dataclass(kw_only=True)
class Strays:
    """What lay in the tree and is no frame."""

    hidden: int = 0
    stray: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: Strays) -> None:
        """Count the finds of `other` as well."""
        self.hidden += other.hidden
        self.stray += other.stray
        self.examples = (self.examples + other.examples)[:_EXAMPLES]

    def see(self, path: str) -> None:
        """Count one stray file or folder."""
        self.stray += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(path)


@dataclass(kw_only=True, eq=False)
class Scan:
    """What one pass found. V videos; classes are in index order and may have no videos."""

    base: str  # the folder that `names` are relative to
    classes: list[str]
    labels: np.ndarray  # (V,) int64, -1 where there are no labels
    names: Texts  # (V,) "class/video", "video" or the path of a CSV line
    frames: FrameNames
    states: np.ndarray  # (V,) uint8: GOOD, EMPTY, MISSING, UNREADABLE, DAMAGED
    damaged: np.ndarray  # (V,) int64: damaged frames that were met before a good one
    times: np.ndarray  # (V,) int64: mtime of the video's folder in ns; -1 missing, 0 too fresh to trust
    watched: dict[str, int]  # folders above the videos, and the CSV -> mtime in ns
    strays: Strays
    notes: list[str] = field(default_factory=list)  # how a list was read, one line each
    pattern: str | None = None  # of the file names that are frames
    files: np.ndarray | None = None  # (V,) bool: the video is a file, not a folder of frames; None: none is


def scan_root(root: Path, *, labelled: bool, pattern: str | None = None) -> Scan:
    """Scan a folder of videos (folders of frames, or video files) or a CSV. Labelled videos must have a good frame.

    pattern: only files of this form are frames. Raises UserError where there is nothing to scan: no such folder, no
    videos, a CSV line without path or label; and where folders hold several types of pictures.
    """
    if root.is_dir():
        return _scan_folder(root, labelled=labelled, pattern=pattern)
    if root.is_file():
        if root.suffix.lower() not in LIST_SUFFIXES or (root.suffix != ".csv" and not root.stat().st_size):
            raise UserError(
                f"{root} is a file and no CSV: give a folder of frames, a packed set, or a CSV (path,label)"
            )
        return _scan_csv(root, labelled=labelled, pattern=pattern)
    raise UserError(f"no such folder: {root} (expected {layout(labelled)}, a packed set, or a CSV)")


def scan_video(folder: Path, *, pattern: str | None = None) -> Scan:
    """Scan the folder of frames of a single video without a label."""
    path = folder.resolve()
    task = _Task(root=folder, base=str(path.parent), pattern=pattern, check=False, started=time.time_ns())
    return _scan_videos(task, [], np.full(1, -1, np.int64), [path.name], {}, Strays())


def looks_labelled(root: Path) -> bool:
    """Whether a folder has classes with videos in them rather than videos, or a CSV has labels: by a first look."""
    if root.is_file():
        return has_labels(root)
    deeper = False
    for folder in sorted(_folders_in(os.path.realpath(root), "", Strays())[0])[:_LOOKS]:
        below, files = _folders_in(os.path.realpath(root), folder, Strays())
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in files):
            return False
        deeper = deeper or bool(below) or any(map(is_video_file, files))
    return deeper


def layout(labelled: bool) -> str:
    """The folders that are expected."""
    return "<class>/<video>/*.jpg" if labelled else "<video>/*.jpg"


def _scan_folder(root: Path, *, labelled: bool, pattern: str | None) -> Scan:
    started, base, strays = time.time_ns(), os.path.realpath(root), Strays()
    top, files = (_videos_in if not labelled else _folders_in)(base, "", strays)
    if not top:
        raise UserError(f"{root} has no folders in it{_instead(files)}: expected {layout(labelled)}")
    watched = {"": _trusted(os.stat(base).st_mtime_ns, started)}
    if not labelled:
        names = sorted(top, key=natural_key)
        none = np.full(len(names), -1, np.int64)
        task = _Task(root=root, base=base, pattern=pattern, check=False, started=started)
        return _scan_videos(task, [], none, names, watched, strays)
    classes = class_order(top)
    names, labels = [], []
    with ThreadPoolExecutor(_THREADS) as pool:
        for label, (mtime, videos, loose, seen) in enumerate(pool.map(lambda name: _scan_class(base, name), classes)):
            if not videos and loose:
                raise UserError(
                    f"class {classes[label]} of {root} has no videos{_instead(loose)}: expected {layout(True)}"
                    f"{_above(root, loose)}"
                )
            watched[classes[label]] = _trusted(mtime, started)
            strays.add(seen)
            names += [f"{classes[label]}/{video}" for video in sorted(videos, key=natural_key)]
            labels += [label] * len(videos)
    task = _Task(root=root, base=base, pattern=pattern, check=True, started=started)
    return _scan_videos(task, classes, np.array(labels, np.int64), names, watched, strays)


def class_order(names: Sequence[str]) -> list[str]:
    """Class names in index order: by value where all are whole numbers, else as text (as `sorted` does)."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _scan_class(base: str, name: str) -> tuple[int, list[str], list[str], Strays]:
    strays = Strays()
    mtime = os.stat(os.path.join(base, name)).st_mtime_ns
    videos, loose = _videos_in(base, name, strays)
    return mtime, videos, loose, strays


def _folders_in(base: str, below: str, strays: Strays) -> tuple[list[str], list[str]]:
    """Names of the folders in base/below, and of the files there; hidden ones are counted only."""
    folders, files = [], []
    try:
        with os.scandir(os.path.join(base, below)) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _LEFTOVERS:
                    strays.hidden += 1
                elif entry.is_dir():
                    folders.append(entry.name)
                else:
                    files.append(entry.name)
                    strays.see(os.path.join(below, entry.name))
    except OSError as error:
        raise UserError(f"cannot read the folder {os.path.join(base, below)}: {error.strerror}") from error
    return folders, files


def _videos_in(base: str, below: str, strays: Strays) -> tuple[list[str], list[str]]:
    """Names of the videos in base/below: folders, and video files without a folder of their name; the other files."""
    seen = Strays()
    folders, files = _folders_in(base, below, seen)
    taken = dict.fromkeys(folders, "")
    loose = []
    for name in files:
        video = without_ending(name)
        if not is_video_file(name) or taken.get(video) == "":  # extracted, and left there
            loose.append(name)
        elif video in taken:
            raise UserError(
                f"{os.path.join(base, below)}: {taken[video]} and {name} are both the video {video}: rename one of them"
            )
        else:
            taken[video] = name
    strays.hidden += seen.hidden
    for name in loose:
        strays.see(os.path.join(below, name))
    return [name or video for video, name in taken.items()], loose


def _instead(files: list[str]) -> str:
    if any(map(is_video_file, files)):
        return " but video files (one folder level is missing)"
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in files):
        return " but images (one folder level is missing)"
    return ""


def _above(root: Path, files: list[str]) -> str:
    """The remedy where a class folder, or a test folder, was given in place of the folder of classes."""
    images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in files)
    return f"; is it the folder of one class? then give {root.resolve().parent}" if images else ""


def _scan_csv(path: Path, *, labelled: bool, pattern: str | None) -> Scan:
    started = time.time_ns()
    watched = {os.path.realpath(path): _trusted(path.stat().st_mtime_ns, started)}
    base = os.path.realpath(path.parent)
    names, texts, notes = read_list(path, labelled=labelled)
    classes = class_order(list(set(texts))) if labelled else []
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[text] for text in texts] if labelled else [-1] * len(names), np.int64)
    task = _Task(root=path, base=base, pattern=pattern, check=labelled, started=started)
    found = _scan_videos(task, classes, labels, names, watched, Strays())
    found.notes = [*notes, *found.notes]
    return found


@dataclass(kw_only=True)
class _Task:
    """What is the same for all videos of a scan."""

    root: Path  # as it was asked for
    base: str
    pattern: str | None
    check: bool  # whether a frame of each video must decode
    started: int  # time in ns


def _scan_videos(
    task: _Task, classes: list[str], labels: np.ndarray, names: list[str], watched: dict[str, int], strays: Strays
) -> Scan:
    from tqdm import tqdm

    chunks = [names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK)]
    frames, facts = [], []
    faulty: list[str] = []
    any_file = any(map(is_video_file, names))
    mixed: dict[str, dict[str, int]] = {}
    strangers: list[str] = []
    bar = tqdm(total=len(names), desc="read video files", unit="video", disable=None if any_file else True)
    with ThreadPoolExecutor(_THREADS) as pool, bar:
        for chunk in pool.map(lambda some: _scan_chunk(task, some), chunks):
            bar.update(len(chunk.facts))
            frames.append(chunk.frames)
            facts.append(chunk.facts)
            strays.add(chunk.strays)
            mixed |= chunk.mixed
            strangers += chunk.strangers
            faulty += chunk.faulty
    if mixed:
        raise UserError(_mixed_message(task.root, mixed, len(names)))
    table = np.concatenate([np.zeros((0, 4), np.int64), *facts])
    files = table[:, 3].astype(bool)
    return Scan(
        base=task.base,
        classes=classes,
        labels=labels,
        names=Texts.of(names),
        frames=join_frames(frames),
        states=table[:, 0].astype(np.uint8),
        damaged=table[:, 1].copy(),
        times=np.where(table[:, 2] > task.started - _FRESH_NS, 0, table[:, 2]),
        watched=watched,
        strays=strays,
        notes=[*_stranger_notes(task.root, strangers), *_faulty_notes(task.root, faulty)],
        pattern=task.pattern,
        files=files if files.any() else None,
    )


def _mixed_message(root: Path, mixed: dict[str, dict[str, int]], videos: int) -> str:
    name, types = next(iter(mixed.items()))
    shown = ", ".join(f"{pattern} ({count})" for pattern, count in types.items())
    frames = max(types, key=lambda pattern: types[pattern])
    return (
        f"{len(mixed)} of {videos} videos of {root} hold several types of pictures, as {name}: {shown}; choose the "
        f"frames by their file names, e.g. data.frame_pattern={shlex.quote(frames)}"
    )


def _stranger_notes(root: Path, strangers: list[str]) -> list[str]:
    if not strangers:
        return []
    return [
        f"{root}: {len(strangers)} videos hold a picture that is named unlike their frames and counts as one of them "
        f"({', '.join(strangers[:_EXAMPLES])}): data.frame_pattern can leave it out"
    ]


def _faulty_notes(root: Path, faulty: list[str]) -> list[str]:
    if not faulty:
        return []
    return [
        f"{root}: {len(faulty)} video files are damaged, and have the frames that decode ({listed(faulty, _EXAMPLES)})"
    ]


@dataclass(kw_only=True)
class _Chunk:
    """What some videos are: frames, rows (state, damaged frames, mtime, is a file), and pictures that are no frames."""

    frames: FrameNames
    facts: np.ndarray
    strays: Strays
    mixed: dict[str, dict[str, int]]  # video -> its types of pictures
    strangers: list[str]
    faulty: list[str]  # video files with what is wrong with them


def _scan_chunk(task: _Task, names: list[str]) -> _Chunk:
    runs: list[list[Run]] = []
    rows, strays, strangers, faulty = [], Strays(), [], []
    mixed: dict[str, dict[str, int]] = {}
    is_frame = matcher(task.pattern)
    for name in names:
        folder = os.path.join(task.base, name)
        if is_video_file(name) and not os.path.isdir(folder):
            found = look_at(folder, check=task.check)
            runs.append(frames_of_file(found.frames))
            rows.append((found.state, 0, mtime_of(folder), 1))
            if found.state == GOOD and found.faults:
                faulty.append(f"{escaped(name)}: {'; '.join(found.faults)}")
            continue
        state, mtime, names_found = _list_frames(folder, name, strays, is_frame)
        damaged = 0
        runs.append(runs_of(names_found))
        if len(runs[-1]) > 1:
            if types := types_of(names_found):
                mixed[name] = types
            elif odd := stranger(names_found):
                strangers.append(f"{name}/{odd}")
        if state == GOOD and task.check:
            order = sorted(names_found, key=natural_key) if len(runs[-1]) > 1 else names_found
            damaged = damaged_before_good(folder, order)
            state = DAMAGED if damaged == len(names_found) else GOOD
        rows.append((state, damaged, mtime, 0))
    return _Chunk(
        frames=pack_runs(runs),
        facts=np.array(rows, np.int64).reshape(-1, 4),
        strays=strays,
        mixed=mixed,
        strangers=strangers,
        faulty=faulty,
    )


def _list_frames(folder: str, name: str, strays: Strays, is_frame: Callable[[str], bool]) -> tuple[int, int, list[str]]:
    """(state, mtime, frames) of a folder; whether a frame decodes is not looked at."""
    mtime = -1
    try:
        mtime = os.stat(folder).st_mtime_ns
        found = _frames_in(folder, name, strays, is_frame)
    except (FileNotFoundError, NotADirectoryError):
        return MISSING, mtime, []
    except OSError:
        return UNREADABLE, mtime, []
    return (GOOD if found else EMPTY), mtime, found


def _frames_in(folder: str, name: str, strays: Strays, is_frame: Callable[[str], bool]) -> list[str]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _LEFTOVERS:
                strays.hidden += 1
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and is_frame(entry.name) and not entry.is_dir():
                found.append(entry.name)
            elif entry.name != SOUND:
                strays.see(f"{name}/{entry.name}")
    return found


def _trusted(mtime: int, started: int) -> int:
    """The mtime, or 0 (which no folder has) where it is too fresh to notice a later change by it."""
    return 0 if mtime > started - _FRESH_NS else mtime
