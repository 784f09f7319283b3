"""A run as people start it, under `torchrun --nproc_per_node=1`: with a GPU, NCCL beside gloo, and DDP.

    python -m benchmarks.smoke            # on a GPU: VideoMAE-B, 16 frames of 224
    python -m benchmarks.smoke --dry      # a tiny model, on the CPU as well

It trains with train.clips_per_gpu=auto, is killed by SIGKILL, resumes, validates, and predicts test videos. Each row is
written when its step is done. Exit status 1 where something is not as it should be.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import about_line, arguments, device_of, machine, table, write
from vac_ddp.data.synthetic import Recipe, make_dataset
from vac_ddp.errors import DONE
from vac_ddp.report.lines import read_metrics
from vac_ddp.results.logits_file import read_views
from vac_ddp.runtime import distributed, torch_compat

STEPS, EVERY, KILLED = 24, 4, 9  # steps of the run, between checkpoints, and where it is killed
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
LIMIT_S = 200.0  # of one program


class Smoke:
    """A data set, a run, and the rows about it."""

    def __init__(self, options: Any, folder: Path) -> None:
        self.options, self.folder, self.run = options, folder, folder / "run"
        self.about = machine(device_of())
        self.rows: list[dict[str, Any]] = []
        recipe = Recipe(videos_per_class=12, test_per_class=2)
        make_dataset(folder / "data", recipe, workers=len(os.sched_getaffinity(0)))
        tiny = ["model.width=32", "model.depth=2", "model.heads=2", "clip.frames=4", "clip.size=32", "data.workers=1"]
        base = ["model.size=base", "clip.frames=16", "clip.size=224"]
        self.words = [
            *("model.weights=null", *(tiny if options.dry else base)),
            *(f"data.train={folder / 'data' / 'data_train'}", f"run.dir={self.run}", f"data.cache={folder / 'cache'}"),
            *("train.clips_per_gpu=auto", f"train.global_batch={8 if options.dry else 64}", "train.epochs=100"),
            *(f"train.max_steps={STEPS}", "optim.warmup_epochs=0", "log.every_steps=1", "health.checksum_every=5"),
            f"checkpoint.every_steps={EVERY}",
        ]

    def all(self) -> bool:
        """Every step; whether all were as they should be."""
        steps: dict[str, Callable[[], str]] = {
            "process group, all-reduce": self.group,
            "training, killed": self.killed,
            "resumed to its end": self.resumed,
            "validation": self.validated,
            "prediction": self.predicted,
        }
        for name, step in steps.items():
            begun = time.monotonic()
            try:
                seen, good = step(), True
            except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
                seen, good = f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}", False
            self.rows.append({"step": name, "seen": seen, "good": good, "seconds": time.monotonic() - begun})
            self.write(last=name == list(steps)[-1] or not good)
            if not good:
                return False
        return True

    def write(self, *, last: bool) -> None:
        """The table so far."""
        lines = ["# A run under torchrun", "", about_line("smoke", self.about), ""]
        rows = [
            [row["step"], row["seen"], f"{row['seconds']:.0f}", "yes" if row["good"] else "NO"] for row in self.rows
        ]
        lines += table(["what", "seen", "seconds", "as it should be"], rows)
        suffix = "gpu" if device_of().type == "cuda" else "cpu"
        result = {"about": self.about, "steps": self.rows}
        write(self.options.out, f"smoke_{suffix}", result, lines, dry=self.options.dry, shown=last)

    # ------------------------------------------------------------ the steps

    def group(self) -> str:
        """Which backends a process group has, and whether it reduces."""
        done = self.torchrun("-m", "benchmarks.smoke", "--rank")
        return done.stdout.strip().splitlines()[-1]

    def killed(self) -> str:
        """Train, and kill the rank once there is a checkpoint: torchrun ends with an error."""
        log = self.folder / "first.log"
        with log.open("w") as out:
            process = subprocess.Popen([*TORCHRUN, "-m", "vac_ddp.train", *self.words], stdout=out, stderr=out)
            try:
                end = time.monotonic() + LIMIT_S
                while self.steps()[-1:] < [KILLED]:
                    assert process.poll() is None, f"it ended by itself: {log.read_text()}"
                    assert time.monotonic() < end, f"step {KILLED} was not reached in {LIMIT_S:.0f} s"
                    time.sleep(0.05)
                for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
                assert process.wait(60) != 0, "torchrun took a killed rank for a good one"
            finally:
                process.kill()
                process.wait()
        described = next(line for line in log.read_text().splitlines() if "global batch" in line)
        assert max(self.run.glob("checkpoints/step-*.pt"), default=None) is not None, "no checkpoint was there"
        return f"killed at step {self.steps()[-1]}; {described.strip()}"

    def resumed(self) -> str:
        """Resume: every step is there once, and the losses are finite."""
        before = self.steps()[-1]
        self.torchrun("-m", "vac_ddp.train", *self.words, "run.resume=auto")
        assert self.steps() == list(range(1, STEPS + 1)), f"steps {self.steps()}"
        losses = [line["loss"] for line in self.lines("train")]
        assert np.isfinite(losses).all(), f"losses {losses}"
        rate = np.median([line["clips_per_s"] for line in self.lines("train")][before:])
        first, last = np.mean(losses[:5]), np.mean(losses[-5:])
        return f"{STEPS} steps, each once; loss {first:.2f} to {last:.2f}; {rate:.1f} clips/s"

    def validated(self) -> str:
        """The validations of all epochs, and the logits of the best one."""
        found = self.lines("epoch")
        kept = read_views(self.run / "validation.npz")
        top1 = float((kept.logits.mean(1).argmax(1) == kept.labels).mean())
        assert any(abs(line["val_top1"] - top1) < 1e-6 for line in found), f"{top1} is of no epoch"
        return f"{len(found)} epochs of {len(kept.ids)} validation videos, best top-1 {top1:.3f}"

    def predicted(self) -> str:
        """Test videos: every one has finite logits and a row."""
        test, out = self.folder / "data" / "data_test", self.folder / "predicted"
        words = ["--", "--run", str(self.run), "--data", str(test), "--out", str(out)]
        self.torchrun("-m", "vac_ddp.predict", *words)
        kept = read_views(out)
        rows = (out / "submission.csv").read_text().splitlines()[1:]
        assert np.isfinite(kept.logits).all(), "logits that are not finite"
        assert len(kept.ids) == len(rows) == sum(1 for _ in test.iterdir()), f"{len(rows)} rows"
        return f"{len(rows)} videos x {kept.logits.shape[1]} views, all finite"

    # ------------------------------------------------------------ what they need

    def torchrun(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A program under torchrun; AssertionError with what it said where it failed."""
        done = subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, of one kind."""
        found = read_metrics(self.run) if (self.run / "metrics.jsonl").exists() else []
        return [dict(line) for line in found if line["kind"] == kind]

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl."""
        return [line["step"] for line in self.lines("train")]


def rank() -> int:
    """In a rank: the process group, and a sum over it on each type of device."""
    device = distributed.start(timeout_s=60)
    group = dist.group.WORLD
    assert group is not None, "started by torchrun"
    names = {type(backend).__name__ for backend in torch_compat.backends(group)}
    for where in {device, torch.device("cpu")}:
        ones = torch.ones(1 << 20, device=where)
        dist.all_reduce(ones)
        assert float(ones.mean()) == dist.get_world_size(), f"sum on {where}"
    print(f"{device}: {', '.join(sorted(names))}", flush=True)
    dist.destroy_process_group()
    return DONE


def main(argv: list[str] | None = None) -> int:
    parser = arguments("smoke", __doc__.splitlines()[0])
    parser.add_argument("--rank", action="store_true", help="what a rank does; for this program itself")
    options = parser.parse_args(argv)
    if options.rank:
        return rank()
    with tempfile.TemporaryDirectory() as folder:
        return DONE if Smoke(options, Path(folder)).all() else 1


if __name__ == "__main__":
    sys.exit(main())
