"""Accuracy and processor time where a part of the tokens is computed in training.

    python -m benchmarks.tokens quickstart                     # made motion videos, fractions x policies x seeds
    python -m benchmarks.tokens clips --data data_train        # one's own clips: folds x seeds, paired differences
    python -m benchmarks.tokens step                           # VideoMAE-B 16x224, beside Hugging Face's class
    python -m benchmarks.tokens quickstart --dry               # tiny

Every training is a process of its own with one thread; validated is with all tokens. Time is the processor time of
forward and backward passes, so that several trainings can run at once (`--jobs`).
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import scipy.stats
import torch

from benchmarks.common import about_line, arguments, machine, our_training, settings_for, table, write
from benchmarks.peers import hf_model
from tests.frame_data import random_batch
from vac_ddp.arguments import parse_settings
from vac_ddp.commands.synth_command import main as synth
from vac_ddp.runtime import distributed
from vac_ddp.training.trainer import open_trainer

ALL = "all"
REACHED = 0.95  # the validation accuracy whose time is compared
SEEN_AS_SAFE = -0.05  # lower end of the interval of the difference on real clips
Curve = list[tuple[float, float]]  # (processor seconds so far, validation accuracy) of every validation


def train(words: list[str]) -> Curve:
    """Train with these settings in this process, on one thread."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    distributed.start(device, timeout_s=600)
    settings = parse_settings(words).config
    curve: Curve = []
    busy = 0.0
    with open_trainer(settings, device) as trainer:
        note = trainer.tracker.write

        def keep(kind: str, step: int, **figures: Any) -> None:
            nonlocal busy
            if kind == "train":
                busy += figures.get("forward_s", 0.0) + figures.get("backward_s", 0.0)
            if kind == "epoch" and "val_top1" in figures:
                curve.append((busy, figures["val_top1"]))
            note(kind, step, **figures)

        trainer.tracker.write = keep  # type: ignore[method-assign]
        trainer.tracker.say = lambda *_, **__: None  # type: ignore[method-assign]
        trainer.stepper._now = lambda host=None: time.process_time()  # type: ignore[method-assign]
        trainer.run()
    return curve


