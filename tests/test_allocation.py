"""The end of a SLURM job as the trainer sees it, and ends that torchrun is not told of. The cluster: tests/slurm/."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import Workplace
from tests.support import REPO, environment
from vac_ddp import files
from vac_ddp.runtime.signals import StopRequest, end_of_allocation, save_by


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, *, job: str) -> None:
    """Put a squeue first in the path that knows one job."""
    program = folder / "squeue"
    program.write_text(f'#!/bin/sh\ncase "$*" in *--jobs={job}\\ *) echo "{answer}" ;; *) exit 1 ;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_end_is_that_of_the_environment_or_of_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_of_allocation({}) is None
    assert end_of_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1790000000"}) == 1790000000.0
    noon = time.mktime((2026, 3, 1, 12, 0, 0, 0, 0, -1))
    squeue(tmp_path, monkeypatch, "2026-03-01T12:00:00", job="7")
    assert end_of_allocation({"SLURM_JOB_ID": "7"}) == noon
    assert end_of_allocation({"SLURM_JOB_ID": "8"}) is None
    squeue(tmp_path, monkeypatch, "2026-03-01T12:00:00", job="7_3")
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert end_of_allocation(array) == noon
    squeue(tmp_path, monkeypatch, "NONE", job="7")
    assert end_of_allocation({"SLURM_JOB_ID": "7"}) is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert end_of_allocation({"SLURM_JOB_ID": "7"}) is None


def test_saving_is_due_before_the_end_or_in_the_middle_of_a_short_rest() -> None:
    assert save_by(None, 120, now=0) is None
    assert save_by(1000.0, 0, now=0) is None
    assert save_by(1000.0, 120, now=0) == 880
    assert save_by(1000.0, 120, now=900) == 950
    assert save_by(1000.0, 120, now=2000) == 1000
    assert StopRequest(time.time() - 1).wanted() and not StopRequest(time.time() + 60).wanted()


def test_a_job_that_ends_saves_by_itself_and_goes_on(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    told = tmp_path / "status.json"
    ends = {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": str(int(time.time()))}
    done = place.python("-m", "vac_ddp.train", *place.arguments("a"), VAC_STATUS_FILE=str(told), **ends)
    assert done.returncode == 75, done.stderr
    assert "the end of the allocation: saving at step" in done.stdout
    assert json.loads(told.read_text())["status"] == 75
    more = place.python("-m", "vac_ddp.train", *place.arguments("a"), SLURM_RESTART_COUNT="1")
    assert more.returncode == 0 and place.steps("a") == list(range(1, 13)), more.stderr
    never = place.python("-m", "vac_ddp.train", *place.arguments("b", "checkpoint.before_end_s=0"), **ends)
    assert never.returncode == 0, never.stderr


@pytest.mark.parametrize(("only", "expected"), [("1", 0), ("", 2)])
def test_torchrun_is_not_told_of_an_error_of_the_users(tmp_path: Path, only: str, expected: int) -> None:
    told = tmp_path / "status.json"
    place = Workplace(tmp_path)
    words = place.arguments("a", "data.train=nowhere")
    done = place.python("-m", "vac_ddp.train", *words, VAC_STATUS_FILE=str(told), VAC_STATUS_ONLY=only)
    assert done.returncode == expected
    assert json.loads(told.read_text())["status"] == 2
    assert len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


def test_what_was_to_be_overwritten_is_thrown_away_once(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    assert place.alone("a").returncode == 0
    job = {"SLURM_JOB_ID": "5"}
    words = place.arguments("a", "run.overwrite=true")
    stopped = place.python("-m", "vac_ddp.train", *words, **job, SLURM_JOB_END_TIME=str(int(time.time())))
    assert stopped.returncode == 75, stopped.stderr
    again = place.python("-m", "vac_ddp.train", *words, **job, SLURM_RESTART_COUNT="1")
    assert again.returncode == 0 and "resumed at step" in again.stdout, again.stdout + again.stderr
    other = place.python("-m", "vac_ddp.train", *words, SLURM_JOB_ID="6", SLURM_RESTART_COUNT="1")
    assert other.returncode == 0 and "resumed" not in other.stdout  # its first attempt had not begun


def test_killed_before_its_first_checkpoint_a_run_keeps_its_name_at_wandb(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    words = ("log.wandb=offline", "checkpoint.every_steps=null")
    fault = {"FAULT": "SIGKILL step=1 rank=0", "FAULT_DONE": str(tmp_path / "fault")}
    place.python(REPO / "tests" / "drivers" / "fault.py", *place.arguments("a", *words), **fault)
    name = (tmp_path / "a" / "wandb_id").read_text().strip()
    assert not list((tmp_path / "a" / "checkpoints").glob("step-*.pt"))
    done = place.python("-m", "vac_ddp.train", *place.arguments("a", *words), SLURM_RESTART_COUNT="1")
    assert done.returncode == 0 and "has no checkpoint yet" in done.stdout, done.stderr
    assert place.state("a")["wandb_id"] == name


@pytest.mark.parametrize("given_back", [False, True])
def test_whose_lock_was_taken_over_ends(tmp_path: Path, given_back: bool) -> None:
    """slurmd dies, its job runs on unseen, and SLURM starts it again on another node."""
    program = (
        "import sys, time, pathlib; from vac_ddp.runtime import lock; lock.BEAT_S = 0.05\n"
        "lock.RunLock(pathlib.Path(sys.argv[1])).take(); print('taken', flush=True); time.sleep(60)"
    )
    old = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment(SLURM_JOB_ID="7"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert old.stdout is not None and old.stderr is not None and old.stdout.readline() == "taken\n"
    owner = json.loads((tmp_path / "run.lock").read_text())
    if given_back:
        old.stderr.close()  # as srun's end of it, which SLURM has ended
        (tmp_path / "run.lock").unlink()
    else:
        files.write_json(tmp_path / "run.lock", {**owner, "host": "another", "attempt": 1})
    assert old.wait(30) == 1
    assert given_back or "taken over by {'host': 'another'" in old.stderr.read()
    assert (tmp_path / "run.lock").exists() != given_back
