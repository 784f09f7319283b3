"""k nearest neighbours by cosine similarity: a reference for probes, without anything to train."""

from __future__ import annotations

import numpy as np

KNN = "k-NN"
NEIGHBOURS = 5


def neighbour_logits(
    x: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, classes: int
) -> np.ndarray:
    """Logarithm of each class's fraction of the nearest training videos (v, K), a vote of none counting as a tenth.

    x (V, P): features of the videos; standardized here by those of `train`. The similarities decide among equal votes.
    """
    from sklearn.neighbors import NearestNeighbors

    mean, scale = x[train].mean(axis=0), x[train].std(axis=0)
    x = (x - mean) / np.where(scale > 0, scale, 1)
    count = min(NEIGHBOURS, len(train))
    distance, place = NearestNeighbors(n_neighbors=count, metric="cosine").fit(x[train]).kneighbors(x[test])
    votes = np.zeros((len(test), classes))
    rows = np.arange(len(test)).repeat(count)
    # 1 - distance / 1000: a vote counts one, the nearer of equals a little more.
    np.add.at(votes, (rows, labels[train][place].ravel()), 1 - distance.ravel() / 1000)
    return np.log(np.maximum(votes, 0.1) / count)
