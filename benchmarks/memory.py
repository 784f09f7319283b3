"""Memory of a training step on a GPU, beside Hugging Face's model, and the largest batch and model that fit.

python -m benchmarks.memory            # on a GPU
python -m benchmarks.memory --dry      # every piece at tiny sizes, on the CPU as well (its figures mean nothing)
"""

from __future__ import annotations

import gc
import sys
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

BATCH = 32
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
        """GiB of the second of two steps; None where it does not fit."""
        cuda = self.device.type == "cuda"
        try:
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

    def largest(self, most: int) -> tuple[int, float]:
        """The largest batch up to `most`, to an eighth of itself, and its GiB; (0, 0) where one clip does not fit."""
        good, memory, bad, size = 0, 0.0, most + 1, 1
        while good < size < bad:
            found = self.peak(size)
            if found is None:
                bad = size
            else:
                good, memory = size, found
            if bad > most:
                size = min(2 * size, most)
            elif bad - good <= max(1, good // 8):
                break
            else:
                size = (good + bad) // 2
        return good, memory


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


def main(argv: list[str] | None = None) -> int:
    options = arguments("memory", __doc__.splitlines()[0]).parse_args(argv)
    device, dry = device_of(), options.dry
    tiny = {"width": 32, "depth": 2, "heads": 2}
    batch, most, pixels = (2, 3, 32) if dry else (BATCH, 4096, 224)
    compile = device.type == "cuda" and not dry
    result: dict[str, Any] = {"about": machine(device), "batch": batch, "at_batch": [], "largest": []}
    base = tiny if dry else {"size": "base"}
    for again in (False, True):
        row: dict[str, Any] = {"checkpointing": again}
        for name, make in (("vac_ddp", ours), ("HF", theirs)):
            for compiled in (False, True) if compile else (False,):
                case = make(base, 16, pixels, again, compile=compiled)
                row[f"{name}{', compiled' if compiled else ''}"] = case.peak(batch)
                if not compiled:
                    row[f"{name}, largest batch"] = case.largest(most)[0]
                del case
                release(device)
        result["at_batch"].append(row)
    for size, frames, again in CASES[:3] if dry else CASES:
        case = ours(tiny if dry else {"size": size}, frames, pixels, again, compile=False)
        clips, memory = case.largest(most)
        parameters = sum(p.numel() for p in case.model.parameters())
        result["largest"].append(
            {
                "size": size,
                "frames": frames,
                "checkpointing": again,
                "clips": clips,
                "gib": memory,
                "parameters": parameters,
            }
        )
        print(result["largest"][-1], file=sys.stderr, flush=True)
        del case
        release(device)
    plain = result["at_batch"][0]
    pairs = [(plain[f"vac_ddp{kind}"], plain[f"HF{kind}"]) for kind in ("", ", compiled") if f"vac_ddp{kind}" in plain]
    met = all(mine is not None and (other is None or mine <= other) for mine, other in pairs)
    total = torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else 0.0
    lines = ["# Memory of a training step", "", about_line("memory", result["about"]), ""]
    lines += [f"The device has {total:.0f} GiB. Peaks are what tensors took, in a step with bf16 and AdamW.", ""]
    columns = [name for name in result["at_batch"][0] if name != "checkpointing"]
    rows = []
    for row in result["at_batch"]:
        cells = ["does not fit" if row[n] is None else row[n] if "largest" in n else f"{row[n]:.2f}" for n in columns]
        rows.append(["all" if row["checkpointing"] else "none", *cells])
    lines += table(["blocks computed again", *columns], rows)
    lines[-1:] = [f"GiB at {batch} clips, and the largest batches."]
    lines += [f"VideoMAE-B, 16 frames of 224. Not above HF's at {batch} clips: {'yes' if met else 'no (missed)'}.", ""]
    lines += ["The largest batch of other models and lengths, 224 pixels, not compiled:", ""]
    lines += table(
        ["model", "parameters", "frames", "blocks computed again", "largest batch", "GiB"],
        [
            [
                r["size"],
                f"{r['parameters'] / 1e6:.0f} M",
                r["frames"],
                "all" if r["checkpointing"] else "none",
                r["clips"],
                f"{r['gib']:.1f}",
            ]
            for r in result["largest"]
        ],
    )
    write(options.out, "memory", result, lines, dry=dry or device.type != "cuda")
    return DONE if met or dry or device.type != "cuda" else FINDINGS


def release(device: torch.device) -> None:
    """Give memory back before the next model."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
