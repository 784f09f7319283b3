"""Seconds and processor time of features and probes, beside Hugging Face's pipeline and scikit-learn.

    python -m benchmarks.probe                                   # made videos
    python -m benchmarks.probe --data data_train --group-regex '^(set\\d+_seq\\d+)_'
    python -m benchmarks.probe --dry                             # every piece, at tiny sizes

Four programs in processes of their own, one after the other: `vac embed`; the pipeline image-feature-extraction with
the same network, weights and frames; `vac probe` on the features; the same selection by scikit-learn (GridSearchCV in
grouped outer folds of the same number). Both select on all videos. Start and imports count, and are shown apart as
well. The features are compared: resampling differs a little, so they agree in direction, not to the last digit.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import about_line, arguments, machine, table, write
from benchmarks.pictures import write_videos
from vac_ddp.config import to_yaml
from vac_ddp.init.weights_choice import IMAGE_BACKBONE, package_file
from vac_ddp.results.features_file import read_features
from vac_ddp.settings import Config

OURS, THEIRS = "vac_ddp", "Hugging Face and scikit-learn"


def timed(words: list[str], folder: Path) -> dict[str, Any]:
    """Run a program; {"seconds", "processor_s", "text"}: on the wall, of it and its children, and what it printed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *words], stdout=said, stderr=errors, cwd=folder, env=environment())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        took = time.perf_counter() - began
        for stream in (said, errors):
            stream.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words[:4])} ended with {process.returncode}: {errors.read()[-2000:]}")
        text = said.read()
    return {"seconds": took, "processor_s": usage.ru_utime + usage.ru_stime, "text": text}


def environment() -> dict[str, str]:
    """One thread a process: more of them spin while they wait, and their time would count."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "HF_HUB_OFFLINE": "1",
    }


def settings(options: Any, data: Path, folder: Path) -> Config:
    """A probe of image features of one centre view, as the preset probe_frames has it."""
    config = Config()
    config.data.train, config.data.cache = str(data), str(folder / "cache")
    config.data.group_regex, config.data.workers, config.data.val_fraction = options.group_regex, 1, 0.0
    config.clip.frames, config.clip.size, config.clip.sampling = options.frames, options.size, "segments"
    config.model.name, config.model.encoder, config.model.backbone = "probe", "frame_vit", IMAGE_BACKBONE
    config.model.weights = str(package_file())
    config.predict.views.windows, config.predict.views.count = "phases", 1
    config.probe.repeats, config.probe.folds = options.repeats, options.folds
    config.run.dir = str(folder / "run")
    return config


def run_all(options: Any, data: Path, folder: Path) -> dict[str, Any]:
    """Time the four programs, and compare what they made."""
    config = settings(options, data, folder)
    (folder / "probe.yaml").write_text(to_yaml(config))
    features = folder / "features" / "features.npz"
    peers = ["-m", "benchmarks.probe_peers"]
    theirs = {
        "data": str(data), "out": str(folder / "theirs.npz"), "weights": config.model.weights,
        "cache": config.data.cache, "backbone": IMAGE_BACKBONE, "frames": options.frames, "size": options.size,
        "group_regex": options.group_regex,
    }  # fmt: skip
    grids = {
        "features": theirs["out"], "folds": options.folds, "repeats": options.repeats, "ridge": config.probe.ridge,
        "statistics": config.probe.statistics, "logistic": config.probe.logistic,
    }  # fmt: skip
    vac = ["-m", "vac_ddp.cli"]
    embed = [*vac, "embed", "--config", "probe.yaml", "--data", str(data), "--out", "features", "--steps"]
    probe = [*vac, "probe", "--config", "probe.yaml", f"probe.features={features}"]
    found: dict[str, Any] = {
        "embed": {OURS: timed(embed, folder), THEIRS: timed([*peers, "embed", json.dumps(theirs)], folder)},
        "probe": {OURS: timed(probe, folder), THEIRS: timed([*peers, "select", json.dumps(grids)], folder)},
        "start": timed(["-c", "import torch, timm, sklearn, vac_ddp.cli"], folder),
    }
    found["table"] = table_of(folder / "run")
    found["their_table"] = json.loads(found["probe"][THEIRS]["text"].splitlines()[-1])
    found["cosine"] = agreement(features, Path(theirs["out"]))
    for run in (*found["embed"].values(), *found["probe"].values(), found["start"]):
        del run["text"]
    return found


def table_of(run: Path) -> list[dict[str, Any]]:
    """The rows of our table of probes: probe, accuracy, seconds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "probe"]


