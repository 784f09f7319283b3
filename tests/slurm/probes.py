"""Jobs whose batch script, task and child of the task write down the signals that reach them, and what may happen."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.support import REPO

PROBE = REPO / "tests" / "drivers" / "probe.py"

# The batch script becomes a probe as well: bash loses one of two trapped signals that arrive together.
BATCH = """#!/bin/bash
exec PYTHON PROBE FOLDER batch srun --input=none --kill-on-bad-exit=0 \
    PYTHON PROBE FOLDER task PYTHON PROBE FOLDER child
"""

# event: (words for sbatch, what happens). `later`: SLURM acts by itself, a minute or so after the start.
EVENTS = {
    "`scancel -s USR1 J`": ((), "scancel -s USR1 J"),
    "`scancel -b -s USR1 J`": ((), "scancel -b -s USR1 J"),
    "`scancel -f -s USR1 J`": ((), "scancel -f -s USR1 J"),
    "time limit, `--signal=USR1@30`": (("--time=1", "--no-requeue", "--signal=USR1@30"), "later"),
    "time limit, `--signal=B:USR1@30`": (("--time=1", "--no-requeue", "--signal=B:USR1@30"), "later"),
    "time limit": (("--time=1", "--no-requeue"), "later"),
    "`scancel J`": ((), "scancel J"),
    "`scontrol requeue J`": (("--requeue",), "scontrol requeue J"),
    "preemption, 10 s of grace": (("--requeue",), "preempt"),
}


class Probe:
    """One job that writes down what reaches it."""

    def __init__(self, cluster: Cluster, folder: Path, event: str) -> None:
        self.cluster, words = cluster, EVENTS[event][0]
        self.folder = folder / f"probe{list(EVENTS).index(event)}"
        self.folder.mkdir()
        script = self.folder / "batch.sh"
        text = BATCH.replace("PYTHON", shlex.quote(sys.executable)).replace("PROBE", str(PROBE))
        script.write_text(text.replace("FOLDER", str(self.folder)))
        self.job = self.cluster.sbatch(
            "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--output=/dev/null", *words, str(script), cwd=self.folder
        )

    def ready(self) -> bool:
        return all(list(self.folder.glob(f"ready.{role}.*")) for role in ("batch", "task", "child"))

    def pids(self) -> list[int]:
        return [int(path.suffix[1:]) for path in self.folder.glob("ready.*")]

    def seen(self) -> dict[str, list[str]]:
        lines = (self.folder / "seen").read_text().splitlines() if (self.folder / "seen").exists() else []
        return {
            role: [line.split()[1] for line in lines if line.split()[0] == role] for role in ("batch", "task", "child")
        }


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
