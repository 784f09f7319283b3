"""Trainings whose processes are killed by `kill -9` at random: each ends as the one that nobody disturbed.

    python -m tests.long.kills                          # 100 kills: about 15 minutes on two free cores
    python -m tests.long.kills --kills 20 --seed 7      # the seed of a run is printed

A kill hits rank 0, rank 1, the torchrun agent or a loader process, while the processes start, in a step, or after the
last one. Whoever is left then ends by itself (the agent starts the ranks again where it may), and the same command is
given again until it ends with status 0. Compared with the undisturbed run: weights, averages, moments, printed figures
and best file, to the bit, and each step once in metrics.jsonl. What was lost goes to benchmarks/results/kills.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.loader import facts
from tests.runs import Workplace, assert_same_end, differences
from tests.support import REPO, environment
from vac_ddp.training import checkpoint

VICTIMS = ("rank 0", "rank 1", "agent", "loader")
LIMIT_S = 300.0  # for one thing to happen, on a machine however busy
WORDS = ["checkpoint.every_steps=2", "checkpoint.keep=3", "train.epochs=12"]
RESULTS = REPO / "benchmarks" / "results"


@dataclass(kw_only=True)
class Kill:
    """One kill: what was planned, and what came of it."""

    victim: str
    phase: str  # start: while the processes start; step: after the line of `step`; end: after that of the last step
    step: int
    delay_s: float
    restarts: int  # that the agent may make in this launch
    reached: int = 0  # the last step in metrics.jsonl when all ranks were gone
    saved: int = 0  # the step of the newest checkpoint at that time


@dataclass(kw_only=True)
class Ended:
    """A training that came through."""

    kills: list[Kill] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def repeated(self) -> int:
        """Steps that were made again."""
        return sum(max(0, kill.reached - kill.saved) for kill in self.kills)


# ---------------------------------------------------------------- processes


def parents() -> dict[int, int]:
    """The parent of every process that is no zombie."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(entry.name)] = int(parent)
    return found


def rank_of(pid: int) -> str | None:
    """RANK in a process's environment."""
    with contextlib.suppress(OSError):
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"RANK="):
                return word[5:].decode()
    return None


