from __future__ import annotations

import math

import numpy as np
import pytest

from vac_ddp.errors import UserError
from vac_ddp.settings import OptimSettings
from vac_ddp.training.lr_schedule import count_warmup_steps, learning_rate, resolve_lr


def official(base: float, final: float, epochs: int, per_epoch: int, warmup_epochs: int, start: float) -> np.ndarray:
    """The official VideoMAE schedule, transcribed as a table filled by loops."""
    warmup = warmup_epochs * per_epoch
    rates = list(np.linspace(start, base, warmup)) if warmup else []
    rest = epochs * per_epoch - warmup
    for i in range(rest):
        rates.append(final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)))
    return np.array(rates)


@pytest.mark.parametrize(("epochs", "per_epoch", "warmup_epochs"), [(20, 7, 5), (3, 1, 1), (4, 5, 0), (2, 3, 2)])
@pytest.mark.parametrize("start", [0.0, 1e-5])
def test_equals_the_official_table(epochs, per_epoch, warmup_epochs, start):
    expected = official(5e-4, 1e-6, epochs, per_epoch, warmup_epochs, start)
    total = epochs * per_epoch
    got = [
        learning_rate(
            step,
            total_steps=total,
            warmup_steps=warmup_epochs * per_epoch,
            peak=5e-4,
            minimum=1e-6,
            warmup_start=start,
        )
        for step in range(total)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-18)


def test_ends_of_the_schedule():
    lr = lambda step, warmup=10: learning_rate(  # noqa: E731
        step, total_steps=100, warmup_steps=warmup, peak=1.0, minimum=0.1, warmup_start=0.0
    )
    assert lr(0) == 0.0
    assert lr(9) == lr(10) == 1.0
    assert lr(55) == pytest.approx(0.55)
    assert 0.1 < lr(99) < 0.101
    assert lr(100) == lr(1000) == 0.1
    assert lr(99, warmup=500) == 1.0
    with pytest.raises(ValueError, match="from 0"):
        lr(-1)


def test_warmup_keeps_its_share_of_a_shorter_run():
    assert count_warmup_steps(5, epochs=20, total_steps=20 * 7) == 35
    assert count_warmup_steps(5, epochs=20, total_steps=16) == 4
    assert count_warmup_steps(5, epochs=2, total_steps=8) == 8
    assert count_warmup_steps(0, epochs=2, total_steps=8) == 0
    with pytest.raises(UserError, match=r"train\.epochs=0"):
        count_warmup_steps(5, epochs=0, total_steps=8)


def test_lr_as_used_and_per_256_clips():
    plain = OptimSettings(lr=2e-5, base_lr=None, min_lr=1e-6, warmup_lr=1e-7)
    assert resolve_lr(plain, 64, 2) == (2e-5, 1e-6, 1e-7)
    recipe = OptimSettings(base_lr=5e-4, min_lr=1e-6, warmup_lr=1e-8)
    # 8 GPUs x 8 videos in the official code; its repeats make 128 clips of them and leave the rate alone
    assert resolve_lr(recipe, 128, 2) == pytest.approx((5e-4 * 64 / 256, 1e-6 * 64 / 256, 1e-8 * 64 / 256))
    assert resolve_lr(recipe, 256, 1) == (5e-4, 1e-6, 1e-8)


@pytest.mark.parametrize("given", [{"lr": None, "base_lr": None}, {"lr": 1e-3, "base_lr": 1e-3}])
def test_exactly_one_rate_is_given(given):
    with pytest.raises(UserError, match=r"optim\.lr.*optim\.base_lr"):
        resolve_lr(OptimSettings(**given), 64, 1)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"lr": math.nan}, {"base_lr": math.inf}, {"lr": 1.0, "min_lr": -1.0}])
def test_rates_are_finite_and_positive(bad):
    with pytest.raises(UserError, match="finite"):
        resolve_lr(OptimSettings(**({"base_lr": None} | bad)), 64, 1)
