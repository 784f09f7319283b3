"""The sound files of an index, and windows of their samples."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from vac_ddp.audio import spectrogram
from vac_ddp.data.index import Index
from vac_ddp.errors import reason


class Sounds:
    """The sound files of an index: `lengths` (V,) in samples, 0 without one, and what is wrong with damaged ones."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.damaged: list[str] = []
        self.paths = [Path(index.folder(video)) / spectrogram.NAME for video in range(len(index))]
        with ThreadPoolExecutor(16) as pool:
            self.lengths = np.array(list(pool.map(self._length, self.paths)), np.int64)

    def _length(self, path: Path) -> int:
        try:
            return spectrogram.sound_length(path)
        except ValueError as error:
            self.damaged.append(f"{path}: {error}")
            return 0

    def windows(self, asked: Sequence[tuple[int, int]], length: int) -> torch.Tensor:
        """Samples (n, length) int16 of the windows (video, first sample)."""
        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(lambda one: self._window(one[0], one[1], length), asked))
        return torch.from_numpy(np.stack(rows))

    def _window(self, video: int, start: int, length: int) -> np.ndarray:
        """Silence where the file cannot be read, though its header could: from then on it counts as silent."""
        try:
            return spectrogram.read_window(self.paths[video], start, length)
        except Exception as error:
            if self.lengths[video]:
                self.damaged.append(f"{self.paths[video]}: {reason(error)}")
            self.lengths[video] = 0
            return np.zeros(length, np.int16)
