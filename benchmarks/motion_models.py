"""Which models see the direction of a motion? LS-ViT against Frame ViT (mean), same ViT, data, steps and recipe.

    python -m benchmarks.motion_models [--out benchmarks/results] [--work DIR] [--epochs 100] [--models NAME ...]

Makes `vac synth --set directions` (8 one-way motions, each the reverse of another), trains every model on it from
nothing by `python -m vac_ddp.train`, and scores `python -m vac_ddp.predict` on the test part, which has sources of its
own. Frames without their order tell the axis of a motion and nothing more: 1/2 is the most that a mean over time can
expect. Writes motion_models.json and motion_models.md. About five minutes on a core
of its own for the two models.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

from vac_ddp import __version__
from vac_ddp.files import read_json, write_json, write_text
from vac_ddp.report.lines import read_metrics

CEILING = 0.5
MODELS = {
    "frame_vit": ("Frame ViT, mean", ["model.name=frame_vit", "model.pooling=mean"]),
    "lsvit": ("LS-ViT", ["model.name=lsvit"]),
    "smif": ("LS-ViT, SMIF alone", ["model.name=lsvit", "model.lmi=false"]),
    "lmi": ("LS-ViT, LMI alone", ["model.name=lsvit", "model.smif=false"]),
    "transformer": ("Frame ViT, transformer", ["model.name=frame_vit", "model.pooling=transformer"]),
}
RECIPE = [
    "clip.frames=8",
    "clip.sampling=segments",
    "clip.size=32",
    "augment.crop_scale=[0.7,1.0]",
    "augment.crop_ratio=[0.9,1.1]",
    "augment.flip=0",
    "model.weights=null",
    "model.width=64",
    "model.depth=4",
    "model.heads=4",
    "model.patch=8",
    "model.mlp_ratio=2",
    "model.head_init_scale=1",
    "optim.lr=2e-3",
    "optim.min_lr=1e-5",
    "optim.warmup_epochs=10",
    "optim.clip_norm=1",
    "train.global_batch=32",
    "train.clips_per_gpu=32",
    "train.label_smoothing=0.05",
    "train.precision=fp32",
    "train.compile=false",
    "train.val_every=20",
    "checkpoint.every_minutes=null",
    "predict.views.windows=spread",
    "predict.views.count=1",
    "data.workers=0",
    "seed=0",
]


def call(module: str, *arguments: str | Path) -> float:
    """Run `python -m MODULE ARGUMENTS` on one thread; returns its seconds."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    return time.perf_counter() - start


def answers(path: Path) -> dict[str, str]:
    """id to class of a submission or of test_labels.csv."""
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["id"]: row["class"] for row in csv.DictReader(stream)}


def measure(name: str, data: Path, work: Path, epochs: int) -> dict[str, Any]:
    """Train and test one model."""
    title, settings = MODELS[name]
    run = work / name
    seconds = call(
        "vac_ddp.train",
        *RECIPE,
        *settings,
        f"train.epochs={epochs}",
        f"data.train={data / 'data_train'}",
        f"data.cache={work / 'cache'}",
        f"run.dir={run}",
        "run.overwrite=true",
    )
    out = work / f"{name}_test"
    call("vac_ddp.predict", "--run", run, "--data", data / "data_test", "--out", out, "--overwrite")
    truth, given = answers(data / "test_labels.csv"), answers(out / "submission.csv")
    assert truth.keys() == given.keys()
    lines = [line for line in read_metrics(run) if line["kind"] == "epoch"]
    best = torch.load(run / f"best_{settings[0].partition('=')[2]}.pt", weights_only=True)
    return {
        "model": title,
        "settings": settings,
        "parameters": sum(tensor.numel() for tensor in best["model"].values()),
        "steps": lines[-1]["step"],
        "train_seconds": round(seconds, 1),
        "train_accuracy": lines[-1]["train_accuracy"],
        "val_top1": max(line["val_top1"] for line in lines if "val_top1" in line),
        "test_top1": sum(given[video] == label for video, label in truth.items()) / len(truth),
        "test_axis": sum(axis(given[video]) == axis(label) for video, label in truth.items()) / len(truth),
        "test_videos": len(truth),
    }


def axis(class_name: str) -> int:
    """Which pair of opposite motions a class belongs to."""
    pairs = (("left", "right"), ("up", "down"), ("growing", "shrinking"), ("clockwise", "counterclockwise"))
    return next(i for i, pair in enumerate(pairs) if class_name in pair)


def report(result: dict[str, Any]) -> str:
    """The result as a Markdown page."""
    rows = [
        f"| {r['model']} | {r['parameters']:,} | {r['steps']} | {r['train_seconds']:.0f} | {r['train_accuracy']:.3f} | "
        f"{r['val_top1']:.3f} | **{r['test_top1']:.3f}** | {r['test_axis']:.3f} |"
        for r in result["models"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            "# Which models see the direction of a motion",
            "",
            f"`{result['command']}`, {result['date']}, {result['machine']}, one thread; {versions}. "
            "Seconds include the start and validations, and whatever else the machine did.",
            "",
            "8 one-way motions of `vac synth --set directions`, "
            f"{result['videos']} videos to train and validate on, {result['models'][0]['test_videos']} to test, of "
            "other sources; same ViT (width 64, depth 4, patch 8), 8 frames of 32 x 32, same steps and recipe, "
            "from nothing. "
            f"Without the order of the frames nobody can expect more than {CEILING}: the axis, and a guess.",
            "",
            "| model | parameters | steps | seconds | train | val top-1 | test top-1 | test, axis alone |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Recipe: `" + " ".join(result["recipe"]) + "`",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work", type=Path, help="folder for data and runs; default: a temporary one")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--videos-per-class", type=int, default=60)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["frame_vit", "lsvit"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        data = work / "directions"
        videos = str(options.videos_per_class)
        call(
            "vac_ddp.commands.synth_command",
            data,
            "--set",
            "directions",
            "--videos-per-class",
            videos,
            "--test-per-class",
            "30",
        )
        models = [measure(name, data, work, options.epochs) for name in options.models]
        facts = read_json(data / "synth.json")
    result = {
        "command": "python -m benchmarks.motion_models " + " ".join(sys.argv[1:]).replace(str(options.work), "DIR"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {
            "vac_ddp": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "data": facts,
        "videos": options.videos_per_class * len(facts["classes"]),
        "recipe": [*RECIPE, f"train.epochs={options.epochs}"],
        "models": models,
    }
    result["command"] = result["command"].strip()
    write_json(options.out / "motion_models.json", result)
    write_text(options.out / "motion_models.md", report(result))
    print(json.dumps(models, indent=2))


if __name__ == "__main__":
    main()
