"""Statistics of features over time steps, as `models.pooling` takes them, for a whole features file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.results.features_file import Features

STATISTICS = ("mean", "std", "difference")
_BLOCK = 1 << 24  # features worked on at a time: the file may be larger than memory


def parse_statistics(text: str) -> list[str]:
    """The statistics in `text`, joined by +; UserError where one does not exist or comes twice."""
    names = text.split("+")
    if not set(names) <= set(STATISTICS) or len(set(names)) < len(names):
        raise UserError(f"probe.statistics: {text}: expected some of {', '.join(STATISTICS)}, joined by +, each once")
    return names


def time_statistics(features: Features, videos: np.ndarray, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Each statistic of `videos` over the time steps, (v, n, D) float32 by its name.

    mean; std (divided by the number of steps); difference: mean absolute difference of neighbouring steps, 0 where
    there is one step. A file without steps has the mean alone: UserError for another.
    """
    if features.steps is None:
        if set(wanted) - {"mean"}:
            raise UserError(
                f"{features.path} has no features of single time steps: write them by `vac embed --steps`, or give "
                "probe.statistics='[mean]' and no attentive probe"
            )
        return {"mean": np.asarray(features.pooled[videos], np.float32)}
    _, views, steps, width = features.steps.shape
    found = {name: np.empty((len(videos), views, width), np.float32) for name in wanted}
    rows = max(1, _BLOCK // (views * steps * width))
    for start in range(0, len(videos), rows):
        block = np.asarray(features.steps[videos[start : start + rows]], np.float32)
        for name in wanted:
            found[name][start : start + rows] = _statistic(name, block)
    return found


def _statistic(name: str, x: np.ndarray) -> np.ndarray:
    """From features (v, n, T, D) to (v, n, D)."""
    if name == "mean":
        return x.mean(axis=2)
    if name == "std":
        return x.std(axis=2)
    return np.abs(np.diff(x, axis=2)).mean(axis=2) if x.shape[2] > 1 else np.zeros_like(x[:, :, 0])
