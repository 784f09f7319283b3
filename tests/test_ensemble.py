"""`vac ensemble`: which members there are, and a whole one of two folds compared with averaging by hand."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.runs import Workplace, make_videos
from tests.support import environment
from vac_ddp.commands import ensemble_command, job_plan
from vac_ddp.errors import UserError
from vac_ddp.results import ensemble
from vac_ddp.results.logits_file import Views, read_views


def views(ids: list[str], logits: list[list[float]], labels: list[int], classes: str = "ab") -> Views:
    return Views(
        ids=ids,
        classes=list(classes),
        views=np.zeros((1, 3), np.int64),
        labels=np.array(labels),
        sources=[""] * len(ids),
        damaged=np.zeros(len(ids)),
        failed=np.zeros(len(ids), bool),
        logits=np.array(logits, np.float32)[:, None],
    )


def test_members_are_every_fold_of_every_seed() -> None:
    made = job_plan.members(Path("runs/x"), folds=2, seeds=[0, 7])
    assert [m.folder.name for m in made] == ["fold1of2_seed0", "fold2of2_seed0", "fold1of2_seed7", "fold2of2_seed7"]
    assert made[3].words == ("seed=7", "data.fold=2/2", "run.dir=runs/x/fold2of2_seed7", "run.resume=auto")
    assert [m.words[0] for m in job_plan.members(Path("x"), folds=None, seeds=[3, 4])] == ["seed=3", "seed=4"]
    for words in ({"folds": 1, "seeds": [0]}, {"folds": 2, "seeds": [1, 1]}):
        with pytest.raises(UserError):
            job_plan.members(Path("x"), **words)


def test_a_video_that_two_members_held_out_gets_the_mean_of_both() -> None:
    pooled = ensemble.pool([views(["u", "v"], [[2, 0], [0, 4]], [0, 1]), views(["v", "w"], [[2, 0], [5, 1]], [1, 0])])
    np.testing.assert_allclose(pooled.scores, [[2, 0], [1, 2], [5, 1]])
    assert pooled.labels.tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="other classes"):
        ensemble.pool([views(["u"], [[2, 0]], [0]), views(["v"], [[2, 0]], [0], classes="ba")])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=3"], "seed=3: the members"),
        (["run.overwrite=true"], "run.overwrite"),
        (["--data", "/nowhere"], "no such data"),
        (["--choose", "greedy"], "data.val"),
        (["--seeds", "0,x"], "--seeds 0,x"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path: Path, words: list[str], said: str) -> None:
    make_videos(tmp_path / "test", classes=1, videos=1, frames=2)
    with pytest.raises(UserError, match=said):
        ensemble_command.main(["--nproc", "1", "--data", str(tmp_path / "test" / "class0"), *words])
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.distributed
def test_two_folds_end_to_end_interrupted_and_started_again(tmp_path: Path) -> None:
    Workplace(tmp_path)
    make_videos(tmp_path / "test", classes=1, videos=5)
    (tmp_path / "test" / "class0").rename(tmp_path / "data_test")
    run = tmp_path / "runs"
    command = [sys.executable, "-m", "vac_ddp.cli", "ensemble", "--nproc", "1", "--folds", "2", "--seeds", "4"]
    command += [f"--config={tmp_path / 'tiny.yaml'}", f"data.train={tmp_path / 'data_train'}", f"run.dir={run}"]
    command += [f"data.cache={tmp_path / 'cache'}", "data.workers=0", "train.epochs=1", "--data", "data_test"]
    first, second = (run / f"fold{fold}of2_seed4" for fold in (1, 2))

    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (second / "log.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode in (75, 143)  # 143: the second member had nothing to save yet
    assert read_views(first / "predictions" / "data_test").logits.shape == (5, 3, 3)
    assert not (run / "ensemble").exists()
    trained = (first / "best_videomae.pt").read_bytes()

    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (first / "best_videomae.pt").read_bytes() == trained
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines if line["kind"] == "train"}) == sum(
        line["kind"] == "train" for line in lines
    )

    by_hand = sum(np.load(m / "predictions" / "data_test" / "views.npz")["logits"].mean(1) for m in (first, second)) / 2
    with (run / "ensemble" / "submission.csv").open() as stream:
        answers = [row["class"] for row in csv.DictReader(stream)]
    assert answers == [f"class{number}" for number in by_hand.argmax(1)]
    with (run / "ensemble" / "scores.csv").open() as stream:
        shares = [float(row["confidence"]) for row in csv.DictReader(stream)]
    expected = np.exp(by_hand) / np.exp(by_hand).sum(1, keepdims=True)
    np.testing.assert_allclose(shares, expected.max(1), atol=1e-5)

    held_out = {}
    for member in (first, second):
        stored = np.load(member / "predictions" / "val" / "views.npz")
        held_out |= dict(zip(stored["ids"], stored["logits"].mean(1).argmax(1) == stored["labels"], strict=True))
    figures = json.loads((run / "ensemble" / "held_out" / "metrics.json").read_text())
    assert figures["videos"] == len(held_out) == 21
    assert figures["top1"] == pytest.approx(np.mean(list(held_out.values())))
    with (run / "ensemble" / "members.csv").open() as stream:
        assert [row["member"] for row in csv.DictReader(stream)] == [first.name, second.name]

    again = [*command, "--score-only", "--out", str(tmp_path / "again")]
    done = subprocess.run(again, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "member 1 of 2" not in done.stdout
    for name in ("submission.csv", "members.csv", "held_out/metrics.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "ensemble" / name).read_bytes()
    (second / "predictions" / "data_test" / "views.npz").unlink()
    done = subprocess.run(again, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and str(second) in done.stderr and len(done.stderr.splitlines()) == 1
