"""Keys in, clips out: what a loader process does for the draws of a load batch, or for scored videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from vac_ddp.data.augment import draw_crop_box, draw_parameters
from vac_ddp.data.batch import Batch, TestBatch, clip_buffer, unit_rows
from vac_ddp.data.clip_sampling import AUGMENT, CROP, FRAMES, MIX, NOISE, generator, train_frames, view_windows
from vac_ddp.data.frames import Frame, NoFrame, read_clip, view_boxes
from vac_ddp.data.mixing import draw_mixing
from vac_ddp.data.sampler import Key
from vac_ddp.errors import UserError
from vac_ddp.settings import ClipSettings, Config, ViewSettings


class Videos(Protocol):
    """What is needed of an index (`vac_ddp.data.index.Index` has it)."""

    labels: np.ndarray
    frame_counts: np.ndarray

    def __len__(self) -> int: ...
    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102
    def reader(self, video: int) -> Callable[[int], Frame]: ...  # noqa: D102
    def frame_name(self, video: int, frame: int) -> str: ...  # noqa: D102


class TrainClips(Dataset):
    """The clips of training draws: a pure function of (seed, epoch, draw, video) and the files.

    A key is (epoch, draw, video): R = augment.repeats clips of one decoding, whose sample numbers are draw * R + r.
    The DataLoader asks for whole load batches: `dataset.__getitems__(keys)` is the :class:`Batch` of units of two,
    the last one may be single; no keys make an empty one.
    """

    def __init__(self, index: Videos, videos: np.ndarray, settings: Config, noise_size: int, seed: int) -> None:
        self.index = index
        self.videos = np.asarray(videos, dtype=np.int64)
        self.settings = settings
        self.noise_size = noise_size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The load batch of `keys`, decoded straight into its place."""
        clip, repeats = self.settings.clip, self._repeats
        rows, units = unit_rows(len(keys), repeats)
        damage: list[str] = []
        clips = clip_buffer(rows.size, clip.frames, clip.size, clip.size, 3)
        for key, places in zip(keys, rows, strict=True):
            step = int(places[1] - places[0]) if repeats > 1 else 1
            damage += self._read(key, clips[places[0] : places[-1] + 1 : step])
        partner = np.arange(rows.size)
        paired = units[units[:, 1] >= 0]
        partner[paired], partner[paired[:, ::-1]] = paired[:, ::-1], paired
        nothing = Key(0, 0, 0)  # shapes and types of an empty batch
        facts = _in_rows([self._facts(key) for key in keys] or [self._facts(nothing)], rows)
        params = _in_rows([self._params(key) for key in keys] or [self._params(nothing)], rows)
        mixing = [self._mixing(key) for key in keys[::2]] or [self._mixing(nothing)]
        params |= _in_rows([mixing[i // 2] for i in range(max(1, len(keys)))], rows)
        params["partner"] = torch.from_numpy(partner)
        return Batch(clips=clips, params=params, units=torch.from_numpy(units), damage=damage, **facts)

    @property
    def _repeats(self) -> int:
        return self.settings.augment.repeats

    def _rngs(self, key: Key, stream: int) -> Iterator[np.random.Generator]:
        """One generator for every clip of a draw."""
        epoch, draw, _ = key
        for sample in range(draw * self._repeats, (draw + 1) * self._repeats):
            yield generator(self.seed, epoch, sample, stream)

    def _read(self, key: Key, out: torch.Tensor) -> list[str]:
        """Decode the clips of a draw into `out` (R, T, S, S, 3). Returns lines about damaged frames."""
        epoch, draw, video = key
        augment = self.settings.augment
        count = int(self.index.frame_counts[video])
        try:
            if not count:
                raise NoFrame({})
            damaged = read_clip(
                self.index.reader(video),
                train_frames(count, self.settings.clip, generator(self.seed, epoch, draw, FRAMES)),
                lambda height, width: [draw_crop_box(rng, augment, height, width) for rng in self._rngs(key, CROP)],
                out,
                n_frames=count,
                reduced=self.settings.data.reduced_decode,
            )
        except NoFrame as error:
            raise UserError(_no_frame_message(self.index, video, error)) from error
        return damage_lines(self.index, video, damaged)

    def _facts(self, key: Key) -> dict[str, np.ndarray]:
        _, draw, video = key
        repeats = self._repeats
        return {
            "labels": np.full(repeats, self.index.labels[video], dtype=np.int64),
            "samples": np.arange(draw * repeats, (draw + 1) * repeats, dtype=np.int64),
            "videos": np.full(repeats, video, dtype=np.int64),
            "noise": np.stack([rng.random(self.noise_size, dtype=np.float32) for rng in self._rngs(key, NOISE)]),
        }

    def _params(self, key: Key) -> dict[str, np.ndarray]:
        clip, augment = self.settings.clip, self.settings.augment
        drawn = [draw_parameters(rng, augment, size=clip.size) for rng in self._rngs(key, AUGMENT)]
        return {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}

    def _mixing(self, first: Key) -> dict[str, np.ndarray]:
        """Mode, share and box of the unit whose first draw is given, for each of its clips."""
        epoch, draw, _ = first
        rng = generator(self.seed, epoch, draw * self._repeats, MIX)
        drawn = draw_mixing(rng, self.settings.augment, size=self.settings.clip.size)
        return {name: np.stack([value] * self._repeats) for name, value in drawn.items()}


class TestViews(Dataset):
    """The views of scored videos, each video decoded once.

    `dataset.__getitems__(places)` is the :class:`TestBatch` of `videos[place]` for the places, `dataset[place]` that of
    one video.

    `tolerant` (the test part): what decodes of a damaged frame is used before its neighbour, and a video without any
    good frame has decoded=False. Otherwise (validation) such a video is a UserError.
    """

    __test__ = False

    def __init__(
        self,
        index: Videos,
        videos: np.ndarray,
        clip: ClipSettings,
        views: ViewSettings,
        *,
        tolerant: bool,
        reduced: bool = True,
    ) -> None:
        self.index = index
        self.videos = np.asarray(videos, dtype=np.int64)
        self.clip = clip
        self.views = views
        self.tolerant = tolerant
        self.reduced = reduced
        self.short_side = clip.size if clip.short_side is None else clip.short_side
        if self.short_side < clip.size:
            raise UserError(
                f"clip.short_side={self.short_side} is below clip.size={clip.size}: a crop does not fit into the frame"
            )

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, place: int) -> TestBatch:
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[int]) -> TestBatch:
        """The views of the videos at `places`, decoded straight into their batch."""
        size, crops = self.clip.size, self.views.crops
        videos = self.videos[np.asarray(places, dtype=np.int64)]
        windows = [view_windows(max(1, int(self.index.frame_counts[v])), self.clip, self.views) for v in videos]
        clip_of_view = None
        if len(videos) == 1:
            windows[0], clip_of_view = _distinct(windows[0], crops)
        clips = clip_buffer(len(videos), len(windows[0]), crops, self.clip.frames, size, size, 3)
        damage: list[str] = []
        decoded = []
        for number, (video, frames) in enumerate(zip(videos.tolist(), windows, strict=True)):
            try:
                damaged = self._read(video, frames, clips[number].movedim(1, 0))
                decoded.append(True)
            except NoFrame as error:
                if not self.tolerant:
                    raise UserError(_no_frame_message(self.index, video, error)) from error
                clips[number].zero_()
                damaged = error.damaged
                decoded.append(False)
            damage += damage_lines(self.index, video, damaged)
        return TestBatch(
            clips=clips.flatten(1, 2),
            places=torch.tensor(places, dtype=torch.int64),
            videos=torch.from_numpy(videos),
            labels=torch.from_numpy(self.index.labels[videos].astype(np.int64)),
            decoded=torch.tensor(decoded),
            clip_of_view=clip_of_view,
            damage=damage,
        )

    def _read(self, video: int, windows: np.ndarray, out: torch.Tensor) -> dict[int, str]:
        """Decode the frames (K, T) and crops of a video into `out` (crops, K, T, S, S, 3). Returns damaged frames."""
        count = int(self.index.frame_counts[video])
        if not count:
            raise NoFrame({})
        size, crops = self.clip.size, self.views.crops
        return read_clip(
            self.index.reader(video),
            windows,
            lambda height, width: view_boxes(height, width, size=size, short_side=self.short_side, crops=crops),
            out,
            n_frames=count,
            reduced=self.reduced,
            tolerant=self.tolerant,
        )


def _distinct(windows: np.ndarray, crops: int) -> tuple[np.ndarray, torch.Tensor | None]:
    """The different ones of the windows (K, T), and which clip each of the K * crops views has; None: its own."""
    different, window_of = np.unique(windows, axis=0, return_inverse=True)
    if len(different) == len(windows):
        return windows, None
    clips = window_of.reshape(-1, 1) * crops + np.arange(crops)
    return different, torch.from_numpy(clips.reshape(-1))


def damage_lines(index: Videos, video: int, damaged: dict[int, str]) -> list[str]:
    """One line for every damaged frame: its name and what is wrong with it."""
    return [f"{index.frame_name(video, frame)}: {reason}" for frame, reason in sorted(damaged.items())]


def damage_line(video: str, lines: Sequence[str]) -> str:
    """One line about the damaged frames of a video, of which `damage_lines` gave `lines`."""
    if len(lines) == 1:
        return f"damaged frame {lines[0]}"
    return f"{len(lines)} damaged frames in {video}, the first: {lines[0].removeprefix(f'{video}/')}"


def _in_rows(parts: Sequence[dict[str, np.ndarray]], rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Arrays (R, ...) of n draws as tensors (n * R, ...) in the order of `rows` (n, R), which may be empty."""
    out = {}
    for name, example in parts[0].items():
        value = np.empty((rows.size, *example.shape[1:]), dtype=example.dtype)
        for places, part in zip(rows, parts, strict=False):
            value[places] = part[name]
        out[name] = torch.from_numpy(value)
    return out


def _no_frame_message(index: Videos, video: int, error: NoFrame) -> str:
    lines = damage_lines(index, video, error.damaged)
    first = f" (first: {lines[0]})" if lines else ""
    return (
        f"video {index.names[video]}: none of its {int(index.frame_counts[video])} frames can be decoded{first}; "
        "remove it, or set data.on_bad_video=skip"
    )
