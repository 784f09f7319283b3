"""Reading video files: PyAV in this process against an ffmpeg process, on one core.

`python -m benchmarks.video [FILES...]` measures, file by file and in turns, all frames to RGB arrays and 16 frames
spread over the file, as a clip of a training step would need. `--old PY` also runs an earlier reader: a file with
`read_frames(path)`. Needs the ffmpeg and ffprobe programs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import about_line, arguments, machine, table, write
from vac_ddp.data.video_reader import VideoFile
from vac_ddp.errors import UserError

FRAMES, STRIDE = 16, 4
FILES = {  # name: what ffmpeg encodes; 320x240 as HMDB51 and UCF101, 1280x720 as phones
    "320x240 H.264 mp4": ("a.mp4", 320, 240, "-c:v libx264 -pix_fmt yuv420p -g 250"),
    "320x240 MPEG-4 avi": ("a.avi", 320, 240, "-c:v mpeg4 -q:v 4 -bf 2"),
    "1280x720 H.264 mp4": ("b.mp4", 1280, 720, "-c:v libx264 -pix_fmt yuv420p -g 60"),
}


DECISION = """## PyAV or an ffmpeg process

Cases: both give the right frames of every file of `tests/test_video_agreement.py` (59 files, the same to the
last bit with the settings noted there) and of the cases in `tests/test_cases.py`. PyAV leaves three
things to the reader that the program does by itself: all of the display matrix, cover pictures, clocks that jump. The
program leaves three others: pixel aspect, a bound of the
frames that a jump of a Matroska or MP4 clock makes with `-r`, and damage, which it reports as text only.
Speed: the tables above. A process costs its start each time, which is most of a clip's time.
Lines: 555 (189 in the two readers before) with single frames, sound and damage. A process needs the same checks, a
reader of `ffprobe`'s answers and one of the pipe, and a seek by time that hits a frame only where time stamps are
regular.
Installation: PyAV is one wheel from pip (`vac_ddp[video]`); its program would be Debian's FFmpeg 5.1 (a root's job) or
`imageio-ffmpeg`, 68 MB and GPL v3.
So PyAV stays, and the program is the independent reader of the tests.""".splitlines()


@functools.cache
def _size(path: Path) -> tuple[int, int]:
    asked = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "stream=width,height"]
    size = subprocess.check_output([*asked, "-of", "csv=p=0", str(path)], text=True).strip().strip(",").split(",")
    return int(size[0]), int(size[1])


def ffmpeg_frames(path: Path, *before: str, filters: str = "") -> Iterator[np.ndarray]:
    """All frames by an ffmpeg process, read from its pipe: (H, W, 3) uint8."""
    width, height = _size(path)
    command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", *before, "-i", str(path)]
    command += [
        "-fps_mode",
        "passthrough",
        *(["-vf", filters] if filters else []),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    size = width * height * 3
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=size) as process:
        assert process.stdout is not None
        while len(data := process.stdout.read(size)) == size:
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def ffmpeg_select(path: Path, numbers: list[int]) -> list[np.ndarray]:
    """Single frames, one process that decodes all of the file and writes those."""
    chosen = "+".join(f"eq(n\\,{number})" for number in numbers)
    return list(ffmpeg_frames(path, filters=f"select={chosen}"))


def ffmpeg_clip(path: Path, numbers: list[int], rate: float) -> list[np.ndarray]:
    """Frames of equal stride, one process that seeks to the first."""
    first, last = numbers[0], numbers[-1]
    begin, length = max(0.0, (first - 0.25) / rate), (last - first + 0.5) / rate
    only = f"select=not(mod(n\\,{STRIDE}))"
    return list(ffmpeg_frames(path, "-ss", f"{begin:.4f}", "-t", f"{length:.4f}", filters=only))


def ways(path: Path, rate: float, old: Any) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Name of a way -> frames it delivers, and the call."""
    video = VideoFile(path=path)
    where = video.table()
    total = len(where)
    spread = np.linspace(0, total - 1, FRAMES).astype(int).tolist()
    first = (total - FRAMES * STRIDE) // 2
    clip = list(range(first, first + FRAMES * STRIDE, STRIDE))
    assert len(ffmpeg_clip(path, clip, rate)) == FRAMES
    found: dict[str, tuple[int, Callable[[], Any]]] = {
        "all, PyAV (ours)": (total, lambda: sum(1 for _ in video.frames())),
        "all, ffmpeg process": (total, lambda: sum(1 for _ in ffmpeg_frames(path))),
        "clip, PyAV (ours)": (FRAMES, lambda: video.frames_at(clip, where)),
        "clip, ffmpeg process": (FRAMES, lambda: ffmpeg_clip(path, clip, rate)),
        "spread, PyAV (ours)": (FRAMES, lambda: video.frames_at(spread, where)),
        "spread, ffmpeg process": (FRAMES, lambda: ffmpeg_select(path, spread)),
        "table of frames": (total, video.table),
    }
    if old is None:
        return found
    return {"all, the reader before": (total, lambda: sum(1 for _ in old.read_frames(path))), **found}


