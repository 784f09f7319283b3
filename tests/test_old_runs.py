"""Run directories that earlier revisions left still resume, predict, score and report (tests/fixtures/make_runs.py)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fixtures.make_runs import FAMILIES, REPO
from tests.runs import Workplace, differences
from vac_ddp import cli, train
from vac_ddp.predict import main as predict_main

REVISIONS = ["be24294"]


@pytest.fixture(params=REVISIONS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs and data of a revision, with the settings' relative paths leading into it."""
    copy = tmp_path / request.param
    shutil.copytree(REPO / "tests" / "fixtures" / request.param, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path))
    return copy


def views_file(out: Path) -> dict[str, np.ndarray]:
    """The arrays of the logits file in `out`, whatever its name."""
    paths = [path for path in (out / "logits.npz", out / "views.npz") if path.exists()]
    with np.load(paths[0], allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("family", FAMILIES)
def test_old_run_predicts_the_logits_it_predicted_then(folder: Path, family: str) -> None:
    assert predict_main(["--run", family, "--data", "data_test", "--out", "again"]) == 0
    then, now = views_file(folder / family / "predictions" / "data_test"), views_file(folder / "again")
    assert then["ids"].tolist() == now["ids"].tolist()
    np.testing.assert_allclose(now["logits"], then["logits"], rtol=1e-4, atol=1e-6)
    old = (folder / family / "predictions" / "data_test" / "submission.csv").read_bytes()
    assert (folder / "again" / "submission.csv").read_bytes() == old


@pytest.mark.parametrize("family", FAMILIES)
def test_old_run_is_scored_and_reported(folder: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    scored = ["score", f"{family}/predictions/data_test", "--out", "scored"]
    assert cli.main(scored) == 0, capsys.readouterr().err
    old = (folder / family / "predictions" / "data_test" / "submission.csv").read_bytes()
    assert (folder / "scored" / "submission.csv").read_bytes() == old
    assert cli.main(["report", family]) == 0, capsys.readouterr().err
    assert (folder / family / "report.html").stat().st_size > 10_000
    assert cli.main(["runs", "."]) == 0
    assert family in capsys.readouterr().out


def test_old_interrupted_run_resumes_to_the_end_of_the_undisturbed_one(folder: Path) -> None:
    words = ["--config=settings.yaml", "model.name=videomae", "run.dir=interrupted"]
    assert train.main(words) == 2, "the directory holds a run"
    assert train.main([*words, "run.resume=auto"]) == 0
    (state,) = (torch.load(p, weights_only=True) for p in (folder / "interrupted" / "checkpoints").glob("*09.pt"))
    (whole,) = (torch.load(p, weights_only=True) for p in (folder / "videomae" / "checkpoints").glob("*09.pt"))
    assert differences(state["position"], whole["position"]) == []
    for part in ("model", "ema"):
        for name, value in whole[part].items():
            torch.testing.assert_close(state[part][name], value, rtol=1e-3, atol=1e-5)
    steps = [line["step"] for line in lines(folder, "interrupted")]
    assert steps == list(range(1, 10))
    losses = [[line["loss"] for line in lines(folder, run)] for run in ("interrupted", "videomae")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_old_finished_run_resumes_without_another_step(folder: Path, family: str) -> None:
    best = folder / family / f"best_{family}.pt"
    before = best.read_bytes()
    words = ["--config=settings.yaml", f"model.name={family}", f"run.dir={family}", "run.resume=auto"]
    assert train.main(words) == 0
    assert best.read_bytes() == before
    assert [line["step"] for line in lines(folder, family)] == list(range(1, 10))


def lines(folder: Path, run: str) -> list[dict[str, object]]:
    """The training lines of metrics.jsonl."""
    place = Workplace.__new__(Workplace)
    place.folder = folder
    return place.lines(run, "train")
