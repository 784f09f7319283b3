"""Where a run is: position, sums since the last line, the figures of a validation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vac_ddp.training import health


@dataclass(kw_only=True)
class Position:
    """Where a run is. Steps count optimizer steps that were attempted, from 0."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    schedule_step: int = 0
    validation_due: bool = False
    stopped_early: bool = False


@dataclass(kw_only=True)
class Tally:
    """Sums over samples since the last line, or since the epoch began. Saved, so that a resumed run prints the same."""

    loss: float = 0.0
    correct: float = 0.0
    samples: int = 0

    def add(self, summary: health.Summary) -> None:
        """Take in the finite samples of some steps."""
        self.loss += summary.loss * summary.finite
        self.correct += summary.accuracy * summary.finite
        self.samples += summary.finite

    def means(self, prefix: str = "") -> dict[str, float]:
        """Loss and accuracy a sample; nothing where there was none."""
        if not self.samples:
            return {}
        return {f"{prefix}loss": self.loss / self.samples, f"{prefix}accuracy": self.correct / self.samples}


@dataclass(kw_only=True)
class Validation:
    """Figures of the validation part, the same on every rank; its logits (V, K) float32 on rank 0 only."""

    top1: float
    loss: float
    figures: dict[str, float]
    logits: np.ndarray | None = None
