"""Figures of a classifier, from logits and labels that were gathered once, in numpy alone.

Training's validation, `vac predict` on labelled folders and `vac score` all take their numbers from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

UNLABELLED = -1
_ROWS = 1 << 16  # rows worked on at a time: float64 copies stay small for a million videos


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class of the per-class table. Shares are NaN where there is nothing to divide by."""

    name: str
    count: int
    correct: int
    recall: float
    precision: float
    f1: float
    mistaken_for: str
    mistaken_count: int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What `classification_metrics` found. Shares from 0 to 1; `loss` in nats; NaN where there are no samples."""

    count: int
    top1: float
    top5: float
    loss: float
    mean_class: float
    calibration_error: float
    confusion: np.ndarray
    per_class: list[ClassRow]

    def figures(self) -> dict[str, float]:
        """The numbers that stand for the whole, by name, for a log line or a JSON file."""
        names = ("top1", "top5", "mean_class", "loss", "calibration_error")
        return {name: getattr(self, name) for name in names}


def classification_metrics(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Metrics:
    """Accuracy, loss, calibration and confusion of logits (N, K) against labels (N,) int64.

    Rows labelled -1 are left out. Equal logits are ranked by class number, so every figure is a function of the values
    alone; a row with a NaN is a mistake, and makes the loss NaN. `mean_class` is the mean recall of the classes that
    have samples. Raises ValueError where the shapes or labels do not fit `classes`.
    """
    labels = labels.astype(np.int64)
    size = len(classes)
    if logits.ndim != 2 or logits.shape[1] != size or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not fit {size} classes")
    if len(labels) and (labels.min() < UNLABELLED or labels.max() >= size):
        raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, there are {size} classes")
    known = labels != UNLABELLED
    if not known.all():
        logits, labels = logits[known], labels[known]

    count = len(labels)
    places = np.empty(count, np.int64)
    predicted = np.empty(count, np.int64)
    confidence = np.empty(count)
    loss = 0.0
    for part in _blocks(count):
        logs = log_softmax(logits[part])
        places[part] = label_places(logits[part], labels[part])
        predicted[part] = logits[part].argmax(axis=1)
        confidence[part] = np.exp(logs.max(axis=1))
        loss -= float(np.take_along_axis(logs, labels[part, None], axis=1).sum())
    confusion = confusion_matrix(labels, predicted, size)
    rows = per_class_table(confusion, classes)
    recalls = [row.recall for row in rows if row.count]
    return Metrics(
        count=count,
        top1=_share(float((places < 1).sum()), count),
        top5=_share(float((places < 5).sum()), count),
        loss=_share(loss, count),
        mean_class=_share(float(np.sum(recalls)), len(recalls)),
        calibration_error=expected_calibration_error(confidence, places == 0),
        confusion=confusion,
        per_class=rows,
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis, in float64."""
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        values = values - values.max(axis=-1, keepdims=True)
        return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def top_classes(scores: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` likeliest classes of scores (V, K), best first, equal ones by number: (numbers, probabilities)."""
    probabilities = np.exp(log_softmax(scores))
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    return order, np.take_along_axis(probabilities, order, axis=1)


def label_places(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Place (N,) int64 of the label among the sorted logits (N, K), from 0; equal logits count in class order.

    A row with a NaN gets place K: it is right for no k.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1])[None, :] < labels[:, None]
    places = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return np.where(np.isnan(logits).any(axis=1), logits.shape[1], places)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, size: int) -> np.ndarray:
    """How often class i (row) was taken for class j (column): (K, K) int64."""
    cells = labels.astype(np.int64) * size + predicted.astype(np.int64)
    return np.bincount(cells, minlength=size * size).reshape(size, size).astype(np.int64)


def per_class_table(confusion: np.ndarray, classes: Sequence[str]) -> list[ClassRow]:
    """Recall, precision, F1 and the commonest mistake of every class, from a confusion matrix (K, K)."""
    rows = []
    for number, name in enumerate(classes):
        count, claimed = int(confusion[number].sum()), int(confusion[:, number].sum())
        correct = int(confusion[number, number])
        mistakes = confusion[number].copy()
        mistakes[number] = 0
        worst = int(mistakes.argmax())
        rows.append(
            ClassRow(
                name=name,
                count=count,
                correct=correct,
                recall=_share(correct, count),
                precision=_share(correct, claimed),
                f1=_share(2 * correct, count + claimed),
                mistaken_for=classes[worst] if mistakes[worst] else "",
                mistaken_count=int(mistakes[worst]),
            )
        )
    return rows


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> float:
    """Mean distance between confidence (N,) and accuracy over equal bins of confidence (Guo et al. 2017)."""
    confidence, correct = confidence.astype(np.float64), correct.astype(np.float64)
    good = np.isfinite(confidence)
    if not good.all():
        confidence, correct = confidence[good], correct[good]
    bin_of = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return _share(float(np.abs(gaps).sum()), len(confidence))


def bootstrap_interval(
    correct: np.ndarray | Sequence[bool],
    groups: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean of `correct` (N,), drawing whole sources with replacement.

    Clips of one source are right or wrong together, so an interval over single clips is too narrow. `groups` (N,) names
    each clip's source (None: every clip is its own). The same arguments always give the same interval. With fewer than
    two sources there is nothing to draw from: (NaN, NaN).
    """
    correct = np.asarray(correct, np.float64)
    if groups is None:
        right, size = correct, np.ones(len(correct))
    else:
        if len(groups) != len(correct):
            raise ValueError(f"{len(groups)} groups for {len(correct)} samples")
        _, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        right, size = np.bincount(member, weights=correct), np.bincount(member).astype(np.float64)
    if len(right) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for number in range(samples):
        drawn = rng.integers(0, len(right), len(right))
        means[number] = right[drawn].sum() / size[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _share(part: float, whole: float) -> float:
    return float(part) / whole if whole else float("nan")


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, min(start + _ROWS, count))
