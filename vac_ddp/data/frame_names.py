"""Names by the million in a few arrays: texts as one run of bytes, frame names as runs of numbers."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_DIGITS = re.compile(r"([0-9]+)")
_MAX_DIGITS = 18  # a longer number does not fit int64 and stays text
NO_NUMBER = -1


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key by which frame 2 comes before frame 10; equal numbers are told apart by the text itself."""
    parts: list[str | int] = list(_DIGITS.split(name))
    parts[1::2] = map(int, parts[1::2])
    return parts, name


class Texts(Sequence[str]):
    """An immutable sequence of texts: the bytes of all (N,) uint8 and the offsets (V+1,) int64.

    File names that are not UTF-8 go through unharmed (surrogateescape, as in `os.fsdecode`).
    """

    def __init__(self, blob: np.ndarray, offsets: np.ndarray) -> None:
        self.blob = blob
        self.offsets = offsets

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Pack `texts`."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def take(self, which: np.ndarray) -> Texts:
        """The texts at the positions `which` (n,) int64, in that order."""
        starts, lengths = self.offsets[:-1][which], np.diff(self.offsets)[which]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return Texts(self.blob[ranges(starts, lengths)], offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[int(i)]  # negative numbers, and an IndexError past the end
        return self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        data, ends = self.blob.tobytes(), self.offsets.tolist()
        for start, end in itertools.pairwise(ends):
            yield data[start:end].decode("utf-8", "surrogateescape")


def is_plain(texts: Texts) -> bool:
    """Whether all texts are ASCII without control characters and backslashes: nothing to be escaped in them."""
    blob = texts.blob
    return not len(blob) or bool(blob.min() >= 0x20 and blob.max() < 0x7F and not (blob == ord("\\")).any())


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers starts[i] ... starts[i] + lengths[i] - 1 of all i, one after the other, (sum,) int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


@dataclass(kw_only=True, eq=False)
class FrameNames:
    """The frame names of V videos, as R runs of numbers in one of a few styles.

    `0001.jpg ... 0093.jpg` is one run (prefix "", suffix ".jpg", pad 4, first 1, step 1, count 93); a gap begins
    a new run; a name without a number is a run of one. Video v has the runs starts[v] to starts[v+1] - 1.
    """

    starts: np.ndarray  # (V+1,) int64
    style: np.ndarray  # (R,) int32, into prefixes, suffixes, pads
    first: np.ndarray  # (R,) int64
    step: np.ndarray  # (R,) int64
    count: np.ndarray  # (R,) int64
    prefixes: Texts
    suffixes: Texts
    pads: np.ndarray  # (S,) int32: least number of digits, or NO_NUMBER

    @property
    def counts(self) -> np.ndarray:
        """Frames of each video, (V,) int64."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.count)])
        return total[self.starts[1:]] - total[self.starts[:-1]]

    def name(self, video: int, frame: int) -> str:
        """The file name of frame number `frame` (from 0) of `video`."""
        return self.namer(video)(frame)

    def namer(self, video: int) -> Callable[[int], str]:
        """A function from a frame's number (from 0) to its file name in `video`, for many frames of one video."""
        begin, end = int(self.starts[video]), int(self.starts[video + 1])
        upto = np.cumsum(self.count[begin:end])
        total = int(upto[-1]) if end > begin else 0

        @functools.cache
        def facts_of(run: int) -> tuple[int, str, int, int, int, str]:
            style = int(self.style[run])
            ahead = int(upto[run - begin]) - int(self.count[run])
            pad, first, step = int(self.pads[style]), int(self.first[run]), int(self.step[run])
            return ahead, self.prefixes[style], pad, first, step, self.suffixes[style]

        def name(frame: int) -> str:
            if not 0 <= frame < total:
                raise IndexError(f"video {video} has no frame {frame}")
            run = begin if end - begin == 1 else begin + int(np.searchsorted(upto, frame, side="right"))
            ahead, prefix, pad, first, step, suffix = facts_of(run)
            number = "" if pad == NO_NUMBER else str(first + (frame - ahead) * step).zfill(pad)
            return f"{prefix}{number}{suffix}"

        return name

    def names(self, video: int) -> list[str]:
        """All frame names of `video`, in order."""
        found = []
        for run in range(int(self.starts[video]), int(self.starts[video + 1])):
            style, first, step = int(self.style[run]), int(self.first[run]), int(self.step[run])
            prefix, suffix, pad = self.prefixes[style], self.suffixes[style], int(self.pads[style])
            if pad == NO_NUMBER:
                found.append(prefix + suffix)
            else:
                last = first + step * int(self.count[run])
                found += [f"{prefix}{number:0{pad}d}{suffix}" for number in range(first, last, step)]
        return found

    def take(self, videos: np.ndarray) -> FrameNames:
        """The same for the videos of the numbers `videos` (n,) int64."""
        lengths = np.diff(self.starts)[videos]
        runs = ranges(self.starts[:-1][videos], lengths)
        return FrameNames(
            starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
            style=self.style[runs],
            first=self.first[runs],
            step=self.step[runs],
            count=self.count[runs],
            prefixes=self.prefixes,
            suffixes=self.suffixes,
            pads=self.pads,
        )


Run = tuple[str, str, int, int, int, int]  # prefix, suffix, pad, first, step, count


def runs_of(names: list[str]) -> list[Run]:
    """The names of one video's frames, in natural order, as runs of numbers."""
    if not names:
        return []
    names.sort()
    return _one_run(names) or _many_runs(sorted(names, key=natural_key))


def _one_run(names: list[str]) -> list[Run] | None:
    """The usual case, told without parsing every name: equally long names with evenly spaced numbers."""
    parts, last = _DIGITS.split(names[0]), _DIGITS.split(names[-1])
    spot = _number_at(parts, last)
    if spot is None or len(parts) != len(last) or len(parts[spot]) != len(last[spot]):
        return None
    pad, first = len(parts[spot]), int(parts[spot])
    step, rest = divmod(int(last[spot]) - first, max(1, len(names) - 1))
    if rest or (step < 1 and len(names) > 1):
        return None
    step = max(1, step)
    prefix, suffix = "".join(parts[:spot]), "".join(parts[spot + 1 :])
    expected = [f"{prefix}{number:0{pad}d}{suffix}" for number in range(first, first + step * len(names), step)]
    return [(prefix, suffix, pad, first, step, len(names))] if expected == names else None


def _many_runs(names: list[str]) -> list[Run]:
    split = [_DIGITS.split(name) for name in names]
    runs: list[Run] = []
    for i, parts in enumerate(split):
        spot = _number_at(parts, split[i - 1] if i else split[min(1, len(split) - 1)])
        if spot is None:
            runs.append((names[i], "", NO_NUMBER, 0, 1, 1))
            continue
        digits, prefix, suffix = parts[spot], "".join(parts[:spot]), "".join(parts[spot + 1 :])
        number = int(digits)
        if runs:
            before, after, pad, first, step, count = runs[-1]
            if (before, after) == (prefix, suffix) and pad != NO_NUMBER and str(number).zfill(pad) == digits:
                gap = number - (first + step * (count - 1))
                if gap > 0 and (count == 1 or gap == step):
                    runs[-1] = (before, after, pad, first, gap, count + 1)
                    continue
        runs.append((prefix, suffix, len(digits) if digits[0] == "0" else 1, number, 1, 1))
    return runs


def _number_at(parts: list[str], other: list[str]) -> int | None:
    """Which of the `parts` (text, digits, text, ...) counts the frames: the first that differs, else the last."""
    spots = range(1, len(parts), 2)
    if len(parts) == len(other):
        for spot in spots:
            if parts[spot] != other[spot]:
                return spot if len(parts[spot]) <= _MAX_DIGITS else None
    usable = [spot for spot in spots if len(parts[spot]) <= _MAX_DIGITS]
    return usable[-1] if usable else None


def pack_runs(videos: Sequence[list[Run]]) -> FrameNames:
    """The runs of V videos as arrays."""
    styles: dict[tuple[str, str, int], int] = {}
    rows = [
        (styles.setdefault((prefix, suffix, pad), len(styles)), first, step, count)
        for runs in videos
        for prefix, suffix, pad, first, step, count in runs
    ]
    table = np.array(rows, np.int64).reshape(-1, 4)
    starts = np.zeros(len(videos) + 1, np.int64)
    np.cumsum([len(runs) for runs in videos], out=starts[1:])
    return FrameNames(
        starts=starts,
        style=table[:, 0].astype(np.int32),
        first=table[:, 1].copy(),
        step=table[:, 2].copy(),
        count=table[:, 3].copy(),
        prefixes=Texts.of(prefix for prefix, _, _ in styles),
        suffixes=Texts.of(suffix for _, suffix, _ in styles),
        pads=np.array([pad for _, _, pad in styles], np.int32),
    )


def join_frames(parts: Sequence[FrameNames]) -> FrameNames:
    """The videos of all `parts`, one after the other, with one table of styles."""
    styles: dict[tuple[str, str, int], int] = {}
    moved = []
    for part in parts:
        table = zip(part.prefixes, part.suffixes, part.pads.tolist(), strict=True)
        moved.append(np.array([styles.setdefault(style, len(styles)) for style in table], np.int32)[part.style])
    runs = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.starts) for part in parts)])

    def column(name: str, kind: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, kind), *(getattr(part, name) for part in parts)])

    return FrameNames(
        starts=np.cumsum(runs),
        style=np.concatenate([np.zeros(0, np.int32), *moved]),
        first=column("first", np.int64),
        step=column("step", np.int64),
        count=column("count", np.int64),
        prefixes=Texts.of(prefix for prefix, _, _ in styles),
        suffixes=Texts.of(suffix for _, suffix, _ in styles),
        pads=np.array([pad for _, _, pad in styles], np.int32),
    )
