"""Frames a second of one core from video files, cached and not, against folders of JPEG frames.

    python -m benchmarks.video [--rounds N] [--videos FOLDER]

Every way makes the same random training clips of the same videos: 16 frames of stride 4, cut to 224 x 224, one of each
video in an epoch. They take turns; a figure is the median over the rounds, a ratio the median of the ratios within a
round. Times are processor times of one process with one thread. H.264 files are made here unless --videos names some.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks.common import about_line, arguments, device_of, machine, table, write
from benchmarks.pictures import moving_frames
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.frame_cache_setup import for_clips
from vac_ddp.data.index import open_index
from vac_ddp.data.sampler import Key
from vac_ddp.data.video_reader import VideoFile, write_frames
from vac_ddp.errors import DONE
from vac_ddp.settings import Config, DataSettings

SIZES = {"320x240": (240, 320), "1280x720": (720, 1280)}
EXTRACTED = "JPEG folders of vac extract"
FIRST, CACHED, UNCACHED = (
    "video files, first epoch (fills the cache)",
    "video files, later epochs",
    "video files, no cache",
)


def encode(path: Path, height: int, width: int, frames: int, seed: int) -> None:
    """Write a video file of H.264, a key frame a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "20", "preset": "veryfast", "g": "25"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, pixels in enumerate(moving_frames(height, width, frames, seed)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def epoch(root: Path, config: Config, *, keep: bool) -> tuple[float, int]:
    """(processor seconds, frames) of the clips of one epoch."""
    index = for_clips(open_index(root, labelled=True, settings=config.data), config, keep=keep)
    clips = TrainClips(index, np.arange(len(index)), config, noise_size=0, seed=1)
    begin = time.process_time()
    for video in range(len(index)):
        clips.__getitems__([Key(0, video, video)])
    return time.process_time() - begin, len(index) * config.clip.frames


def measure(folder: Path, videos: Path, rounds: int) -> dict[str, Any]:
    """Frames a second of every way in every round."""
    config = Config(data=DataSettings(cache=str(folder / "cache")))
    config.clip.stride = 4
    roots = {EXTRACTED: folder / "frames"}
    for path in sorted(videos.glob("*/*")):
        target = roots[EXTRACTED] / path.parent.name / path.stem
        target.mkdir(parents=True)
        write_frames(VideoFile(path=path), target, short_side=2 * config.clip.size)
    rates: dict[str, list[float]] = {way: [] for way in (EXTRACTED, FIRST, CACHED, UNCACHED)}
    for turn in range(rounds + 1):
        for kept in (folder / "cache" / "frames").glob("*.frames"):
            kept.unlink()
        (folder / "cache" / "frames" / "size").unlink(missing_ok=True)
        for way in rates:
            seconds, frames = epoch(roots.get(way, videos), config, keep=way in (FIRST, CACHED))
            if turn:
                rates[way].append(frames / seconds)
            if way == CACHED:
                config.data.cache = str(folder / "nothing")
        config.data.cache = str(folder / "cache")
    return {"rates": rates, "videos": len(list(videos.glob("*/*")))}


def lines_of(result: dict[str, Any]) -> list[str]:
    """The table of one set of videos."""
    rates = result["rates"]
    rows = []
    for way, found in rates.items():
        ratio = statistics.median(b / a for a, b in zip(found, rates[EXTRACTED], strict=True))
        rows.append([way, round(statistics.median(found)), f"{ratio:.2f}"])
    return table(["way", "frames/s", "time, extracted = 1"], rows)


def main() -> int:
    """Measure and write benchmarks/results/video_data.json and .md."""
    parser = arguments("video", __doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="measure these as well: <class>/<video file>")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = machine(device_of())
    about["versions"]["av"] = av.__version__
    result: dict[str, Any] = {"about": about}
    lines = ["# Training clips from video files, on one core", "", about_line("video", about), ""]
    lines += [
        "Processor time of decoding, cropping and resampling; 16 frames of stride 4, 224 x 224. The cache holds JPEGs"
    ]
    lines += ["as `vac extract` writes them, short side at most 448.", ""]
    sizes = {"64x48": (48, 64)} if options.dry else SIZES
    for name, (height, width) in sizes.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            for number in range(2 if options.dry else 12 if height < 480 else 4):
                path = folder / "videos" / f"class{number % 2}" / f"video{number:02d}.mp4"
                encode(path, height, width, 20 if options.dry else 100, number)
            result[name] = measure(folder, folder / "videos", 1 if options.dry else options.rounds)
        lines += [f"## {name} H.264, {result[name]['videos']} videos of 100 frames", "", *lines_of(result[name])]
        write(options.out, "video_data", result, lines, dry=options.dry, shown=name == list(sizes)[-1])
    if options.videos:
        with tempfile.TemporaryDirectory() as scratch:
            result["given"] = measure(Path(scratch), options.videos, options.rounds)
        lines += [f"## {result['given']['videos']} real files", "", *lines_of(result["given"])]
        write(options.out, "video_data", result, lines, dry=options.dry)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
