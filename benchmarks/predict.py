"""What a view costs, how fast the model is beside Hugging Face's, and how much of a prediction is not the model.

    python -m benchmarks.predict                  # views on one core, a small model on the CPU
    python -m benchmarks.predict --gpu            # VideoMAE-B on a GPU
    python -m benchmarks.predict --dry            # every piece, at tiny sizes

Three tables. Views: decoding for 5 windows x 3 crops (mirrored ones are made on the device) against 5 windows x 1 crop:
each frame is decoded once for all views, so it should cost at most 1.3 times as much; cutting and resampling, which
every crop needs, are shown beside it. Passes: uint8 clips in the device's memory to logits, ours with normalisation
against Hugging Face's class with floats that are ready. Whole: `run_task` from files, saving and gathering
included, with the share of its time in which the model could not work.

Exit status 3 where a bar is missed.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from benchmarks import peers
from benchmarks.common import (
    CLASSES,
    SMALL,
    Stopwatch,
    about_line,
    arguments,
    device_of,
    machine,
    ratio,
    table,
    write,
)
from vac_ddp.data import frames
from vac_ddp.data.clip_sampling import view_windows, window_count
from vac_ddp.data.dataset import TestViews
from vac_ddp.data.index import open_index
from vac_ddp.data.loader import views_loader
from vac_ddp.data.normalization import normalize
from vac_ddp.errors import DONE, FINDINGS
from vac_ddp.models import load_model
from vac_ddp.predicting.all_videos import run_task
from vac_ddp.predicting.task import VIEWS, Task
from vac_ddp.results.logits_file import ViewsHead
from vac_ddp.scoring.scorer import Scorer, prepare
from vac_ddp.scoring.views import video_costs, view_table
from vac_ddp.settings import ClipSettings, Config, DataSettings, ModelSettings, ViewSettings
from vac_ddp.training.meters import clip_flops, matmul_rate

OURS, OURS_COMPILED = "vac_ddp, not compiled", "vac_ddp"
HF, HF_BYTES, HF_COMPILED = "HF", "HF, from the same bytes", "HF, torch.compile"
BOUND = 1.3
WHOLE_SHARE = "whole 5x3 prediction: share of the matmul peak"


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
    real, spent = frames.decode_plain_jpeg, [0.0]

    def timed(*arguments: Any) -> bool:
        start = time.perf_counter()
        try:
            return real(*arguments)
        finally:
            spent[0] += time.perf_counter() - start

    frames.decode_plain_jpeg = timed
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
        frames.decode_plain_jpeg = real
    return best


def passes(options: Any, device: torch.device) -> dict[str, Any]:
    """Clips a second of forward passes, in rounds: ours and Hugging Face's, as they are and compiled."""
    clip = ClipSettings(frames=16, stride=4, size=options.size)
    loaded = load_model(ModelSettings(weights=None, **options.sizes), clip, CLASSES, seed=0)
    theirs = peers.hf_model(loaded.model).to(device).eval()
    models = {OURS: loaded.model.to(device).eval()}
    if options.compile:
        models[OURS_COMPILED] = copy.deepcopy(models[OURS])
        models[OURS_COMPILED].compile_blocks()
    half = torch.bfloat16 if device.type == "cuda" else None
    scorers = {name: scorer_of(model, loaded, device, options.clips) for name, model in models.items()}
    whole = torch.randint(0, 256, (options.clips, 16, options.size, options.size, 3), dtype=torch.uint8, device=device)
    floats = normalize(whole, tuple(loaded.mean), tuple(loaded.std), torch.float32)

    @torch.inference_mode()
    def hf(model: Any, pixels: Callable[[], torch.Tensor] = lambda: floats) -> torch.Tensor:
        with torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None):
            return model(pixel_values=pixels()).logits.float()

    ways: dict[str, Callable[[], torch.Tensor]] = {
        name: functools.partial(scorer.outputs, whole) for name, scorer in scorers.items()
    }
    ways[HF] = functools.partial(hf, theirs)
    ways[HF_BYTES] = functools.partial(hf, theirs, lambda: peers.rescaled(whole))
    if options.compile:
        ways[HF_COMPILED] = functools.partial(hf, torch.compile(copy.deepcopy(theirs)))
    difference = float((ways[OURS]() - ways[HF]()).abs().max() / ways[HF]().abs().max())
    assert difference < 0.05, f"the peer's logits differ by {difference:.2g} of the largest"
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(options.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            watch = Stopwatch(device, seconds=options.seconds, warm=2, alone=True)
            while True:
                ways[name]()
                if not watch.tick(options.clips):
                    break
            rounds[name].append(round(watch.rate, 2))
    flops, matmul = clip_flops(models[OURS], clip), matmul_rate(device, half)
    assert flops is not None
    return {
        "rounds": rounds,
        "flops_per_clip": flops[0],
        "matmul": matmul,
        "mfu": {name: max(rates) * flops[0] / matmul for name, rates in rounds.items()},
        "difference": difference,
    }


def scorer_of(model: Any, loaded: Any, device: torch.device, clips: int | str) -> Scorer:
    """The model as a prediction has it."""
    return Scorer(
        model=model,
        device=device,
        autocast=torch.bfloat16 if device.type == "cuda" else None,
        mean=tuple(loaded.mean),
        std=tuple(loaded.std),
        flip=False,
        clips_per_gpu=clips,
    )


def view_costs(options: Any, index: Any) -> dict[str, float]:
    """Milliseconds a video on one core: decoding and loading of 5x1 and 5x3 views, best rounds."""
    clip = ClipSettings(frames=16, stride=4, size=options.size if options.dry else 224)
    few = np.arange(min(12, len(index)))
    found = {}
    for crops in (1, 3):
        views = ViewSettings(windows="spread", count=5, crops=crops)
        decode, load = load_seconds(TestViews(index, few, clip, views, tolerant=True), options.repeats)
        found |= {f"5x{crops} decoding": 1000 * decode, f"5x{crops} loading": 1000 * load}
    return found


def whole_prediction(options: Any, device: torch.device, index: Any, folder: Path) -> dict[str, Any]:
    """A whole prediction of 5x3 views as `vac predict` makes it, the best of two."""
    clip = ClipSettings(frames=16, stride=4, size=options.size)
    config = Config(clip=clip)
    config.predict.compile = options.compile
    loaded = load_model(ModelSettings(weights=None, **options.sizes), clip, CLASSES, seed=0)
    views = ViewSettings(windows="spread", count=5, crops=3)
    per_video = window_count(views) * views.crops
    scorer = scorer_of(loaded.model.to(device).eval(), loaded, device, "auto")
    prepare(scorer, config, len(index) * per_video)
    task = Task(
        head=ViewsHead(
            ids=list(index.names),
            classes=CLASSES,
            views=view_table(views, per_video // views.crops),
            labels=index.labels,
            sources=[""] * len(index),
            damaged=np.zeros(len(index)),
            failed=np.zeros(len(index), bool),
        ),
        costs=video_costs(index.frame_counts, lambda n: view_windows(n, clip, views), views.crops),
        fingerprint={"data": "benchmark"},
        arrays=lambda logits: {"logits": logits},
        missing={"logits": np.zeros((per_video, len(CLASSES)), np.float32)},
        output=VIEWS,
    )
    load = functools.partial(
        views_loader,
        TestViews(index, np.arange(len(index)), clip, views, tolerant=True),
        videos_per_batch=1,
        workers=options.workers,
        prefetch=4,
        pin=device.type == "cuda",
    )
    found: list[dict[str, float]] = []
    for turn in range(2):
        start = time.perf_counter()
        done = run_task(
            task,
            scorer,
            load,
            folder / f"out{turn}",
            save_every=50,
        )
        total = time.perf_counter() - start
        found.append({"clips_per_s": len(index) * per_video / total, "waited": done.waited / total, "seconds": total})
    best = max(found, key=lambda one: one["clips_per_s"])
    return {**best, "videos": len(index), "clips_per_pass": scorer.clips_per_pass}


def choose(argv: list[str] | None) -> Any:
    """Options with the sizes that go with them."""
    parser = arguments("predict", __doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="VideoMAE-B, 16 frames of 224")
    parser.add_argument("--compile", action="store_true", help="on the CPU as well")
    for name, default in (("--videos", None), ("--workers", None), ("--repeats", 3), ("--rounds", None)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args(argv)
    options.compile |= options.gpu
    small = options.dry or not options.gpu
    options.sizes = dict(SMALL) if small else {"size": "base"}
    options.size, options.clips = (112, 4) if small else (224, 64)
    options.videos = options.videos or (12 if small else 200)
    options.frames = 40 if small else 100
    options.workers = options.workers or (1 if small else 15)
    options.rounds = options.rounds or (7 if small else 3)
    options.seconds = options.seconds or (1.5 if small else 3.0)
    if options.dry:
        options.sizes |= {"depth": 2, "width": 32, "heads": 2}
        options.size, options.clips, options.videos, options.frames, options.repeats = 32, 4, 3, 24, 1
        options.rounds, options.seconds = 1, 0.1
    return options


def bars_of(result: dict[str, Any], options: Any) -> list[list[str]]:
    """What had to be reached, what was, and whether that is enough."""
    rows = []

    def add(what: str, found: float, best: float | None, bar: float, *, most: bool = False) -> None:
        value = found if best is None else max(found, best)
        met = value <= bar if most else value >= bar
        shown = "" if best is None else f"{best:.3f}"
        rows.append([what, f"{found:.3f}", shown, f"{'<=' if most else '>='} {bar:g}" + ("" if met else " (missed)")])

    if "passes" in result:
        rounds = result["passes"]["rounds"]
        for way, over in ((OURS, HF_BYTES), (OURS_COMPILED, HF_COMPILED)):
            if way in rounds:
                kept = ratio(rounds, way, over)
                add(f"passes: {way} / {over}", kept["median"], kept["best"], 1.0)
        if options.gpu:
            add("passes: share of the matmul peak", result["passes"]["mfu"][OURS_COMPILED], None, 0.50)
    if (options.gpu or options.dry) and "mfu" in result.get("whole", {}):
        add(WHOLE_SHARE, result["whole"]["mfu"], None, 0.50)
    if "views" in result:
        views = result["views"]
        add("decoding: 5x3 / 5x1 views", views["5x3 decoding"] / views["5x1 decoding"], None, BOUND, most=True)
    return rows


def as_lines(result: dict[str, Any], options: Any, command: str) -> list[str]:
    """The tables for people."""
    lines = ["# Prediction", "", about_line(command, result["about"]), ""]
    lines += table(["what", "found", "best rounds", "bar"], result["bars"])
    if "passes" in result:
        kept, sizes = result["passes"], ", ".join(f"{name} {value}" for name, value in options.sizes.items())
        lines += [f"## Passes of {options.clips} clips in memory: {sizes}, 16 frames of {options.size}", ""]
        rows = [
            [n, f"{sorted(r)[len(r) // 2]:.1f}", f"{max(r):.1f}", f"{kept['mfu'][n]:.3f}"]
            for n, r in kept["rounds"].items()
        ]
        head = ["way", "clips/s, median", "best round", "of the matmul"]
        lines += table(head, sorted(rows, key=lambda r: -float(r[1])))
        lines += [
            f"A matrix product reached {kept['matmul'] / 1e12:.4g} TFLOP/s in this run; a clip costs "
            f"{kept['flops_per_clip'] / 1e9:.4g} GFLOP.",
            "",
        ]
    if "whole" in result:
        whole = result["whole"]
        lines += [
            f"## A whole prediction: {whole['videos']} videos of {options.frames} frames of 320x240, 5x3 views, "
            f"{options.workers} loader process(es)",
            "",
            f"{whole['clips_per_s']:.1f} clips/s, {whole['mfu']:.3f} of the matmul, "
            f"{100 * whole['outside_the_model']:.0f} % of its time outside the model, "
            f"{100 * whole['waited']:.0f} % waiting for frames; passes of {whole['clips_per_pass']} clips.",
            "",
        ]
    if "views" in result:
        lines += ["## Views: milliseconds a video on one core, best rounds", ""]
        lines += table(["views and work", "ms"], [[name, f"{value:.1f}"] for name, value in result["views"].items()])
        lines += [
            "Loading is decoding with cutting and resampling, which are per crop: a shared resize would put the crops",
            "at other sub-pixel places.",
        ]
    return lines


def main(argv: list[str] | None = None) -> int:
    options = choose(argv)
    device = device_of()
    command = " ".join(["predict", *(sys.argv[1:] if argv is None else argv)])
    kept = "predict_gpu" if device.type == "cuda" else "predict_cpu"
    result: dict[str, Any] = {"about": machine(device)}

    def keep(part: str, found: dict[str, Any], *, last: bool = False) -> None:
        result[part] = found
        result["bars"] = bars_of(result, options)
        write(options.out, kept, result, as_lines(result, options, command), dry=options.dry, shown=last)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_videos(folder / "data", options.videos, options.frames, (240, 320))
        index = open_index(folder / "data", labelled=False, settings=DataSettings(cache=str(folder)))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        keep("views", view_costs(options, index))
        torch.set_num_threads(threads)
        alone = passes(options, device)
        keep("passes", alone)
        whole = whole_prediction(options, device, index, folder)
    whole["mfu"] = whole["clips_per_s"] * alone["flops_per_clip"] / alone["matmul"]
    most = max(alone["rounds"].get(OURS_COMPILED, alone["rounds"][OURS]))
    whole["outside_the_model"] = max(0.0, 1 - whole["clips_per_s"] / most)
    keep("whole", whole, last=True)
    missed = any("missed" in row[-1] for row in result["bars"])
    return FINDINGS if missed and not options.dry else DONE


if __name__ == "__main__":
    sys.exit(main())
