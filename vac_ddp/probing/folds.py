"""Grouped folds of cross-validation, and the standard error of an accuracy over groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vac_ddp.data.holdout import grouped_folds
from vac_ddp.errors import UserError

_SMALL = 500  # videos; with fewer the folds are sampled several times
_REPEATS = 4


def outer_folds(
    groups: Sequence[str], labels: np.ndarray, *, folds: int, repeats: int | None, seed: int
) -> list[np.ndarray]:
    """The fold (V,) of each video, in each repeat: repeat r has the folds of data.fold=k/K with seed + r.

    repeats=None: 4 for fewer than 500 videos, else 1. UserError where there are fewer groups than folds.
    """
    found = len(set(groups))
    if found < folds:
        raise UserError(
            f"probe.folds={folds}: the videos are of {found} groups, which cannot be put in {folds} folds; set a "
            "smaller probe.folds, or see data.group_by"
        )
    count = repeats if repeats is not None else _REPEATS if len(labels) < _SMALL else 1
    return [grouped_folds(groups, labels, folds=folds, seed=seed + repeat) for repeat in range(count)]


def standard_error(correct: np.ndarray, groups: Sequence[str]) -> float:
    """Standard error of the mean of `correct` (V,), in [0, 1], over the sampling of whole groups.

    Videos of one group are right or wrong together: the residuals are summed by group (cluster-robust, Liang and Zeger
    1986, with the factor G / (G - 1)). NaN for a single group.
    """
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(member, correct - correct.mean())
    if len(sums) < 2:
        return float("nan")
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(correct))
