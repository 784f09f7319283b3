"""Clips a second of training, against Hugging Face's Trainer and the notebook's loop, on the same frames.

    python -m benchmarks.train_step              # on the CPU: small models, medians and ratios over rounds
    python -m benchmarks.train_step --gpu        # VideoMAE-B 16x224 on a GPU, one long round
    python -m benchmarks.train_step --dry        # every piece, in a minute or two

Three tables. In memory: the same batch again and again, so model, loss and optimizer alone; ours begins with uint8,
augments and normalises them, the peers' floats are ready but where it says "from the same bytes". With loader: JPEG
files of 320x240, loader processes, everything. Profile: where the time of a step goes in a whole run (`open_trainer`:
agreement, log, checks and all) whose data are ready. Exit status 3 where a bar is missed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import peers
from benchmarks.common import (
    CLASSES,
    SMALL,
    TINY,
    Ours,
    Stopwatch,
    about_line,
    arguments,
    device_of,
    keys_of,
    machine,
    make_frames,
    our_training,
    ratio,
    settings_for,
    table,
    training_set,
    write,
)
from benchmarks.loader import planned_clips
from vac_ddp.arguments import parse_settings
from vac_ddp.data.batch import Batch
from vac_ddp.data.index import Index
from vac_ddp.data.loader import to_device, train_loader
from vac_ddp.data.sampler import StepSampler
from vac_ddp.errors import DONE, FINDINGS
from vac_ddp.files import read_json
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.training.trainer import open_trainer

OURS, EAGER = "vac_ddp", "vac_ddp, not compiled"
HF_BYTES = "HF Trainer, best settings, from the same bytes"
HF, HF_COMPILED, EXAMPLE = "HF Trainer, best settings", "HF Trainer, torch_compile", "HF Trainer, documented example"
NOTEBOOK = "the notebook's loop"
SHARE, WAIT, GOAL = "share of the matmul peak, with loader", "waiting for data", " (a goal)"


def gpu_batch(clips: int, size: int, frames: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A float batch in the device's memory, for the peers."""
    return {
        "pixel_values": torch.randn(clips, frames, 3, size, size, device=device),
        "labels": torch.arange(clips, device=device) % len(CLASSES),
    }


def our_memory(ours: Ours, batch: Batch, watch: Stopwatch) -> float:
    """Our steps on one batch in the device's memory, augmentation and normalisation included."""
    while True:
        ours.step([batch], watch.steps)
        if not watch.tick(len(batch)):
            return watch.rate


def our_loading(ours: Ours, index: Index, config: Config, watch: Stopwatch, *, workers: int) -> tuple[float, float]:
    """Our steps on files; (clips/s, share of the time that the device waited for data)."""
    dataset = training_set(index, config, ours.stepper.model.noise_size)
    sampler = StepSampler(
        dataset.videos.repeat(64),
        seed=0,
        global_batch=config.train.global_batch,
        clips_per_gpu=ours.stepper.clips_per_gpu,
        rank=0,
        world=1,
    )
    loader = train_loader(dataset, sampler, workers=workers, pin=watch.device.type == "cuda")
    waited, epoch, going = 0.0, 0, True
    idle: list[Any] = []
    ours.stepper.last_end = None
    while going:
        sampler.set_epoch(epoch)
        epoch += 1
        loads = to_device(loader, watch.device)
        while going:
            asked = time.perf_counter()
            batch = next(loads, None)
            if batch is None:
                break
            if watch.steps >= watch.warm:
                waited += time.perf_counter() - asked
            ours.step([batch], watch.steps)
            if watch.steps >= watch.warm:
                idle.append(ours.stepper.records[-1].marks[:2])
            going = watch.tick(len(batch))
    loader.close()
    if watch.device.type == "cuda":
        waited = min(waited, sum(a[1].elapsed_time(b[1]) / 1000 for a, b in idle if a[0] == ""))
    return watch.rate, waited / watch.took


