"""The learning rate of a step: a pure function of its number, nothing to save and nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vac_ddp.errors import UserError
from vac_ddp.settings import Config, OptimSettings

RECIPE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of a run in optimizer steps, and the learning rate of each."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak: float
    minimum: float
    warmup_start: float

    @property
    def epochs(self) -> int:
        """Epochs that begin; the last may be cut short."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def lr(self, step: int) -> float:
        """The learning rate of step `step` (from 0), before a group's `lr_scale`."""
        return learning_rate(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            peak=self.peak,
            minimum=self.minimum,
            warmup_start=self.warmup_start,
        )


def make_schedule(config: Config, steps_per_epoch: int, *, total_steps: int | None = None) -> Schedule:
    """The schedule of the settings: train.epochs, or train.max_steps where that is less, or `total_steps`."""
    total = steps_per_epoch * config.train.epochs
    if config.train.max_steps is not None:
        total = min(total, config.train.max_steps)
    if total_steps is not None:
        total = total_steps
    peak, minimum, warmup_start = resolve_lr(config.optim, config.train.global_batch, config.augment.repeats)
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=count_warmup_steps(config.optim.warmup_epochs, epochs=config.train.epochs, total_steps=total),
        peak=peak,
        minimum=minimum,
        warmup_start=warmup_start,
    )


def learning_rate(
    step: int, *, total_steps: int, warmup_steps: int, peak: float, minimum: float, warmup_start: float
) -> float:
    """The learning rate of optimizer step `step` (from 0), before a group's `lr_scale`.

    Linear from `warmup_start` at step 0 to `peak` at step `warmup_steps - 1`, then half a cosine from `peak` at
    step `warmup_steps` towards `minimum`, which step `total_steps` would reach. The same numbers as
    `cosine_scheduler` in the official VideoMAE code (utils.py), which tabulates them. Later steps get `minimum`.
    """
    if step < 0:
        raise ValueError(f"step {step}: steps count from 0")
    warmup_steps = min(warmup_steps, total_steps)
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / max(1, warmup_steps - 1)
    if step >= total_steps:
        return minimum
    share = (step - warmup_steps) / (total_steps - warmup_steps)
    return minimum + 0.5 * (peak - minimum) * (1.0 + math.cos(math.pi * share))


def count_warmup_steps(warmup_epochs: float, *, epochs: int, total_steps: int) -> int:
    """How many of `total_steps` are warm-up, where `epochs` epochs would have been the whole.

    A run cut short by train.max_steps warms up for the same share of its length. At most `total_steps`: with
    warmup_epochs >= epochs the rate rises to the end.
    """
    if epochs < 1:
        raise UserError(f"train.epochs={epochs}: at least 1")
    return min(total_steps, round(total_steps * warmup_epochs / epochs))


def resolve_lr(settings: OptimSettings, global_batch: int, repeats: int) -> tuple[float, float, float]:
    """(peak, minimum, warm-up start) as used, from optim.lr or optim.base_lr.

    base_lr is the recipe's rate per 256 clips of the global batch, the repeated-augmentation factor not counted:
    everything is multiplied by global_batch / repeats / 256 (official VideoMAE code: lr, min_lr and warmup_lr scale
    alike). lr is taken as it is, min_lr and warmup_lr with it. Exactly one of them is given, else UserError.
    """
    if (settings.lr is None) == (settings.base_lr is None):
        given = "neither is" if settings.lr is None else "both are"
        raise UserError(
            f"optim.lr is the peak as used, optim.base_lr the recipe's per {RECIPE_BATCH} clips: {given} given; "
            "give exactly one (the other one null)"
        )
    for name in ("lr", "base_lr", "min_lr", "warmup_lr"):
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"optim.{name}={value}: a finite number, 0 or more")
    if settings.lr is not None:
        return settings.lr, settings.min_lr, settings.warmup_lr
    assert settings.base_lr is not None
    scale = global_batch / repeats / RECIPE_BATCH
    return settings.base_lr * scale, settings.min_lr * scale, settings.warmup_lr * scale
