"""Frames for tests: natural-looking pictures, folders of them, and videos that live in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from tests.image_files import encode as encode
from vac_ddp.data.batch import Batch
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.frames import resize_crop
from vac_ddp.data.sampler import Key
from vac_ddp.settings import Config


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth, coloured picture with edges, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    out = np.empty((height, width, 3))
    for channel in range(3):
        waves = sum(
            rng.uniform(10, 35) * np.sin(rng.uniform(2, 14) * y + rng.uniform(2, 14) * x + rng.uniform(0, 6))
            for _ in range(4)
        )
        edge = 60 * (np.hypot(y - rng.uniform(0.2, 0.6), x - rng.uniform(0.2, 0.8)) < rng.uniform(0.1, 0.3))
        out[..., channel] = 110 + waves + edge
    return out.clip(0, 255).astype(np.uint8)


def jpeg(height: int, width: int, seed: int = 0, quality: int = 90) -> bytes:
    """`picture` as a JPEG."""
    return simplejpeg.encode_jpeg(picture(height, width, seed), quality=quality, colorsubsampling="420")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def write_video(folder: Path, frames: int, *, height: int = 48, width: int = 64, seed: int = 0) -> Path:
    """A folder of JPEG frames 0001.jpg, 0002.jpg, ..."""
    folder.mkdir(parents=True)
    for i in range(frames):
        (folder / f"{i + 1:04d}.jpg").write_bytes(jpeg(height, width, seed * 1000 + i))
    return folder


def cut_out(stack: np.ndarray, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """`box` of frames (N, H, W, 3) resampled by `resize_crop`, (N, size, size, 3)."""
    out = torch.empty((len(stack), size, size, 3), dtype=torch.uint8)
    resize_crop(torch.from_numpy(stack), box, out)
    return out


class MemoryVideos:
    """Videos in memory: a list of frames (bytes, or an OSError to raise) for each."""

    def __init__(self, videos: list[list[bytes | OSError]], labels: list[int] | None = None) -> None:
        self.videos = videos
        self.labels = np.array(labels if labels is not None else [0] * len(videos), dtype=np.int64)
        self.frame_counts = np.array([len(v) for v in videos], dtype=np.int64)
        self.names = [f"class/video{i}" for i in range(len(videos))]
        self.read: list[tuple[int, int]] = []

    def frame_bytes(self, video: int, frame: int) -> bytes:
        self.read.append((video, frame))
        data = self.videos[video][frame]
        if isinstance(data, OSError):
            raise data
        return data

    def reader(self, video: int) -> Callable[[int], bytes]:
        return functools.partial(self.frame_bytes, video)

    def frame_name(self, video: int, frame: int) -> str:
        return f"{self.names[video]}/{frame + 1:04d}.jpg"


def random_batch(config: Config, noise_size: int, clips: int) -> Batch:
    """The load batch of so many draws of one video."""
    videos = MemoryVideos([[jpeg(48, 64, frame) for frame in range(config.clip.frames)]])
    dataset = TrainClips(videos, np.zeros(1, np.int64), config, noise_size, 0)
    return dataset.__getitems__([Key(0, draw, 0) for draw in range(clips)])