def agreement(ours: Path, theirs: Path) -> float:
    """The least cosine between features of a time step by vac_ddp and by the pipeline, videos in the same order."""
    steps = read_features(ours).steps
    assert steps is not None
    with np.load(theirs) as file:
        a, b = np.asarray(steps[:, 0], np.float32), file["steps"].astype(np.float32)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float(cosine.min())


def choose(argv: list[str] | None) -> Any:
    """Options with the sizes that go with them."""
    parser = arguments("probe", __doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="labelled frame folder (default: made videos)")
    parser.add_argument("--group-regex", help="data.group_regex")
    parser.add_argument("--repeats", type=int, default=1, help="of the outer folds (%(default)s)")
    options = parser.parse_args(argv)
    options.frames, options.size, options.folds, options.videos = (2, 64, 3, 12) if options.dry else (16, 224, 5, 80)
    if options.data is None:
        options.group_regex = r"^(video\d+)$"  # every video is a group of its own
    return options


def main(argv: list[str] | None = None) -> int:
    options = choose(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data.resolve() if options.data else folder / "frames"
        if not options.data:
            side = options.size + 32  # few more pixels than needed: decoded in full by both
            write_videos(data, videos=options.videos, frames=24, height=side, width=side)
        about = machine(torch.device("cpu"))
        found = run_all(options, data, folder)
    command = shlex.join(["probe", *(sys.argv[1:] if argv is None else argv)])
    result = {"about": about, **found}
    write(options.out, "probe_cpu", result, text_of(options, result, about_line(command, about)), dry=options.dry)
    return 0


def text_of(options: Any, result: dict[str, Any], about: str) -> list[str]:
    """The tables as Markdown."""
    rows = []
    for what, name in (("features", "embed"), ("probes", "probe")):
        ours, theirs = result[name][OURS], result[name][THEIRS]
        peer = {"embed": "pipeline image-feature-extraction", "probe": "GridSearchCV"}[name]
        rows += [
            [f"{what}: vac {name}", *(f"{ours[key]:.1f}" for key in ("seconds", "processor_s")), ""],
            [f"{what}: {peer}", *(f"{theirs[key]:.1f}" for key in ("seconds", "processor_s")),
             f"{theirs['processor_s'] / ours['processor_s']:.2f}"],
        ]  # fmt: skip
    start = result["start"]
    rows += [["start and imports, in each of them", f"{start['seconds']:.1f}", f"{start['processor_s']:.1f}", ""]]
    lines = ["# Features and probes", "", about, ""]
    lines += [
        f"One view of each video, {options.frames} frames of {options.size} pixels, {IMAGE_BACKBONE}; "
        f"{options.folds} outer folds, sampled {options.repeats} time(s). One thread per process.",
        "",
    ]
    lines += table(["program", "seconds", "processor seconds", "times ours"], rows)
    lines += [f"Least cosine between features of a frame, ours and the pipeline's: {result['cosine']:.4f}.", ""]
    theirs = result["their_table"]
    probes = [
        [row["probe"], f"{row['seconds']:.1f}", f"{row['accuracy']:.3f}",
         *([f"{theirs[row['probe']]['seconds']:.1f}", f"{theirs[row['probe']]['accuracy']:.3f}"]
           if row["probe"] in theirs else ["", ""])]
        for row in result["table"]
    ]  # fmt: skip
    lines += ["## Each probe, without start and imports", ""]
    head = ["probe", "seconds", "outer folds", "seconds, scikit-learn alone", "its outer folds"]
    return [*lines, *table(head, probes)]


if __name__ == "__main__":
    sys.exit(main())