def command_of(pid: int) -> bytes:
    """A process's command line."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def processes(agent: int) -> dict[str, list[int]]:
    """The processes of a launch by VICTIMS; `ranks`: all ranks. A loader process is a fork of its rank."""
    found: dict[str, list[int]] = {"agent": [agent], "loader": [], "ranks": []}
    tree = parents()
    for pid in (pid for pid, parent in tree.items() if parent == agent):
        rank = rank_of(pid)
        if rank is not None:
            found["ranks"].append(pid)
            found[f"rank {rank}"] = [pid]
            found["loader"] += [p for p, parent in tree.items() if parent == pid and command_of(p) == command_of(pid)]
    return found


def until(happened: Callable[[], bool], what: str) -> None:
    """Wait for something."""
    end = time.monotonic() + LIMIT_S
    while not happened():
        if time.monotonic() > end:
            raise AssertionError(f"not within {LIMIT_S:.0f} s: {what}")
        time.sleep(0.005)


# ---------------------------------------------------------------- one training


class Training:
    """One run directory, started again until it is done."""

    def __init__(self, place: Workplace, run: str, words: list[str]) -> None:
        self.place, self.run, self.words = place, run, words
        self.metrics = place.folder / run / "metrics.jsonl"
        self.log = place.folder / f"{run}.out"
        self.agent: subprocess.Popen[bytes] | None = None
        self.before: tuple[int, int] | None = None  # metrics.jsonl when this attempt began

    def state(self) -> tuple[int, int] | None:
        """Which file metrics.jsonl is, and its size: resuming writes it anew."""
        with contextlib.suppress(OSError):
            stat = self.metrics.stat()
            return stat.st_ino, stat.st_size
        return None

    def reached(self) -> int:
        """The last step in metrics.jsonl."""
        with contextlib.suppress(OSError):
            for line in reversed(self.metrics.read_bytes().splitlines()):
                with contextlib.suppress(ValueError):  # a line that is being written
                    return int(json.loads(line)["step"])
        return 0

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        found = checkpoint.numbered(self.place.folder / self.run / "checkpoints")
        return int(found[-1].stem.partition("-")[2]) if found else 0

    def start(self, restarts: int) -> None:
        """Give the command."""
        self.before = self.state()
        words = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")]
        words += [f"--max-restarts={restarts}", "-m", "vac_ddp.train"]
        words += self.place.arguments(self.run, *self.words, "run.resume=auto")
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(words, cwd=self.place.folder, env=environment(), stdout=log, stderr=log)

    def ended(self) -> bool:
        assert self.agent is not None
        return self.agent.poll() is not None

    def due(self, kill: Kill, last: int) -> bool:
        """Whether the moment of a kill has come, but for its delay."""
        if kill.phase == "start":
            return bool(processes(self.pid())["ranks"]) or kill.victim == "agent"
        now = self.state()
        return now is not None and now != self.before and self.reached() >= (last if kill.phase == "end" else kill.step)

    def pid(self) -> int:
        assert self.agent is not None
        return self.agent.pid

    def strike(self, kill: Kill, last: int) -> bool:
        """Wait for the moment and kill; False where the launch ended before."""
        until(lambda: self.ended() or self.due(kill, last), f"{kill}, see {self.log}")
        time.sleep(kill.delay_s)  # the random part of the moment
        found: dict[str, list[int]] = {}

        def there() -> bool:
            found.clear()
            found.update(processes(self.pid()))
            return bool(found.get(kill.victim))

        until(lambda: self.ended() or there(), f"{kill.victim} is not there, see {self.log}")
        if self.ended():
            kill.delay_s /= 2  # it would have come after the end: sooner in the next training
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.Random(kill.delay_s).choice(found[kill.victim]), signal.SIGKILL)
            until(lambda: not set(found["ranks"]) & parents().keys(), f"ranks after the kill of {kill.victim}")
            kill.reached, kill.saved = self.reached(), self.saved()
            self.before = self.state()
            return True
        return False

    def through(self, kills: list[Kill], last: int) -> Ended:
        """Train to the end, with the first of `kills`, until one leaves nothing to train."""
        begun, done, kills = time.monotonic(), Ended(), list(kills)
        while True:
            self.start(kills[0].restarts if kills else 0)
            while kills and not self.ended() and self.strike(kills[0], last):
                done.kills.append(kills.pop(0))
                if done.kills[-1].reached >= last:  # ranks without an agent train on: the next kill is another run's
                    kills = []
            assert self.agent is not None
            if self.agent.wait(LIMIT_S) == 0:
                done.seconds = time.monotonic() - begun
                return done


# ---------------------------------------------------------------- many


def planned(seed: int, count: int, *, last: int, start_s: float, step_s: float, each: int) -> list[Kill]:
    """`count` kills in groups of `each`, about those of one training: their steps rise, some end with an end."""
    draw = random.Random(seed)
    found: list[Kill] = []
    while len(found) < count:
        size = min(each, count - len(found))
        phases = draw.choices(["start", "step"], weights=[1, 3], k=size)
        if draw.random() < 0.5:
            phases[-1] = "end"
        steps = sorted(draw.randint(1, last - 1) for _ in phases)
        for phase, step in zip(phases, steps, strict=True):
            spread = start_s if phase == "start" else 3 * step_s if phase == "step" else start_s / 4
            found.append(
                Kill(
                    victim=draw.choice(VICTIMS), phase=phase, step=step, delay_s=draw.uniform(0, spread),
                    restarts=draw.choice([0, 0, 2]),
                )
            )  # fmt: skip
    return found


def compare(place: Workplace, whole: str, run: str) -> None:
    """The two runs ended alike, and each step is once in metrics.jsonl."""
    assert_same_end(place, whole, run)
    assert place.steps(run) == sorted(set(place.steps(run)))
    best = [torch.load(place.folder / one / "best_videomae.pt", weights_only=True) for one in (whole, run)]
    for part in ("model", "classes", "metrics"):
        assert differences(best[0][part], best[1][part], part) == []
    left = [path.name for path in (place.folder / run).rglob("*") if path.name.endswith((".partial", ".lock"))]
    assert left == []


def undisturbed(place: Workplace, run: str, words: list[str]) -> tuple[int, float, float]:
    """Train once in peace; (steps, seconds from the command to the first step, seconds from there to the end)."""
    training, begun = Training(place, run, words), time.monotonic()
    training.start(restarts=0)
    until(lambda: training.reached() > 0 or training.ended(), f"the first step, see {training.log}")
    first = time.monotonic()
    assert training.agent is not None
    assert training.agent.wait(LIMIT_S) == 0, training.log.read_text()
    return training.reached(), first - begun, time.monotonic() - first


def run_all(place: Workplace, count: int, seed: int, words: list[str], each: int) -> tuple[list[Ended], float, int]:
    """All kills; (the trainings, seconds of the undisturbed one, its steps)."""
    print(f"{count} kills with the seed {seed}", flush=True)
    last, start_s, rest_s = undisturbed(place, "whole", words)
    kills = planned(seed, count, last=last, start_s=start_s, step_s=rest_s / last, each=each)
    found: list[Ended] = []
    while kills:
        run = f"killed{len(found)}"
        found.append(Training(place, run, words).through(kills, last))
        kills = kills[len(found[-1].kills) :]
        struck = ", ".join(f"{kill.victim} {kill.phase} {kill.reached}->{kill.saved}" for kill in found[-1].kills)
        print(f"{run}: {found[-1].seconds:.0f} s, {struck}", flush=True)
        compare(place, "whole", run)
    return found, start_s + rest_s, last


def report(found: list[Ended], seconds: float, last: int, seed: int) -> tuple[dict[str, object], list[str]]:
    """What it cost, for programs and for people."""
    kills = [kill for ended in found for kill in ended.kills]
    repeated = sum(ended.repeated for ended in found)
    spent = sum(ended.seconds for ended in found)
    lost = spent - seconds * len(found)
    about = facts()
    result = {
        "about": about, "seed": seed, "kills": len(kills), "trainings": len(found), "steps": last,
        "undisturbed_s": seconds, "disturbed_s": spent, "repeated_steps": repeated,
        "list": [[asdict(kill) for kill in ended.kills] for ended in found],
    }  # fmt: skip
    victims, phases = (Counter(getattr(kill, name) for kill in kills) for name in ("victim", "phase"))
    total = last * len(found)
    lines = [
        f"# {len(kills)} random kills",
        "",
        f"`python -m tests.long.kills --kills {len(kills)} --seed {seed}`, {about['date']}, {about['processor']} "
        f"({about['cores']} cores, load {about['load_average']} at the end), 2 ranks with a loader process each, a "
        "checkpoint every 2 steps.",
        "",
        f"{len(found)} trainings of {last} steps, each one equal to the undisturbed one to the bit, each step once in "
        "metrics.jsonl.",
        "",
        "| | |",
        "|---|---|",
        f"| killed | {', '.join(f'{name}: {victims[name]}' for name in VICTIMS)} |",
        f"| when | {', '.join(f'{name}: {phases[name]}' for name in ('start', 'step', 'end'))} |",
        f"| steps repeated | {repeated}, {repeated / len(kills):.2f} per kill |",
        f"| goodput in steps | {total / (total + repeated):.3f} |",
        f"| seconds lost | {lost:.0f}, {lost / len(kills):.1f} per kill (undisturbed training: {seconds:.1f} s) |",
        "",
        "The seconds are those of starting processes again: importing torch, reading data and checkpoint. They are the",
        "same for long trainings; a kill there costs them and half the time between checkpoints on average.",
    ]
    return result, lines


def main(argv: list[str] | None = None) -> None:
    """Kill, compare, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.long.kills", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="default: a random one, printed")
    parser.add_argument("--each", type=int, default=9, help="kills planned for one training (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kills.json and kills.md (%(default)s)")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))  # stays where a run did not end as it should
    print(f"in {folder}", flush=True)
    found, seconds, last = run_all(Workplace(folder), args.kills, args.seed, WORDS, args.each)
    shutil.rmtree(folder)
    result, lines = report(found, seconds, last, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kills.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (args.out / "kills.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
