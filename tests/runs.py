"""Tiny training runs for the tests: frames, settings, launches, and what a run left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.support import REPO, environment

DRIVER = REPO / "tests" / "drivers" / "fault.py"

TINY = """\
model: {weights: null, width: 32, depth: 2, heads: 2, patch: 16, drop_path: 0.2}
clip: {frames: 4, stride: 2, size: 32}
data: {group_by: none, workers: 1}
augment: {crop_scale: [0.5, 1.0], flip: 0.5, mixup: 0.8, cutmix: 1.0}
train: {epochs: 3, global_batch: 6, clips_per_gpu: 2, ema_decay: 0.9, label_smoothing: 0.1}
optim: {lr: 0.003, warmup_epochs: 1, layer_decay: 0.8, clip_norm: 1.0}
checkpoint: {every_steps: 3, keep: 20}
log: {every_steps: 1}
"""


def make_videos(folder: Path, *, classes: int = 3, videos: int = 7, frames: int = 9, size: int = 40) -> Path:
    """<folder>/<class>/<video>/0001.jpg...: noise around a colour of the class, the same on every call."""
    rng = np.random.default_rng(7)
    for label in range(classes):
        for video in range(videos):
            target = folder / f"class{label}" / f"v{video:02d}"
            target.mkdir(parents=True)
            colour = np.eye(3)[label % 3] * 120
            for frame in range(frames):
                pixels = (rng.random((size, size, 3)) * 80 + colour + frame * 4).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(target / f"{frame + 1:04d}.jpg", quality=90)
    return folder


class Workplace:
    """A folder with training and validation videos and the tiny settings, where runs are started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_videos(folder / "data_train")
        make_videos(folder / "data_val", videos=2)
        (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")

    def arguments(self, run: str, *words: str) -> list[str]:
        """The words of a training command that leaves its run in `run`."""
        return [
            f"--config={self.folder / 'tiny.yaml'}",
            f"data.train={self.folder / 'data_train'}",
            f"data.val={self.folder / 'data_val'}",
            f"data.cache={self.folder / 'cache'}",
            f"run.dir={self.folder / run}",
            *words,
        ]

    def train(
        self, run: str, *words: str, ranks: int = 2, fault: str = "", restarts: int = 0, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Train under torchrun; `fault` is what goes wrong, in the words of drivers/fault.py."""
        program = [str(DRIVER)] if fault else ["-m", "vac_ddp.train"]
        status = self.folder / f"{run}.status.json"
        status.unlink(missing_ok=True)
        return subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
                *(f"--max-restarts={restarts}", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"),
                *program,
                *self.arguments(run, *words),
            ],
            cwd=self.folder,
            env=environment(FAULT=fault, FAULT_DONE=str(self.folder / f"{run}.fault"), VAC_STATUS_FILE=str(status)),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def python(self, *words: str | Path, timeout: float = 240, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run `python WORDS` in this folder, in one process."""
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=self.folder,
            env=environment(**extra),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def alone(self, run: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Train in a single process, without torchrun."""
        return self.python("-m", "vac_ddp.train", *self.arguments(run, *words))

    def status(self, run: str) -> dict[str, Any]:
        """What the run wrote to VAC_STATUS_FILE."""
        return json.loads((self.folder / f"{run}.status.json").read_text(encoding="utf-8"))

    def lines(self, run: str, kind: str | None = None, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of one kind."""
        path = self.folder / run / name
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in found if kind is None or line["kind"] == kind]

    def state(self, run: str) -> dict[str, Any]:
        """The newest checkpoint of a run."""
        newest = max((self.folder / run / "checkpoints").glob("step-*.pt"))
        return torch.load(newest, weights_only=True)

    def steps(self, run: str) -> list[int]:
        """The step of every training line, in the order of the file."""
        return [line["step"] for line in self.lines(run, "train")]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested states differ, to the last bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        keys = [f"{where}.{k}" for k in a.keys() ^ b.keys()]
        return keys + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [where]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a} != {b}"]


def assert_same_end(place: Workplace, run: str, other: str) -> None:
    """Two runs ended in the same weights, moments, averages and positions, and printed the same losses."""
    a, b = place.state(run), place.state(other)
    assert a["position"] == b["position"]
    for part in ("model", "ema", "optimizer", "stopping", "tallies"):
        assert differences(a[part], b[part], part) == []
    figures = ("step", "epoch", "loss", "accuracy", "lr", "grad_norm")
    for kind in ("train", "epoch"):
        mine, theirs = place.lines(run, kind), place.lines(other, kind)
        assert [line["step"] for line in mine] == [line["step"] for line in theirs]
        for x, y in zip(mine, theirs, strict=True):
            assert {k: x.get(k) for k in figures} == {k: y.get(k) for k in figures}


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line of an error of the user's, whose exit status is 2."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def no_orphans(place: Workplace) -> list[str]:
    """Processes that still run with this workplace on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(place.folder) in words and "vac_ddp" in words + str(DRIVER):
                found.append(words)
    return found
