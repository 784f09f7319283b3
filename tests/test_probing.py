"""Probes on features: statistics, linear and attentive probes against scikit-learn and torch, nested selection."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vac_ddp.data.holdout import grouped_folds
from vac_ddp.errors import UserError
from vac_ddp.models.pooling import AttentivePool, StatisticsPool
from vac_ddp.probing.attentive import AttentiveGrid
from vac_ddp.probing.folds import outer_folds, standard_error
from vac_ddp.probing.head import Head
from vac_ddp.probing.linear import LinearGrid
from vac_ddp.probing.nested import joined, new_outcome, try_grid
from vac_ddp.probing.selection import select_probe, table_lines
from vac_ddp.probing.statistics import time_statistics
from vac_ddp.results.features_file import Features
from vac_ddp.settings import ProbeSettings

CPU = torch.device("cpu")


def features_of(steps: np.ndarray, labels: np.ndarray, groups: list[str]) -> Features:
    """A features file in memory; steps (V, n, T, D)."""
    count = len(labels)
    return Features(
        ids=[f"video {i}" for i in range(count)],
        labels=labels,
        groups=groups,
        damaged=np.zeros(count, np.int64),
        failed=np.zeros(count, bool),
        views=np.zeros((steps.shape[1], 3), np.int64),
        classes=[f"class {i}" for i in range(int(labels.max()) + 1)],
        steps=steps,
        pooled=steps.mean(axis=2),
    )


def sample(videos: int, classes: int = 3, *, views: int = 1, steps: int = 4, width: int = 10, shift: float = 1.0):
    """Features (V, n, T, D) float32 whose means say something of the class, labels, and groups of two videos."""
    rng = np.random.default_rng(5)
    labels = np.arange(videos) % classes
    centres = rng.normal(size=(classes, width)) * shift
    x = rng.normal(size=(videos, views, steps, width)) * rng.uniform(0.1, 5, width) + centres[labels][:, None, None]
    return x.astype(np.float32), labels, [f"group {i // (2 * classes)}" for i in range(videos)]


def head_logits(head: Head, steps: np.ndarray) -> np.ndarray:
    """Logits (V, K) of a head for features (V, T, D), by the pooling modules of the models."""
    x = torch.from_numpy(steps).double()
    if head.query is None:
        pooled = StatisticsPool(x.shape[2], head.statistics)(x).double()
    else:
        pool = AttentivePool(x.shape[2], x.shape[1], len(head.query))
        with torch.no_grad():
            pool.query.copy_(torch.from_numpy(head.query))
            pool.bias.copy_(torch.from_numpy(head.position if head.position is not None else 0 * pool.bias.numpy()))
            pooled = pool(x).double()
    return (pooled @ torch.from_numpy(head.weight).T + torch.from_numpy(head.bias)).numpy()


@pytest.mark.parametrize("steps", [1, 5])
def test_statistics_are_those_of_the_pooling_in_models(steps):
    x, labels, groups = sample(7, views=2, steps=steps)
    names = ["std", "difference", "mean"]
    found = time_statistics(features_of(x, labels, groups), np.array([4, 0, 6]), names)
    expected = StatisticsPool(x.shape[3], names)(torch.from_numpy(x[[4, 0, 6]]).flatten(0, 1)).unflatten(0, (3, 2))
    ours = np.concatenate([found[name] for name in names], axis=2)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [6, 200])  # fewer features than videos, and more
def test_linear_probes_are_those_of_scikit_learn(width):
    x, labels, _ = sample(60, width=width)
    x = x.mean(axis=2)
    train, test = np.arange(0, 60, 2), np.arange(1, 60, 2)
    rows = x[:, 0].astype(np.float64)
    ridge = LinearGrid("ridge", ["mean"], x, labels, classes=3, penalties=[3.0, 300.0])
    logistic = LinearGrid("logistic", ["mean"], x, labels, classes=3, penalties=[0.1, 0.001])
    references = {
        ridge: [Ridge(alpha=alpha) for alpha in ridge.penalties],
        logistic: [LogisticRegression(C=c, tol=1e-10, max_iter=10000) for c in logistic.penalties],
    }
    for grid, models in references.items():
        found = grid.held_out(train, test)
        for number, model in enumerate(models):
            pipeline = make_pipeline(StandardScaler(), model)
            pipeline.fit(rows[train], np.eye(3)[labels[train]] if grid is ridge else labels[train])
            expected = pipeline.predict(rows[test]) if grid is ridge else pipeline.decision_function(rows[test])
            # The softmax does not see what is added to all classes.
            ours, expected = (z - z.mean(axis=1, keepdims=True) for z in (found[number], expected))
            np.testing.assert_allclose(ours, expected, atol=1e-5)
            head = grid.fit(train, number)
            direct = rows[test] @ head.weight.T + head.bias
            np.testing.assert_allclose(direct, found[number], atol=1e-4)


def test_linear_probes_of_several_views_count_each_as_a_row():
    x, labels, _ = sample(30, views=3)
    x = x.mean(axis=2)
    grid = LinearGrid("ridge", ["mean"], x, labels, classes=3, penalties=[10.0])
    train, test = np.arange(20), np.arange(20, 30)
    pipeline = make_pipeline(StandardScaler(), Ridge(alpha=10.0))
    pipeline.fit(x[:20].reshape(60, -1), np.eye(3)[labels[:20].repeat(3)])
    expected = pipeline.predict(x[20:].reshape(30, -1)).reshape(10, 3, 3).mean(axis=1)
    np.testing.assert_allclose(grid.held_out(train, test)[0], expected, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_gives_a_class_that_is_not_in_training_a_small_probability(classes):
    x, labels, _ = sample(40, classes=classes, shift=3.0)
    grid = LinearGrid("logistic", ["mean"], x.mean(axis=2), labels, classes=classes + 1, penalties=[1.0])
    everything = np.arange(40)
    logits = grid.held_out(everything, everything)[0].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert (probabilities[:, classes] < 0.2).all()
    assert (logits[:, :classes].argmax(axis=1) == labels).mean() > 0.9
    alone = grid.held_out(np.flatnonzero(labels == 1), everything)[0]
    assert (alone.argmax(axis=1) == 1).all()


def test_the_standard_error_sums_residuals_by_group():
    correct, groups = np.array([1, 1, 0, 0.5, 1, 0]), ["a", "a", "b", "b", "b", "c"]
    mean = correct.mean()
    sums = [sum(c - mean for c, g in zip(correct, groups, strict=True) if g == name) for name in "abc"]
    expected = math.sqrt(3 / 2 * sum(value**2 for value in sums)) / 6
    assert standard_error(correct, groups) == pytest.approx(expected)
    singles = standard_error(correct, list("abcdef"))
    assert singles == pytest.approx(correct.std(ddof=1) / math.sqrt(6))
    assert math.isnan(standard_error(correct, ["a"] * 6))


def test_outer_folds_are_those_of_the_setting_data_fold():
    _, labels, groups = sample(36)
    folds = outer_folds(groups, labels, folds=3, repeats=2, seed=7)
    for repeat, fold in enumerate(folds):
        np.testing.assert_array_equal(fold, grouped_folds(groups, labels, folds=3, seed=7 + repeat))
    assert len(outer_folds(groups, labels, folds=3, repeats=None, seed=0)) == 4
    with pytest.raises(UserError, match=r"probe\.folds=9: .* 6 groups"):
        outer_folds(groups, labels, folds=9, repeats=1, seed=0)


def test_an_outer_fold_takes_no_part_in_its_own_predictions():
    x, labels, _ = sample(48, shift=0.3)
    x = x.mean(axis=2)
    fold = np.arange(48) // 6 % 4

    def nested(labels: np.ndarray) -> np.ndarray:
        outcomes = []
        for probe, penalties in (("ridge", [0.1, 10.0, 1000.0]), ("logistic", [0.01, 1.0])):
            outcome = new_outcome([fold], 3)
            grid = LinearGrid(probe, ["mean"], x, labels, classes=3, penalties=penalties)
            try_grid(outcome, grid, labels, lambda: None)
            outcomes.append(outcome)
        return joined(outcomes).logits[0]

    before = nested(labels)
    for outer in range(4):
        changed = labels.copy()
        changed[fold == outer] = (labels[fold == outer] + 1) % 3
        after = nested(changed)
        np.testing.assert_array_equal(after[fold == outer], before[fold == outer])
        assert not np.allclose(after[fold != outer], before[fold != outer])


def test_the_nested_choice_is_that_of_loops_over_outer_and_inner_folds():
    x, labels, _ = sample(48, shift=0.4)
    x = x.mean(axis=2)
    fold, penalties = np.arange(48) // 6 % 4, [0.01, 1.0, 100.0]
    outcome = new_outcome([fold], 3)
    try_grid(outcome, LinearGrid("ridge", ["mean"], x, labels, classes=3, penalties=penalties), labels, lambda: None)
    for outer in range(4):
        losses, answers = [], []
        for penalty in penalties:

            def fitted(train: np.ndarray, test: np.ndarray, penalty: float = penalty) -> np.ndarray:
                model = make_pipeline(StandardScaler(), Ridge(alpha=penalty))
                return model.fit(x[train, 0].astype(np.float64), np.eye(3)[labels[train]]).predict(x[test, 0])

            inner = np.zeros((48, 3))
            for held in set(range(4)) - {outer}:
                inner[fold == held] = fitted((fold != held) & (fold != outer), fold == held)
            z, y = inner[fold != outer], labels[fold != outer]
            temperatures = np.exp(np.linspace(-4, 4, 2001))
            logs = [z / t - np.log(np.exp(z / t).sum(axis=1, keepdims=True)) for t in temperatures]
            values = [-log[np.arange(len(y)), y].mean() for log in logs]
            losses.append(min(values))
            answers.append(fitted(fold != outer, fold == outer) / temperatures[int(np.argmin(values))])
        best = int(np.argmin(losses))
        assert outcome.inner[0, outer] == pytest.approx(losses[best], abs=1e-4)
        np.testing.assert_allclose(outcome.logits[0, fold == outer], answers[best], rtol=0.02, atol=1e-3)


def attentive(x: np.ndarray, labels: np.ndarray, **changed) -> AttentiveGrid:
    settings = ProbeSettings(attentive_lr=[3e-3, 0.03], attentive_weight_decay=[0.0, 0.1], attentive_steps=30)
    settings = dataclasses.replace(settings, **changed)
    videos, classes = np.arange(len(labels)), int(labels.max()) + 1
    return AttentiveGrid(x, videos, labels, settings, classes=classes, queries=2, seed=3, device=CPU)


def test_a_grid_of_attentive_probes_gives_what_each_gives_alone():
    x, labels, _ = sample(24, views=2)
    train, test = np.arange(16), np.arange(16, 24)
    grid = attentive(x, labels, attentive_seeds=2)
    together = grid.held_out(train, test)
    assert len(together) == 8
    for number, candidate in enumerate(grid.candidates):
        said = dict(candidate.settings)
        alone = attentive(x, labels, attentive_lr=[said["lr"]], attentive_weight_decay=[said["weight_decay"]])
        alone.recipe = dataclasses.replace(alone.recipe, seeds=[3 + int(said["seed"])])
        np.testing.assert_allclose(together[number], alone.held_out(train, test)[0], rtol=1e-3, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 1e-3  # another seed


def test_an_attentive_probe_is_the_pooling_of_models_trained_by_torch():
    x, labels, _ = sample(24)
    train, test = np.arange(16), np.arange(16, 24)
    grid = attentive(x, labels, attentive_lr=[0.01], attentive_weight_decay=[0.1])
    found = grid.held_out(train, test)[0]
    rows = torch.from_numpy(x[:, 0])
    flat = rows[train].flatten(0, 1)
    rows = (rows - flat.mean(0)) / flat.std(0, correction=0)
    pool, head = AttentivePool(10, 4, 2), torch.nn.Linear(20, 3)
    first = grid._train(train, dataclasses.replace(grid.recipe, steps=0), torch.zeros(10), torch.ones(10))
    with torch.no_grad():
        pool.query.copy_(first.matrix[0, :, 0])
        pool.bias.copy_(first.position[0])
        for parameter in head.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW(
        [
            {"params": [pool.query, head.weight], "weight_decay": 0.1},
            {"params": [pool.bias, head.bias], "weight_decay": 0},
        ]
    )
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 30))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(pool(rows[train])), torch.from_numpy(labels[train])).backward()
        optimizer.step()
    np.testing.assert_allclose(found, head(pool(rows[test])).detach().numpy(), rtol=1e-3, atol=1e-4)
    folded = head_logits(grid.fit(train, 0), x[test, 0])
    np.testing.assert_allclose(folded, found, rtol=1e-4, atol=1e-4)


def test_more_rows_than_a_batch_are_read_in_batches():
    x, labels, _ = sample(300, width=4, shift=3.0)
    grid = attentive(x, labels, attentive_lr=[0.03], attentive_weight_decay=[0.0])
    logits = grid.held_out(np.arange(280), np.arange(280, 300))[0]
    assert (logits.argmax(axis=1) == labels[280:]).mean() > 0.9
    np.testing.assert_array_equal(logits, grid.held_out(np.arange(280), np.arange(280, 300))[0])


def test_batches_do_not_depend_on_how_a_grid_is_divided():
    x, labels, _ = sample(300, width=4, shift=3.0)
    grid = attentive(x, labels, attentive_lr=[0.03], attentive_weight_decay=[0.0], attentive_seeds=2)
    together = grid.held_out(np.arange(280), np.arange(280, 300))
    grid.at_once = 1
    np.testing.assert_allclose(grid.held_out(np.arange(280), np.arange(280, 300)), together, rtol=1e-3, atol=1e-4)


def ordered(videos: int = 60) -> Features:
    """Features that rise in one class and fall in the other: the same steps in another order."""
    rng = np.random.default_rng(0)
    labels = np.arange(videos) % 2
    ramp = np.linspace(-1, 1, 8)[None, :, None] * (1 - 2 * labels[:, None, None])
    x = ramp * rng.uniform(0.5, 1, 6) + rng.normal(size=(videos, 8, 6)) * 0.5
    return features_of(x[:, None].astype(np.float32), labels, [f"g{i // 4}" for i in range(videos)])


def test_attentive_probes_see_the_order_of_steps_by_positions_alone():
    settings = ProbeSettings(probes=["attentive"], attentive_steps=60, folds=3, repeats=1)
    found = {
        positions: select_probe(
            ordered(), dataclasses.replace(settings, attentive_positions=positions), queries=2, seed=0
        )
        for positions in (True, False)
    }
    assert found[True].nested.accuracy > 0.9
    assert found[False].nested.accuracy < 0.7
    assert found[False].head.position is None


def test_select_probe_fits_all_videos_and_calibrates():
    x, labels, groups = sample(60, shift=2.0)
    features = features_of(x, labels, groups)
    features.labels[7] = -1
    features.failed[9] = True
    settings = ProbeSettings(statistics=["mean", "std"], folds=3, repeats=2)
    ticks = []
    selected = select_probe(features, settings, queries=4, seed=0, tick=lambda: ticks.append(1))
    assert selected.videos.tolist() == [i for i in range(60) if i not in (7, 9)]
    assert selected.candidate.statistics == ("mean",)
    assert selected.nested.accuracy > 0.8
    assert len(selected.nested.folds) == 6
    right = (selected.logits.argmax(axis=1) == labels[selected.videos]).mean()
    assert abs(right - selected.nested.accuracy) < 0.1
    assert [row.probe for row in selected.table] == ["ridge", "logistic", "k-NN"]
    assert len(ticks) == 2 * 2 * 2 * 6 + 1  # probes x statistics x repeats x pairs of folds, and the last fit
    grid = LinearGrid(
        selected.candidate.probe,
        ["mean"],
        x[selected.videos].mean(axis=2),
        labels[selected.videos],
        classes=3,
        penalties=[selected.candidate.settings[0][1]],
    )
    every = np.arange(len(selected.videos))
    expected = grid.held_out(every, every)[0] / selected.temperature
    np.testing.assert_allclose(head_logits(selected.head, x[selected.videos, 0]), expected, rtol=1e-4, atol=1e-4)
    lines = table_lines(selected)
    assert len(lines) == 5
    assert lines[-1].startswith("selected")


def test_what_ticks_can_end_a_selection():
    x, labels, groups = sample(30)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select_probe(features_of(x, labels, groups), ProbeSettings(folds=3), queries=4, seed=0, tick=stop)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"probes": []}, "probe.probes is empty"),
        ({"statistics": []}, "probe.statistics is empty"),
        ({"ridge": []}, "probe.ridge is empty"),
        ({"statistics": ["mean+median"]}, "mean\\+median: expected some of mean, std, difference"),
        ({"statistics": ["mean+mean"]}, "each once"),
        ({"probes": ["attentive"], "attentive_lr": []}, "probe.attentive_lr is empty"),
        ({"folds": 20}, "probe.folds=20"),
    ],
)
def test_settings_of_which_no_probe_follows_are_an_error(changed, said):
    x, labels, groups = sample(30)
    settings = dataclasses.replace(ProbeSettings(), **changed)
    with pytest.raises(UserError, match=said):
        select_probe(features_of(x, labels, groups), settings, queries=4, seed=0)


def test_features_without_steps_have_the_mean_alone():
    x, labels, groups = sample(60, shift=2.0)
    features = dataclasses.replace(features_of(x, labels, groups), steps=None)
    settings = ProbeSettings(folds=3, repeats=1, ridge=[30.0], probes=["ridge"])
    with pytest.raises(UserError, match="vac embed --steps"):
        select_probe(features, settings, queries=4, seed=0)
    with pytest.raises(UserError, match="vac embed --steps"):
        select_probe(features, dataclasses.replace(settings, probes=["attentive"]), queries=4, seed=0)
    alone = select_probe(features, dataclasses.replace(settings, statistics=["mean"]), queries=4, seed=0)
    assert alone.nested.accuracy > 0.8
