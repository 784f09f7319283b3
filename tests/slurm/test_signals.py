"""What reaches whom: a job whose batch script, task and task's child write down their signals, and the events of SLURM.

The table of README.md is made of these; a SLURM that behaves otherwise fails here before it fails a run.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import Jobs
from tests.slurm.probes import EVENTS, PROBE, Probe, alive
from tests.support import REPO

pytestmark = pytest.mark.slurm
README = Path(__file__).with_name("README.md")


def shown(seen: dict[str, list[str]], role: str, killed: bool) -> str:
    """A cell of the table: different signals by name (SLURM keeps no order), and KILL where that ended the process."""
    names = sorted(set(seen[role]))
    return " ".join([*names, *(["KILL"] if killed else [])]) or "-"


def table_of_readme() -> dict[str, tuple[str, str, str]]:
    """event: (batch script, task, its child), as README.md has it."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    return {row[0]: row[1:] for row in rows if row[0] in EVENTS}


def test_what_reaches_whom_is_what_the_readme_says(jobs: Jobs) -> None:
    """A job for each event, all at once, for most of the time is waiting; preemption last, for it takes whole nodes."""
    cluster = jobs.cluster
    probes = jobs.waiting | {event: Probe(cluster, jobs.folder, event) for event in EVENTS if event not in jobs.waiting}
    found: dict[str, tuple[str, ...]] = {}

    pids: dict[str, list[int]] = {}  # those of the first attempt: a job that is requeued has others later

    def note(event: str, *, killed: bool) -> None:
        if killed:
            cluster.until(lambda: not any(map(alive, pids[event])), 240, lambda: f"{event} ends nothing")
        else:
            cluster.until(lambda: any(probes[event].seen().values()), 150, lambda: f"{event} reaches nobody")
            cluster.run("srun", "--nodes=2", "true")  # what is sent to several is sent by now
        seen = probes[event].seen()
        found[event] = tuple(shown(seen, role, killed) for role in ("batch", "task", "child"))

    for event, probe in probes.items():
        cluster.until(probe.ready, 120, lambda event=event: f"{event} is not ready")
        pids[event] = probe.pids()
        if EVENTS[event][1].startswith("sc"):
            cluster.run(*EVENTS[event][1].replace("J", probe.job).split())
    for event in [event for event in EVENTS if "-s USR1" in event]:
        note(event, killed=False)
    for event in [event for event in EVENTS if "-s USR1" not in event and EVENTS[event][1] != "preempt"]:
        note(event, killed=True)
    cluster.run("scancel", *[probes[event].job for event in EVENTS if EVENTS[event][1] != "preempt"])
    other = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    cluster.sbatch(*other, cwd=jobs.folder)
    note("preemption, 10 s of grace", killed=True)
    cluster.run("scancel", *[probe.job for probe in probes.values()])
    print(found)
    # linuxproc tells the children as well
    columns = 3 if cluster.track() == "cgroup" else 2
    assert {e: cells[:columns] for e, cells in found.items()} == {e: c[:columns] for e, c in table_of_readme().items()}


# event: (signal, whether torchrun has the flags of slurm/common.sh)
RANKS = {
    "`scancel -s USR1 J`, as `slurm/common.sh` starts it": ("USR1", True),
    "`scancel -s TERM J`, as `slurm/common.sh` starts it": ("TERM", True),
    "`scancel -s USR1 J`, without `--signals-to-handle`": ("USR1", False),
}


def flags_of_the_scripts() -> list[str]:
    """What slurm/common.sh tells torchrun about signals."""
    text = (REPO / "slurm" / "common.sh").read_text(encoding="utf-8")
    return re.findall(r"--signals-to-handle=\S+", text)


@pytest.mark.parametrize("event", RANKS)
def test_what_torchrun_hands_on_is_what_the_readme_says(jobs: Jobs, event: str, tmp_path: Path) -> None:
    name, flagged = RANKS[event]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    loader = [sys.executable, str(PROBE), str(tmp_path), "loader"]
    words = [*torchrun, *(flags_of_the_scripts() if flagged else []), str(PROBE), str(tmp_path), "rank", *loader]
    script = tmp_path / "batch.sh"
    script.write_text(f"#!/bin/bash\nsrun --input=none {shlex.join(words)}\n")
    job = jobs.cluster.sbatch("--cpus-per-task=1", "--output=log", str(script), cwd=tmp_path)
    ready = [f"ready.{role}.*" for role in ("rank", "loader")]
    jobs.cluster.until(lambda: all(list(tmp_path.glob(one)) for one in ready), 120, lambda: jobs.log(job))
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("ready.*")]
    jobs.cluster.run("scancel", "-s", name, job)
    if flagged:
        jobs.cluster.until((tmp_path / "seen").exists, 60, lambda: event)
        agent = name
    else:  # the agent dies of it, and SLURM kills what it leaves behind with the step
        jobs.cluster.until(lambda: not any(map(alive, pids)), 90, lambda: event)
        agent = f"{name}, dies"
    jobs.cluster.run("srun", "--nodes=2", "true")
    lines = (tmp_path / "seen").read_text().splitlines()
    seen = {role: [line.split()[1] for line in lines if line.split()[0] == role] for role in ("rank", "loader")}
    (tmp_path / "end").touch()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    found = (agent, *(shown(seen, role, not flagged) for role in ("rank", "loader")))
    print(event, found)
    columns = 3 if jobs.cluster.track() == "cgroup" else 2
    assert found[:columns] == {row[0]: row[1:] for row in rows}[event][:columns]
