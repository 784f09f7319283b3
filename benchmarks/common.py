"""What the speed benchmarks share: a model and its settings, frames, clocks, tables with machine, versions and date."""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.loader import children, facts
from benchmarks.pictures import write_videos
from vac_ddp.data.batch import Batch
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.sampler import Key
from vac_ddp.files import write_json, write_text
from vac_ddp.models import Loaded, load_model
from vac_ddp.settings import Config, DataSettings
from vac_ddp.training.meters import Meters
from vac_ddp.training.objective import Classification
from vac_ddp.training.resuming import Resumed
from vac_ddp.training.step import Stepper, make_stepper

RESULTS = Path(__file__).parent / "results"
CLASSES = [f"class{i}" for i in range(51)]
SMALL = {"width": 192, "depth": 6, "heads": 3}  # on the CPU, and with --dry on a GPU
TINY = {"width": 16, "depth": 1, "heads": 2, "patch": 28}  # hides nothing of the loader


def arguments(program: str, about: str) -> argparse.ArgumentParser:
    """The options that all speed benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=about)
    parser.add_argument("--dry", action="store_true", help="every piece at tiny sizes: its figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)), help="folder (%(default)s)")
    parser.add_argument("--seconds", type=float, help="for each way and round")
    return parser


def device_of() -> torch.device:
    """The GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """`facts` with the device and its threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {**facts(), "device": name, "threads": torch.get_num_threads(), "cores_usable": len(os.sched_getaffinity(0))}


def about_line(command: str, about: dict[str, Any]) -> str:
    """One line on where a table comes from."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"`python -m benchmarks.{command}`, {about['date']}, {about['device']}; {about['processor']} ({about['cores']} "
        f"cores, load {about['load_average']} at the start, {about['threads']} threads), {versions}."
    )


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
    ]


def write(folder: Path, name: str, result: dict[str, Any], lines: list[str], *, dry: bool, shown: bool = True) -> None:
    """NAME.json and NAME.md, on the screen as well where `shown`; a dry run's are marked.

    To be called as soon as there is something: a piece that runs out of time keeps what it has measured.
    """
    if dry:
        lines = [lines[0], "", "**A dry run: it shows that every piece works, its figures mean nothing.**", *lines[1:]]
        result = {"dry": True, **result}
    text = "\n".join(lines).rstrip() + "\n"
    if shown:
        print(text, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result)
    write_text(folder / f"{name}.md", text)


class Stopwatch:
    """Counts clips between the end of the warm-up and the end of `seconds`, the device awaited at both ends only.

    alone: all work is this process's, on the CPU: its processor time counts, so that what else runs on the machine
    counts less.
    """

    def __init__(
        self, device: torch.device, *, seconds: float, warm: int = 3, least: int = 3, alone: bool = False
    ) -> None:
        self.device, self.seconds, self.warm, self.least = device, seconds, warm, least
        self.clock = time.process_time if alone and device.type == "cpu" else time.perf_counter
        self.steps, self.clips, self.began, self.took = 0, 0, 0.0, 0.0
        self.busy: dict[int, float] = {}

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def tick(self, clips: int) -> bool:
        """A step with so many clips is done (or given to the device); whether to go on."""
        self.steps += 1
        if self.steps < self.warm:
            return True
        if self.steps == self.warm:
            self.began = self.now()
            self.busy = processor_seconds()
            return True
        self.clips += clips
        if self.device.type == "cuda" and (self.steps - self.warm) % 8 == 0:
            self.now()  # the host may not run ahead for ever, or it does not see the end
        if self.clock() - self.began < self.seconds or self.steps - self.warm < self.least:
            return True
        self.took = self.now() - self.began
        self.busy = {pid: took - self.busy.get(pid, took) for pid, took in processor_seconds().items()}
        return False

    @property
    def free_rate(self) -> float:
        """Clips a second where every process has a core of its own: what the busiest of them can do."""
        return self.clips / max(self.busy.values())

    @property
    def rate(self) -> float:
        """Clips a second."""
        return self.clips / self.took


def processor_seconds() -> dict[int, float]:
    """Processor time of this process and its children, by process id."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {os.getpid(): time.process_time()}
    for pid in children():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def ratio(rounds: dict[str, list[float]], way: str, over: str) -> dict[str, float]:
    """The median of the ratios within a round, and the ratio of the best rounds."""
    pairs = zip(rounds[way], rounds[over], strict=True)
    return {
        "median": round(statistics.median(a / b for a, b in pairs), 3),
        "best": round(max(rounds[way]) / max(rounds[over]), 3),
    }


# ---------------------------------------------------------------- ours


def settings_for(sizes: dict[str, Any], *, frames: int, size: int, clips: int, **train: Any) -> Config:
    """Settings of a run with a model of these sizes and the plain augmentation."""
    config = Config()
    config.model.weights = None
    for name, value in sizes.items():
        setattr(config.model, name, value)
    config.clip.frames, config.clip.size = frames, size
    config.train.global_batch = config.train.clips_per_gpu = clips
    config.optim.warmup_epochs = 0
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


@dataclass
class Ours:
    """Our training step, ready to go."""

    stepper: Stepper
    meters: Meters
    loaded: Loaded

    def step(self, batches: list[Batch], number: int = 0) -> None:
        """One optimizer step at a small rate over batches on the device."""
        count = sum(len(batch) for batch in batches)
        self.stepper.run(batches, step=number, samples=count, lr=1e-5, began=time.perf_counter())
        if len(self.stepper.records) > 10:
            self.stepper.records.popleft()


def our_training(config: Config, device: torch.device) -> Ours:
    """The stepper that a run of these settings would have."""
    loaded = load_model(config.model, config.clip, CLASSES, seed=0)
    data: Any = SimpleNamespace(classes=CLASSES, split=SimpleNamespace(train=range(10**9)))  # long enough to compile
    nothing = Resumed(state=None, facts=None, source=None)
    stepper, meters = make_stepper(config, Classification(config, data, loaded, device), nothing, device, print)
    stepper.warm_up()
    return Ours(stepper, meters, loaded)


def make_frames(folder: Path, *, videos: int, frames: int, height: int = 240, width: int = 320) -> Index:
    """Textured, moving JPEG frames in two classes, and their index."""
    root = folder / f"frames {width}x{height}"
    if not root.exists():
        write_videos(root, videos=videos, frames=frames, height=height, width=width)
    return open_index(root, labelled=True, settings=DataSettings(cache=str(folder / "cache")))


def training_set(index: Index, config: Config, noise_size: int) -> TrainClips:
    """The training clips of all videos."""
    return TrainClips(index, np.arange(len(index)), config, noise_size, 0)


def keys_of(index: Index, count: int) -> list[Key]:
    """Draws over all videos in turn."""
    return [Key(0, draw, draw % len(index)) for draw in range(count)]