def in_memory(options: Any, device: torch.device, index: Index) -> dict[str, Any]:
    """Every way on a batch in memory."""
    frames, size, clips = options.frames, options.size, options.clips
    config = settings_for(options.sizes, frames=frames, size=size, clips=clips, compile=False)
    ours = our_training(config, device)
    batch = training_set(index, config, ours.stepper.model.noise_size).__getitems__(keys_of(index, clips)).to(device)
    check_same(ours, peers.hf_model(ours.stepper.model).to(device), device)
    floats = gpu_batch(clips, size, frames, device)
    raw = {"bytes": batch.clips, "labels": floats["labels"]}
    common: dict[str, Any] = {"clips": clips, "planned": None, "size": size, "batch": floats}

    def fresh() -> torch.nn.Module:  # Trainer leaves `forward` wrapped
        return peers.hf_model(ours.stepper.model).to(device)

    ways: dict[str, Callable[[Stopwatch], float]] = {
        EAGER: lambda watch: our_memory(ours, batch, watch),
        HF: lambda watch: peers.hf_trainer(fresh(), watch, **common),
        HF_BYTES: lambda watch: peers.hf_trainer(fresh(), watch, **(common | {"batch": raw})),
        NOTEBOOK: lambda watch: peers.notebook_loop(fresh(), watch, **common),
    }
    if options.compile:
        quick = settings_for(options.sizes, frames=frames, size=size, clips=clips, compile=True)
        compiled = our_training(quick, device)
        ways = {
            OURS: lambda watch: our_memory(compiled, batch, watch),
            **ways,
            HF_COMPILED: lambda watch: peers.hf_trainer(fresh(), watch, compile=True, **common),
        }
    found = in_turns(ways, options, device, alone=True)
    meters = ours.meters
    return {
        **found,
        "flops_per_clip": meters.flops_per_clip,
        "matmul": meters.matmul,
        "mfu": {name: max(r) * meters.flops_per_clip / meters.matmul for name, r in found["rounds"].items()},
    }


def with_loader(options: Any, device: torch.device, index: Index) -> dict[str, Any]:
    """Every way from JPEG files."""
    frames, size, clips = options.frames, options.loader_size, options.clips
    config = settings_for(options.loader_sizes, frames=frames, size=size, clips=clips, compile=options.compile)
    config.data.prefetch = 4
    ours = our_training(config, device)
    planned = planned_clips(training_set(index, config, 0), keys_of(index, 8 * len(index)), (240, 320))
    waits: list[float] = []

    def run_ours(watch: Stopwatch) -> float:
        rate, wait = our_loading(ours, index, config, watch, workers=options.workers)
        waits.append(wait)
        return rate

    def fresh() -> torch.nn.Module:
        return peers.hf_model(ours.stepper.model).to(device)

    common: dict[str, Any] = {"clips": clips, "planned": planned, "size": size}
    few: dict[str, Any] = {**common, "clips": min(8, clips)}
    ways: dict[str, Callable[[Stopwatch], float]] = {
        OURS: run_ours,
        HF: lambda watch: peers.hf_trainer(fresh(), watch, workers=options.workers, **common),
        EXAMPLE: lambda watch: peers.hf_trainer(fresh(), watch, best=False, **few),
        NOTEBOOK: lambda watch: peers.notebook_loop(fresh(), watch, workers=options.notebook_workers, **few),
    }
    if options.compile:
        ways[HF_COMPILED] = lambda watch: peers.hf_trainer(
            fresh(), watch, workers=options.workers, compile=True, **common
        )
    found = in_turns(ways, options, device)
    meters = ours.meters
    return {
        **found,
        "data_wait": min(waits),
        "mfu": {name: max(r) * meters.flops_per_clip / meters.matmul for name, r in found["rounds"].items()},
    }


