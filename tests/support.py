"""What several test files need: the optional real clips, and real torchrun launches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


def shared(*parts: str) -> Path:
    """A path in the optional folder of real material (VAC_SHARED, else ../shared), or a skip that says so."""
    root = Path(os.environ.get("VAC_SHARED", REPO.parent / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"extra test: no real material at {'/'.join(parts)} (set VAC_SHARED to a folder that has it)")
    return path


def unpack(path: Path, folder: Path, *, short_side: int) -> list[str]:
    """The frames that a prediction reads of a video file, as `folder`/<name>/0001.jpg...; returns its faults."""
    from vac_ddp.data.video_frames import Encoding, open_video

    video = open_video(path, Encoding(short_side=short_side))
    target = folder / (path.stem.lstrip(".") or "video")
    target.mkdir(parents=True)
    for number in range(video.count):
        (target / f"{number + 1:04d}.jpg").write_bytes(video.read(number))
    return video.faults


def ffmpeg_program() -> str:
    """The path of the ffmpeg program, or a skip that says so."""
    path = shutil.which("ffmpeg")
    if path is None:
        pytest.skip("no ffmpeg program to make and to check videos with (Debian: apt-get install ffmpeg)")
    return path


def environment(**extra: str) -> dict[str, str]:
    """This environment with one thread a process, the repository importable, and no GPU."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


def torchrun(
    ranks: int, *arguments: str | Path, cwd: Path, timeout: float = 300, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc_per_node=RANKS ARGUMENTS` with gloo on the CPU and wait for it."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            *map(str, arguments),
        ],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
