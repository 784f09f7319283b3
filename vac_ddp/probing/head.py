"""What a probe is: its hyper-parameters, and the pooling and classifier that were fitted with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A probe with its hyper-parameters. statistics: of a linear probe; settings: by name, for people."""

    probe: str
    statistics: tuple[str, ...] = ()
    settings: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return " ".join(["+".join(self.statistics), *(f"{name}={value:g}" for name, value in self.settings)]).strip()


@dataclass(kw_only=True)
class Head:
    """A fitted probe on features as they are: the standardization is part of its numbers.

    weight (K, P) and bias (K,) float64 classify the P pooled features: the `statistics` of D features one after
    the other, or, for attentive pooling, the sums of H queries (see `models.pooling.AttentivePool`), whose query (H, D)
    and position (H, T') are given then.
    """

    weight: np.ndarray
    bias: np.ndarray
    statistics: list[Any] = field(default_factory=list)
    query: np.ndarray | None = None
    position: np.ndarray | None = None


class Grid(Protocol):
    """Candidates that share their work. Videos are numbers from 0 to V - 1."""

    candidates: list[Candidate]

    def held_out(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Logits (C, v, K) float32 of the videos `test` (v,), by each candidate fitted on the videos `train`."""

    def fit(self, train: np.ndarray, number: int) -> Head:
        """Fit candidate `number` on the videos `train`."""
