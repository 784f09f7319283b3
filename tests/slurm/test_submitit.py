"""launch/submitit_train.py on the cluster and on this machine: what slurm/*.sh do, with submitit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import assert_same_end
from tests.slurm.jobs import HELD, Jobs
from tests.support import REPO, environment

pytestmark = pytest.mark.slurm
SCRIPT = str(REPO / "launch" / "submitit_train.py")


class Launched:
    """A launcher that runs, and what it says."""

    def __init__(self, jobs: Jobs, *words: str, **extra: str) -> None:
        self.jobs, self.path = jobs, jobs.folder / f"launched-{len(list(jobs.folder.glob('launched-*')))}"
        with self.path.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT, *words],
                cwd=jobs.folder,
                env=environment(**jobs.cluster.environment, **extra),
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.path.read_text()

    def job(self) -> tuple[str, Path]:
        """Id and log of the (first) job, once it is submitted."""
        line = re.compile(r"^job +(\S+) +(\S+)$", re.MULTILINE)
        self.jobs.cluster.until(
            lambda: bool(line.search(self.said())) or self.process.poll() is not None, 60, self.said
        )
        found = line.search(self.said())
        assert found, self.said()
        return found[1], Path(found[2])

    def held(self, run: str, step: int) -> None:
        path = Path(f"{self.jobs.mark(run)}.{step}")
        self.jobs.cluster.until(path.exists, 240, lambda: self.everything())

    def everything(self) -> str:
        logs = sorted((self.jobs.folder / "submitit").glob("*_log.*"))
        return self.said() + "".join(f"\n== {path}\n{path.read_text()[-4000:]}" for path in logs[-4:])

    def ends(self, timeout: float = 240) -> int:
        self.jobs.cluster.until(lambda: self.process.poll() is not None, timeout, self.everything)
        return self.process.returncode


HOLDS = (2, 4, 6, 8, 10)


def five_times(jobs: Jobs, run: str, launched: Launched, disturb: Callable[[int], object]) -> None:
    """Hold a run at five steps and disturb it; it must end as the undisturbed one."""
    for count, step in enumerate(HOLDS):
        launched.held(run, step)
        disturb(count)
    assert launched.ends() == 0, launched.everything()
    assert_same_end(jobs.place, "whole", run)
    assert jobs.place.steps(run) == list(range(1, 13))
    assert "ended with status 0: done" in launched.said()


def hold(jobs: Jobs, run: str) -> dict[str, str]:
    return {"VAC_MODULE": HELD, "HOLD_AT": ",".join(map(str, HOLDS)), "HOLD_MARK": str(jobs.mark(run))}


def test_five_preemptions_on_the_cluster(jobs: Jobs) -> None:
    """Ten minutes: submitit takes every signal for a time-out then, and would give up after three."""
    run = "clustered"
    words = [
        "train",
        "--nodes",
        "2",
        "--gpus",
        "1",
        "--cpus",
        "2",
        "--time",
        "10",
        "--",
        *jobs.words(run, "log.wandb=offline"),
    ]
    launched = Launched(jobs, *words, **hold(jobs, run))
    job, log = launched.job()

    def disturb(count: int) -> None:
        if count == 2:
            jobs.cluster.run("scontrol", "requeue", job)
        else:
            jobs.cluster.run("scancel", "--signal=USR2", job)

    five_times(jobs, run, launched, disturb)
    info = jobs.cluster.wait(job)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("COMPLETED", "0:0", "5")
    assert len(jobs.wandb_ids(run)) == 6 and len(set(jobs.wandb_ids(run))) == 1
    assert all(f"attempt {number}:" in log.read_text() for number in range(1, 7))
    assert f"scancel {job}" in launched.said() and str(log) in launched.said()


def test_five_preemptions_on_this_machine(jobs: Jobs) -> None:
    run = "local"
    words = ["train", "--cluster", "local", "--ranks", "2", "--", *jobs.words(run)]
    launched = Launched(jobs, *words, **hold(jobs, run))
    job, _ = launched.job()

    def disturb(count: int) -> None:
        children = Path(f"/proc/{job}/task/{job}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGUSR2)

    five_times(jobs, run, launched, disturb)


def test_an_error_of_the_users_fails_once(jobs: Jobs) -> None:
    refused = Launched(jobs, "train", "--", *jobs.words("never", "train.epoch=3"))
    assert refused.ends() == 2
    assert len(refused.said().splitlines()) == 1 and "train.epoch" in refused.said()
    launched = Launched(jobs, "train", "--gpus", "1", "--cpus", "2", "--", *jobs.words("never", "data.train=nowhere"))
    job, log = launched.job()
    assert launched.ends() == 2, launched.everything()
    assert re.search(r"ended with status 2: .*nowhere", launched.said())
    info = jobs.cluster.wait(job)
    assert (info["JobState"], info["Restarts"]) == ("FAILED", "0")
    assert log.with_suffix(".err").read_text().count("vac: ") == 1


def test_a_sweep_is_an_array_and_ends_in_a_table(jobs: Jobs) -> None:
    words = jobs.words("grid", "train.epochs=1", "data.workers=0")
    launched = Launched(jobs, "sweep", "--gpus", "1", "--cpus", "2", "--grid", "optim.lr=0.001,0.003", "--", *words)
    assert launched.ends() == 0, launched.everything()
    assert re.search(r"^job +\d+_0 .*\njob +\d+_1 ", launched.said(), re.MULTILINE)
    assert re.search(r"^optim.lr=0.001 +1 .*\noptim.lr=0.003 +1 ", launched.said(), re.MULTILINE), launched.said()
