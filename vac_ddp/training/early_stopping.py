"""Which epoch is the best, and when to end: decided on rank 0 alone, then told to all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class Stopping:
    """The best validation accuracy so far, and how many validations ago that was."""

    patience: int | None
    best: float | None = None
    best_epoch: int | None = None
    since_best: int = 0

    def update(self, accuracy: float, epoch: int) -> tuple[bool, bool]:
        """Take in a validation; returns (is it the best, should training end). NaN is never the best."""
        if not math.isnan(accuracy) and (self.best is None or accuracy > self.best):
            self.best, self.best_epoch, self.since_best = accuracy, epoch, 0
            return True, False
        self.since_best += 1
        return False, self.patience is not None and self.since_best >= self.patience

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the patience stays as it is set now."""
        self.best, self.best_epoch, self.since_best = state["best"], state["best_epoch"], state["since_best"]
