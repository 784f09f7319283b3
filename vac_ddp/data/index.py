"""Which videos there are: their labels, frames and damage, from a folder, a CSV or a packed set, scanned once."""

# ruff: noqa: PTH112, PTH118 - paths stay text: a million Path objects cost more than the reads

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vac_ddp.data import video_scan as states
from vac_ddp.data.decode import DamagedFrame, decode_frame
from vac_ddp.data.folder_levels import better_roots, frames_below
from vac_ddp.data.frame_cache import FrameCache
from vac_ddp.data.frame_names import FrameNames, Texts, is_plain
from vac_ddp.data.index_file import cache_path, read_scan, write_scan
from vac_ddp.data.pack import PackedFrames, is_pack, read_pack
from vac_ddp.data.scan import Scan, layout, scan_root, scan_video
from vac_ddp.data.scan_freshness import unchanged
from vac_ddp.data.video_scan import without_ending
from vac_ddp.errors import UserError
from vac_ddp.files import write_text
from vac_ddp.settings import DataSettings
from vac_ddp.text import escaped, listed

_NAMED = 5
_LONGEST = 1000  # characters of a class name: CSV readers take fields of 131,072


@dataclass(kw_only=True, eq=False)
class Index:
    """V videos and where their frames are. Safe to fork and to pickle; reading is safe from many threads."""

    root: Path  # as it was asked for
    classes: list[str]  # class index -> name
    labels: np.ndarray  # (V,) int64, -1 where there are no labels
    names: Texts  # (V,) "class/video", "video", or the path of a CSV line: unique
    frames: FrameNames
    frame_counts: np.ndarray  # (V,) int64; 0 for a test video without frames
    notes: list[str] = field(default_factory=list)  # what the user should know, one line each
    skipped: list[str] = field(default_factory=list)  # names of the videos that were left out
    damaged: int = 0  # damaged frames that the scan met: a lower bound
    base: str = ""
    packed: PackedFrames | None = None
    paths: Texts | None = None  # (V,) where they are on the disk, below `base`, where that is not `names`
    files: np.ndarray | None = None  # (V,) bool: the video is a file, not a folder of frames; None: none is
    frame_cache: FrameCache = field(default_factory=FrameCache)  # how frames of files are read: `frame_cache_setup`

    def __len__(self) -> int:
        return len(self.names)

    def frame_name(self, video: int, frame: int) -> str:
        """The frame's file name behind the video's name, as it is printed: "class/video/0001.jpg"."""
        return f"{self.names[video]}/{escaped(self.frames.name(video, frame))}"

    def frame_bytes(self, video: int, frame: int) -> bytes:
        """The frame's file as it is on the disk. Raises OSError where it cannot be read."""
        return self.reader(video)(frame)

    def reader(self, video: int) -> Callable[[int], bytes]:
        """A function that reads the file of a frame of `video`, as `frame_bytes` does, for many of its frames."""
        if self.packed is not None:
            return functools.partial(self.packed.read, video)
        folder = self.folder(video)
        if self.is_file(video):
            return self.frame_cache.reader(Path(folder))
        name = self.frames.namer(video)
        return lambda frame: _contents(f"{folder}/{name(frame)}")

    def is_file(self, video: int) -> bool:
        """Whether the video is a video file."""
        return self.files is not None and self.packed is None and bool(self.files[video])

    def folder(self, video: int) -> str:
        """The path of the video's folder of frames, or of its file."""
        return os.path.join(self.base, (self.names if self.paths is None else self.paths)[video])

    def take(self, videos: np.ndarray) -> Index:
        """The index of the videos of the numbers `videos` (n,) int64 only."""
        return Index(
            root=self.root,
            classes=self.classes,
            labels=self.labels[videos],
            names=self.names.take(videos),
            frames=self.frames.take(videos),
            frame_counts=self.frame_counts[videos],
            notes=list(self.notes),
            skipped=list(self.skipped),
            damaged=self.damaged,
            base=self.base,
            packed=None if self.packed is None else self.packed.take(videos),
            paths=None if self.paths is None else self.paths.take(videos),
            files=None if self.files is None else self.files[videos],
            frame_cache=self.frame_cache,
        )


