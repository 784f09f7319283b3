"""Training jobs of the tests: submitted, held at a step, disturbed, and compared with an undisturbed one."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.runs import Workplace, assert_same_end
from tests.slurm.cluster import Cluster
from tests.slurm.probes import EVENTS, Probe
from tests.support import REPO

HELD = "tests.drivers.hold"

LIMITS = {
    # what saves before the time limit: the trainer, which knows the end of its job, or SLURM's warning
    "own": (
        ["checkpoint.before_end_s=90", "log.wandb=offline"],
        "B:USR1@5",
        "the end of the allocation: saving at step",
    ),
    "warned": (["checkpoint.before_end_s=0"], "B:USR1@65", "SIGUSR1: saving at step"),
}


class Jobs:
    """A workplace whose runs are SLURM jobs."""

    def __init__(self, cluster: Cluster, place: Workplace) -> None:
        self.cluster, self.place, self.folder = cluster, place, place.folder
        self.whole = ""
        self.limited: dict[str, str] = {}
        self.waiting: dict[str, Probe] = {}

    def start_what_waits(self) -> None:
        """Submit what has to wait for a time limit, so that it does so while other tests work."""
        for name, (words, signal, _) in LIMITS.items():
            sbatch = ("--time=3", f"--signal={signal}")
            self.limited[name] = self.train(f"limit_{name}", *words, sbatch=sbatch, hold="5")
        for event, (_, what) in EVENTS.items():
            if what == "later":
                self.waiting[event] = Probe(self.cluster, self.folder, event)

    def words(self, run: str, *words: str) -> list[str]:
        """The settings of a run; no checkpoints but those of epochs and of interruptions."""
        return self.place.arguments(run, "checkpoint.every_steps=null", *words)

    def train(
        self, run: str, *words: str, nodes: int = 1, sbatch: tuple[str, ...] = (), hold: str = "", **extra: str
    ) -> str:
        """Submit slurm/train.sh with one rank on each of two nodes, or two on one; the job's number.

        hold: steps at which rank 0 waits for what will disturb it (drivers/hold.py).
        """
        if hold:
            extra |= {"VAC_MODULE": HELD, "HOLD_AT": hold, "HOLD_MARK": str(self.mark(run))}
        gpus = f"--gpus-per-node={2 // nodes}"  # stand-ins: a rank a GPU
        sbatch = ("--cpus-per-task=2", *sbatch)
        return self.cluster.sbatch(
            f"--nodes={nodes}", gpus, *sbatch, str(REPO / "slurm" / "train.sh"),
            *self.words(run, *words), cwd=self.folder, **extra,
        )  # fmt: skip

    def mark(self, run: str) -> Path:
        """The beginning of the names of the files that say where a run is held."""
        return self.folder / f"{run}.held"

    def held(self, job: str, run: str, step: int) -> None:
        """Wait until the run is held before a step."""
        path = Path(f"{self.mark(run)}.{step}")
        self.cluster.until(path.exists, 180, lambda: f"{path.name}: {self.cluster.info(job)}\n{self.log(job)}")

    def release(self, run: str, step: int) -> None:
        """Let a run that is held go on."""
        Path(f"{self.mark(run)}.{step}.go").touch()

    def processes(self, run: str) -> list[int]:
        """Ranks and loader processes of a run, by their command lines."""
        word = f"run.dir={self.folder / run}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes()
                    if (
                        word in words
                        and b"torch.distributed.run" not in words
                        and b"slurm" not in words.split(b"\0")[1]
                    ):
                        found.append(int(entry.name))
        return found

    def log(self, job: str, name: str = "vac-train") -> str:
        """What the job wrote."""
        path = self.folder / f"{name}-{job}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else f"no {path.name}"

    def wandb_ids(self, run: str) -> list[str]:
        """The W&B ids of a run's attempts, in the order of time (folders are offline-run-<time>-<id>)."""
        return [path.name.rpartition("-")[2] for path in sorted((self.folder / run / "wandb").glob("offline-run-*"))]

    def came_through(self, job: str, run: str, *, restarts: int, wandb: int = 0) -> None:
        """The job is done after so many restarts, and its run is the undisturbed one in everything it left.

        wandb: attempts that told W&B of it, all under one id; 0 where the run does not use it.
        """
        info = self.cluster.wait(job)
        assert (info["JobState"], info["ExitCode"]) == ("COMPLETED", "0:0"), self.log(job)
        assert info["Restarts"] == str(restarts), self.log(job)
        assert_same_end(self.place, "whole", run)
        steps = self.place.steps(run)
        assert steps == sorted(set(steps)) == list(range(1, 13))
        ids = self.wandb_ids(run)
        assert len(ids) == wandb and len(set(ids)) == min(wandb, 1), ids
        assert not (self.folder / run / "interrupted.json").exists()
        assert not (self.folder / f".vac-status-{job}-{restarts}.json").exists(), "the script leaves nothing behind"
