"""Linear probes: ridge and logistic regression on standardized statistics, reduced to the span of the training rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vac_ddp.probing.head import Candidate, Head

_RANK = 1e-12  # eigenvalues below this fraction of the largest are rounding errors
_TOLERANCE, _ITERATIONS = 1e-6, 1000


@dataclass(kw_only=True)
class Reduced:
    """Standardized rows in an orthonormal basis of their span: X = rows @ basis.T exactly, rows.T @ rows diagonal.

    A linear model with an L2 penalty has its weights in that span, so it is fitted on min(N, P) numbers a row.
    mean, scale (P,): of the standardization; basis (P, r); rows (N, r).
    """

    mean: np.ndarray
    scale: np.ndarray
    basis: np.ndarray
    rows: np.ndarray

    def map(self, x: np.ndarray) -> np.ndarray:
        """Other rows (M, P) in the same basis: (M, r)."""
        return ((x - self.mean) / self.scale) @ self.basis


def reduce(x: np.ndarray) -> Reduced:
    """Standardize training rows (N, P) and reduce them to the r <= min(N, P) dimensions of their span, in float64."""
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1.0
    x = (x - mean) / scale
    wide = x.shape[1] > x.shape[0]
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = values > _RANK * values.max(initial=0.0)
    basis = x.T @ (vectors[:, kept] / np.sqrt(values[kept])) if wide else vectors[:, kept]
    return Reduced(mean=mean, scale=scale, basis=basis, rows=x @ basis)


def ridge(rows: np.ndarray, labels: np.ndarray, classes: int, penalties: list[float]) -> list[np.ndarray]:
    """Ridge regression of one-hot labels for each penalty: (r + 1, K) float64 each, the intercept last.

    rows (N, r): of `Reduced`, centred and with a diagonal rows.T @ rows, so that all penalties have a closed form.
    """
    targets = np.eye(classes)[labels]
    intercept = targets.mean(axis=0)
    products, squares = rows.T @ (targets - intercept), (rows**2).sum(axis=0)
    return [np.vstack([products / (squares + penalty)[:, None], intercept]) for penalty in penalties]


def logistic(rows: np.ndarray, labels: np.ndarray, classes: int, inverse_penalties: list[float]) -> list[np.ndarray]:
    """scikit-learn's multinomial logistic regression for each C: (r + 1, K) float64 each, the intercept last.

    A class without a video has weights 0 and the bias of half a video among the others.
    """
    from sklearn.linear_model import LogisticRegression

    seen = np.unique(labels)
    bias = np.full(classes, np.log(0.5 / len(labels)))
    found: dict[float, np.ndarray] = {}
    model = LogisticRegression(solver="newton-cg", tol=_TOLERANCE, max_iter=_ITERATIONS, warm_start=True)
    for c in sorted(set(inverse_penalties)):  # from the strongest penalty: each starts from the one before
        whole = np.vstack([np.zeros((rows.shape[1], classes)), bias])
        if len(seen) > 1:
            model.C = c
            model.fit(rows, labels)
            weights = np.vstack([model.coef_.T, model.intercept_])
            # Of two classes scikit-learn gives the difference of their logits.
            whole[:, seen] = weights if weights.shape[1] > 1 else weights * [-0.5, 0.5]
            whole[-1, seen] -= np.log(np.exp(whole[-1, seen]).sum())
        else:
            whole[-1, seen] = 0.0
        found[c] = whole
    return [found[c] for c in inverse_penalties]


class LinearGrid:
    """Ridge or logistic regression on some statistics, for several penalties."""

    def __init__(
        self,
        probe: str,
        statistics: list[str],
        x: np.ndarray,
        labels: np.ndarray,
        *,
        classes: int,
        penalties: list[float],
    ) -> None:
        """Take ridge or logistic (`probe`); x: statistics (V, n, P) of n views a video, each a row; labels (V,)."""
        self.solve = ridge if probe == "ridge" else logistic
        self.statistics, self.x, self.labels, self.classes, self.penalties = statistics, x, labels, classes, penalties
        name = "penalty" if probe == "ridge" else "C"
        self.candidates = [
            Candidate(probe=probe, statistics=tuple(statistics), settings=((name, value),)) for value in penalties
        ]

    def held_out(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Logits (C, v, K) float32 of the videos `test` (v,), the mean over their views."""
        reduced, found = self._fit(train, self.penalties)
        rows = reduced.map(self.x[test].mean(axis=1, dtype=np.float64))
        return np.stack([rows @ weights[:-1] + weights[-1] for weights in found]).astype(np.float32)

    def fit(self, train: np.ndarray, number: int) -> Head:
        """Fit candidate `number` on the videos `train`."""
        reduced, [weights] = self._fit(train, [self.penalties[number]])
        weight = ((reduced.basis @ weights[:-1]) / reduced.scale[:, None]).T
        return Head(weight=weight, bias=weights[-1] - weight @ reduced.mean, statistics=self.statistics)

    def _fit(self, train: np.ndarray, penalties: list[float]) -> tuple[Reduced, list[np.ndarray]]:
        views = self.x.shape[1]
        reduced = reduce(self.x[train].reshape(len(train) * views, -1))
        return reduced, self.solve(reduced.rows, self.labels[train].repeat(views), self.classes, penalties)
