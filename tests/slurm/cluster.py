"""The tests' cluster: started by cluster.sh, asked by sbatch and scontrol."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import REPO, environment

SCRIPT = Path(__file__).with_name("cluster.sh")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


def required() -> bool:
    """Whether a cluster that does not start is a failure, not a skip."""
    return os.environ.get("CI", "").lower() in ("1", "true") or os.environ.get("VAC_SLURM") == "1"


def why_not() -> str | None:
    """Why no cluster is started here where none is required, in one line."""
    if required():
        return None
    if os.geteuid() != 0:
        return "no SLURM cluster: starting one needs root (sudo env VAC_SLURM=1 ... insists)"
    if not (shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("munged")):
        return "no SLURM on this machine (VAC_SLURM=1 installs Debian's packages and starts a cluster)"
    return None


class Cluster:
    """Two nodes, vn1 and vn2, with the file system of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def script(self, *words: str) -> None:
        """Run cluster.sh."""
        # Not captured by pipes: the daemons keep what they inherit open.
        with (self.folder.parent / f"{self.folder.name}.log").open("a+") as log:
            done = subprocess.run([str(SCRIPT), words[0], str(self.folder), *words[1:]], stdout=log, stderr=log)
            log.seek(0)
            assert done.returncode == 0, f"cluster.sh {' '.join(words)}: {log.read()}"

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon of a node alone: what it had started runs on."""
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)

    def track(self) -> str:
        """How slurmd holds the processes of a job together: cgroup or linuxproc."""
        return self.run("scontrol", "show", "config").partition("proctrack/")[2].split()[0]

    def run(self, *words: str, cwd: Path | None = None, **extra: str) -> str:
        """Run a command with the cluster's configuration; its output."""
        done = subprocess.run(
            words, cwd=cwd, env=environment(**self.environment, **extra), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def sbatch(self, *words: str, cwd: Path, **extra: str) -> str:
        """Submit `sbatch WORDS` in a folder; the job's number."""
        given = {"VAC_HOME": str(REPO), "VAC_PYTHON": os.environ.get("VAC_PYTHON", "") or _python(), **extra}
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **given).strip()

    def info(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]))

    def wait(self, job: str, *states: str, timeout: float = 180) -> dict[str, str]:
        """Wait until the job is in one of `states` (default: any end), and for good."""
        states = states or ENDED
        self.until(lambda: self.info(job)["JobState"] in states, timeout, lambda: f"{job}: {self.info(job)}")
        return self.info(job)

    def until(self, met: Callable[[], bool], timeout: float, what: Callable[[], str]) -> None:
        """Poll until `met()`; what SLURM and the machine do is not ours to be told of."""
        end = time.monotonic() + timeout
        while not met():
            assert time.monotonic() < end, f"not within {timeout:.0f} s: {what()}"
            time.sleep(0.1)


def _python() -> str:
    import sys

    return sys.executable
