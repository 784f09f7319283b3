"""Figures against sklearn-free references: loops written out, torch's own loss, cases counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vac_ddp.results import metrics
from vac_ddp.results.metrics import bootstrap_interval, classification_metrics

CLASSES = [f"class_{i}" for i in range(7)]


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 6, 400)  # class_6 has no sample
    logits = rng.normal(size=(400, 7)).astype(np.float32)
    logits[np.arange(400), labels] += 1.0
    return logits, labels


def test_figures_equal_plain_loops(sample: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = sample
    found = classification_metrics(logits, labels, CLASSES)
    order = np.argsort(-logits, axis=1)
    assert found.count == 400
    assert found.top1 == sum(order[i, 0] == labels[i] for i in range(400)) / 400
    assert found.top5 == sum(labels[i] in order[i, :5] for i in range(400)) / 400
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(labels))
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    recalls = [np.mean(order[labels == k, 0] == k) for k in range(6)]
    assert found.mean_class == pytest.approx(np.mean(recalls), rel=1e-12)
    confusion = np.zeros((7, 7), np.int64)
    for i in range(400):
        confusion[labels[i], order[i, 0]] += 1
    assert found.confusion.dtype == np.int64
    assert (found.confusion == confusion).all()


def test_calibration_error_equals_the_definition(sample: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = sample
    probabilities = torch.softmax(torch.tensor(logits).double(), 1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert classification_metrics(logits, labels, CLASSES).calibration_error == pytest.approx(expected, rel=1e-9)


def test_blocks_do_not_change_the_result(
    sample: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = classification_metrics(*sample, CLASSES)
    monkeypatch.setattr(metrics, "_ROWS", 37)
    parts = classification_metrics(*sample, CLASSES)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    assert (parts.top1, parts.top5, parts.calibration_error) == (whole.top1, whole.top5, whole.calibration_error)


def test_per_class_table_by_hand() -> None:
    confusion = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]])
    a, b, c = metrics.per_class_table(confusion, ["a", "b", "c"])
    assert (a.count, a.correct, a.recall, a.precision, a.mistaken_for, a.mistaken_count) == (4, 3, 0.75, 1.0, "b", 1)
    assert (b.recall, b.precision, b.mistaken_for) == (0.5, 2 / 3, "c")
    assert b.f1 == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert (c.count, c.precision, c.mistaken_for) == (0, 0.0, "")
    assert math.isnan(c.recall)


def test_unlabelled_rows_are_left_out(sample: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = sample
    hidden = labels.copy()
    hidden[100:] = -1
    assert classification_metrics(logits, hidden, CLASSES).figures() == (
        classification_metrics(logits[:100], labels[:100], CLASSES).figures()
    )


def test_equal_logits_and_nan_rows_are_no_gift() -> None:
    labels = np.array([0, 1, 6])
    level = classification_metrics(np.zeros((3, 7), np.float32), labels, CLASSES)
    assert level.top1 == pytest.approx(1 / 3)  # only class 0 comes first among equals
    assert level.top5 == pytest.approx(2 / 3)
    broken = classification_metrics(np.full((3, 7), np.nan, np.float32), labels, CLASSES)
    assert (broken.top1, broken.top5) == (0.0, 0.0)
    assert math.isnan(broken.loss)


def test_fewer_than_five_classes_and_no_samples() -> None:
    assert classification_metrics(np.eye(2, dtype=np.float32), np.array([1, 0]), ["a", "b"]).top5 == 1.0
    empty = classification_metrics(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), ["a", "b"])
    assert empty.count == 0
    assert math.isnan(empty.top1)


@pytest.mark.parametrize("labels", [[0, 7], [0, -2], [0]])
def test_labels_that_do_not_fit(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="class"):
        classification_metrics(np.zeros((2, 7), np.float32), np.array(labels), CLASSES)


def test_bootstrap_over_clips_is_near_the_binomial_interval() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(2000) < 0.7
    low, high = bootstrap_interval(correct)
    half = 1.96 * math.sqrt(correct.mean() * (1 - correct.mean()) / 2000)
    assert low == pytest.approx(correct.mean() - half, abs=0.003)
    assert high == pytest.approx(correct.mean() + half, abs=0.003)
    assert bootstrap_interval(correct) == (low, high)


def test_bootstrap_over_sources_is_wider() -> None:
    """100 sources of 20 clips that stand or fall together hold what 100 clips hold: sqrt(20) times wider."""
    rng = np.random.default_rng(1)
    source = rng.random(100) < 0.7
    correct, groups = np.repeat(source, 20), [f"s{i // 20}" for i in range(2000)]
    low, high = bootstrap_interval(correct, groups)
    alone = bootstrap_interval(correct)
    assert (high - low) / (alone[1] - alone[0]) == pytest.approx(math.sqrt(20), rel=0.15)
    assert math.isnan(bootstrap_interval([True, False], ["one", "one"])[0])
