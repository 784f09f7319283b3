"""Clips a second of one core: our training path against other ways and against pure JPEG decoding.

    python -m benchmarks.loader [--seconds N] [--simd-python PYTHON] [--quick]

All ways read the same files: 16 frames of a random window, cut to 224 x 224, in batches of 8 clips. They take turns;
a figure is the median over the rounds, a ratio the median of the ratios within a round. Times are processor times
of one process with one thread on one core (user and system), so that what else runs on the machine counts less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms import functional as tv
from transformers import VideoMAEImageProcessor

from benchmarks.pictures import write_videos
from vac_ddp.data.augment import draw_crop_box
from vac_ddp.data.clip_sampling import CROP, FRAMES, generator, train_frames
from vac_ddp.data.dataset import TestViews, TrainClips
from vac_ddp.data.index import open_index
from vac_ddp.data.loader import train_loader
from vac_ddp.data.pack_writer import pack
from vac_ddp.data.sampler import Key, StepSampler
from vac_ddp.errors import DONE, FINDINGS
from vac_ddp.files import write_json, write_text
from vac_ddp.settings import Config, DataSettings, ViewSettings

RESULTS = Path(__file__).parent / "results"
LOAD = 8  # clips of a load batch
SIZES = {"320x240": (240, 320), "1280x720": (720, 1280)}
OURS, FULL, PACKED, CEILING = "ours, training", "ours, full decode only", "ours, packed", "JPEG decoding alone"
NOTEBOOK, PROCESSOR = "the notebook's way", "VideoMAEImageProcessor"
BARS = {  # size -> (way, over, at least)
    "320x240": [(OURS, NOTEBOOK, 6.0), (OURS, PROCESSOR, 2.5), (OURS, CEILING, 0.70)],
    "1280x720": [(FULL, CEILING, 0.80), (OURS, CEILING, 1.0)],
}


@dataclass
class Clip:
    """One training clip: what every way reads."""

    paths: list[str]
    box: tuple[int, int, int, int]  # top, left, height, width


@dataclass
class Way:
    """One way to make clips: `run(n)` makes n of them and returns seconds of processor time."""

    name: str
    run: Callable[[int], float]


def timed(make: Callable[[int], object], *, clips: int = 1) -> Callable[[int], float]:
    """`run` of a way by `make(i)`, which makes the i-th `clips` clips."""
    done = 0

    def run(count: int) -> float:
        nonlocal done
        start = time.process_time()
        for _ in range(0, count, clips):
            make(done)
            done += 1
        return time.process_time() - start

    return run


class Pillow:
    """A process of its own with Pillow or Pillow-SIMD."""

    def __init__(self, python: str, clips: list[Clip], size: int, *, draft: bool) -> None:
        script = Path(__file__).with_name("pillow_clips.py")
        self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = json.loads(self.process.stdout.readline())
        described = [
            {"paths": c.paths, "box": [c.box[1], c.box[0], c.box[3], c.box[2]], "size": size, "draft": draft}
            for c in clips
        ]
        self._say(json.dumps(described))

    def _say(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def run(self, count: int) -> float:
        self._say(str(count))
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def in_batches(make: Callable[[int], torch.Tensor], load: int) -> Callable[[int], float]:
    """`run` of a way that makes single clips, with the DataLoader's collation of `load` of them."""
    return timed(lambda i: default_collate([make(load * i + j) for j in range(load)]), clips=load)


def notebook_clip(paths: list[str], size: int, draw: random.Random, *, jitter: bool) -> torch.Tensor:
    """PIL, ToTensor, then in float: shrink by 0.8 to 1, crop, resize, flip, change colours, normalise each frame.

    jitter: the changes of brightness, contrast and saturation, each in three clips of ten. Returns (T, 3, S, S).
    """
    frames = torch.stack([tv.to_tensor(Image.open(p).convert("RGB")) for p in paths])
    scale = draw.uniform(0.8, 1.0)
    height, width = (int(side * scale) for side in frames.shape[-2:])
    frames = tv.resize(frames, [height, width])
    top, left = draw.randint(0, max(0, height - size)), draw.randint(0, max(0, width - size))
    frames = tv.crop(frames, top, left, min(size, height), min(size, width))
    frames = tv.resize(frames, [size, size])
    if draw.random() < 0.5:
        frames = tv.hflip(frames)
    for change in (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation) if jitter else ():
        if draw.random() < 0.3:
            frames = change(frames, draw.uniform(0.9, 1.1))
    return torch.stack([tv.normalize(frame, [0.5] * 3, [0.5] * 3) for frame in frames])


def notebook_way(clips: list[Clip], size: int, load: int, *, jitter: bool) -> Callable[[int], float]:
    """Whole load batches of the notebook's clips."""
    draw = random.Random(0)
    return in_batches(lambda i: notebook_clip(clips[i % len(clips)].paths, size, draw, jitter=jitter), load)


