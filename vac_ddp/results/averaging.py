"""From logits per view to scores per video: averages, temperature, subsets of views, ensembles. numpy alone.

A score (V, K) is a logit: its softmax is the confidence. Averaging probabilities gives their logarithm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.results.logits_file import VIEW_COLUMNS, Views
from vac_ddp.results.metrics import UNLABELLED, label_places, log_softmax

Method = Literal["mean-logits", "mean-probs"]
METHODS: tuple[Method, ...] = ("mean-logits", "mean-probs")
_BLOCK = 1 << 22  # logits worked on at a time in float64


def method_for(files: Sequence[Views], asked: Method | None = None) -> Method:
    """What is averaged: as `asked`, else as the predictions of `files` were made with, if they agree; else logits."""
    said = {file.about.get("average", METHODS[0]) for file in files}
    chosen = asked or (said.pop() if len(said) == 1 else METHODS[0])
    if chosen not in METHODS:
        raise UserError(f"{files[0].path} was averaged by {chosen!r}: give --method {' or '.join(METHODS)}")
    return chosen


def average_views(logits: np.ndarray, *, method: Method = "mean-logits", temperature: float = 1.0) -> np.ndarray:
    """Scores (V, K) float64 of logits (V, n, K): the mean over the views, of logits or of probabilities.

    The logits are divided by `temperature` (> 0) first (Guo et al. 2017).
    """
    videos, views, classes = logits.shape
    scores = np.empty((videos, classes))
    step = max(1, _BLOCK // max(1, views * classes))
    for start in range(0, videos, step):
        part = logits[start : start + step].astype(np.float64) / temperature
        if method == "mean-logits":
            scores[start : start + step] = part.mean(axis=1)
        else:
            scores[start : start + step] = _mean_of_logs(log_softmax(part), np.full(views, 1 / views))
    return scores


def combine(
    scores: Sequence[np.ndarray],
    weights: Sequence[float] | np.ndarray,
    *,
    method: Method = "mean-logits",
    absent: np.ndarray | None = None,
) -> np.ndarray:
    """Weighted mean of the scores (V, K) of M models; the weights (M,) are made to sum to 1.

    absent: (M, V) bool, where a model could say nothing of a video: the others share its weight there. A video that all
    models miss is averaged as if none did.
    """
    shares = row_weights(weights, len(scores), len(scores[0]), absent)
    if method == "mean-logits":
        return np.sum([w[:, None] * s for w, s in zip(shares, scores, strict=True) if w.any()], axis=0)
    used = [(w, log_softmax(s)) for w, s in zip(shares, scores, strict=True) if w.any()]
    return _mean_of_logs(np.stack([s for _, s in used], axis=1), np.stack([w for w, _ in used], axis=1))


def row_weights(
    weights: Sequence[float] | np.ndarray, models: int, videos: int, absent: np.ndarray | None = None
) -> np.ndarray:
    """What each model counts for each video: (M, V), columns that sum to 1. UserError where `weights` make no sense."""
    if len(weights) != models:
        raise UserError(f"{len(weights)} weights for {models} views files: give one each")
    values = np.asarray(weights, np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise UserError(f"weights {', '.join(f'{w:g}' for w in values)}: must be 0 or more, and one above 0")
    full = np.repeat((values / values.sum())[:, None], videos, axis=1)
    if absent is None or not absent.any():
        return full
    there = np.where(absent, 0.0, full)
    total = there.sum(axis=0)
    return np.where(total > 0, there / np.where(total > 0, total, 1.0), full)


def _mean_of_logs(logs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log(sum_i weights_i exp(logs_i)) over axis 1 of (V, n, K); weights (n,) or (V, n)."""
    top = logs.max(axis=1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log((np.exp(logs - top) * weights[..., None]).sum(axis=1)) + top[:, 0]


# ---------------------------------------------------------------- several files


@dataclass(kw_only=True)
class Aligned:
    """Several views files in the order of the first: logits [(V, n_m, K)], absent (M, V) bool, labels (V,)."""

    logits: list[np.ndarray]
    absent: np.ndarray
    labels: np.ndarray


def align(files: Sequence[Views]) -> Aligned:
    """Put several views files into the ids' and classes' order of the first; labels come from any that has them.

    A UserError names what does not fit: other videos, other classes, other labels.
    """
    first = files[0]
    if len(set(first.ids)) != len(first.ids):
        raise UserError(f"{first.path}: a video is there twice")
    logits, absent, labels = [first.logits], [first.failed], first.labels.copy()
    for other in files[1:]:
        order = _order(first.ids, other.ids, first, other, "video")
        columns = _order(first.classes, other.classes, first, other, "class")
        known = np.where(other.labels >= 0, np.argsort(columns)[other.labels], UNLABELLED)[order]
        clash = (known >= 0) & (labels >= 0) & (known != labels)
        if clash.any():
            raise UserError(f"{other.path} gives {first.ids[int(clash.argmax())]!r} another label than {first.path}")
        labels = np.where(labels >= 0, labels, known)
        same = (columns == np.arange(len(columns))).all() and (order == np.arange(len(order))).all()
        logits.append(other.logits if same else other.logits[order][:, :, columns])
        absent.append(other.failed[order])
    return Aligned(logits=logits, absent=np.stack(absent), labels=labels)


def _order(names: list[str], others: list[str], first: Views, other: Views, what: str) -> np.ndarray:
    place = {name: i for i, name in enumerate(others)}
    absent = [name for name in names if name not in place]
    if absent or len(others) != len(names):
        extra = sorted(set(others) - set(names))
        said = f"lacks {what} {absent[0]!r}" if absent else f"has {what} {extra[0]!r} besides" if extra else "differs"
        raise UserError(f"{other.path} {said} ({len(others)} against {len(names)} of {first.path}): not the same data")
    return np.array([place[name] for name in names], np.int64)


def select_views(table: np.ndarray, words: Sequence[str]) -> np.ndarray:
    """Numbers of the views that `words` ask for, from the table (n, 3) of window, crop, flip.

    A word is `window=0,2`, `crop=1`, `flip=0` (all of them must hold) or a list of view numbers `0,3,4`.
    """
    chosen = np.ones(len(table), bool)
    for word in words:
        name, equals, text = word.partition("=") if "=" in word else ("", "", word)
        if equals and name not in VIEW_COLUMNS:
            raise UserError(f"--subset {word}: views have {', '.join(VIEW_COLUMNS)}, or give their numbers")
        try:
            wanted = [int(number) for number in text.split(",")]
        except ValueError:
            raise UserError(f"--subset {word}: expected whole numbers with commas, as window=0,2 or 0,3,4") from None
        column = table[:, VIEW_COLUMNS.index(name)] if equals else np.arange(len(table))
        absent = sorted(set(wanted) - set(column.tolist()))
        if absent:
            raise UserError(f"--subset {word}: there is no {name or 'view'} {absent[0]} (0 to {int(column.max())})")
        chosen &= np.isin(column, wanted)
    if not chosen.any():
        raise UserError(f"--subset {' '.join(words)}: no view is left")
    return np.flatnonzero(chosen)


# ---------------------------------------------------------------- fitted on validation


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose label has the largest score; labels (V,) all known."""
    return float((label_places(scores, labels) == 0).mean())


def mean_loss(scores: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy of the softmax of scores (V, K), in nats."""
    return -float(np.take_along_axis(log_softmax(scores), labels[:, None], axis=1).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray, *, method: Method = "mean-logits") -> float:
    """The temperature, from 0.01 to 100, at which `average_views` has the least loss on (V, n, K) with known labels.

    A grid over log T, then golden sections in the best cell: probabilities averaged need not have one minimum.
    """
    if method == "mean-logits":
        logits = average_views(logits)[:, None, :]

    def loss(log_t: float) -> float:
        return mean_loss(average_views(logits, method=method, temperature=math.exp(log_t)), labels)

    grid = np.linspace(math.log(0.01), math.log(100.0), 41)
    best = int(np.argmin([loss(t) for t in grid]))
    low, high = float(grid[max(0, best - 1)]), float(grid[min(len(grid) - 1, best + 1)])
    return math.exp(_golden(loss, low, high))


def _golden(function: Callable[[float], float], low: float, high: float, steps: int = 40) -> float:
    share = (math.sqrt(5) - 1) / 2
    a, b = high - share * (high - low), low + share * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(steps):
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - share * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + share * (high - low)
            at_b = function(b)
    return (low + high) / 2


def greedy_weights(
    scores: Sequence[np.ndarray],
    labels: np.ndarray,
    *,
    method: Method = "mean-logits",
    absent: np.ndarray | None = None,
    rounds: int | None = None,
) -> np.ndarray:
    """How often each model is taken by greedy selection with replacement (Caruana et al. 2004), as shares (M,).

    Each round adds the model with which the ensemble has the best top-1 on validation, and the least loss among equals.
    The best round is kept; the first is the best single model, so the result is never below it.
    """
    rounds = max(5, 3 * len(scores)) if rounds is None else rounds
    counts = np.zeros(len(scores))
    best: tuple[tuple[float, float], np.ndarray] | None = None
    for _ in range(rounds):
        trials = []
        for model in range(len(scores)):
            tried = counts.copy()
            tried[model] += 1
            mixed = combine(scores, tried, method=method, absent=absent)
            trials.append(((top1(mixed, labels), -mean_loss(mixed, labels)), -model, tried))
        figures, _, counts = max(trials, key=lambda trial: trial[:2])
        if best is None or figures > best[0]:
            best = figures, counts
    assert best is not None
    return best[1] / best[1].sum()


def fit_weights(
    scores: Sequence[np.ndarray],
    labels: np.ndarray,
    *,
    method: Method = "mean-logits",
    absent: np.ndarray | None = None,
    steps: int = 200,
) -> np.ndarray:
    """Weights (M,) that sum to 1 with little loss on validation: exponentiated gradient (Kivinen, Warmuth 1997).

    The step is halved where it did not help. It starts at equal weights and never ends with more loss than those or
    than any single model.
    """
    models = len(scores)

    def loss(weights: np.ndarray) -> float:
        return mean_loss(combine(scores, weights, method=method, absent=absent), labels)

    starts = [np.full(models, 1 / models), *np.eye(models)]
    losses = [loss(w) for w in starts]
    weights, now, rate = starts[0], losses[0], 4.0
    for _ in range(steps):
        if rate < 1e-4:
            break
        slope = np.array([(loss(_towards(weights, m, 1e-4)) - now) / 1e-4 for m in range(models)])
        tried = weights * np.exp(-rate * (slope - slope.min()))
        tried = np.maximum(tried / tried.sum(), 1e-6)
        tried /= tried.sum()
        value = loss(tried)
        if value < now:
            weights, now, rate = tried, value, rate * 1.5
        else:
            rate /= 2
    single = int(np.argmin(losses))
    return weights if now <= losses[single] else starts[single]


def _towards(weights: np.ndarray, model: int, share: float) -> np.ndarray:
    return (1 - share) * weights + share * np.eye(len(weights))[model]


# ---------------------------------------------------------------- what views buy


def views_table(
    logits: np.ndarray, labels: np.ndarray, *, method: Method = "mean-logits", temperature: float = 1.0, tries: int = 20
) -> list[tuple[int, float, float, float]]:
    """Top-1 against the number of views: rows (number, mean, lowest, highest) over subsets of that size.

    All subsets where there are at most `tries` of them, else as many drawn with a fixed seed.
    """
    views = logits.shape[1]
    numbers = [n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 60) if n < views] + [views]
    rng = np.random.default_rng(0)
    rows = []
    for number in numbers:
        if math.comb(views, number) <= tries:
            subsets = [list(s) for s in itertools.combinations(range(views), number)]
        else:
            subsets = [sorted(rng.permutation(views)[:number].tolist()) for _ in range(tries)]
        found = [top1(average_views(logits[:, s], method=method, temperature=temperature), labels) for s in subsets]
        rows.append((number, float(np.mean(found)), min(found), max(found)))
    return rows
