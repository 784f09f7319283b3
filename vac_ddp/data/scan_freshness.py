"""Whether a cached scan still holds: the tree is as the scan saw it."""

# ruff: noqa: PTH118 - as in scan.py, paths stay text

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vac_ddp.data.scan import Scan
from vac_ddp.data.video_scan import DAMAGED, UNREADABLE, damaged_before_good, look_at, mtime_of

_THREADS = 16  # they wait for the file system


def unchanged(scan: Scan, *, every: bool, sample: int = 256) -> bool:
    """Whether the tree still is as `scan` saw it: its folders, and a sample of the videos, or every one.

    The sample is another one each time. Videos that were bad are looked at again in any case.
    """
    if any(mtime_of(os.path.join(scan.base, path)) != mtime for path, mtime in scan.watched.items()):
        return False
    count = len(scan.names)
    some = (
        np.arange(count) if every or count <= sample else np.random.default_rng().choice(count, sample, replace=False)
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        now = list(pool.map(lambda i: mtime_of(os.path.join(scan.base, scan.names[i])), some.tolist(), chunksize=64))
        if not np.array_equal(np.array(now, np.int64), scan.times[some]):
            return False
        bad = np.flatnonzero(np.isin(scan.states, (UNREADABLE, DAMAGED))).tolist()
        return all(pool.map(lambda i: _still_bad(scan, i), bad))


def _still_bad(scan: Scan, video: int) -> bool:
    folder = os.path.join(scan.base, scan.names[video])
    file = scan.files is not None and bool(scan.files[video])
    if scan.states[video] == UNREADABLE:
        return not os.access(folder, os.R_OK if file else os.R_OK | os.X_OK)
    if file:
        return look_at(folder, check=True).state == DAMAGED
    names = scan.frames.names(video)
    return damaged_before_good(folder, names) == len(names)