def train_all(runs: dict[str, list[str]], folder: Path, jobs: int) -> dict[str, Curve]:
    """Train every run, `jobs` at a time, in processes of their own; curves by name. `folder` keeps what is done."""
    found: dict[str, Curve] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {}
        for name, words in runs.items():
            kept = folder / f"{name}.json"
            if kept.exists():
                found[name] = [(seconds, top1) for seconds, top1 in json.loads(kept.read_text())]
            else:
                where = [f"run.dir={folder / name}", "run.resume=none", "run.overwrite=true"]  # whole or not counted
                waiting[name] = pool.submit(train, [*words, "log.every_steps=1", *where])
        for name, curve in waiting.items():
            found[name] = curve.result()
            (folder / f"{name}.json").write_text(json.dumps(found[name]))
            print(f"  {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def ways(fractions: list[float], policies: list[str]) -> dict[str, list[str]]:
    """Settings by what is kept."""
    kept = {
        f"{policy} {fraction:g}": [f"train.keep_tokens={fraction}", f"train.keep_policy={policy}"]
        for fraction, policy in itertools.product(fractions, policies)
    }
    return {ALL: [], **kept}


def time_to(curve: Curve, accuracy: float) -> float:
    """Processor seconds until a validation reaches `accuracy`, interpolated between validations; inf: never."""
    before = (0.0, 0.0)
    for seconds, top1 in curve:
        if top1 >= accuracy:
            part = (accuracy - before[1]) / (top1 - before[1]) if top1 > before[1] else 1.0
            return before[0] + part * (seconds - before[0])
        before = (seconds, top1)
    return math.inf


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean of paired differences with its 95 % interval (Student's t)."""
    mean, count = statistics.mean(differences), len(differences)
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


# ---------------------------------------------------------------- the made set


def quickstart(options: Any, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Fractions x policies x seeds on the set of `vac synth`."""
    if not (folder / "data").exists():
        synth([str(folder / "data"), *(["--videos-per-class", "8", "--test-per-class", "1"] if options.dry else [])])
    fractions, seeds = ([0.5], 1) if options.dry else ([0.7, 0.5, 0.33], 3)
    common = ["--config", "quickstart", f"data.train={folder / 'data' / 'data_train'}", "data.workers=0"]
    common += [f"data.cache={folder / 'cache'}", "train.clips_per_gpu=32", "log.wandb=disabled"]
    common += ["train.epochs=2", "optim.warmup_epochs=1"] if options.dry else []
    chosen = ways(fractions, ["motion"] if options.dry else ["random", "motion"])
    runs = {f"{way} seed {seed}": [*common, *chosen[way], f"seed={seed}"] for seed in range(seeds) for way in chosen}
    curves = train_all(runs, folder, options.jobs)
    rows = {}
    for way in chosen:
        mine = [curves[f"{way} seed {seed}"] for seed in range(seeds)]
        rows[way] = {
            "best": statistics.mean(max(top1 for _, top1 in curve) for curve in mine),
            "last": statistics.mean(curve[-1][1] for curve in mine),
            "seconds": statistics.mean(curve[-1][0] for curve in mine),
            "reached": sum(time_to(curve, REACHED) < math.inf for curve in mine),
            "to_095": statistics.mean(min(time_to(curve, REACHED), curve[-1][0]) for curve in mine),
        }
    plot(
        options.out / "tokens_quickstart.svg",
        {way: [curves[f"{way} seed {s}"] for s in range(seeds)] for way in chosen},
    )
    lines = ["![accuracy against processor time](tokens_quickstart.svg)", ""]
    lines += table(
        ["tokens kept", "best validation accuracy", "last", "processor seconds", "of all",
         f"reached {REACHED}", f"seconds to {REACHED}", "of all"],
        [
            [way, f"{row['best']:.4f}", f"{row['last']:.4f}", f"{row['seconds']:.1f}",
             f"{row['seconds'] / rows[ALL]['seconds']:.2f}", f"{row['reached']} of {seeds}", f"{row['to_095']:.1f}",
             f"{row['to_095'] / rows[ALL]['to_095']:.2f}"]
            for way, row in rows.items()
        ],
    )  # fmt: skip
    lines += [
        f"Means of {seeds} seeds. Processor seconds are those of forward and backward passes. A training that never",
        f"reaches {REACHED} counts with all of its seconds there, which is less than it would take.",
    ]
    return {"curves": curves, "rows": rows}, lines


def plot(path: Path, curves: dict[str, list[Curve]]) -> None:
    """Mean validation accuracy over the seeds against processor time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    for way, seeds in curves.items():
        seconds = [statistics.mean(point) for point in zip(*([s for s, _ in curve] for curve in seeds), strict=True)]
        top1 = [statistics.mean(point) for point in zip(*([a for _, a in curve] for curve in seeds), strict=True)]
        axis.plot(seconds, top1, label=way, color="black" if way == ALL else None, linewidth=1.5)
    axis.set_xlabel("processor seconds of forward and backward passes")
    axis.set_ylabel("validation accuracy (all tokens)")
    axis.legend(title="tokens in training", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


# ---------------------------------------------------------------- one's own clips


def clips(options: Any, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Folds x seeds on clips of consecutive frames: all tokens against part of them, in pairs."""
    folds, seeds, epochs = (2, 1, 1) if options.dry else (5, 3, options.epochs)
    common = [
        "--config", "scratch_small", f"data.train={options.data.resolve()}", f"data.cache={folder / 'cache'}",
        "clip.sampling=dense", "clip.stride=2", f"train.epochs={epochs}", f"train.val_every={epochs}",
        "train.clips_per_gpu=8", "val.windows=spread", "log.wandb=disabled",
        *(["optim.warmup_epochs=0"] if options.dry else []),
    ]  # fmt: skip
    chosen = ways([0.42], ["motion"])
    pairs = list(itertools.product(range(1, folds + 1), range(seeds)))
    runs = {
        f"{way} fold {fold} seed {seed}": [*common, *chosen[way], f"data.fold={fold}/{folds}", f"seed={seed}"]
        for fold, seed in pairs
        for way in chosen
    }
    curves = train_all(runs, folder, options.jobs)
    last = {way: [curves[f"{way} fold {fold} seed {seed}"][-1] for fold, seed in pairs] for way in chosen}
    rows, found = [], {}
    for way, points in last.items():
        seconds = sum(s for s, _ in points) / sum(s for s, _ in last[ALL])
        row = [way, f"{statistics.mean(top1 for _, top1 in points):.3f}", f"{seconds:.2f}"]
        if way != ALL and not options.dry:
            mean, low, high = interval([a - b for (_, a), (_, b) in zip(points, last[ALL], strict=True)])
            found[way] = {"difference": mean, "low": low, "high": high, "safe": low >= SEEN_AS_SAFE}
            row += [f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}"]
        rows.append(row + [""] * (5 - len(row)))
    lines = table(["tokens kept", "accuracy", "processor time of all", "paired difference", "its 95 % interval"], rows)
    lines += [
        f"{folds} grouped folds x {seeds} seeds, {epochs} epochs from scratch by the preset scratch_small, but for",
        "dense clips: 8 frames of stride 2 at 64 pixels. Accuracy after the last epoch, of all tokens. A lower end",
        f"below {SEEN_AS_SAFE} is not safe.",
        "Seeds draw weights, order and crops anew; the folds are those of the seed.",
    ]
    return {"last": last, "intervals": found}, lines


# ---------------------------------------------------------------- one step


def step(options: Any, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Forward, backward and AdamW of VideoMAE-B on one thread, in turns."""
    torch.set_num_threads(1)
    sizes = {"width": 32, "depth": 2, "heads": 2} if options.dry else {"width": 768, "depth": 12, "heads": 12}
    frames, size, count = (4, 32, 2) if options.dry else (16, 224, 1)
    device = torch.device("cpu")
    ours = {}
    for way, words in {ALL: (1.0, "random"), "random 0.5": (0.5, "random"), "motion 0.5": (0.5, "motion")}.items():
        config = settings_for(sizes, frames=frames, size=size, clips=count, keep_tokens=words[0], keep_policy=words[1])
        ours[way] = (our_training(config, device), config)
    library = hf_model(ours[ALL][0].stepper.model).train()
    optimizer = torch.optim.AdamW(library.parameters(), lr=1e-5, fused=True)
    pixels, labels = torch.randn(count, frames, 3, size, size), torch.arange(count)

    def theirs() -> None:
        library(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    calls: dict[str, Any] = {"Hugging Face's class, all": theirs}
    for way, (training, config) in ours.items():
        batch = random_batch(config, training.stepper.model.noise_size, count)
        calls[f"vac_ddp, {way}"] = lambda training=training, batch=batch: training.step([batch])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number, (name, call) in itertools.product(range(2 if options.dry else 6), calls.items()):
        began = time.process_time()
        call()
        if number:  # the first round warms up
            seconds[name].append(time.process_time() - began)
    peer = seconds["Hugging Face's class, all"]
    ratios = {name: statistics.median(a / b for a, b in zip(own, peer, strict=True)) for name, own in seconds.items()}
    lines = table(
        ["step", "processor seconds, median", "of Hugging Face's"],
        [[name, f"{statistics.median(own):.3f}", f"{ratios[name]:.3f}"] for name, own in seconds.items()],
    )
    lines += [
        f"{count} clip(s) of {frames} frames of {size} pixels, one thread; ours augments and normalizes as well.",
        "Packing clips of different numbers of tokens was not built: `torch.nn.attention.varlen` has a CUDA kernel",
        "only, so it cannot be faster than a fixed number here, and a fixed number needs no recompilation.",
    ]
    return {"seconds": seconds, "ratios": ratios}, lines


def main(argv: list[str] | None = None) -> int:
    parser = arguments("tokens", __doc__.splitlines()[0])
    parser.add_argument("part", choices=("quickstart", "clips", "step"))
    parser.add_argument("--data", type=Path, help="clips: labelled frame folder")
    parser.add_argument("--epochs", type=int, default=150, help="clips: of a training (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder that keeps finished trainings; started again, they count")
    options = parser.parse_args(argv)
    if options.part == "clips" and options.data is None:
        parser.error("clips: give --data FOLDER")
    about = machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = (options.work or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        found, lines = {"quickstart": quickstart, "clips": clips, "step": step}[options.part](options, folder)
    command = " ".join(["tokens", *(sys.argv[1:] if argv is None else argv)])
    head = [f"# A part of the tokens: {options.part}", "", about_line(command, about), ""]
    write(options.out, f"tokens_{options.part}", {"about": about, **found}, [*head, *lines], dry=options.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
