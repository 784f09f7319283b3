"""Memory of a training step on a GPU, beside Hugging Face's model, and the largest batch and model that fit.

python -m benchmarks.memory            # on a GPU
python -m benchmarks.memory --dry      # every piece at tiny sizes, on the CPU as well (its figures mean nothing)

The search for the largest batch takes at most `TRIES` steps, and no case begins after --limit seconds.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import peers
from benchmarks.common import CLASSES, about_line, arguments, device_of, machine, settings_for, table, write
from vac_ddp.errors import DONE, FINDINGS
from vac_ddp.models import build_model
from vac_ddp.training.meters import GIB, peak_memory
from vac_ddp.training.optimization import make_groups, make_optimizer

BATCH, MOST = 32, 1024
TRIES = 8  # steps of a search for the largest batch
TINY_MODEL = {"width": 32, "depth": 2, "heads": 2}
CASES = [  # size, frames, whether all blocks are checkpointed
    ("base", 16, False),
    ("base", 16, True),
    ("base", 32, False),
    ("base", 32, True),
    ("large", 16, True),
    ("huge", 16, False),
    ("huge", 16, True),
    ("huge", 32, True),
    ("giant", 16, False),
    ("giant", 16, True),
    ("giant", 32, True),
]


class Case:
    """A model with its optimizer, and steps of it."""

    def __init__(
        self, model: nn.Module, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor], config: Any
    ) -> None:
        self.device = device_of()
        self.model, self.forward, self.clip = model.to(self.device).train(), forward, config.clip
        if hasattr(model, "num_depths"):
            self.optimizer = make_optimizer(make_groups(model, config.optim), config.optim, lr=1e-6)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(self, clips: int) -> None:
        """One step on zeros."""
        clip, half = self.clip, self.device.type == "cuda"
        pixels = torch.zeros(clips, clip.frames, 3, clip.size, clip.size, device=self.device)
        labels = torch.zeros(clips, dtype=torch.int64, device=self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            logits = self.forward(self.model, pixels)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak(self, clips: int) -> float | None:
        """GiB of a step beside those that made the optimizer's state; None where it does not fit."""
        cuda = self.device.type == "cuda"
        try:
            if not self.optimizer.state:
                self.step(clips)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            self.step(clips)
            return peak_memory(self.device)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            return None
        finally:
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()


