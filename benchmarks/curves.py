"""Do the levers change what is learnt? Loss curves with each one against the spread of seeds, plotted.

    python -m benchmarks.curves [--dry]

The same small run on tinted noise, several seeds as a GPU would run it (compiled, bf16, fused AdamW), and the
first seed with a lever changed: not compiled, float32, plain AdamW, and all of these. A curve agrees where its distance
to the first seed's is not above the largest distance between two seeds.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from benchmarks.common import about_line, arguments, device_of, machine, table, write
from vac_ddp.arguments import parse_settings
from vac_ddp.errors import DONE, FINDINGS
from vac_ddp.runtime import distributed
from vac_ddp.training.trainer import open_trainer

LIKE_A_GPU = ["train.compile=true", "train.precision=bf16", "optim.fused=true"]
CHANGES = {
    "not compiled": ["train.compile=false"],
    "fp32": ["train.precision=fp32"],
    "plain AdamW": ["optim.fused=false"],
    "all three": ["train.compile=false", "train.precision=fp32", "optim.fused=false"],
}
WINDOW = 15  # steps of the moving average


def run(folder: Path, name: str, words: list[str], device: torch.device) -> list[float]:
    """Train once; the loss of every step."""
    common = [
        *(
            "model.weights=null",
            "clip.frames=8",
            "data.group_by=none",
            "augment.crop_scale=[0.5,1.0]",
            "clip.sampling=segments",
            "data.val_fraction=0",
        ),
        *(
            "data.workers=0",
            "optim.warmup_epochs=1",
            "log.every_steps=1",
            "train.epochs=1000",
            "model.head_init_scale=1",
        ),
        *("checkpoint.every_minutes=null", f"data.train={folder / 'data'}"),
        *(f"data.cache={folder / 'cache'}", f"run.dir={folder / name}", "optim.lr=1e-3", "train.label_smoothing=0"),
    ]
    settings = parse_settings([*common, *words]).config
    losses: list[float] = []
    with open_trainer(settings, device) as trainer:
        note = trainer.tracker.write

        def keep(kind: str, step: int, **figures: Any) -> None:
            if kind == "train":
                losses.append(figures["loss"])
            note(kind, step, **figures)

        trainer.tracker.write = keep  # type: ignore[method-assign]
        trainer.tracker.say = lambda *_, **__: None  # type: ignore[method-assign]
        trainer.run()
    print(f"  {name}: last loss {np.mean(losses[-WINDOW:]):.4f}", file=sys.stderr, flush=True)
    return losses


def make_videos(root: Path, *, videos: int) -> None:
    """Six classes of noise, each with a tint of its own that is weak beside the noise: learnt in a hundred steps."""
    rng = np.random.default_rng(0)
    tints = rng.normal(scale=14, size=(6, 3))
    for label, video in itertools.product(range(6), range(videos)):
        folder = root / f"class{label}" / f"video{video:02d}"
        folder.mkdir(parents=True)
        look = rng.normal(scale=10, size=(12, 16, 3)).repeat(6, axis=0).repeat(6, axis=1)
        for frame in range(16):
            picture = 120 + tints[label] + look + rng.normal(scale=30, size=(72, 96, 3))
            data = simplejpeg.encode_jpeg(picture.clip(0, 255).astype(np.uint8), quality=90)
            (folder / f"{frame + 1:04d}.jpg").write_bytes(data)


def smooth(losses: list[float]) -> np.ndarray:
    """Moving average over `WINDOW` steps."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def distance(a: list[float], b: list[float]) -> float:
    """Mean distance of two smoothed curves."""
    return float(np.abs(smooth(a) - smooth(b)).mean())


def plot(path: Path, seeds: list[list[float]], changed: dict[str, list[float]]) -> None:
    """Seeds as a band, each change as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    band = np.stack([smooth(losses) for losses in seeds])
    steps = np.arange(WINDOW, WINDOW + band.shape[1])
    axis.fill_between(steps, band.min(0), band.max(0), color="#cbd5e0", label=f"{len(seeds)} seeds")
    axis.plot(steps, band[0], color="black", linewidth=1, label="first seed: compiled, bf16, fused")
    for name, losses in changed.items():
        axis.plot(steps, smooth(losses), "--", linewidth=1, label=f"first seed, {name}")
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss, mean of {WINDOW} steps")
    axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    parser = arguments("curves", __doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args(argv)
    device, dry = device_of(), options.dry
    cuda = device.type == "cuda"
    steps = options.steps or (20 if dry else 400 if cuda else 240)
    seeds = options.seeds or (2 if dry else 4)
    words = [f"train.max_steps={steps}", "train.global_batch=32", "train.clips_per_gpu=32"]
    words += ["model.width=192", "model.depth=6", "model.heads=3", "clip.size=64"]
    if not cuda or dry:
        words = [f"train.max_steps={steps}", "train.global_batch=12", "train.clips_per_gpu=12"]
        words += ["model.width=64", "model.depth=2", "model.heads=2", "clip.size=32"]
    distributed.start(device, timeout_s=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_videos(folder / "data", videos=4 if dry else 24)
        words += LIKE_A_GPU
        found = [run(folder, f"seed {n}", [*words, f"seed={n}"], device) for n in range(seeds)]
        changed: dict[str, list[float]] = {}
        for what, change in CHANGES.items():
            changed[what] = run(folder, what, [*words, *change, "seed=0"], device)
            met = keep(options, found, changed, steps, last=len(changed) == len(CHANGES))
    return DONE if met or dry else FINDINGS


def keep(options: Any, seeds: list[list[float]], changed: dict[str, list[float]], steps: int, *, last: bool) -> bool:
    """Write the table and the plot of what has been run; whether all of it is within the seeds."""
    device = device_of()
    suffix = "gpu" if device.type == "cuda" else "cpu"
    spread = [distance(a, b) for a, b in itertools.combinations(seeds, 2)]
    rows = {what: distance(losses, seeds[0]) for what, losses in changed.items()}
    met = all(value <= max(spread) for value in rows.values())
    plot(options.out / f"curves_{suffix}.svg", seeds, changed)
    about = machine(device)
    result = {
        "about": about,
        "seeds": seeds,
        "changed": changed,
        "spread": spread,
        "distances": rows,
        "agree": met,
    }
    lines = ["# Loss curves", "", about_line("curves", about), "", f"![loss curves](curves_{suffix}.svg)", ""]
    lines += table(
        ["first seed, but", "mean distance to the first seed", "within the seeds"],
        [[what, f"{value:.4f}", "yes" if value <= max(spread) else "no (missed)"] for what, value in rows.items()],
    )
    lines += [
        f"Between two of {len(seeds)} seeds: {min(spread):.4f} to {max(spread):.4f}. {steps} steps, means of {WINDOW};",
        "the seed draws weights, order, crops and mixing anew.",
    ]
    write(options.out, f"curves_{suffix}", result, lines, dry=options.dry, shown=last)
    return met


if __name__ == "__main__":
    sys.exit(main())
