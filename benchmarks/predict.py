"""What a view costs, and how much of a prediction is not the model.

python -m benchmarks.predict                                  views on one core, a small model on the CPU
python -m benchmarks.predict --width 768 --depth 12 --heads 12 --videos 400 --workers 14      ViT-B on a GPU

Two figures. Decoding for 5 windows x 3 crops (mirrored ones are made on the device) against 5 windows x 1 crop: each
frame is decoded once for all views, so it should cost at most 1.3 times as much; cutting and resampling, which every
crop needs, are shown beside it. And videos a second of a whole prediction, saving and gathering included, with the
share of its time in which the model could not work: what the same forward passes take with their clips on the device
already is the model's own time.

Exit status 1 where decoding for more crops costs more than the bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from benchmarks.index import cpu
from vac_ddp.data import frames
from vac_ddp.data.dataset import TestViews
from vac_ddp.data.index import open_index
from vac_ddp.data.sampling import test_windows
from vac_ddp.inference.forward import AUTO_CLIPS, Scorer
from vac_ddp.inference.run import Task, predict_views
from vac_ddp.inference.views import video_costs, view_table
from vac_ddp.inference.viewsfile import ViewsHead
from vac_ddp.models import load_model
from vac_ddp.settings import ClipSettings, DataSettings, ModelSettings, ViewSettings

BOUND = 1.3
CLASSES = [f"class {i}" for i in range(51)]


def make_videos(root: Path, videos: int, length: int, size: tuple[int, int]) -> None:
    """Smooth noise that compresses as film does (about 25 kB a frame at 320x240); the files of a few are shared."""
    rng = np.random.default_rng(0)
    height, width = size
    pool = []
    for _ in range(min(length, 60)):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = coarse.repeat(8, axis=0).repeat(8, axis=1).astype(np.int16) + rng.integers(
            -12, 13, (height, width, 3)
        )
        pool.append(simplejpeg.encode_jpeg(np.clip(picture, 0, 255).astype(np.uint8), quality=90))
    for video in range(videos):
        folder = root / f"{video + 1:05}"
        folder.mkdir(parents=True)
        for frame in range(length):
            (folder / f"{frame + 1:04}.jpg").write_bytes(pool[(video + frame) % len(pool)])


def load_seconds(dataset: TestViews, repeats: int) -> tuple[float, float]:
    """Best seconds a video, over `repeats` rounds of all videos: of decoding alone, and of loading as a whole."""
    real, spent = frames.decode_frame, [0.0]

    def timed(*arguments: Any, **words: Any) -> np.ndarray:
        start = time.perf_counter()
        try:
            return real(*arguments, **words)
        finally:
            spent[0] += time.perf_counter() - start

    frames.decode_frame = timed
    best = (float("inf"), float("inf"))
    try:
        for _ in range(repeats):
            spent[0] = 0.0
            start = time.perf_counter()
            for place in range(len(dataset)):
                dataset[place]
            whole = time.perf_counter() - start
            best = min(best[0], spent[0] / len(dataset)), min(best[1], whole / len(dataset))
    finally:
        frames.decode_frame = real
    return best


def model_seconds(scorer: Scorer, clip: ClipSettings, clips: int) -> float:
    """Seconds that the forward passes of `clips` clips take with their pixels on the device."""
    size = AUTO_CLIPS[scorer.device.type]
    pixels = torch.rand(size, clip.frames, 3, clip.size, clip.size, device=scorer.device)
    times = []
    with (
        torch.inference_mode(),
        torch.autocast(
            scorer.device.type, dtype=scorer.autocast or torch.bfloat16, enabled=scorer.autocast is not None
        ),
    ):
        for _ in range(4):
            start = time.perf_counter()
            scorer.model(pixels).float().cpu()
            times.append(time.perf_counter() - start)
    return min(times[1:]) / size * clips


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name, default in (("--videos", 24), ("--frames", 100), ("--width", 96), ("--depth", 4), ("--heads", 3)):
        add(name, type=int, default=default)
    add("--size", type=int, default=224, help="side of a clip")
    add("--workers", type=int, default=1)
    add("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{cpu()}; {where}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}")
    clip = ClipSettings(frames=16, stride=4, size=options.size)
    one, three = (ViewSettings(windows="spread", count=5, crops=crops) for crops in (1, 3))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_videos(folder / "data", options.videos, options.frames, (240, 320))
        index = open_index(folder / "data", labelled=False, settings=DataSettings(cache=str(folder)))
        few = np.arange(min(12, len(index)))
        torch.set_num_threads(1)
        sets = [TestViews(index, few, clip, views, tolerant=True) for views in (one, three)]
        (decode, load), (more_decode, more_load) = (load_seconds(dataset, options.repeats) for dataset in sets)
        ratio = more_decode / decode
        print(f"one core, videos of {options.frames} frames of 320x240, ms a video:")
        print(f"  5x1 views          {1000 * decode:6.1f} decoding  {1000 * load:6.1f} with cutting and resampling")
        print(f"  5x3 views          {1000 * more_decode:6.1f} decoding  {1000 * more_load:6.1f}")
        print(f"  5x3 / 5x1            {ratio:.2f} (bound {BOUND:g})  {more_load / load:.2f}")

        model = ModelSettings(weights=None, width=options.width, depth=options.depth, heads=options.heads)
        loaded = load_model(model, clip, CLASSES, seed=0)
        views = dataclasses.replace(three, crops=1, count=3)
        scorer = Scorer(
            model=loaded.model.to(device).eval(),
            device=device,
            autocast=torch.bfloat16 if device.type == "cuda" else None,
            mean=tuple(loaded.mean),
            std=tuple(loaded.std),
            flip=False,
            clips_per_gpu="auto",
        )
        per_video = len(test_windows(1, clip, views))
        own = model_seconds(scorer, clip, len(index) * per_video)
        task = Task(
            head=ViewsHead(
                ids=list(index.names),
                classes=CLASSES,
                views=view_table(views, per_video),
                labels=index.labels,
                sources=[""] * len(index),
                damaged=np.zeros(len(index)),
                failed=np.zeros(len(index), bool),
            ),
            costs=video_costs(index.frame_counts, lambda n: test_windows(n, clip, views), 1),
            fingerprint={"data": "benchmark"},
            prior=np.zeros(len(CLASSES), np.float32),
        )
        start = time.perf_counter()
        done = predict_views(
            task,
            scorer,
            TestViews(index, np.arange(len(index)), clip, views, tolerant=True),
            folder / "out",
            workers=options.workers,
            prefetch=4,
            save_every=50,
        )
        total = time.perf_counter() - start
        parameters = sum(p.numel() for p in loaded.model.parameters()) / 1e6
        print(f"prediction           {len(index) / total:.1f} videos/s, 3 views each, {parameters:.1f} M parameters, "
              f"{options.workers} loader processes")  # fmt: skip
        print(f"outside the model    {100 * max(0.0, 1 - own / total):.0f} % of {total:.2f} s "
              f"(waiting for frames {100 * done.waited / total:.0f} %)")  # fmt: skip
    return 0 if ratio <= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
