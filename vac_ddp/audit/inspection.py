"""Decode every frame of the videos of an index: sizes, damage, and hashes of some."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vac_ddp.audit import duplicates
from vac_ddp.data.decode import DamagedFrame, decode_frame, frame_size
from vac_ddp.data.index import Index
from vac_ddp.errors import reason

HASHED_SIDE = 64  # pixels of the short side that a hashed frame keeps at least


@dataclass(kw_only=True)
class Inspection:
    """What decoding every frame of one video showed."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width) -> frames
    damaged: list[tuple[int, str]] = field(default_factory=list)  # frame, reason
    odd: list[int] = field(default_factory=list)  # frames of another size than most
    hashes: list[tuple[int, int]] = field(default_factory=list)


def inspect_video(index: Index, video: int) -> Inspection:
    """Decode every frame of a video: its size, its damage, and the hashes of some."""
    inspection = Inspection()
    count = int(index.frame_counts[video])
    hashed = set(duplicates.sampled(count))
    sizes: dict[int, tuple[int, int]] = {}
    read = index.reader(video)
    for frame in range(count):
        try:
            data = read(frame)
            height, width = frame_size(data)
            enough = (f for f in (8, 4, 2) if min(height, width) // f >= HASHED_SIDE)
            pixels = decode_frame(data, factor=next(enough, 1) if frame in hashed else 8)
        except DamagedFrame as error:
            inspection.damaged.append((frame, str(error)))
            continue
        except Exception as error:  # whatever is wrong with one frame, the others are looked at
            inspection.damaged.append((frame, reason(error)))
            continue
        sizes[frame] = (height, width)
        if frame in hashed and (found := duplicates.hash_frame(pixels)) is not None:
            inspection.hashes.append(found)
    inspection.sizes = Counter(sizes.values())
    usual = inspection.sizes.most_common(1)[0][0] if sizes else None
    inspection.odd = [frame for frame, size in sizes.items() if size != usual]
    return inspection


def inspect_all(index: Index, *, workers: int | None, what: str) -> list[Inspection]:
    """`inspect_video` for all videos, in threads (the decoders release the GIL)."""
    from tqdm import tqdm

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        inspections = pool.map(lambda video: inspect_video(index, video), range(len(index)))
        return list(tqdm(inspections, total=len(index), desc=what, unit="video", disable=None))
