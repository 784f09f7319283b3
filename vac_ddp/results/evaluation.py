"""What labelled videos say about a model: figures, tables, an interval over sources, as lines and as files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vac_ddp.files import write_json, write_text
from vac_ddp.results.metrics import Metrics, bootstrap_interval, classification_metrics
from vac_ddp.results.submission import quoted


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of the labelled videos, and the 95 % interval of top-1 over `sources` sources (NaN with fewer than 2)."""

    metrics: Metrics
    interval: tuple[float, float]
    sources: int
    unlabelled: int


def evaluate(
    scores: np.ndarray, labels: np.ndarray, classes: Sequence[str], sources: Sequence[str] | None = None
) -> Evaluation:
    """Evaluate scores (V, K) against labels (V,), -1 for unknown.

    A video without a source (empty text), or all of them without `sources`, is a source of its own.
    """
    known = np.flatnonzero(labels >= 0)
    given = list(sources) if sources is not None else [""] * len(labels)
    groups = [f"source {given[i]}" if given[i] else f"video {i}" for i in known.tolist()]
    correct = scores[known].argmax(axis=1) == labels[known]
    return Evaluation(
        metrics=classification_metrics(scores, labels, classes),
        interval=bootstrap_interval(correct, groups),
        sources=len(set(groups)),
        unlabelled=len(labels) - len(known),
    )


def lines(found: Evaluation, *, worst: int = 5) -> list[str]:
    """The evaluation for people, a line each."""
    m = found.metrics
    low, high = found.interval
    shown = [
        f"{m.count} videos of {sum(row.count > 0 for row in m.per_class)} classes from {found.sources} sources"
        + (f"; {found.unlabelled} without a label" if found.unlabelled else ""),
        f"top-1        {m.top1:.4f}"
        + ("" if math.isnan(low) else f"   95 % of bootstraps over sources: {low:.4f} to {high:.4f}"),
        f"top-5        {m.top5:.4f}",
        f"mean class   {m.mean_class:.4f}",
        f"loss         {m.loss:.4f}",
        f"calibration  {m.calibration_error:.4f}   expected distance of confidence and accuracy",
    ]
    rows = sorted((r for r in m.per_class if r.count > r.correct), key=lambda r: (r.recall, -r.count))[:worst]
    if rows:
        width = max(len(row.name) for row in rows)
        shown.append("hardest classes")
        shown += [
            f"  {row.name:<{width}}  {row.correct:>4} of {row.count:<4} {row.recall:.2f}"
            f"   {row.mistaken_count} taken for {row.mistaken_for}"
            for row in rows
        ]
    return shown


def write_evaluation(out: str | Path, found: Evaluation) -> None:
    """Write metrics.json, per_class.csv and confusion.csv (rows: the true class) into `out`."""
    out, m = Path(out), found.metrics
    low, high = (None if math.isnan(value) else value for value in found.interval)
    figures = {name: None if math.isnan(value) else value for name, value in m.figures().items()}
    write_json(
        out / "metrics.json",
        {
            **figures,
            "videos": m.count,
            "unlabelled": found.unlabelled,
            "sources": found.sources,
            "top1_low": low,
            "top1_high": high,
        },
    )
    table = [["class", "videos", "correct", "recall", "precision", "f1", "mistaken_for", "times"]]
    table += [
        [
            quoted(row.name),
            str(row.count),
            str(row.correct),
            *(_share(value) for value in (row.recall, row.precision, row.f1)),
            quoted(row.mistaken_for) if row.mistaken_for else "",
            str(row.mistaken_count),
        ]
        for row in m.per_class
    ]
    write_text(out / "per_class.csv", _csv(table))
    names = [quoted(row.name) for row in m.per_class]
    matrix = [["true/predicted", *names]]
    matrix += [[name, *map(str, counts)] for name, counts in zip(names, m.confusion.tolist(), strict=True)]
    write_text(out / "confusion.csv", _csv(matrix))


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def _csv(table: list[list[str]]) -> str:
    return "".join(",".join(row) + "\n" for row in table)
