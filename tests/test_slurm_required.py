"""A cluster that is required and does not start is a failure; elsewhere a skip with a line. None is needed for this."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPO, environment


@pytest.mark.parametrize("insist", [{"VAC_SLURM": "1"}, {"CI": "true"}, {}], ids=["VAC_SLURM", "CI", "neither"])
def test_no_cluster_fails_or_skips(tmp_path: Path, insist: dict[str, str]) -> None:
    for name, line in {
        "id": "echo 1000",
        "slurmctld": "exit 1",
    }.items():  # a user who is not root, and no SLURM of ours
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    bare = {name: value for name, value in environment().items() if name not in ("CI", "VAC_SLURM")}
    path = f"{tmp_path}:{os.environ['PATH'] if insist else ''}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "slurm", "-k", "attempts_are_counted", "tests/slurm/test_jobs.py"],
        cwd=REPO,
        env={**bare, "PATH": path, **insist},
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()[-1]
    if insist:
        assert done.returncode == 1 and "1 error" in said and "cluster.sh start" in done.stdout, done.stdout
    else:
        assert done.returncode == 0 and "1 skipped" in said and "no SLURM" in done.stdout, done.stdout