def processor_way(clips: list[Clip], size: int, load: int) -> Callable[[int], float]:
    """Frames by PIL, then the image processor of transformers: short side to `size`, centre crop, normalise."""
    processor = VideoMAEImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    def make(i: int) -> torch.Tensor:
        frames = [Image.open(p).convert("RGB") for p in clips[i % len(clips)].paths]
        return processor(frames, return_tensors="pt")["pixel_values"][0]

    return in_batches(make, load)


def our_way(dataset: TrainClips, keys: list[Key], load: int) -> Callable[[int], float]:
    """Whole load batches of the training path: draws, files, decoding, crops, parameters."""
    loads = [keys[i : i + load] for i in range(0, len(keys), load)]
    return timed(lambda i: dataset.__getitems__(loads[i % len(loads)]), clips=load)


def our_views(dataset: TestViews) -> Callable[[int], float]:
    """One centre clip a video: what the image processor is for."""
    return timed(lambda i: dataset[i % len(dataset)])


def ceiling(clips: list[Clip], shape: tuple[int, int]) -> Callable[[int], float]:
    """Full JPEG decoding of the same frames, from memory into one buffer, and nothing else.

    The buffer begins 16 bytes beside a multiple of 32, where libjpeg-turbo is fastest; numpy puts it anywhere.
    """
    held = {path: Path(path).read_bytes() for clip in clips for path in clip.paths}
    size = shape[0] * shape[1] * 3
    memory = np.empty(size + 48, np.uint8)
    start = (16 - memory.ctypes.data) % 32
    buffer = memory[start : start + size].reshape(*shape, 3)

    def make(i: int) -> None:
        for path in clips[i % len(clips)].paths:
            simplejpeg.decode_jpeg(held[path], "RGB", buffer=buffer)

    return timed(make)


def planned_clips(dataset: TrainClips, keys: list[Key], shape: tuple[int, int]) -> list[Clip]:
    """The files and boxes that the training path takes for the keys."""
    index, settings = dataset.index, dataset.settings
    clips = []
    for epoch, draw, video in keys:
        frames = train_frames(
            int(index.frame_counts[video]), settings.clip, generator(dataset.seed, epoch, draw, FRAMES)
        )
        box = draw_crop_box(generator(dataset.seed, epoch, draw, CROP), settings.augment, *shape)
        clips.append(Clip([str(index.root / index.frame_name(video, int(frame))) for frame in frames], box))
    return clips


def measure(ways: list[Way], *, seconds: float, rounds: int, load: int) -> dict[str, list[float]]:
    """Clips a second of every way in every round. A round gives each way about the same time, in changing order."""
    counts = {}
    for way in ways:
        way.run(load)  # files into the page cache, code into the caches
        wanted = seconds / rounds / way.run(load) if seconds else 1
        counts[way.name] = max(1, round(wanted)) * load
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(rounds):
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            rates[way.name].append(counts[way.name] / way.run(counts[way.name]))
    return rates


def worker_memory(dataset: TrainClips) -> dict[str, float]:
    """Memory of one loader process after three epochs: peak and what it shares with nobody, in MiB."""
    videos = dataset.videos
    sampler = StepSampler(videos, seed=0, global_batch=LOAD, clips_per_gpu=LOAD, rank=0, world=1)
    loader = train_loader(dataset, sampler, workers=1, pin=False)
    before = set(children())
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for _ in loader:
            pass
        worker = next(child for child in children() if child not in before)
        status = Path(f"/proc/{worker}/status").read_text()
        own = Path(f"/proc/{worker}/smaps_rollup").read_text()
    loader.close()
    return {
        "peak_resident_mib": round(kilobytes(status, "VmHWM") / 1024),
        "private_mib": round((kilobytes(own, "Private_Dirty") + kilobytes(own, "Private_Clean")) / 1024),
    }