def _processor_s() -> float:
    """Processor time of this process and its ended children, which other work on the machine changes little."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def measure(path: Path, rate: float, rounds: int, old: Any) -> list[list[Any]]:
    """Rows (way, frames a second, milliseconds a call), medians over rounds in turns."""
    seconds: dict[str, list[float]] = {}
    known = ways(path, rate, old)
    for counted in [False] + [True] * rounds:
        order = list(known.items())
        for name, (_, call) in order[::-1] if len(seconds.get(order[0][0], [])) % 2 else order:
            begin = _processor_s()
            call()
            if counted:
                seconds.setdefault(name, []).append(_processor_s() - begin)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return [[name, round(known[name][0] / middle[name]), round(1000 * middle[name], 1)] for name in known]


def main() -> None:
    parser = arguments("video", __doc__ or "")
    parser.add_argument("files", nargs="*", type=Path, help="more files to read")
    parser.add_argument("--old", type=Path, help="a Python file with an earlier read_frames")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.dry:
        given.rounds = 1
    if not shutil.which("ffmpeg") or not shutil.which("ffprobe"):
        raise UserError("needs the ffmpeg and ffprobe programs (Debian: apt-get install ffmpeg)")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    old = None
    if given.old:
        spec = importlib.util.spec_from_file_location("earlier", given.old)
        assert spec is not None
        assert spec.loader is not None
        old = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(old)
    about = machine(torch.device("cpu"))
    import av

    program = subprocess.check_output(["ffmpeg", "-version"], text=True).split()[2]
    about["versions"] |= {"av": av.__version__, "ffmpeg": program}
    lines = [
        "# Reading video files on one core",
        "",
        about_line("video", about),
        "",
        "Processor time of the process and its children, medians over rounds in turns; frames as RGB arrays (H, W, 3).",
        f"Spread: {FRAMES} frames over the whole file, as of a test video. Clip: {FRAMES} frames of stride {STRIDE}",
        "from its middle, as a clip of a training step. `table of frames`: needed once a file for these.",
        "",
    ]
    result: dict[str, Any] = {"about": about, "files": {}}
    scratch = given.out / ".video_files"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        cases = []
        for name, (file, width, height, how) in FILES.items():
            made = f"ffmpeg -v error -y -f lavfi -i testsrc2=size={width}x{height}:rate=30:duration=4 {how} {file}"
            subprocess.run(made.split(), cwd=scratch, check=True)
            cases.append((name, scratch / file))
        for name, path in [*cases, *((path.name, path) for path in given.files)]:
            rows = measure(path, 30.0, given.rounds, old)
            result["files"][name] = rows
            lines += [f"## {name}", "", *table(["way", "frames/s", "ms a call"], rows), ""]
            print("\n".join(lines[-len(rows) - 4 :]), file=sys.stderr)
    finally:
        shutil.rmtree(scratch)
    lines += DECISION
    write(given.out, "video", result, lines, dry=given.dry)


if __name__ == "__main__":
    main()