def in_turns(
    ways: dict[str, Callable[[Stopwatch], float]], options: Any, device: torch.device, *, alone: bool = False
) -> dict[str, Any]:
    """Clips a second of every way in every round, in changing order; alone: nothing else works for them."""
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    free: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(options.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            watch = Stopwatch(device, seconds=options.seconds, warm=options.warm, alone=alone)
            rounds[name].append(ways[name](watch))
            free[name].append(watch.free_rate)
            print(f"  {name}: {rounds[name][-1]:.2f} clips/s", file=sys.stderr, flush=True)
    kept = {"rounds": rounds} if alone or device.type == "cuda" else {"rounds": free, "wall": rounds}
    return {
        what: {name: [round(rate, 2) for rate in rates] for name, rates in found.items()}
        for what, found in kept.items()
    }


@torch.no_grad()
def check_same(ours: Ours, theirs: torch.nn.Module, device: torch.device) -> None:
    """The peer computes the same function: otherwise the comparison means nothing."""
    model = ours.stepper.model
    clips = torch.randn(2, model.arch.frames, 3, *model.arch.image, device=device)
    mine, other = model.eval()(clips), theirs.eval()(pixel_values=clips).logits
    model.train()
    difference = float((mine - other).abs().max() / mine.abs().max())
    assert difference < 1e-2, f"the peer's logits differ by {difference:.2g} of the largest"


# ---------------------------------------------------------------- the profile


def profile(options: Any, device: torch.device, folder: Path, index: Index) -> dict[str, Any]:
    """Shares of the time of a whole run whose data are ready, and the operations that took most of it."""
    root = next(folder.glob("frames*"))
    words = [f"model.{name}={value}" for name, value in options.sizes.items()]
    words += [
        f"data.train={root}",
        f"run.dir={folder / 'run'}",
        f"data.cache={folder / 'cache'}",
        "data.val_fraction=0",
    ]
    words += ["model.weights=null", f"clip.frames={options.frames}", f"clip.size={options.size}", "data.workers=0"]
    words += [f"train.global_batch={options.clips}", f"train.clips_per_gpu={options.clips}", "data.group_by=none"]
    words += [f"train.max_steps={options.profile_steps}", "optim.lr=1e-5", "log.every_steps=10", "run.overwrite=true"]
    words += [f"train.epochs={10 * options.profile_steps}", f"train.compile={str(options.compile).lower()}"]
    settings = parse_settings(words).config
    distributed.start(device, timeout_s=120)
    with open_trainer(settings, device) as trainer:
        dataset = training_set(index, settings, trainer.stepper.model.noise_size)
        batch = dataset.__getitems__(keys_of(index, options.clips)).to(device)
        trainer.sampler = SimpleNamespace(  # type: ignore[assignment]
            steps_per_epoch=options.profile_steps,
            samples_of_step=lambda _: options.clips,
            loads_of_step=lambda _: 1,
            set_epoch=lambda epoch, start_step: None,
        )
        trainer.loader = repeat(batch)  # type: ignore[assignment]
        lines: list[dict[str, Any]] = []
        note = trainer.tracker.write

        def keep(kind: str, step: int, **figures: Any) -> None:
            if kind == "train":
                lines.append(figures)
            note(kind, step, **figures)

        trainer.tracker.write = keep  # type: ignore[method-assign]
        trainer.run()
        names = ("idle", "prepare", "forward", "backward", "optimizer")
        later = lines[1:] or lines  # the first line holds the start
        seconds = {name: sum(line[f"{name}_s"] for line in later) for name in names}
        whole = options.clips * 10 * sum(1 / line["clips_per_s"] for line in later)
        seconds["the rest"] = max(0.0, whole - sum(seconds.values()))
        top = operations(lambda: trainer.stepper.run([batch], step=0, samples=len(batch), lr=1e-5, began=0.0), device)
    outside = sum(seconds[name] for name in ("idle", "prepare", "the rest"))
    return {
        "ms_a_step": 1000 * whole / (10 * len(later)),
        "shares": {name: took / whole for name, took in seconds.items()},
        "outside": outside / whole,
        "operations": top,
    }


def operations(step: Callable[[], None], device: torch.device) -> list[dict[str, Any]]:
    """The operations that took most of three steps, by torch.profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profiler(activities=kinds) as found:
        for _ in range(3):
            step()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return [{"name": e.key[:70], "share": getattr(e, key) / total, "calls": e.count / 3} for e in events[:14]]


# ---------------------------------------------------------------- bars and tables


def bars(result: dict[str, Any], options: Any) -> list[dict[str, Any]]:
    """What had to be reached, and what was."""
    rows = []

    def add(what: str, found: float, bar: float, *, most: bool = False) -> None:
        met = found <= bar if most else found >= bar
        rows.append({"what": what, "found": round(found, 4), "bar": f"{'<=' if most else '>='} {bar:g}", "met": met})

    memory, loading = result.get("memory"), result.get("loader")

    def add_ratio(part: dict[str, Any] | None, where: str, way: str, over: str, bar: float) -> None:
        if part is not None and way in part["rounds"] and over in part["rounds"]:
            kept = ratio(part["rounds"], way, over)
            rows.append(
                {
                    "what": f"{where}: {way} / {over}",
                    "found": kept["median"],
                    "best": kept["best"],
                    "bar": f">= {bar:g}",
                }
                | {"met": max(kept.values()) >= bar}
            )

    def best_of(part: dict[str, Any] | None) -> str:
        return max((HF, HF_COMPILED), key=lambda name: max(part["rounds"].get(name, [0.0])) if part else 0.0)

    if options.gpu or options.dry:
        if loading is not None:
            add(SHARE, loading["mfu"][OURS], 0.45)
            add(f"{SHARE}{GOAL}", loading["mfu"][OURS], 0.60)
            add(WAIT, loading["data_wait"], 0.02, most=True)
        add_ratio(memory, "in memory", OURS, best_of(memory), 1.25)
        for over, bar in ((best_of(loading), 1.3), (EXAMPLE, 2.0), (NOTEBOOK, 3.0)):
            add_ratio(loading, "with loader", OURS, over, bar)
    else:
        add_ratio(memory, "in memory", EAGER, HF_BYTES, 1.0)
        add_ratio(memory, "in memory", OURS, HF_COMPILED, 1.0)
        add_ratio(loading, "with loader", OURS, HF, 1.0)
        add_ratio(loading, "with loader", OURS, NOTEBOOK, 4.0)
    if "profile" in result:
        outside = result["profile"]["outside"]
        add("time of a step outside forward, backward and optimizer", outside, 0.03, most=True)
    return rows


def as_lines(result: dict[str, Any], options: Any, command: str) -> list[str]:
    """The tables for people."""
    lines = ["# Training", "", about_line(command, result["about"]), ""]
    lines += table(
        ["what", "found", "best rounds", "bar"],
        [
            [b["what"], b["found"], b.get("best", ""), b["bar"] + ("" if b["met"] else " (missed)")]
            for b in result["bars"]
        ],
    )
    sizes = ", ".join(f"{name} {value}" for name, value in options.sizes.items())
    loaded = ", ".join(f"{name} {value}" for name, value in options.loader_sizes.items())
    titles = {
        "memory": f"In memory: {sizes}, {options.frames} frames of {options.size}, batches of {options.clips}",
        "loader": f"With loader: {loaded}, {options.frames} frames of {options.loader_size} from JPEGs of 320x240, "
        f"{options.workers} loader process(es)",
    }
    for part in (name for name in titles if name in result):
        lines += [f"## {titles[part]}", ""]
        rates = result[part]["rounds"]
        rows = [
            [n, f"{sorted(r)[len(r) // 2]:.1f}", f"{max(r):.1f}", f"{result[part]['mfu'][n]:.3f}"]
            for n, r in rates.items()
        ]
        lines += table(
            ["way", "clips/s, median", "best round", "of the matmul"], sorted(rows, key=lambda r: -float(r[1]))
        )
    if "wall" in result.get("loader", {}):
        lines += [
            "Seconds are of processor time, so that what else runs on the machine counts less: in memory of this",
            "process; with loader, of the busiest process, as if each had a core of its own. By the clock on the wall: "
            + "; ".join(f"{n} {max(r):.0f}" for n, r in result["loader"]["wall"].items())
            + " clips/s (best rounds).",
            "",
        ]
    if "memory" in result:
        matmul, flops = result["memory"]["matmul"], result["memory"]["flops_per_clip"]
        lines += [
            f"A matrix product reached {matmul / 1e12:.4g} TFLOP/s in this run; a clip of the first table costs "
            f"{flops / 1e9:.4g} GFLOP forward and backward.",
        ]
    if "loader" in result:
        lines += [f"Waiting for data with the loader: {100 * result['loader']['data_wait']:.1f} %.", ""]
    return lines + (profile_lines(result["profile"]) if "profile" in result else [])


def profile_lines(found: dict[str, Any]) -> list[str]:
    """The tables on where the time of a step goes."""
    return [
        "## Where the time of a step goes",
        "",
        f"A whole run whose data are ready (the first table's model), {found['ms_a_step']:.1f} ms a step.",
        "",
        *table(["phase", "share"], [[n, f"{100 * s:.2f} %"] for n, s in found["shares"].items()]),
        *table(
            ["operation (torch.profiler, own time)", "share", "calls a step"],
            [[f"`{o['name']}`", f"{100 * o['share']:.1f} %", f"{o['calls']:.0f}"] for o in found["operations"]],
        ),
    ]


def choose(argv: list[str] | None) -> Any:
    """Options with the sizes that go with them."""
    parser = arguments("train_step", __doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="VideoMAE-B, 16 frames of 224")
    parser.add_argument("--rounds", type=int, help="turns")
    parser.add_argument("--workers", type=int, help="loader processes")
    parser.add_argument("--clips", type=int, help="clips of a batch")
    parser.add_argument("--only", choices=("memory", "loader", "profile"), help="this table anew, the others as kept")
    parser.add_argument("--compile", action="store_true", help="on the CPU as well")
    options = parser.parse_args(argv)
    options.compile |= options.gpu
    small = options.dry or not options.gpu
    options.sizes = dict(SMALL) if small else {"size": "base"}
    options.loader_sizes = dict(TINY) if small else {"size": "base"}
    options.frames, options.size, options.loader_size = (16, 112, 224) if small else (16, 224, 224)
    options.clips = options.clips or (4 if small else 32)
    options.warm = 3 if small else 8
    options.rounds = options.rounds or (1 if options.gpu else 5)
    options.seconds = options.seconds or (4.0 if small else 10.0)
    options.profile_steps = 40
    options.workers = options.workers or (1 if small else 16)
    options.notebook_workers = 1 if small else 4
    if options.dry:
        options.rounds, options.seconds, options.warm, options.profile_steps = 1, 0.1, 2, 20
        options.sizes |= {"depth": 2, "width": 32, "heads": 2}
        options.clips, options.size, options.loader_size, options.workers = 4, 32, 32, 1
        options.loader_sizes |= {"patch": 16}
    return options


def main(argv: list[str] | None = None) -> int:
    options = choose(argv)
    device = device_of()
    command = " ".join(["train_step", *(sys.argv[1:] if argv is None else argv)])
    name = "train_gpu" if device.type == "cuda" else "train_cpu"
    result: dict[str, Any] = read_json(options.out / f"{name}.json") if options.only else {}
    result["about"] = machine(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        videos = 4 if options.dry else 12 if not options.gpu else 32
        index = make_frames(folder, videos=videos, frames=24 if options.dry else 48)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "loader": lambda: with_loader(options, device, index),
            "memory": lambda: in_memory(options, device, index),
            "profile": lambda: profile(options, device, folder, index),
        }
        for part in (options.only,) if options.only else parts:
            result[part] = parts[part]()
            result["bars"] = bars(result, options)
            write(options.out, name, result, as_lines(result, options, command), dry=options.dry, shown=False)
    write(options.out, name, result, as_lines(result, options, command), dry=options.dry)
    return DONE if options.dry or all(bar["met"] for bar in result["bars"] if GOAL not in bar["what"]) else FINDINGS


if __name__ == "__main__":
    sys.exit(main())
