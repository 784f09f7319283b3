"""Keys in, clips out: what a loader process does for one draw or one scored video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from vac_ddp.data.augment import draw_crop_box, draw_parameters
from vac_ddp.data.frames import DamagedFrame, NoFrame, decode_frame, read_clip, view_boxes
from vac_ddp.data.sampler import Key
from vac_ddp.data.sampling import AUGMENT, CROP, FRAMES, NOISE, generator, test_windows, train_frames
from vac_ddp.errors import UserError
from vac_ddp.settings import ClipSettings, Config, ViewSettings


class Videos(Protocol):
    """What is needed of an index (`vac_ddp.data.index.Index` has it)."""

    labels: np.ndarray
    names: Sequence[str]
    frame_counts: np.ndarray

    def frame_bytes(self, video: int, frame: int) -> bytes: ...  # noqa: D102
    def frame_name(self, video: int, frame: int) -> str: ...  # noqa: D102


class TrainClips(Dataset):
    """The clips of training draws. A pure function of (seed, epoch, draw, video) and the files.

    `dataset[key]`, with a key (epoch, draw, video), is a dict; R = augment.repeats clips come from one decoding:

    clips : (R, T, S, S, 3) uint8, the random crop already taken, not flipped
    labels : (R,) int64
    samples : (R,) int64, sample numbers draw * R + r
    noise : (R, noise_size) float32 in [0, 1), random numbers for the model
    params : dict of (R, ...) tensors for `augment.augment_clips`
    epoch, video : int
    damage : list of str, damaged frames that were replaced by their nearest good one, with the reason
    """

    def __init__(self, index: Videos, videos: np.ndarray, settings: Config, noise_size: int, seed: int) -> None:
        self.index = index
        self.videos = np.asarray(videos, dtype=np.int64)
        self.settings = settings
        self.noise_size = noise_size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: Key | tuple[int, int, int]) -> dict[str, Any]:
        epoch, draw, video = key
        clip, augment, repeats = self.settings.clip, self.settings.augment, self.settings.augment.repeats
        samples = range(draw * repeats, (draw + 1) * repeats)
        count = int(self.index.frame_counts[video])

        def boxes(height: int, width: int) -> list[tuple[int, int, int, int]]:
            return [draw_crop_box(generator(self.seed, epoch, s, CROP), augment, height, width) for s in samples]

        try:
            if not count:
                raise NoFrame({})
            clips, damaged = read_clip(
                lambda frame: self.index.frame_bytes(video, frame),
                train_frames(count, clip, generator(self.seed, epoch, draw, FRAMES)),
                boxes,
                clip.size,
                n_frames=count,
                reduced=self.settings.data.reduced_decode,
            )
        except NoFrame as error:
            raise UserError(no_frame_message(self.index, video, error)) from error
        drawn = [
            draw_parameters(generator(self.seed, epoch, s, AUGMENT), augment, frames=clip.frames, size=clip.size)
            for s in samples
        ]
        noise = [generator(self.seed, epoch, s, NOISE).random(self.noise_size, dtype=np.float32) for s in samples]
        return {
            "clips": clips,
            "labels": torch.full((repeats,), int(self.index.labels[video]), dtype=torch.int64),
            "samples": torch.tensor(samples, dtype=torch.int64),
            "noise": torch.from_numpy(np.stack(noise)),
            "params": {name: torch.from_numpy(np.stack([d[name] for d in drawn])) for name in drawn[0]},
            "epoch": epoch,
            "video": video,
            "damage": damage_lines(self.index, video, damaged),
        }


class TestViews(Dataset):
    """The views of scored videos, each video decoded once.

    `dataset[i]` is a dict for `videos[i]`:

    clips : (K * crops, T, S, S, 3) uint8, window k and crop c at k * crops + c; the mirrored views are made on the
        device
    place, video : int, i and its number in the index
    label : int, -1 where there is none
    decoded : bool, False where no frame could be decoded (`clips` are then zero)
    damage : list of str, damaged frames, with the reason

    `tolerant` (the test part): what decodes of a damaged frame is used before its neighbour, and a video without any
    good frame is an item with decoded=False. Otherwise (validation) that is a UserError.
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

    def __getitem__(self, item: int) -> dict[str, Any]:
        video = int(self.videos[item])
        count = int(self.index.frame_counts[video])
        size, crops = self.clip.size, self.views.crops
        windows = test_windows(max(count, 1), self.clip, self.views)
        try:
            if not count:
                raise NoFrame({})
            clips, damaged = read_clip(
                lambda frame: self.index.frame_bytes(video, frame),
                windows.reshape(-1),
                lambda height, width: view_boxes(height, width, size=size, short_side=self.short_side, crops=crops),
                size,
                n_frames=count,
                reduced=self.reduced,
                tolerant=self.tolerant,
            )
            clips = clips.view(crops, *windows.shape, size, size, 3).transpose(0, 1).flatten(0, 1)
            decoded = True
        except NoFrame as error:
            if not self.tolerant:
                raise UserError(no_frame_message(self.index, video, error)) from error
            clips = torch.zeros((len(windows) * crops, self.clip.frames, size, size, 3), dtype=torch.uint8)
            damaged, decoded = error.damaged, False
        return {
            "clips": clips.contiguous(),
            "place": int(item),
            "video": video,
            "label": int(self.index.labels[video]),
            "decoded": decoded,
            "damage": damage_lines(self.index, video, damaged),
        }


def damage_lines(index: Videos, video: int, damaged: dict[int, str]) -> list[str]:
    """One line for every damaged frame: its name and what is wrong with it."""
    return [f"{index.frame_name(video, frame)}: {reason}" for frame, reason in sorted(damaged.items())]


def no_frame_message(index: Videos, video: int, error: NoFrame) -> str:
    """What to say of a video none of whose frames can be decoded."""
    lines = damage_lines(index, video, error.damaged)
    first = f" (first: {lines[0]})" if lines else ""
    return (
        f"video {index.names[video]}: none of its {int(index.frame_counts[video])} frames can be decoded{first}; "
        "remove it, or set data.on_bad_video=skip"
    )


def has_good_frame(index: Videos, video: int) -> bool:
    """Whether any frame of a video decodes as a whole; decodes no more than it must, the middle one first."""
    count = int(index.frame_counts[video])
    for frame in sorted(range(count), key=lambda f: abs(f - count // 2)):
        try:
            decode_frame(index.frame_bytes(video, frame), factor=8)
            return True
        except (DamagedFrame, OSError):
            continue
    return False