def largest(peak: Callable[[int], float | None], most: int, limit: float) -> tuple[int, float]:
    """The largest batch up to `most`, to an eighth of itself, and its GiB; (0, 0) where one clip does not fit.

    peak: GiB of a batch, None where it does not fit; asked at most `TRIES` times. Every clip more takes as much as the
    one before: two small batches say where `limit` GiB are reached, and the search begins there.
    """
    fits: dict[int, float] = {}
    bad, size = most + 1, 1
    for _ in range(TRIES):
        found = peak(size)
        if found is None:
            bad = size
        else:
            fits[size] = found
        good = max(fits, default=0)
        if good == most or bad - good <= max(1, good // 8):
            break
        if good < 8 <= bad and len(fits) < 3:
            size = min(4 * good, most, bad - 1)
        elif bad > most and len(fits) > 1:
            low, high = sorted(fits)[-2:]
            each = max((fits[high] - fits[low]) / (high - low), 1e-6)
            size = int(min(most, max(good + 1, good + (limit - fits[good]) / each)))
        else:
            size = (good + bad) // 2
        if not good < size < bad:
            break
    good = max(fits, default=0)
    return good, fits.get(good, 0.0)


def ours(sizes: dict[str, Any], frames: int, pixels: int, again: bool, *, compile: bool) -> Case:
    """Our model, compiled as a run on a GPU has it."""
    config = settings_for(sizes, frames=frames, size=pixels, clips=BATCH)
    model = build_model(config.model, config.clip, len(CLASSES))
    model.checkpointing = len(model.blocks) if again else 0
    if compile:
        model.compile_blocks()
    return Case(model, lambda net, clips: net(clips), config)


def theirs(sizes: dict[str, Any], frames: int, pixels: int, again: bool, *, compile: bool) -> Case:
    """Hugging Face's model with our weights."""
    config = settings_for(sizes, frames=frames, size=pixels, clips=BATCH)
    model = peers.hf_model(build_model(config.model, config.clip, len(CLASSES)))
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compile:
        model.compile()
    return Case(model, lambda net, clips: net(pixel_values=clips).logits, config)


class Table:
    """What has been measured so far, written after every case."""

    def __init__(self, options: Any) -> None:
        self.options, self.device = options, device_of()
        self.cuda, self.dry = self.device.type == "cuda", options.dry
        self.batch, self.most, self.pixels = (2, 3, 32) if options.dry else (BATCH, MOST, 224)
        self.compile = self.cuda and not options.dry
        self.total = torch.cuda.get_device_properties(self.device).total_memory / GIB if self.cuda else 0.0
        self.result: dict[str, Any] = {"about": machine(self.device), "batch": self.batch, "at_batch": []}
        self.result |= {"largest": []}
        self.end = time.monotonic() + options.limit

    def searched(self, case: Case) -> tuple[int, float]:
        """The largest batch of a case, and its GiB."""
        return largest(case.peak, self.most, 0.95 * self.total if self.cuda else float("inf"))

    def measure(self) -> bool:
        """All cases for which there is time; whether ours never takes more than HF's."""
        for again in (False, True):
            self.result["at_batch"].append(self.at_batch(again))
            self.write()
        for size, frames, again in CASES[:3] if self.dry else CASES:
            row: dict[str, Any] = {"size": size, "frames": frames, "checkpointing": again}
            if time.monotonic() < self.end:
                case = ours(TINY_MODEL if self.dry else {"size": size}, frames, self.pixels, again, compile=False)
                clips, memory = self.searched(case)
                parameters = sum(p.numel() for p in case.model.parameters())
                row |= {"clips": clips, "gib": memory, "parameters": parameters}
                del case
                release(self.device)
            self.result["largest"].append(row)
            print(row, file=sys.stderr, flush=True)
            self.write()
        return self.write(shown=True)

    def at_batch(self, again: bool) -> dict[str, Any]:
        """Ours and HF's at the same batch, and the largest batch of each."""
        row: dict[str, Any] = {"checkpointing": again}
        for name, make in (("vac_ddp", ours), ("HF", theirs)):
            for compiled in (False, True) if self.compile else (False,):
                sizes = TINY_MODEL if self.dry else {"size": "base"}
                case = make(sizes, 16, self.pixels, again, compile=compiled)
                row[f"{name}{', compiled' if compiled else ''}"] = case.peak(self.batch)
                if not compiled:
                    row[f"{name}, largest batch"] = self.searched(case)[0]
                del case
                release(self.device)
        return row

    def write(self, *, shown: bool = False) -> bool:
        """Write it; whether ours never takes more than HF's."""
        result, plain = self.result, self.result["at_batch"][0]
        kinds = ("", ", compiled")
        pairs = [(plain[f"vac_ddp{kind}"], plain[f"HF{kind}"]) for kind in kinds if f"vac_ddp{kind}" in plain]
        met = all(mine is not None and (other is None or mine <= other) for mine, other in pairs)
        lines = ["# Memory of a training step", "", about_line("memory", result["about"]), ""]
        lines += [
            f"The device has {self.total:.0f} GiB. Peaks are what tensors took, in a step with bf16 and AdamW.",
            "",
        ]
        columns = [name for name in plain if name != "checkpointing"]
        rows = []
        for row in result["at_batch"]:
            cells = [
                "does not fit" if row[n] is None else row[n] if "largest" in n else f"{row[n]:.2f}" for n in columns
            ]
            rows.append(["all" if row["checkpointing"] else "none", *cells])
        lines += table(["blocks computed again", *columns], rows)
        lines[-1:] = [f"GiB at {self.batch} clips, and the largest batches."]
        lines += [
            f"VideoMAE-B, 16 frames of 224. Not above HF's at {self.batch} clips: {'yes' if met else 'no (missed)'}."
        ]
        lines += ["", "The largest batch of other models and lengths, 224 pixels, not compiled:", ""]
        head = ["model", "parameters", "frames", "blocks computed again", "largest batch", "GiB"]
        lines += table(head, [_cells(row) for row in result["largest"]])
        write(self.options.out, "memory", result, lines, dry=self.dry or not self.cuda, shown=shown)
        return met


def _cells(row: dict[str, Any]) -> list[Any]:
    again = "all" if row["checkpointing"] else "none"
    if "clips" not in row:
        return [row["size"], "", row["frames"], again, "no time left", ""]
    return [
        row["size"],
        f"{row['parameters'] / 1e6:.0f} M",
        row["frames"],
        again,
        row["clips"],
        f"{row['gib']:.1f}",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = arguments("memory", __doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which no case begins (%(default)s)")
    options = parser.parse_args(argv)
    met = Table(options).measure()
    return DONE if met or options.dry or device_of().type != "cuda" else FINDINGS


def release(device: torch.device) -> None:
    """Give memory back before the next model."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
