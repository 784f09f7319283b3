"""Nested cross-validation of the candidates of one probe on grouped folds.

In each repeat the videos are in K outer folds. Every candidate is fitted without fold i, and without folds i and j for
all pairs: the other K - 1 folds are the inner folds of fold i, and a fit without i and j serves both. For fold i that
candidate is chosen whose logits of the other folds, each from a fit without it and i, have the least cross entropy at
their best temperature; its fit without i then answers for fold i, which took no part in the choice.
The final choice, with the same rule, is by the fits without one fold, over all repeats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vac_ddp.probing.head import Grid
from vac_ddp.results.averaging import fit_temperature, mean_loss

_ROWS = 4096  # videos that a temperature is fitted on, spread over all


@dataclass(kw_only=True)
class Outcome:
    """What nested cross-validation says of some candidates; R repeats, K folds, V videos.

    inner (R, K): least loss of a candidate on the inner folds of each outer fold; logits (R, V, classes): calibrated,
    of each outer fold by that candidate. grid, number: the candidate of the final choice; loss, temperature: the mean
    over repeats of its loss on outer folds, and the geometric mean of its temperatures. seconds: of all fits.
    """

    folds: list[np.ndarray]
    inner: np.ndarray
    logits: np.ndarray
    grid: Grid | None = None
    number: int = 0
    loss: float = math.inf
    temperature: float = 1.0
    seconds: float = 0.0


def new_outcome(folds: list[np.ndarray], classes: int) -> Outcome:
    """An outcome before any candidate was tried. folds: the fold (V,) of each video, in each repeat."""
    count, shape = int(folds[0].max()) + 1, (len(folds), len(folds[0]), classes)
    return Outcome(folds=folds, inner=np.full((len(folds), count), math.inf), logits=np.zeros(shape, np.float32))


def try_grid(outcome: Outcome, grid: Grid, labels: np.ndarray, tick: Callable[[], None]) -> None:
    """Try the candidates of a grid on videos with labels (V,); `outcome` keeps what is better than before.

    tick: called before every fit.
    """
    start = time.perf_counter()
    every, tried = np.arange(len(labels)), len(grid.candidates)
    losses, log_temperatures = np.zeros(tried), np.zeros(tried)
    for repeat, fold in enumerate(outcome.folds):
        held = _held_out(grid, fold, outcome.logits.shape[2], tick)
        for number in range(tried):
            for outer in range(outcome.inner.shape[1]):
                inside = fold != outer
                loss, temperature = calibrate(held[number, outer, inside], labels[inside])
                if loss < outcome.inner[repeat, outer]:
                    outcome.inner[repeat, outer] = loss
                    outcome.logits[repeat, ~inside] = held[number, outer, ~inside] / temperature
            loss, temperature = calibrate(held[number, fold, every], labels)
            losses[number] += loss / len(outcome.folds)
            log_temperatures[number] += math.log(temperature) / len(outcome.folds)
    best = int(losses.argmin())
    if losses[best] < outcome.loss:
        outcome.grid, outcome.number, outcome.loss = grid, best, float(losses[best])
        outcome.temperature = math.exp(log_temperatures[best])
    outcome.seconds += time.perf_counter() - start


def _held_out(grid: Grid, fold: np.ndarray, classes: int, tick: Callable[[], None]) -> np.ndarray:
    """Logits (C, K, V, classes): at [c, i, v] of video v by candidate c, fitted without fold i and the fold of v."""
    folds = int(fold.max()) + 1
    held = np.empty((len(grid.candidates), folds, len(fold), classes), np.float32)
    for i in range(folds):
        for j in range(i, folds):
            tick()
            test = np.flatnonzero((fold == i) | (fold == j))
            logits = grid.held_out(np.flatnonzero((fold != i) & (fold != j)), test)
            held[:, i, test[fold[test] == j]] = logits[:, fold[test] == j]
            held[:, j, test[fold[test] == i]] = logits[:, fold[test] == i]
    return held


def calibrate(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(cross entropy in nats, temperature) of logits (v, K) at the temperature where it is least."""
    some = np.linspace(0, len(labels) - 1, min(_ROWS, len(labels))).astype(np.int64)
    # fit_temperature looks between 0.01 and 100; the outputs of a ridge regression are small numbers.
    unit = float(logits.std()) or 1.0
    temperature = unit * fit_temperature(logits[some, None] / unit, labels[some])
    return mean_loss(logits / temperature, labels), temperature


def joined(outcomes: list[Outcome]) -> Outcome:
    """The nested selection among several outcomes on the same folds: the best inner loss answers for an outer fold."""
    whole = new_outcome(outcomes[0].folds, outcomes[0].logits.shape[2])
    for outcome in outcomes:
        for repeat, fold in enumerate(whole.folds):
            better = outcome.inner[repeat] < whole.inner[repeat]
            whole.inner[repeat, better] = outcome.inner[repeat, better]
            whole.logits[repeat, better[fold]] = outcome.logits[repeat, better[fold]]
        whole.seconds += outcome.seconds
    best = min(outcomes, key=lambda outcome: outcome.loss)
    whole.grid, whole.number, whole.loss, whole.temperature = best.grid, best.number, best.loss, best.temperature
    return whole
