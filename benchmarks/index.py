"""How fast an index of a million videos loads, in one process and in four ranks that do not scan.

python -m benchmarks.index                  a million videos, made as arrays: no folder, no image
python -m benchmarks.index --tree 20000     also scans a real tree of that many folders (8 empty files each)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from vac_ddp.data.frame_names import FrameNames, Texts
from vac_ddp.data.index import cache_path, open_index
from vac_ddp.data.index_file import write_scan
from vac_ddp.data.scan import Scan, Strays
from vac_ddp.settings import DataSettings

CLASSES = 400
BOUND_S, BOUND_MIB = 5.0, 1024.0


def made_scan(videos: int, root: Path) -> Scan:
    """What a scan of `videos` videos would find: one in twenty has a gap, one in a hundred irregular names."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, CLASSES, videos))
    gaps, odd = rng.random(videos) < 0.05, rng.random(videos) < 0.01
    runs = np.where(odd, 20, np.where(gaps, 2, 1))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(runs)])
    total = int(starts[-1])
    frames = FrameNames(
        starts=starts,
        style=rng.integers(0, 3, total, dtype=np.int32),
        first=rng.integers(0, 1000, total),
        step=np.ones(total, np.int64),
        count=rng.integers(20, 300, total),
        prefixes=Texts.of(["", "frame_", "img"]),
        suffixes=Texts.of([".jpg", ".jpg", ".png"]),
        pads=np.array([4, 6, 1], np.int32),
    )
    return Scan(
        base=str(root),
        classes=[f"class_{i:03d}" for i in range(CLASSES)],
        labels=labels,
        names=Texts.of(f"class_{label:03d}/video_{i:07d}_abcdefghijk" for i, label in enumerate(labels.tolist())),
        frames=frames,
        states=np.zeros(videos, np.uint8),
        damaged=np.zeros(videos, np.int64),
        times=np.full(videos, 1, np.int64),
        watched={},
        strays=Strays(),
    )


def cpu() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def peak_mib() -> float:
    """Most memory this process has had (Linux; getrusage would count what its parent had before)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def start_rank(root: Path, cache: Path, barrier, results) -> None:
    """What a rank does after rank 0 wrote the index; the folder does not exist, so a scan would fail."""
    before = peak_mib()
    barrier.wait()
    started = time.perf_counter()
    index = open_index(root, labelled=True, settings=DataSettings(cache=str(cache)), scan=False)
    loaded = time.perf_counter() - started
    peak = peak_mib()
    results.put((loaded, peak - before, peak, len(index), index.frame_name(len(index) - 1, 0)))


def measure(root: Path, cache: Path, ranks: int) -> list[tuple[float, float, float, int, str]]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(ranks), context.Queue()
    processes = [context.Process(target=start_rank, args=(root, cache, barrier, results)) for _ in range(ranks)]
    for process in processes:
        process.start()
    rows = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return rows


def scan_tree(videos: int, folder: Path) -> dict[str, float]:
    """Seconds to scan a real test folder, and to check the cached index against it."""
    for i in range(videos):
        (folder / "tree" / f"{i:06d}").mkdir(parents=True)
        for frame in range(8):
            (folder / "tree" / f"{i:06d}" / f"{frame:04d}.jpg").touch()
    time.sleep(2.1)  # a tree that is younger than two seconds is not trusted to stay as it is
    seconds = {}
    for what, rescan in (("scan", False), ("check a sample", False), ("check all", True)):
        settings = DataSettings(cache=str(folder / "cache"), rescan=rescan)
        started = time.perf_counter()
        open_index(folder / "tree", labelled=False, settings=settings)
        seconds[what] = round(time.perf_counter() - started, 3)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tree", type=int, default=0, help="folders of a real tree that is scanned as well")
    parser.add_argument("--save", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, cache = folder / "no_such_folder", folder / "cache"
        path = cache_path(root, labelled=True, settings=DataSettings(cache=str(cache)))
        write_scan(path, made_scan(options.videos, root))
        figures = {
            "machine": f"{cpu()}, {os.cpu_count()} cores, {platform.system()}",
            "versions": f"Python {platform.python_version()}, numpy {np.__version__}",
            "date": time.strftime("%Y-%m-%d"),
            "videos": options.videos,
            "file_mib": round(path.stat().st_size / 2**20, 1),
        }
        print(f"index of {options.videos} videos: {figures['file_mib']} MiB on the disk")
        good = True
        for ranks in (1, options.ranks):
            rows = measure(root, cache, ranks)
            slowest, most, peak = (max(row[i] for row in rows) for i in range(3))
            good = good and slowest <= BOUND_S and peak <= BOUND_MIB
            figures[f"{ranks} ranks"] = {
                "seconds": round(slowest, 3),
                "mib": round(most, 1),
                "peak_mib": round(peak, 1),
            }
            print(f"{ranks} ranks: loaded in {slowest:.2f} s, {most:.0f} MiB more a process (peak {peak:.0f} MiB)")
        print(f"bounds {BOUND_S:g} s and {BOUND_MIB:g} MiB: {'kept' if good else 'broken'}")
        if options.tree:
            figures["tree"] = {"videos": options.tree, **scan_tree(options.tree, folder)}
            print(f"a real tree of {options.tree} videos: {figures['tree']}")
    if options.save:
        options.save.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
