"""`vac score`: averages by hand, temperature and weights against brute force, ensembles that do not fit together."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import environment
from vac_ddp.commands.score_command import main
from vac_ddp.errors import UserError
from vac_ddp.results import averaging
from vac_ddp.results.logits_file import ViewsHead, write_views
from vac_ddp.scoring.views import view_table
from vac_ddp.settings import ViewSettings

CLASSES = ["climb", "pick", "sit", "wave"]


def made(seed: int, *, videos: int = 120, views: int = 3, skill: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (V, n, 4) of a model with some skill, and the labels (V,), the same for every seed."""
    labels = np.random.default_rng(99).integers(0, 4, videos)
    logits = np.random.default_rng(seed).normal(size=(videos, views, 4)).astype(np.float32)
    logits[np.arange(videos), :, labels] += skill
    return logits, labels


def written(
    path: Path,
    logits: np.ndarray,
    labels: np.ndarray | None,
    *,
    ids: list[str] | None = None,
    classes: list[str] = CLASSES,
    failed: np.ndarray | None = None,
    flip: bool = False,
) -> str:
    videos, views = logits.shape[:2]
    write_views(
        path,
        ViewsHead(
            ids=ids or [f"{i + 1:05}" for i in range(videos)],
            classes=classes,
            views=view_table(ViewSettings(flip=flip), views // (2 if flip else 1)),
            labels=np.full(videos, -1) if labels is None else labels,
            sources=[""] * videos,
            damaged=np.zeros(videos),
            failed=np.zeros(videos, bool) if failed is None else failed,
            about={"weights": path.stem},
        ),
        [logits],
    )
    return str(path)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return torch.softmax(torch.tensor(x, dtype=torch.float64), axis).numpy()


def test_averages_of_views(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, _ = made(0)
    for block in (1 << 22, 50):
        monkeypatch.setattr(averaging, "_BLOCK", block)
        np.testing.assert_allclose(averaging.average_views(logits), logits.astype(np.float64).mean(1), rtol=1e-12)
        by_hand = np.log(softmax(logits.astype(np.float64) / 2.5).mean(1))
        found = averaging.average_views(logits, method="mean-probs", temperature=2.5)
        np.testing.assert_allclose(found, by_hand, rtol=1e-10)


def test_ensembles_of_three_models_by_hand() -> None:
    parts = [made(seed)[0].astype(np.float64).mean(1) for seed in range(3)]
    weights = np.array([2.0, 1.0, 1.0])
    by_hand = (2 * parts[0] + parts[1] + parts[2]) / 4
    np.testing.assert_allclose(averaging.combine(parts, weights), by_hand, rtol=1e-12)
    by_hand = np.log((2 * softmax(parts[0]) + softmax(parts[1]) + softmax(parts[2])) / 4)
    np.testing.assert_allclose(averaging.combine(parts, weights, method="mean-probs"), by_hand, rtol=1e-10)


def test_a_model_that_missed_a_video_leaves_it_to_the_others() -> None:
    a, b = (made(seed)[0].astype(np.float64).mean(1) for seed in range(2))
    absent = np.zeros((2, len(a)), bool)
    absent[0, :10] = True
    absent[:, 5] = True  # nobody has it: as if all had
    mixed = averaging.combine([a, b], [3, 1], absent=absent)
    np.testing.assert_allclose(mixed[:5], b[:5])
    np.testing.assert_allclose(mixed[10:], (3 * a[10:] + b[10:]) / 4)
    np.testing.assert_allclose(mixed[5], (3 * a[5] + b[5]) / 4)


@pytest.mark.parametrize("method", averaging.METHODS)
def test_temperature_is_the_best_of_a_fine_grid(method: averaging.Method) -> None:
    logits, labels = made(4, skill=1.5)
    logits *= 20  # far too sure
    found = averaging.fit_temperature(logits, labels, method=method)
    grid = np.exp(np.linspace(np.log(0.05), np.log(50), 400))
    losses = []
    for t in grid:
        p = (
            softmax(logits.astype(np.float64).mean(1) / t)
            if method == "mean-logits"
            else softmax(logits.astype(np.float64) / t).mean(1)
        )
        losses.append(-np.log(p[np.arange(len(labels)), labels]).mean())
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)
    assert found > 2


@pytest.mark.parametrize("method", averaging.METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_selection_is_never_below_the_best_single(method: averaging.Method, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [made(10 * seed + m, skill=float(rng.uniform(0.2, 1.5)))[0].astype(np.float64).mean(1) for m in range(5)]
    labels = made(0)[1]
    weights = averaging.greedy_weights(parts, labels, method=method)
    assert weights.sum() == pytest.approx(1)
    mixed = averaging.top1(averaging.combine(parts, weights, method=method), labels)
    assert mixed >= max(averaging.top1(p, labels) for p in parts)


def test_more_greedy_rounds_are_never_worse() -> None:
    """The best round counts, not the last one."""
    dropped = 0
    for seed in range(6):
        parts = [made(10 * seed + m, videos=40, skill=0.5)[0].astype(np.float64).mean(1) for m in range(4)]
        labels = made(0, videos=40)[1]
        found = [
            averaging.top1(averaging.combine(parts, averaging.greedy_weights(parts, labels, rounds=rounds)), labels)
            for rounds in range(1, 13)
        ]
        assert found == sorted(found)
        dropped += found[-1] > found[0]
    assert dropped  # and they do help


def test_greedy_selection_leaves_out_what_does_harm() -> None:
    good, labels = made(1, skill=3.0)
    bad = -5 * good
    weights = averaging.greedy_weights([bad.mean(1), good.mean(1)], labels)
    assert weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("method", averaging.METHODS)
def test_fitted_weights_are_near_the_best_of_a_grid(method: averaging.Method) -> None:
    skills = (1.5, 0.7, 0.1)
    parts = [made(m, skill=s)[0].astype(np.float64).mean(1) for m, s in enumerate(skills)]
    labels = made(0)[1]
    weights = averaging.fit_weights(parts, labels, method=method)
    found = averaging.mean_loss(averaging.combine(parts, weights, method=method), labels)
    grid = [
        averaging.mean_loss(averaging.combine(parts, [a, b, 20 - a - b], method=method), labels)
        for a, b in itertools.product(range(21), repeat=2)
        if a + b <= 20
    ]
    assert found <= min(grid) + 1e-3
    assert found <= min(averaging.mean_loss(p, labels) for p in parts)


def test_views_are_picked_by_window_crop_and_flip() -> None:
    table = view_table(ViewSettings(crops=3, flip=True), 2)
    assert averaging.select_views(table, ["window=1", "flip=0"]).tolist() == [6, 8, 10]
    assert averaging.select_views(table, ["0,11"]).tolist() == [0, 11]
    for words, text in (
        (["time=1"], "views have window, crop, flip"),
        (["window=2"], "there is no window 2"),
        (["12"], "there is no view 12"),
        (["window=x"], "whole numbers"),
        (["window=0", "11"], "no view is left"),
    ):
        with pytest.raises(UserError, match=text):
            averaging.select_views(table, words)


def test_the_table_of_views_holds_all_subsets() -> None:
    logits, labels = made(7)
    rows = averaging.views_table(logits, labels)
    for (number, mean, low, high), size in zip(rows, (1, 2, 3), strict=True):
        accuracies = [
            float((logits[:, list(s)].astype(np.float64).mean(1).argmax(1) == labels).mean())
            for s in itertools.combinations(range(3), size)
        ]
        assert number == size
        assert (mean, low, high) == (pytest.approx(np.mean(accuracies)), min(accuracies), max(accuracies))


# ---------------------------------------------------------------- the program


def test_score_of_three_models_equals_averaging_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of the files holds the same in another order of videos and classes."""
    parts = [made(seed)[0] for seed in range(3)]
    labels = made(0)[1]
    order, columns = np.random.default_rng(5).permutation(120), [2, 0, 3, 1]
    files = [
        written(tmp_path / "a.npz", parts[0], None),
        written(
            tmp_path / "b.npz",
            parts[1][order][:, :, columns],
            np.argsort(columns)[labels[order]],
            ids=[f"{i + 1:05}" for i in order],
            classes=[CLASSES[c] for c in columns],
        ),
        written(tmp_path / "c.npz", parts[2], None),
    ]
    assert main([*files, "--weights", "2,1,1", "--out", str(tmp_path / "out")]) == 0
    scores = sum(w * p.astype(np.float64).mean(1) for w, p in zip((2, 1, 1), parts, strict=True)) / 4
    answers = [CLASSES[k] for k in scores.argmax(1)]
    expected = "id,class\n" + "".join(f"{i + 1},{a}\n" for i, a in enumerate(answers))
    assert (tmp_path / "out" / "submission.csv").read_text() == expected
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures["top1"] == pytest.approx(float((scores.argmax(1) == labels).mean()))
    rows = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert rows[1].split(",")[1:3] == [answers[0], f"{softmax(scores)[0].max():.6f}"]
    printed = capsys.readouterr().out
    assert f"top-1        {figures['top1']:.4f}" in printed
    assert "weight 0.500" in printed


def test_failed_videos_of_one_model_are_left_to_the_other(tmp_path: Path) -> None:
    a, b = made(0)[0], made(1)[0]
    failed = np.zeros(120, bool)
    failed[3] = True
    a[3] = 50 * np.eye(4)[0]  # would win if it counted
    b[3] = np.eye(4)[2]
    files = [written(tmp_path / "a.npz", a, None, failed=failed), written(tmp_path / "b.npz", b, None)]
    main([*files, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "submission.csv").read_text().splitlines()[4] == "4,sit"


def test_greedy_fit_and_temperature_from_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = made(0)[1]
    tests = [written(tmp_path / f"t{m}.npz", made(m)[0], None) for m in range(3)]
    validation = [written(tmp_path / f"v{m}.npz", made(m + 20, skill=m / 2)[0] * 4, labels) for m in range(3)]
    for how in ("--greedy", "--fit"):
        assert main([*tests, how, *validation, "--temperature-from", *validation, "--out", str(tmp_path / how)]) == 0
        fitted = json.loads((tmp_path / how / "ensemble.json").read_text())
        assert sum(fitted["weights"]) == pytest.approx(1)
        assert fitted["weights"][2] > fitted["weights"][0]
        parts = [made(m + 20, skill=m / 2)[0] * 4 for m in range(3)]
        hot = [averaging.fit_temperature(p, labels) for p in parts]
        assert fitted["temperatures"] == pytest.approx(hot)
    assert "best single" in capsys.readouterr().out


def test_subset_and_answer_by_number(tmp_path: Path) -> None:
    logits, _ = made(0, views=6)
    file = written(tmp_path / "a.npz", logits, None, flip=True)
    main([file, "--subset", "flip=0", "window=0,2", "--answer", "index", "--out", str(tmp_path / "out")])
    answers = logits[:, [0, 4]].astype(np.float64).mean(1).argmax(1)
    lines = (tmp_path / "out" / "submission.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[1]) for line in lines] == answers.tolist()


def test_what_does_not_fit_together_is_one_line(tmp_path: Path) -> None:
    logits, labels = made(0)
    good = written(tmp_path / "good.npz", logits, labels)
    fewer = written(tmp_path / "fewer.npz", logits[:9], labels[:9])
    others = written(tmp_path / "others.npz", logits, labels, classes=["climb", "pick", "sit", "swim"])
    relabelled = written(tmp_path / "relabelled.npz", logits, (labels + 1) % 4)
    unlabelled = written(tmp_path / "unlabelled.npz", logits, None)
    for argv, text in (
        ([good, fewer], "lacks video '00010'"),
        ([fewer, good], "has video '00010' besides"),
        ([good, others], "lacks class 'wave'"),
        ([good, relabelled], "gives '00001' another label"),
        ([good, "--weights", "1,2"], "2 weights for 1"),
        ([good, "--weights", "a"], "expected numbers"),
        ([good, "--weights", "-1"], "0 or more"),
        ([good, unlabelled, "--weights", "0,0"], "one above 0"),
        ([good, "--greedy", good, good], "2 validation files for 1"),
        ([good, "--greedy", unlabelled], "has no labels"),
        ([good, "--greedy", good, "--weights", "1"], "give one of them"),
        ([good, "--temperature-from", others], "other classes"),
        ([good, "--metod", "x"], "unrecognized arguments"),
        ([str(tmp_path / "none.npz")], "no views file"),
        ([], "required: VIEWS"),
    ):
        with pytest.raises(UserError, match=text) as caught:
            main(argv)
        assert "\n" not in str(caught.value)


def test_scoring_needs_no_torch(tmp_path: Path) -> None:
    logits, labels = made(0)
    file = written(tmp_path / "a.npz", logits, labels)
    code = f"import sys; from vac_ddp.cli import main; main(['score', {file!r}]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout
