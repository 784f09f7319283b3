"""Does the size or length of a video give its class away? A nearest neighbour that sees nothing else tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_VIDEOS = 8000
_BLOCK = 1 << 20


@dataclass(kw_only=True)
class Giveaway:
    """What a nearest neighbour on size and length scores, and what it would without any connection."""

    accuracy: float  # 0 to 1
    chance: float  # expected for shuffled classes
    margin: float  # above chance by more than this is no accident
    videos: int  # that were looked at

    @property
    def found(self) -> bool:
        """Whether the class is given away."""
        return self.accuracy > self.chance + self.margin


def nearest_neighbour(features: np.ndarray, labels: np.ndarray, groups: Sequence[str], *, seed: int = 0) -> Giveaway:
    """Leave-one-source-out 1-nearest-neighbour accuracy.

    Parameters
    ----------
    features : (V, D) positive numbers
        Width, height and number of frames; compared as logarithms in units of their deviation.
    labels : (V,) int64
        Class of each video.
    groups : (V,) str
        Source of each video. Its own source is no neighbour: clips of one recording have one size, and that says
        nothing about a video to come. Of several equally near neighbours each counts its share.
    seed : int
        Draws `MOST_VIDEOS` where there are more.

    """
    numbers = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)[1]
    if len(labels) > MOST_VIDEOS:
        some = np.sort(np.random.default_rng([seed, 0x61]).choice(len(labels), MOST_VIDEOS, replace=False))
        features, labels, numbers = features[some], labels[some], numbers[some]
    count = len(labels)
    logs = np.log(np.maximum(1, features))
    deviation = logs.std(0)
    points = np.where(deviation > 1e-9, (logs - logs.mean(0)) / np.where(deviation > 1e-9, deviation, 1), 0)
    right = 0.0
    for top in range(0, count, height := max(1, _BLOCK // max(1, count))):
        rows = slice(top, top + height)
        distance = ((points[rows, None] - points[None]) ** 2).sum(2)
        distance[numbers[rows, None] == numbers[None]] = np.inf
        least = distance.min(1, keepdims=True)
        nearest = (distance <= least + 1e-9) & np.isfinite(distance)
        same = nearest & (labels[rows, None] == labels[None])
        right += float((same.sum(1) / np.maximum(1, nearest.sum(1))).sum())
    sizes = np.unique(labels, return_counts=True)[1]
    chance = float((sizes * (sizes - 1)).sum() / max(1, count * (count - 1)))
    independent = len(np.unique(np.stack([numbers, labels]), axis=1).T)  # clips of one source and class are one
    margin = max(0.05, 4 * float(np.sqrt(chance * (1 - chance) / max(1, independent))))
    return Giveaway(accuracy=right / max(1, count), chance=chance, margin=margin, videos=count)
