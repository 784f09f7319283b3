"""From a features file to the selected probe: candidates, nested selection, the final fit, and the table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vac_ddp.errors import UserError
from vac_ddp.probing.attentive import ATTENTIVE, AttentiveGrid
from vac_ddp.probing.folds import outer_folds, standard_error
from vac_ddp.probing.head import Candidate, Grid, Head
from vac_ddp.probing.linear import LinearGrid
from vac_ddp.probing.neighbours import KNN, NEIGHBOURS, neighbour_logits
from vac_ddp.probing.nested import Outcome, joined, new_outcome, try_grid
from vac_ddp.probing.statistics import parse_statistics, time_statistics
from vac_ddp.results.features_file import Features
from vac_ddp.results.metrics import label_places, log_softmax
from vac_ddp.settings import ProbeSettings


@dataclass(kw_only=True)
class Row:
    """A line of the table: a probe with the hyper-parameters of the final choice, and figures of the outer folds.

    accuracy: the mean over videos and repeats; error: its standard error over groups; loss: cross entropy of the
    calibrated logits, NaN for k-NN; folds: accuracy of every outer fold, repeat by repeat; seconds: of all fits.
    """

    probe: str
    settings: str
    accuracy: float
    error: float
    loss: float
    folds: list[float]
    seconds: float


@dataclass(kw_only=True)
class Selected:
    """The selected probe, fitted on all its videos, and what the outer folds say of the whole selection.

    head: gives calibrated logits, divided by `temperature`. videos (V,): numbers in the features file; logits
    (V, K) float32: calibrated, of these videos in the first repeat, each by a selection that did not see its fold.
    nested: the selection among all probes; table: each probe by itself in the order of the settings, k-NN last;
    groups: how many the videos are of.
    """

    candidate: Candidate
    head: Head
    temperature: float
    videos: np.ndarray
    logits: np.ndarray
    nested: Row
    table: list[Row]
    groups: int


def select_probe(
    features: Features,
    settings: ProbeSettings,
    *,
    queries: int,
    seed: int,
    videos: np.ndarray | None = None,
    groups: Sequence[str] | None = None,
    device: torch.device | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Selected:
    """Select a probe for labelled features by nested cross-validation, and fit it on all their videos.

    queries: of attentive probes. videos: those of the file to use, by default all with a label that did not fail;
    groups: of every video of the file, by default as the file says. tick: called before every fit; what it raises
    ends the selection. UserError for settings that mean nothing, too few groups, and features without steps.
    """
    check_probes(settings)
    if videos is None:
        videos = np.flatnonzero((features.labels >= 0) & ~features.failed)
    given = features.groups if groups is None else groups
    own = [given[video] for video in videos.tolist()]
    labels = features.labels[videos]
    folds = outer_folds(own, labels, folds=settings.folds, repeats=settings.repeats, seed=seed)
    tried: dict[str, Outcome] = {}
    for grid in _grids(
        features, videos, settings, queries=queries, seed=seed, device=torch.device("cpu") if device is None else device
    ):
        outcome = tried.setdefault(grid.candidates[0].probe, new_outcome(folds, len(features.classes)))
        try_grid(outcome, grid, labels, tick)
    whole = joined(list(tried.values()))
    assert whole.grid is not None, "some candidate was tried"
    tick()
    head = whole.grid.fit(np.arange(len(videos)), whole.number)
    head.weight, head.bias = head.weight / whole.temperature, head.bias / whole.temperature
    return Selected(
        candidate=whole.grid.candidates[whole.number],
        head=head,
        temperature=whole.temperature,
        videos=videos,
        logits=whole.logits[0],
        nested=_row("selected", whole, labels, own),
        table=[
            *(_row(probe, outcome, labels, own) for probe, outcome in tried.items()),
            _reference(features, videos, folds, own),
        ],
        groups=len(set(own)),
    )


def _grids(
    features: Features, videos: np.ndarray, settings: ProbeSettings, *, queries: int, seed: int, device: torch.device
) -> Iterator[Grid]:
    """Candidates that share their work, in the order of the settings. UserError where there is none."""
    labels, classes = features.labels[videos], len(features.classes)
    combinations = [parse_statistics(text) for text in dict.fromkeys(settings.statistics)]
    linear = {"ridge": settings.ridge, "logistic": settings.logistic}
    wanted = list(dict.fromkeys(settings.probes))
    parts: dict[str, np.ndarray] = {}
    if set(wanted) & linear.keys():
        parts = time_statistics(features, videos, list({name: None for names in combinations for name in names}))
    for probe in wanted:
        if probe == ATTENTIVE:
            if features.steps is None:
                raise UserError(
                    f"{features.path} has no features of single time steps, which attentive probes take: write them by "
                    "`vac embed --steps`, or leave attentive out of probe.probes"
                )
            yield AttentiveGrid(
                features.steps, videos, labels, settings, classes=classes, queries=queries, seed=seed, device=device
            )
            continue
        for names in combinations:
            x = np.concatenate([parts[name] for name in names], axis=2)
            yield LinearGrid(probe, names, x, labels, classes=classes, penalties=linear[probe])


def check_probes(settings: ProbeSettings) -> None:
    """UserError for settings of which no probe follows."""
    linear = {"ridge": settings.ridge, "logistic": settings.logistic}
    needed: dict[str, Sequence[object]] = {"probes": settings.probes}
    for probe in settings.probes:
        if probe == ATTENTIVE:
            needed |= {"attentive_lr": settings.attentive_lr, "attentive_weight_decay": settings.attentive_weight_decay}
        else:
            needed |= {"statistics": settings.statistics, probe: linear[probe]}
    for name, values in needed.items():
        if not values:
            raise UserError(f"probe.{name} is empty: give at least one")
    for text in settings.statistics:
        parse_statistics(text)


def _row(probe: str, outcome: Outcome, labels: np.ndarray, groups: Sequence[str]) -> Row:
    assert outcome.grid is not None, "some candidate was tried"
    logs = np.take_along_axis(log_softmax(outcome.logits), labels[None, :, None], axis=2)
    row = _figures(probe, outcome.logits, outcome.folds, labels, groups)
    row.settings = str(outcome.grid.candidates[outcome.number])
    row.loss, row.seconds = -float(logs.mean()), outcome.seconds
    return row


def _reference(features: Features, videos: np.ndarray, folds: list[np.ndarray], groups: Sequence[str]) -> Row:
    """The line of k nearest neighbours on the mean over time and views."""
    start = time.perf_counter()
    x = np.asarray(features.pooled[videos], np.float32).mean(axis=1)
    labels, classes = features.labels[videos], len(features.classes)
    logits = np.zeros((len(folds), len(videos), classes))
    for repeat, fold in enumerate(folds):
        for outer in range(int(fold.max()) + 1):
            train, test = np.flatnonzero(fold != outer), np.flatnonzero(fold == outer)
            logits[repeat, test] = neighbour_logits(x, labels, train, test, classes)
    row = _figures(KNN, logits, folds, labels, groups)
    row.settings, row.seconds = f"mean k={NEIGHBOURS}, a reference", time.perf_counter() - start
    return row


def _figures(probe: str, logits: np.ndarray, folds: list[np.ndarray], labels: np.ndarray, groups: Sequence[str]) -> Row:
    """Accuracies of logits (R, V, K), each by a fit that did not see the video's fold."""
    correct = np.stack([label_places(part, labels) == 0 for part in logits])
    mean = correct.mean(axis=0)
    return Row(
        probe=probe,
        settings="",
        accuracy=float(mean.mean()),
        error=standard_error(mean, groups),
        loss=float("nan"),
        folds=[
            float(right[fold == outer].mean())
            for right, fold in zip(correct, folds, strict=True)
            for outer in range(int(fold.max()) + 1)
        ],
        seconds=0.0,
    )


def table_lines(selected: Selected) -> list[str]:
    """The table for people: a head, a line a probe, and the nested selection."""
    rows = [*selected.table, selected.nested]
    width = max(len(row.settings) for row in rows)
    lines = [f"{'probe':<10} {'hyper-parameters':<{width}}  {'accuracy':>8}   SE      {'loss':>6}  {'seconds':>7}"]
    for row in rows:
        loss = "" if math.isnan(row.loss) else f"{abs(row.loss):.4f}"
        lines.append(
            f"{row.probe:<10} {row.settings:<{width}}  {row.accuracy:>8.4f} ± {row.error:.4f}  {loss:>6}  "
            f"{row.seconds:>7.1f}"
        )
    return lines
