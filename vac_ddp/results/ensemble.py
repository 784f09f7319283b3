"""Several models' logits of the same videos: temperatures and weights from validation, and held-out videos pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.results import averaging
from vac_ddp.results.averaging import Method
from vac_ddp.results.logits_file import Views


@dataclass(kw_only=True)
class Pooled:
    """Scores (V, K) of videos by the members that did not train on them, with labels (V,) and sources."""

    scores: np.ndarray
    labels: np.ndarray
    sources: list[str]


def pool(files: Sequence[Views], *, method: Method = "mean-logits") -> Pooled:
    """Put the validation parts of all members together: a video that several held out gets the mean of their scores.

    UserError where they do not have the same classes in the same order.
    """
    found: dict[str, list[np.ndarray]] = {}
    known: dict[str, tuple[int, str]] = {}
    for file in files:
        if file.classes != files[0].classes:
            raise UserError(f"{file.path} has other classes than {files[0].path}: they are no members of one ensemble")
        scores = averaging.average_views(file.logits, method=method)
        for name, label, source, row in zip(file.ids, file.labels.tolist(), file.sources, scores, strict=True):
            found.setdefault(name, []).append(row)
            known[name] = (label, source)
    combined = [averaging.combine([r[None] for r in rows], [1.0] * len(rows), method=method) for rows in found.values()]
    return Pooled(
        scores=np.concatenate(combined),
        labels=np.array([label for label, _ in known.values()], np.int64),
        sources=[source for _, source in known.values()],
    )


def picked(file: Views, subset: Sequence[str] | None) -> np.ndarray:
    """Numbers of the views that `subset` names (see `averaging.select_views`); of all without one."""
    return averaging.select_views(file.views, subset) if subset else np.arange(len(file.views))


def fit_temperatures(validation: Sequence[Views], *, method: Method, subset: Sequence[str] | None) -> list[float]:
    """The temperature of each model, fitted on its labelled validation file."""
    fitted = []
    for file in validation:
        known = file.labels >= 0
        part = file.logits[:, picked(file, subset)]
        fitted.append(averaging.fit_temperature(part[known], file.labels[known], method=method))
    return fitted


def choose_weights(
    validation: Sequence[Views],
    temperatures: Sequence[float],
    *,
    greedy: bool,
    method: Method,
    subset: Sequence[str] | None,
) -> tuple[np.ndarray, str]:
    """Weights of the models on validation videos that all have: greedily by accuracy, or by the loss; and how."""
    aligned = averaging.align(validation)
    known = aligned.labels >= 0
    labels, absent = aligned.labels[known], aligned.absent[:, known]
    scores = [
        averaging.average_views(part[known][:, picked(file, subset)], method=method, temperature=t)
        for part, file, t in zip(aligned.logits, validation, temperatures, strict=True)
    ]
    choose = averaging.greedy_weights if greedy else averaging.fit_weights
    weights = choose(scores, labels, method=method, absent=absent)
    best = max(averaging.top1(part, labels) for part in scores)
    mixed = averaging.top1(averaging.combine(scores, weights, method=method, absent=absent), labels)
    verb = "chosen" if greedy else "fitted"
    return weights, f"{verb} on validation: top-1 {mixed:.4f} there, best single {best:.4f}"
