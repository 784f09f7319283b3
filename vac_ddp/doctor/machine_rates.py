"""What a machine can do: decode, read, copy, reduce; each measured in a few seconds, for `vac doctor`."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from vac_ddp.data.augment import draw_crop_box
from vac_ddp.data.frames import read_clip
from vac_ddp.data.scan import IMAGE_SUFFIXES
from vac_ddp.data.video_frames import encoded_frames, file_encoding
from vac_ddp.data.video_scan import is_video_file
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config

SAMPLE = 192  # frames that are read
LOOKED_AT = 20_000  # directory entries, at most
DECODE_S = 2.0


def sample_frames(root: Path) -> list[Path]:
    """Some frames below a folder, from a bounded look at it, spread over what was seen."""
    seen: list[Path] = []
    looked = 0
    for folder, folders, names in os.walk(root):
        folders.sort()
        own = [Path(folder) / name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        seen += own[: max(1, SAMPLE // 8)]
        looked += len(names) + len(folders)
        if looked > LOOKED_AT or len(seen) > 8 * SAMPLE:
            break
    return seen[:: max(1, len(seen) // SAMPLE)][:SAMPLE]


def sample_video_files(root: Path, folder: Path, config: Config) -> list[Path]:
    """Frames of some video files below `root`, written to `folder` as the cache keeps them; none where none decodes."""
    files: list[Path] = []
    for parent, folders, names in os.walk(root):
        folders.sort()
        files += [Path(parent) / name for name in sorted(names)[: SAMPLE // 8] if is_video_file(name)]
        if len(files) >= SAMPLE:
            break
    paths: list[Path] = []
    for file in files[:: max(1, len(files) // 8)][:8]:
        frames = encoded_frames(file, file_encoding(config.data, config.clip))
        with contextlib.suppress(Exception):  # vac audit names damaged files
            for _, data in itertools.islice(frames, SAMPLE // 8):
                paths.append(folder / f"{len(paths) + 1:04}")
                paths[-1].write_bytes(data)
    return paths


def make_sample(folder: Path) -> list[Path]:
    """Frames of 320x240 where there are no data: coarse noise with grain, about 25 KB each as film has."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(32):
        coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        grain = rng.integers(-12, 13, coarse.shape)
        picture = (coarse.astype(np.int16) + grain).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{i + 1:04}.jpg")
        paths[-1].write_bytes(simplejpeg.encode_jpeg(picture, quality=90))
    return paths


def decode_rate(frames: list[bytes], config: Config, seconds: float) -> float:
    """Clips a second of this process: decode, crop, resample."""
    torch.set_num_threads(1)
    clip = config.clip
    out = torch.empty((1, clip.frames, clip.size, clip.size, 3), dtype=torch.uint8)
    rng = np.random.default_rng(0)

    def one(first: int) -> None:
        read_clip(
            lambda i: frames[i],
            (first + np.arange(clip.frames)) % len(frames),
            lambda height, width: [draw_crop_box(rng, config.augment, height, width)],
            out,
            n_frames=len(frames),
            reduced=config.data.reduced_decode,
        )

    one(0)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        one(count * clip.frames % len(frames))
        count += 1
    return count / (time.perf_counter() - begin)


def _decode_here(queue: Any, frames: list[bytes], config: Config) -> None:
    queue.put(decode_rate(frames, config, DECODE_S))


def decode_rate_together(frames: list[bytes], config: Config, processes: int) -> float:
    """Clips a second of several processes at once, apart as a loader's are: this one keeps its threads."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    started = [context.Process(target=_decode_here, args=(queue, frames, config)) for _ in range(processes)]
    for process in started:
        process.start()
    rates = [queue.get(timeout=60) for _ in started]
    for process in started:
        process.join()
    return sum(rates)


def read_rate(paths: list[Path]) -> float:
    """Bytes a second of reading these files, after asking the kernel to forget them (a page cache may not)."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    begin = time.perf_counter()
    size = sum(len(path.read_bytes()) for path in paths)
    return size / max(1e-6, time.perf_counter() - begin)


def free_memory() -> int:
    """Bytes of memory that programs can still have."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def copy_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory to a CUDA device."""
    host = torch.empty(256 << 20, dtype=torch.uint8).pin_memory()
    best = 0.0
    for _ in range(4):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        host.to(device, non_blocking=True)
        torch.cuda.synchronize(device)
        best = max(best, host.nbytes / (time.perf_counter() - begin))
    return best


def all_reduce_rate(ranks: int) -> float | None:
    """Bytes of gradients a second that `ranks` processes on this machine reduce; None where that does not work."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", __name__]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "rate.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            subprocess.run(
                [sys.executable, *words, str(report)],
                check=True,
                capture_output=True,
                env=environment,
                timeout=60,
            )
            return float(json.loads(report.read_text())["rate"])
        except (subprocess.SubprocessError, OSError, ValueError):
            return None


def _all_reduce(report: Path) -> None:
    """One rank of `all_reduce_rate`."""
    device = distributed.pick_device()
    distributed.start(device, timeout_s=60)
    bucket = torch.ones(25 << 18, device=device)  # 25 MiB
    best = math.inf
    for _ in range(6):
        distributed.barrier()
        begin = time.perf_counter()
        distributed.sum_in_place(bucket)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        bucket.fill_(1.0)
    if distributed.is_main():
        report.write_text(json.dumps({"rate": bucket.nbytes / best}))
    distributed.barrier()
    distributed.end(0)


if __name__ == "__main__":
    _all_reduce(Path(sys.argv[1]))
