"""The commands of the pages about SLURM, on the cluster: what asks is asked of a job, what submits is checked."""

from __future__ import annotations

import re

import pytest

from tests import docs
from tests.slurm.jobs import Jobs
from tests.support import REPO
from vac_ddp.arguments import parse_settings

pytestmark = pytest.mark.slurm
PAGES = ("slurm-first-run.md", "slurm-preemption.md", "when-it-hangs.md")
# Shown by test_jobs.py, or about this machine (weights, a tool that is to be installed).
ELSEWHERE = ("scancel", "scontrol requeue", "tail", "export", "git", "python", ".venv", "launch")


def commands() -> list[str]:
    """Every command of the pages that speaks to SLURM, environment words in front of it included."""
    found = []
    for page in PAGES:
        found += [command.text for command in docs.commands(REPO / "docs" / page)]
        lines = (REPO / "docs" / page).read_text(encoding="utf-8").splitlines()
        found += [line.removeprefix("$ ") for line in lines if re.match(r"\$ [A-Z_]+=\S", line)]
    return [text for text in found if not text.startswith(ELSEWHERE) and "py-spy" not in text]


def test_commands_that_ask_are_answered(jobs: Jobs) -> None:
    job = jobs.train("pages", nodes=2, hold="2")
    jobs.held(job, "pages", 2)
    asking = [text for text in commands() if "sbatch" not in text]
    assert len(asking) >= 6
    for text in asking:
        text = text.replace("preemptible", "main").replace("JOB", job, 1) if "JOB" in text else text
        said = jobs.cluster.run("bash", "-c", text.replace("preemptible", "main"), cwd=jobs.folder)
        assert said.strip(), text
        if "getent" in text:  # every node knows the first one, by an address that the others can reach
            assert len(re.findall(r"^10\.\S+ +vn1$", said, re.MULTILINE)) == 2 or "127.214" in said, said
    jobs.cluster.run("scancel", job)
    jobs.cluster.wait(job, "CANCELLED")


def test_commands_that_submit_are_accepted(jobs: Jobs) -> None:
    submitting = [text for text in commands() if "sbatch" in text and "..." not in text]
    assert len(submitting) >= 7
    for text in submitting:
        script = re.search(r"slurm/(\w+)\.sh", text)
        assert script is not None, text
        if script[1] not in ("predict", "embed"):  # words of these are options, not settings
            parse_settings(text.partition(script[0])[2].split())
        tried = text.replace("sbatch ", "sbatch --test-only ").replace("preemptible", "main")
        jobs.cluster.run("bash", "-c", f"{tried} 2>&1", cwd=REPO)
