"""train.max_minutes on a real clock: whole, and interrupted and resumed, with short and with long steps.

    python -m tests.long.time_limit [--minutes 2] [--slack 20]

Ends with status 1 where a run takes longer than its minutes and `slack` seconds together, or leaves no usable best
weights. Prints what it measured. Two ranks under `vac train`; about four times the minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.runs import Workplace
from tests.support import environment

WORDS = ["train.epochs=100000", "train.ema_decay=null", "log.every_steps=20", "checkpoint.keep=2"]
SHAPES = {
    "short steps, many epochs": ["train.global_batch=6"],
    "long steps, an epoch takes a third of the limit": [
        *("model.width=192", "model.depth=6", "model.heads=3", "clip.size=112", "clip.frames=16", "clip.stride=1"),
        *("train.global_batch=6", "augment.repeats=3"),
    ],
}


def start(place: Workplace, run: str, words: list[str]) -> subprocess.Popen[str]:
    """`vac train --nproc 2` with its output in `<run>.txt`."""
    with (place.folder / f"{run}.txt").open("a") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "vac_ddp.cli", "train", "--nproc", "2", *place.arguments(run, *WORDS, *words)],
            cwd=place.folder,
            env=environment(),
            stdout=out,
            stderr=out,
            text=True,
        )


def one(place: Workplace, run: str, words: list[str], *, stop_after_s: float | None) -> float:
    """Train to the end, stopped once by SIGTERM or not; seconds of all starts. AssertionError: not as promised."""
    began = time.monotonic()
    process = start(place, run, words)
    if stop_after_s is not None:
        time.sleep(stop_after_s)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75, f"{run}: ended with {process.returncode}"
        process = start(place, run, [*words, "run.resume=auto"])
    assert process.wait() == 0, f"{run}: ended with {process.returncode}"
    took = time.monotonic() - began
    best = torch.load(place.folder / run / "best_videomae.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in best["model"].values())
    epochs = place.lines(run, "epoch")
    facts = json.loads(max((place.folder / run / "checkpoints").glob("*.json")).read_text())
    assert epochs[-1]["step"] == facts["step"] == facts["total_steps"], "the last epoch was not ended"
    assert "val_top1" in epochs[-1] and "top1" in best["metrics"]
    return took


def main() -> int:
    """Run all shapes; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--slack", type=float, default=20.0)
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        for number, (name, shape) in enumerate(SHAPES.items()):
            for stop in (None, 25 * options.minutes):
                run = f"run{number}{'' if stop is None else 'stopped'}"
                took = one(place, run, [*shape, f"train.max_minutes={options.minutes}"], stop_after_s=stop)
                late = took > 60 * options.minutes + options.slack
                bad += late
                how = "whole" if stop is None else f"stopped after {stop:.0f} s and resumed"
                print(f"{name}, {how}: {took:.1f} s{' TOO LONG' if late else ''}")
                for line in re.findall(r"time limit .*", (place.folder / run / "log.txt").read_text()):
                    print(f"  {line}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
