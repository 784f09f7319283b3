"""slurm/kfold.sh and slurm/sweep.sh: arrays of which the last task puts the results of all together."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from tests.runs import make_videos
from tests.slurm.jobs import Jobs
from tests.support import REPO

pytestmark = pytest.mark.slurm
TASK = ("--gpus-per-node=1", "--cpus-per-task=2")


def test_three_folds_are_trained_predicted_and_scored(jobs: Jobs) -> None:
    make_videos(jobs.folder / "test", classes=1, videos=5)
    (jobs.folder / "test" / "class0").rename(jobs.folder / "data_test")
    words = [
        word for word in jobs.words("folds", "train.epochs=1", "data.workers=0") if not word.startswith("data.val=")
    ]
    array = jobs.cluster.sbatch("--array=1-3", *TASK, str(REPO / "slurm" / "kfold.sh"), *words, cwd=jobs.folder)
    logs = {}
    for task in (1, 2, 3):
        info = jobs.cluster.wait(f"{array}_{task}", timeout=300)
        logs[task] = jobs.log(f"{array}_{task}", "vac-kfold")
        assert (info["JobState"], info["ExitCode"]) == ("COMPLETED", "0:0"), logs[task]
    scored = [task for task, log in logs.items() if "scoring them together" in log and "top-1 of 3 members" in log]
    assert scored, logs
    folder = jobs.folder / "folds"
    views = [np.load(folder / f"fold{k}of3_seed0" / "predictions" / "data_test" / "views.npz") for k in (1, 2, 3)]
    by_hand = sum(one["logits"].mean(1) for one in views)
    with (folder / "ensemble" / "submission.csv").open() as stream:
        assert [row["class"] for row in csv.DictReader(stream)] == [f"class{n}" for n in by_hand.argmax(1)]
    held_out = [np.load(folder / f"fold{k}of3_seed0" / "predictions" / "val" / "views.npz")["ids"] for k in (1, 2, 3)]
    assert sorted(np.concatenate(held_out).tolist()) == sorted(
        str(path.relative_to(jobs.folder / "data_train")) for path in (jobs.folder / "data_train").glob("*/*")
    )


def test_a_sweep_ends_in_a_table(jobs: Jobs) -> None:
    words = jobs.words("sweep", "train.epochs=1", "data.workers=0")
    script = str(REPO / "slurm" / "sweep.sh")
    array = jobs.cluster.sbatch("--array=1-2", *TASK, script, *words, cwd=jobs.folder, GRID="optim.lr=0.001,0.003")
    logs = []
    for task in (1, 2):
        info = jobs.cluster.wait(f"{array}_{task}", timeout=300)
        logs.append(jobs.log(f"{array}_{task}", "vac-sweep"))
        assert (info["JobState"], info["ExitCode"]) == ("COMPLETED", "0:0"), logs[-1]
    tables = [log.splitlines()[-2:] for log in logs if "mean and deviation over seeds" in log]
    assert tables, logs
    assert tables[0][0].startswith("optim.lr=0.001 ") and tables[0][1].startswith("optim.lr=0.003 ")
    assert (jobs.folder / "sweep" / "optim.lr=0.003" / "best_videomae.pt").exists()


def test_an_array_that_does_not_fit_its_grid_says_so(jobs: Jobs) -> None:
    script = str(REPO / "slurm" / "sweep.sh")
    job = jobs.cluster.sbatch("--array=1-2", *TASK, script, cwd=jobs.folder, GRID="optim.lr=0.1,0.2 seed=0,1")
    info = jobs.cluster.wait(f"{job}_1")
    assert (info["JobState"], info["ExitCode"]) == ("FAILED", "2:0")
    assert "sbatch --array=1-4" in jobs.log(f"{job}_1", "vac-sweep")


def test_a_prediction_on_two_nodes(jobs: Jobs) -> None:
    words = ["--run", str(jobs.folder / "whole"), "--data", str(jobs.folder / "data_val"), "--out", "predicted"]
    job = jobs.cluster.sbatch("--nodes=2", *TASK, str(REPO / "slurm" / "predict.sh"), *words, cwd=jobs.folder)
    info = jobs.cluster.wait(job)
    assert (info["JobState"], info["ExitCode"]) == ("COMPLETED", "0:0"), jobs.log(job, "vac-predict")
    with (jobs.folder / "predicted" / "submission.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 6