def _contents(path: str) -> bytes:
    """A file's bytes, with the fewest system calls: a clip reads its frames from as many small files."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size  # 0: empty, or on a file system that does not say
        data = os.read(handle, size or 1 << 20)
        while data and (len(data) < size or not size) and (more := os.read(handle, 1 << 20)):
            data += more
    finally:
        os.close(handle)
    return data


def open_index(
    root: str | Path,
    *,
    labelled: bool,
    settings: DataSettings,
    classes: list[str] | None = None,
    scan: bool = True,
    cache_file: str | Path | None = None,
    keep: bool = True,
) -> Index:
    """The index of a labelled folder of <class>/<video>/*.jpg and <class>/*.mp4, a test folder of <video>/*.jpg and
    *.mp4, a CSV, or a packed set.

    The scan is kept under `settings.cache` and used again while the tree is unchanged. With several ranks, rank 0
    calls first and the others, after a barrier, with `scan=False`: they read what it wrote and look at nothing
    else. `cache_file` is one more copy in a place that all ranks see, where the cache folder is not shared.
    keep=False: what is kept is read, and nothing is written.

    `classes`: the labels are by these names (validation data of a model that has them). Every test video is in
    the index, whatever its state. Raises UserError for anything the user must change, in one line.
    """
    index, found = open_as_it_is(
        root, labelled=labelled, settings=settings, scan=scan, cache_file=cache_file, keep=keep
    )
    if not labelled:
        return _checked_test(index, found, settings)
    _check_classes(index, classes)
    if classes is not None:
        number = {name: i for i, name in enumerate(classes)}
        index.labels = np.array([number[name] for name in index.classes], np.int64)[index.labels]
        index.classes = list(classes)
    return _without_bad(index, found, settings, keep=keep)


def open_as_it_is(
    root: str | Path,
    *,
    labelled: bool,
    settings: DataSettings,
    scan: bool = True,
    cache_file: str | Path | None = None,
    keep: bool = True,
) -> tuple[Index, Scan]:
    """The index with all that is wrong left in it, and the scan that knows what: for those who report or copy it."""
    root = Path(root).expanduser()
    if is_pack(root):
        found, packed = read_pack(root, labelled=labelled)
        return index_of(found, root, packed), found
    found = cached_scan(root, labelled=labelled, settings=settings, scan=scan, cache_file=cache_file, keep=keep)
    hollow = found.states == states.EMPTY
    if scan and root.is_dir() and (hollow.any() if labelled else hollow.all()):
        _check_level(root, labelled=labelled)
    return index_of(found, root), found


def open_folder(folder: Path, settings: DataSettings) -> Index:
    """The index of a single video, a folder of frames; nothing is kept of the scan."""
    return index_of(scan_video(folder, pattern=settings.frame_pattern), folder)


def _check_level(root: Path, *, labelled: bool) -> None:
    """Raise UserError where frames of `root`, of which videos have none, lie deeper than expected."""
    better = better_roots(root, labelled=labelled)
    if better:
        tests = [path for path in sorted(root.iterdir()) if frames_below(str(path)) == 1] if labelled else []
        raise UserError(
            f"{root} is one folder too high: expected {layout(labelled)}, which {better[0]} has; give {_one_of(better)}"
            + (f" ({_one_of(tests)} has {layout(False)}, a test folder)" if tests else "")
        )


def _one_of(folders: Sequence[Path]) -> str:
    return " or ".join(str(folder) for folder in folders[:_NAMED])


def index_of(found: Scan, root: Path, packed: PackedFrames | None = None) -> Index:
    """All videos of a scan as they are, bad ones included. Names and classes are printable from here on."""
    names = found.names if found.files is None else Texts.of(_names_of_videos(found))
    names = names if is_plain(names) else Texts.of(map(escaped, names))
    return Index(
        root=root,
        classes=list(map(escaped, found.classes)),
        labels=found.labels,
        names=names,
        paths=None if names is found.names else found.names,
        files=found.files,
        frames=found.frames,
        frame_counts=found.frames.counts,
        notes=[*found.notes, *_stray_notes(root, found)],
        damaged=int(found.damaged.sum()),
        base=found.base,
        packed=packed,
    )


def _names_of_videos(found: Scan) -> Iterator[str]:
    """The names of a scan's videos, without the endings of those that are files."""
    assert found.files is not None
    for name, is_file in zip(found.names, found.files.tolist(), strict=True):
        yield without_ending(name) if is_file else name


def cached_scan(
    root: Path,
    *,
    labelled: bool,
    settings: DataSettings,
    scan: bool = True,
    cache_file: str | Path | None = None,
    keep: bool = True,
) -> Scan:
    """What the cache knows of `root`, if that still holds, else a new scan, which is then kept (see `open_index`)."""
    default = cache_path(root, labelled=labelled, settings=settings)
    places = [place for place in (cache_file and Path(cache_file), default) if place]
    for i, place in enumerate(places):
        stored = read_scan(place)
        if stored is None:
            continue
        ours = _is_of(stored, root, labelled=labelled) and (stored.pattern or None) == (settings.frame_pattern or None)
        if not scan or (ours and unchanged(stored, every=settings.rescan)):
            if scan and keep:
                stale, later = places[:i], places[i + 1 :]
                _keep(stored, [*stale, *(other for other in later if not other.exists())], cache_file)
            return stored
    if not scan:
        raise UserError(
            f"no index of {root} at {places[0] if places else 'any place'}: rank 0 must have written it to a folder "
            "that all ranks see"
        )
    found = scan_root(root, labelled=labelled, pattern=settings.frame_pattern)
    if keep:
        _keep(found, places, cache_file)
    return found


def _is_of(stored: Scan, root: Path, *, labelled: bool) -> bool:
    """Whether a scan was made of `root`: a cache file that the caller chose may be of another one, or of a CSV."""
    where = os.path.realpath(root)
    same = stored.base == where if os.path.isdir(where) else where in stored.watched
    return same and bool(stored.classes) == labelled


def _keep(found: Scan, places: Sequence[Path], needed: str | Path | None) -> None:
    """Write the scan to `places`; only the one that other ranks wait for must succeed."""
    for place in places:
        try:
            write_scan(place, found)
        except OSError as error:
            if needed is not None and place == Path(needed):
                raise UserError(f"cannot write the index to {place}: {error.strerror}") from error


def _stray_notes(root: Path, found: Scan) -> list[str]:
    strays = found.strays
    notes = []
    if strays.stray:
        some = ", ".join(map(escaped, strays.examples))
        notes.append(f"{root}: {strays.stray} files or folders are no frames and were left alone ({some})")
    if strays.hidden:
        notes.append(f"{root}: {strays.hidden} hidden files or folders were left alone")
    return notes


def _checked_test(index: Index, found: Scan, settings: DataSettings) -> Index:
    if not index.frame_counts.any():
        form = f" named {settings.frame_pattern} (data.frame_pattern)" if settings.frame_pattern else ""
        what = "folders" if index.files is None else "videos"
        raise UserError(
            f"none of the {len(index)} {what} of {index.root} has frames{form} in it: expected <video>/*.jpg"
        )
    bad = np.flatnonzero(found.states != states.GOOD)
    if len(bad):
        index.notes.append(f"{index.root}: {len(bad)} of {len(index)} test videos have no frames: {_named(found, bad)}")
    return index


def _check_classes(index: Index, classes: list[str] | None) -> None:
    counts = np.bincount(index.labels, minlength=len(index.classes))
    hollow = [name for name, count in zip(index.classes, counts, strict=True) if not count]
    if classes is not None:
        strange = [name for name in index.classes if name not in set(classes)]
        if strange:
            remedy = "rename or remove them"
            if len(strange) == len(index.classes) and index.root.is_dir() and index.packed is None:
                tests = [index.root / name for name in strange if frames_below(str(index.root / name)) == 1]
                if tests:
                    remedy = f"if its videos have no classes, it is one folder too high: give {_one_of(tests)}"
            raise UserError(
                f"{index.root} has {len(strange)} classes that training does not know ({', '.join(strange[:_NAMED])}): "
                f"{remedy}"
            )
        return
    endless = next((name for name in index.classes if len(name) > _LONGEST), None)
    if endless is not None:
        raise UserError(
            f"{index.root} has a class name of {len(endless)} characters ({endless[:40]}...): at most {_LONGEST}"
        )
    if hollow:
        raise UserError(
            f"{len(hollow)} classes of {index.root} have no videos ({', '.join(hollow[:_NAMED])}): "
            "put <video>/ folders with frames into them, or remove them"
        )
    if len(index.classes) < 2:
        raise UserError(f"{index.root} has a single class ({index.classes[0]}): a classifier needs at least two")


def _without_bad(index: Index, found: Scan, settings: DataSettings, *, keep: bool) -> Index:
    """Refuse videos without a good frame, or leave them out where the user said so and they are few."""
    bad = np.flatnonzero(found.states != states.GOOD)
    if len(bad) and settings.on_bad_video == "error":
        raise UserError(
            f"{len(bad)} of {len(index)} videos of {index.root} cannot be used: {_named(found, bad)}"
            f"{_whole_list(index, found, bad, settings) if keep else ''}{why_bad(index, found, bad)}; "
            "repair or remove them, or set data.on_bad_video=skip"
        )
    share = max(len(bad) / len(index), index.damaged / max(1, int(index.frame_counts.sum())))
    if share > settings.max_damaged:
        raise UserError(
            f"{share:.1%} of {index.root} is damaged ({len(bad)} of {len(index)} videos without a good frame, "
            f"{index.damaged} damaged frames met): repair it, or raise data.max_damaged (now {settings.max_damaged:g})"
        )
    if index.damaged:
        index.notes.append(f"{index.root}: {index.damaged} damaged frames were met in looking for a good one a video")
    if not len(bad):
        return index
    kept = index.take(np.flatnonzero(found.states == states.GOOD))
    kept.skipped = [index.names[i] for i in bad]
    left_out = f"{_named(found, bad)}{why_bad(index, found, bad)}"
    kept.notes.append(f"{index.root}: {len(bad)} of {len(index)} videos were left out: {left_out}")
    gone = np.setdiff1d(index.labels, kept.labels)
    if len(gone):
        raise UserError(f"no video of class {index.classes[int(gone[0])]} in {index.root} has a frame that decodes")
    return kept


def _named(found: Scan, bad: np.ndarray) -> str:
    return listed([f"{escaped(found.names[i])} ({states.STATES[found.states[i]]})" for i in bad], _NAMED)


def why_bad(index: Index, found: Scan, bad: np.ndarray) -> str:
    """What is wrong with the first frame of the first of the videos `bad` of which none decodes, behind "; "."""
    video = next((i for i in bad.tolist() if found.states[i] == states.DAMAGED), None)
    if video is None:
        hollow = found.pattern and (found.states[bad] == states.EMPTY).any()
        return f"; only files named {found.pattern} count (data.frame_pattern)" if hollow else ""
    if index.is_file(video):
        return f"; {escaped(found.names[video])}: {'; '.join(states.look_at(index.folder(video), check=True).faults)}"
    try:
        decode_frame(index.frame_bytes(video, 0), factor=8)
    except DamagedFrame as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        return ""
    return f"; {index.frame_name(video, 0)}: {reason}"


def _whole_list(index: Index, found: Scan, bad: np.ndarray, settings: DataSettings) -> str:
    """Where more are bad than one line can name: write all of them down, and say where."""
    if len(bad) <= _NAMED:
        return ""
    kept = cache_path(index.root, labelled=True, settings=settings)
    if kept is None:
        return ""
    path = kept.with_suffix(".bad.txt")
    lines = [f"{escaped(found.names[i])}\t{states.STATES[found.states[i]]}\n" for i in bad]
    try:
        write_text(path, "".join(lines))
    except OSError:
        return ""
    return f" (all are listed in {path})"
