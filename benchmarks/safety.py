"""What the safety of training costs a step: agreement on signals, checks of the ranks, background checkpoints.

    torchrun --nproc_per_node=2 -m benchmarks.safety            # gloo on the CPU, or NCCL on GPUs

One real training run (`open_trainer`, small VideoMAE, synthetic frames) in which the parts are timed where the trainer
calls them. A checkpoint is written at every fifth step: steps with and without one in flight stand side by side.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader import facts
from vac_ddp.arguments import parse_settings
from vac_ddp.commands import synth_command
from vac_ddp.runtime import distributed
from vac_ddp.training import health
from vac_ddp.training.trainer import Trainer, open_trainer

RESULTS = Path(__file__).parent / "results" / "safety"
SAVE_EVERY = 5

WORDS = [
    "model.weights=null",
    "model.width=192",
    "model.depth=6",
    "model.heads=3",
    "clip.frames=8",
    "clip.size=64",
    "train.global_batch=16",
    "train.clips_per_gpu=8",
    "train.epochs=8",
    "train.ema_decay=0.99",
    "data.group_by=none",
    "data.val_fraction=0",
    "data.workers=1",
    "optim.lr=1e-3",
    "log.every_steps=10",
    "health.checksum_every=10",
    "checkpoint.every_minutes=null",
]


def timed(spent: dict[str, list[float]], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, its seconds noted under `name`."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return call(*arguments, **named)
        finally:
            spent[name].append(time.perf_counter() - begun)

    return wrapped


def watch(trainer: Trainer, spent: dict[str, list[float]]) -> None:
    """Put a clock around the parts of a trainer, and around its steps with and without a checkpoint in flight."""
    trainer._agree = timed(spent, "agreement", trainer._agree)
    trainer.log.read = timed(spent, "reading the counters", trainer.log.read)
    trainer.save = timed(spent, "snapshot for a checkpoint", trainer.save)
    health.check_same_weights = timed(spent, "comparison of weights", health.check_same_weights)
    run = trainer.stepper.run

    def step(*arguments: Any, **named: Any) -> None:
        writer = trainer.saver.writer
        flying = writer is not None and writer.thread is not None and writer.thread.is_alive()
        begun = time.perf_counter()
        run(*arguments, **named)
        spent["step beside a save" if flying else "step"].append(time.perf_counter() - begun)

    trainer.stepper.run = step


def table(spent: dict[str, list[float]], every: dict[str, int]) -> list[dict[str, Any]]:
    """Median milliseconds of each part, how often it happens, and its share of a step."""
    step = statistics.median(spent["step"][3:])
    rows = [{"part": "step (forward, backward, optimizer)", "ms": 1000 * step, "every": 1, "share": 1.0}]
    for name, often in every.items():
        if spent[name]:
            cost = statistics.median(spent[name])
            rows.append({"part": name, "ms": 1000 * cost, "every": often, "share": cost / often / step})
    if spent["step beside a save"]:
        beside = statistics.median(spent["step beside a save"])
        rows.append({"part": "step beside a background save", "ms": 1000 * beside, "every": 0, "share": beside / step})
    return rows


def main() -> None:
    """Run once and write the table."""
    device = distributed.pick_device()
    distributed.start(device, timeout_s=120)
    folder = Path(distributed.broadcast_object(tempfile.mkdtemp() if distributed.is_main() else None))
    if distributed.is_main():
        synth_command.main([str(folder / "data"), "--videos-per-class", "16", "--test-per-class", "1"])
    distributed.barrier()
    words = [*WORDS, f"data.train={folder / 'data' / 'data_train'}", f"run.dir={folder / 'run'}"]
    words += [f"data.cache={folder / 'cache'}", f"checkpoint.every_steps={SAVE_EVERY}"]
    settings = parse_settings(words).config
    spent: dict[str, list[float]] = defaultdict(list)
    with open_trainer(settings, device) as trainer:
        watch(trainer, spent)
        trainer.run()
        size = max(path.stat().st_size for path in (folder / "run" / "checkpoints").glob("*.pt"))
    every = {
        "agreement": 1,
        "reading the counters": settings.log.every_steps,
        "comparison of weights": settings.health.checksum_every,
        "snapshot for a checkpoint": SAVE_EVERY,
    }
    rows = table(spent, every)
    if distributed.is_main():
        about = {**facts(), "ranks": distributed.world_size(), "threads": torch.get_num_threads()}
        lines = [
            "# Cost of the safety of training",
            "",
            f"{about['processor']}, {about['ranks']} ranks x {about['threads']} threads, checkpoint of "
            f"{size / 1e6:.1f} MB, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}. One run; medians.",
            "",
            "| part | ms | every ... steps | share of a step |",
            "|---|---|---|---|",
            *(f"| {r['part']} | {r['ms']:.2f} | {r['every'] or '-'} | {100 * r['share']:.2f} % |" for r in rows),
            "",
            "Snapshots are far rarer in use (every epoch, and every ten minutes) than here.",
            "",
        ]
        print("\n".join(lines))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
        RESULTS.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=2), encoding="utf-8")
    distributed.barrier()
    distributed.end(0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
