"""Which views a video has, what they cost, and which rank scores which videos. Pure functions."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.settings import ViewSettings


def set_views(views: ViewSettings, text: str) -> None:
    """Set windows, crops and mirroring as written in --views: 5x3, or 2x3+flip. UserError for another text."""
    match = re.fullmatch(r"([1-9][0-9]{0,2})x([13])(\+flip)?", text)
    if match is None:
        raise UserError(f"--views {text}: expected KxC with C 1 or 3, as 5x3 or 2x3+flip")
    views.windows, views.count, views.crops, views.flip = "spread", int(match[1]), int(match[2]), bool(match[3])


def view_table(settings: ViewSettings, windows: int) -> np.ndarray:
    """The views of one video as rows (window, crop, mirrored): (n, 3) int64, window by window.

    A row's clip is number `window * crops + crop` of what `TestViews` decodes; mirrored ones are made on the device.
    """
    flips = 2 if settings.flip else 1
    grid = np.indices((windows, settings.crops, flips)).reshape(3, -1)
    return np.ascontiguousarray(grid.T).astype(np.int64)


def video_costs(frame_counts: np.ndarray, windows_of: Callable[[int], np.ndarray], views_per_window: int) -> np.ndarray:
    """Relative cost of each video: frames decoded plus frames sent through the model, (V,) int64.

    `windows_of(n_frames)` gives the frame numbers (K, T) of a video; it is asked once for every length that occurs. A
    video without frames costs what one with a single frame does: it still takes its turn.
    """
    counts = np.maximum(np.asarray(frame_counts, np.int64), 1)
    lengths, length_of = np.unique(counts, return_inverse=True)
    costs = np.empty(len(lengths), np.int64)
    for row, length in enumerate(lengths.tolist()):
        frames = np.unique(windows_of(length), axis=0)  # equal windows go through the model once
        costs[row] = len(np.unique(frames)) + frames.size * views_per_window
    return costs[length_of].astype(np.int64)


def deal(costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Deal whole videos to ranks by cost: for each rank its places in `costs`, ascending, (n_r,) int64.

    Longest processing time first (Graham 1969): the dearest video left goes to the rank with the least work, so no rank
    has more than 4/3 of the best possible. Every video goes to one rank; with more ranks than videos some get none.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for place in np.argsort(-np.asarray(costs, np.int64), kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        dealt[rank].append(place)
        heapq.heappush(loads, (load + int(costs[place]), rank))
    return [np.sort(np.array(places, np.int64)) for places in dealt]
