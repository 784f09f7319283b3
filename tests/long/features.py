"""Disk and memory of a large features file: `python -m tests.long.features [VIDEOS [STEPS [WIDTH]]]`.

Part files of an embedding are written as ranks would, joined as rank 0 does, and read back; by default 100,000 videos
of 16 steps of 768 float16 features, which takes 5 GiB of disk and some minutes. Prints the size of the file, the peak
of resident memory of both, and ends with status 1 above 2.5 GiB on disk or 1 GiB of memory.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np

from vac_ddp.predicting import part_files
from vac_ddp.results.features_file import FeaturesHead, read_features, write_features

DISK, MEMORY = 2.5 * 2**30, 2**30


def save_parts(out: Path, *, videos: int, steps: int, width: int, each: int) -> tuple[list[str], np.dtype]:
    """Parts of two ranks, one with the even videos, of `each` videos; the same block of values for every part."""
    shapes = {"pooled": (1, width), "steps": (1, steps, width)}
    kind = part_files.record_type({name: np.zeros(shape, np.float16) for name, shape in shapes.items()})
    (out / part_files.FOLDER).mkdir()
    records = np.zeros(each, kind)
    records["steps"] = np.random.default_rng(0).normal(size=(each, 1, steps, width))
    names = []
    for rank in range(2):
        own = np.arange(rank, videos, 2)
        for start in range(0, len(own), each):
            part = records[: len(own[start : start + each])]
            part["video"] = own[start : start + each]
            part["pooled"][:, 0, 0] = part["video"] % 1000
            names.append(part_files.save_part(out, part))
    return names, kind


def join(out: Path, *, videos: int, steps: int, width: int, each: int) -> tuple[int, int]:
    """Join parts to a features file and read it; (peak of memory that numpy and Python took, bytes of the file)."""
    names, kind = save_parts(out, videos=videos, steps=steps, width=width, each=each)
    head = FeaturesHead(
        ids=[f"{number:06}" for number in range(videos)],
        labels=np.zeros(videos, np.int64),
        groups=[""] * videos,
        damaged=np.zeros(videos, np.int64),
        failed=np.zeros(videos, bool),
        views=np.zeros((1, 3), np.int64),
        classes=["a"],
        about={"weights": "", "fingerprint": {}},
    )
    path = out / "features.npz"
    tracemalloc.start()
    parts = [part_files.read_part(out, name, kind) for name in names]
    whole, blocks = part_files.joined(parts, head, kind)
    write_features(path, whole, blocks, dtype="float16", width=width, steps=steps)
    found = read_features(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.steps is not None
    few = np.linspace(0, videos - 1, 100).astype(int)
    assert (found.pooled[few, 0, 0] == (few % 1000).astype(np.float16)).all()
    assert np.isfinite(found.steps[few].astype(np.float32)).all()
    return peak, path.stat().st_size


def main(argv: list[str]) -> int:
    """Join and read in a process of its own; print sizes."""
    videos, steps, width = [*map(int, argv), 100_000, 16, 768][: len(argv)] + [100_000, 16, 768][len(argv) :]
    with tempfile.TemporaryDirectory(prefix="features_") as folder:
        code = (
            "import sys, pathlib; from tests.long.features import join; "
            f"print(*join(pathlib.Path(sys.argv[1]), videos={videos}, steps={steps}, width={width}, each=50))"
        )
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    traced, size = map(int, done.stdout.split())
    print(f"{videos} videos x {steps} x {width} float16")
    print(f"file {size / 2**30:.2f} GiB; peak memory {resident / 2**30:.2f} GiB resident, {traced / 2**30:.2f} traced")
    return int(size > DISK or resident > MEMORY)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