def children() -> list[int]:
    return [int(n) for n in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def kilobytes(text: str, name: str) -> int:
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


def bench(size_name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All ways at one frame size."""
    shape = SIZES[size_name]
    small = size_name == "320x240"
    videos, frames = (2, 24) if arguments.quick else (12, 48) if small else (4, 40)
    root = folder / size_name
    mean = write_videos(root, videos=videos, frames=frames, height=shape[0], width=shape[1])
    settings = Config()
    index = open_index(root, labelled=True, settings=DataSettings(cache=str(folder / "cache")))
    dataset = TrainClips(index, np.arange(videos), settings, 12, 0)
    keys = [Key(0, draw, draw % videos) for draw in range(LOAD if arguments.quick else 16 * LOAD)]
    clips = planned_clips(dataset, keys, shape)
    size = settings.clip.size
    load = 2 if arguments.quick else LOAD
    ways = [Way(OURS, our_way(dataset, keys, load)), Way(CEILING, ceiling(clips, shape))]
    full = Config()
    full.data.reduced_decode = False
    if not small:
        ways.append(Way(FULL, our_way(TrainClips(index, np.arange(videos), full, 12, 0), keys, load)))
    pack(
        root,
        folder / f"packed {size_name}",
        labelled=True,
        settings=DataSettings(cache=str(folder / "cache")),
        shard_bytes=1 << 30,
        workers=1,
    )
    packed = open_index(folder / f"packed {size_name}", labelled=True, settings=DataSettings())
    ways.append(Way(PACKED, our_way(TrainClips(packed, np.arange(videos), settings, 12, 0), keys, load)))
    centre = ViewSettings(windows="spread", count=1)
    ways.append(
        Way("ours, centre view", our_views(TestViews(index, np.arange(videos), settings.clip, centre, tolerant=False)))
    )
    ways += [
        Way(NOTEBOOK, notebook_way(clips, size, load, jitter=True)),
        Way(f"{NOTEBOOK}, without colour jitter", notebook_way(clips, size, load, jitter=False)),
        Way(PROCESSOR, processor_way(clips, size, load)),
    ]
    pillows = []
    for name, python in (("Pillow", sys.executable), ("Pillow-SIMD", arguments.simd_python)):
        for draft in (False,) if small else (False, True):
            if python:
                pillows.append(Pillow(python, clips, size, draft=draft))
                ways.append(Way(f"{name}{', draft()' if draft else ''}", pillows[-1].run))
    try:
        rates = measure(ways, seconds=arguments.seconds, rounds=arguments.rounds, load=load)
    finally:
        for pillow in pillows:
            pillow.close()
    ratios = {}
    for way, over, bar in BARS[size_name]:
        ratio = statistics.median(a / b for a, b in zip(rates[way], rates[over], strict=True))
        best = max(rates[way]) / max(rates[over])
        ratios[f"{way} / {over}"] = {"ratio": round(ratio, 3), "best": round(best, 3), "bar": bar, "met": ratio >= bar}
    return {
        "frame_bytes": round(mean),
        "clips_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "rounds": {name: [round(v, 1) for v in values] for name, values in rates.items()},
        "ratios": ratios,
        "worker_memory": worker_memory(dataset),
        "pillow_versions": [pillow.version for pillow in pillows],
    }


def facts() -> dict[str, Any]:
    """Machine, versions, date."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    names = ("torch", "torchvision", "transformers", "simplejpeg", "pillow", "numpy")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in names}},
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The tables for people."""
    about = result["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Loading clips on one core",
        "",
        f"`python -m benchmarks.loader`, {about['date']}, {about['processor']} ({about['cores']} cores, load "
        f"{about['load_average']} at the start), {versions}.",
        "",
        "Batches of 8 clips, 16 frames of a random window (stride 2), 224 x 224; ours and Pillow's with the recipe's",
        "random resized crop in uint8 (flip, colour and normalisation are done on the device), the notebook's and the",
        "processor's in float as they are. Frames are synthetic: 1/f textures, panned, with moving objects and noise",
        "(`benchmarks/pictures.py`), JPEG quality 90, 4:2:0.",
        "Clips a second of processor time of one thread; medians over rounds in turns. The best rounds are those that",
        "other work on the machine disturbed least.",
        "",
    ]
    for name, part in result["sizes"].items():
        lines += [
            f"## {name}, {part['frame_bytes'] / 1024:.1f} KB a frame",
            "",
            "| way | clips/s | frames/s | of decoding alone |",
        ]
        lines += ["|---|---|---|---|"]
        top = part["clips_per_s"][CEILING]
        for way, rate in sorted(part["clips_per_s"].items(), key=lambda item: -item[1]):
            lines.append(f"| {way} | {rate:.1f} | {16 * rate:.0f} | {rate / top:.2f} |")
        lines += ["", "| ratio | median | best rounds | bar |", "|---|---|---|---|"]
        for ratio, found in part["ratios"].items():
            bar = f"{found['bar']:g}{'' if found['met'] else ' (missed)'}"
            lines.append(f"| {ratio} | {found['ratio']:.2f} | {found['best']:.2f} | {bar} |")
        memory = part["worker_memory"]
        lines += [
            "",
            f"A loader process: {memory['peak_resident_mib']} MiB at its peak with shared libraries and batches, "
            f"{memory['private_mib']} MiB of them its own.",
            f"Pillow in turns: {', '.join(v['version'] for v in part['pillow_versions'])}.",
            "",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=12.0, help="for each way at each size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns in which they are spent (%(default)s)")
    parser.add_argument("--simd-python", help="an interpreter with numpy and Pillow-SIMD (launch/install_simd.sh)")
    parser.add_argument("--quick", action="store_true", help="a look whether it works: figures mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where loader.json and loader.md go (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.seconds, arguments.rounds = 0.0, 1
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    result: dict[str, Any] = {"about": facts(), "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in SIZES:
            result["sizes"][name] = bench(name, Path(folder), arguments)
    text = as_markdown(result)
    print(text)
    write_json(arguments.out / "loader.json", result)
    write_text(arguments.out / "loader.md", text)
    return DONE if all(r["met"] for part in result["sizes"].values() for r in part["ratios"].values()) else FINDINGS


if __name__ == "__main__":
    sys.exit(main())
