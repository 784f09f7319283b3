"""Jobs of slurm/train.sh: shapes, ends, and what interrupts them."""

from __future__ import annotations

import pytest

from tests.runs import assert_same_end
from tests.slurm.jobs import LIMITS, Jobs
from tests.slurm.probes import alive

pytestmark = pytest.mark.slurm


# ---------------------------------------------------------------- to the end


def test_two_nodes_and_one_node_end_alike(jobs: Jobs) -> None:
    whole = jobs.cluster.info(jobs.whole)
    assert (whole["JobState"], whole["ExitCode"], whole["Restarts"]) == ("COMPLETED", "0:0", "0")
    job = jobs.train("one", nodes=1)
    info = jobs.cluster.wait(job)
    assert (info["JobState"], info["ExitCode"]) == ("COMPLETED", "0:0"), jobs.log(job)
    for name in ("best_videomae.pt", "config.yaml", "metrics.jsonl", "report.html", "checkpoints"):
        assert (jobs.folder / "one" / name).exists()
    assert "1 node(s) x 2 rank(s) on vn" in jobs.log(job)
    assert "2 node(s) x 1 rank(s) on vn[1-2]" in jobs.log(jobs.whole)
    assert_same_end(jobs.place, "whole", "one")


@pytest.mark.parametrize(
    ("word", "said"),
    [("train.epoch=3", "train.epoch"), ("data.train=nowhere", "nowhere")],
    ids=["bad_setting", "missing_data"],
)
def test_an_error_of_the_users_fails_once(jobs: Jobs, word: str, said: str) -> None:
    job = jobs.train(f"error_{said}", word, nodes=2 if said == "nowhere" else 1)
    info = jobs.cluster.wait(job)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "2:0", "0"), jobs.log(job)
    lines = [line for line in jobs.log(job).splitlines() if line.startswith("vac: ")]
    assert len(lines) == 1 and said in lines[0], jobs.log(job)
    assert "Traceback" not in jobs.log(job) and "queued again" not in jobs.log(job)
    assert jobs.log(job).splitlines()[-1].startswith(f"job {job}, attempt 1: not started again")


# ---------------------------------------------------------------- interrupted, and back by itself


def test_requeued_in_mid_epoch(jobs: Jobs) -> None:
    job = jobs.train("requeue", "log.wandb=offline", nodes=2, hold="5")
    jobs.held(job, "requeue", 5)
    jobs.cluster.run("scontrol", "requeue", job)
    jobs.came_through(job, "requeue", restarts=1, wandb=2)
    assert "SIGTERM: saving at step 7 and ending" in jobs.log(job)
    assert "resumed at step 7 of 12" in jobs.log(job)


@pytest.mark.parametrize("whom", ["tasks", "batch"])
def test_signalled_by_scancel(jobs: Jobs, whom: str) -> None:
    run = f"signal_{whom}"
    job = jobs.train(run, "log.wandb=offline", nodes=2, hold="5")
    jobs.held(job, run, 5)
    jobs.cluster.run("scancel", "--signal=USR1", *(["--batch"] if whom == "batch" else []), job)
    jobs.came_through(job, run, restarts=1, wandb=2)
    assert "SIGUSR1: saving at step" in jobs.log(job)
    assert "queued again" in jobs.log(job)


# ---------------------------------------------------------------- not back


def test_cancelled_is_cancelled_and_the_same_words_go_on(jobs: Jobs) -> None:
    job = jobs.train("cancelled", nodes=1, hold="5")
    jobs.held(job, "cancelled", 5)
    jobs.cluster.run("scancel", job)
    assert jobs.cluster.wait(job)["JobState"] == "CANCELLED"
    jobs.cluster.until(lambda: "saving at step 7" in jobs.log(job), 60, lambda: jobs.log(job))
    again = jobs.train("cancelled", "run.resume=auto", nodes=1)
    jobs.came_through(again, "cancelled", restarts=0)
    assert jobs.cluster.info(job)["JobState"] == "CANCELLED"


def test_attempts_are_counted(jobs: Jobs) -> None:
    job = jobs.train("capped", nodes=1, hold="5", VAC_MAX_ATTEMPTS="1")
    jobs.held(job, "capped", 5)
    jobs.cluster.run("scancel", "--signal=USR1", job)
    info = jobs.cluster.wait(job)
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "75:0", "0")
    assert "that was the last attempt" in jobs.log(job)


# ---------------------------------------------------------------- the time limit, waited for while the others ran


@pytest.mark.parametrize("name", LIMITS)
def test_the_time_limit(jobs: Jobs, name: str) -> None:
    job = jobs.limited[name]
    jobs.held(job, f"limit_{name}", 5)
    jobs.came_through(job, f"limit_{name}", restarts=1, wandb=2 if name == "own" else 0)
    assert LIMITS[name][2] in jobs.log(job)


# ---------------------------------------------------------------- what takes whole nodes


def test_preempted_by_a_job_of_a_better_partition(jobs: Jobs) -> None:
    job = jobs.train("preempted", nodes=2, hold="6")
    jobs.held(job, "preempted", 6)
    other = jobs.cluster.sbatch(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=jobs.folder
    )
    assert jobs.cluster.wait(other)["JobState"] == "COMPLETED"
    jobs.came_through(job, "preempted", restarts=1)
    assert "SIGTERM: saving at step" in jobs.log(job)


def test_a_node_dies(jobs: Jobs) -> None:
    job = jobs.train("node", "log.wandb=offline", nodes=2, hold="6")
    jobs.held(job, "node", 6)
    jobs.cluster.script("kill", "vn2")
    jobs.cluster.run("scontrol", "update", "nodename=vn2", "state=down", "reason=test")
    jobs.cluster.wait(job, "PENDING")
    jobs.cluster.script("boot", "vn2")
    jobs.came_through(job, "node", restarts=1, wandb=2)
    assert "resumed at step 4 of 12" in jobs.log(job)  # the end of the first epoch


def test_slurmd_dies_and_its_job_runs_on_unseen(jobs: Jobs) -> None:
    job = jobs.train("unseen", hold="6")
    jobs.held(job, "unseen", 6)
    node = jobs.cluster.info(job)["NodeList"]
    ranks = jobs.processes("unseen")
    assert len(ranks) >= 2
    jobs.cluster.kill_slurmd(node)
    jobs.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    # What it had started is still there, until it sees that the run has another owner.
    try:
        jobs.came_through(job, "unseen", restarts=1)
        jobs.cluster.until(lambda: not any(map(alive, ranks)), 90, lambda: f"{ranks} live on")
    finally:
        jobs.cluster.script("boot", node)


def test_elastic_job_loses_a_node_and_goes_on(jobs: Jobs) -> None:
    job = jobs.train("elastic", nodes=2, sbatch=("--no-kill",), hold="6", VAC_MIN_NODES="1")
    jobs.held(job, "elastic", 6)
    jobs.cluster.script("kill", "vn2")
    jobs.cluster.run("scontrol", "update", "nodename=vn2", "state=down", "reason=test")
    jobs.release("elastic", 6)
    try:
        info = jobs.cluster.wait(job)
    finally:
        jobs.cluster.script("boot", "vn2")
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("COMPLETED", "0:0", "0"), jobs.log(job)
    assert "the same batches, the loss to 1e-5 (world_size 2 -> 1" in jobs.log(job)
    assert jobs.place.steps("elastic") == list(range(1, 13))
    expected, found = jobs.place.lines("whole", "train"), jobs.place.lines("elastic", "train")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
