"""How a run reads video files: encoded for its clips, by the cache; and a line on what does not fit into it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vac_ddp.data.decode import decode_frame
from vac_ddp.data.frame_cache import FOLDER, FrameCache
from vac_ddp.data.index import Index
from vac_ddp.data.index_file import cache_folder
from vac_ddp.data.video_frames import VideoFrames, file_encoding
from vac_ddp.settings import Config

_SAMPLED = 8  # videos of which a clip is read
_LOOKED_UP = 4096  # videos that are looked for in the cache
_CLIP = 16  # frames
_THREADS = 16


@dataclass(kw_only=True)
class _Sample:
    """Bytes of an encoded frame, and how much longer a clip takes from the video than from the cache."""

    frame_bytes: float
    ratio: float


def for_clips(index: Index, config: Config, *, keep: bool = False, note: bool = False) -> Index:
    """Let the frames of video files be read as clips of `config` need them, see `video_frames.file_encoding`.

    keep: those that are read are kept in the cache, for later epochs. note: add a line on that to the index's.
    Returns the index.
    """
    index.frame_cache = FrameCache(
        folder=cache_folder(config.data),
        encoding=file_encoding(config.data, config.clip),
        limit=round(config.data.cache_gb * 1e9) if keep else 0,
    )
    if keep and note and index.files is not None and index.packed is None:
        files = np.flatnonzero(index.files & (index.frame_counts > 0))
        paths = [Path(index.folder(video)) for video in files.tolist()]
        index.notes.append(f"{index.root}: {cache_note(index.frame_cache, paths, index.frame_counts[files])}")
    return index


def cache_note(cache: FrameCache, paths: Sequence[Path], counts: np.ndarray) -> str:
    """One line on the frames of the video files `paths` (V,), which have `counts` (V,) int64 frames."""
    what = f"{len(paths)} videos are video files"
    if cache.folder is None or not cache.limit:
        why = "data.cache_gb=0" if cache.folder else "there is no folder for them, see data.cache"
        return f"{what}: their frames are not cached ({why}), every epoch decodes them"
    where = cache.folder / FOLDER
    try:
        used = cache.count()
        free = shutil.disk_usage(where).free
    except OSError as error:
        return f"{what}: their frames cannot be cached in {where} ({error.strerror}), every epoch decodes them"
    missing = _not_kept(cache, paths)
    share = len(missing) / max(1, min(len(paths), _LOOKED_UP))  # of the videos
    sample = _sample(cache, [paths[i] for i in missing], counts[missing]) if len(missing) else None
    if sample is None:
        return f"{what}: their frames are cached in {where} ({used / 1e9:.1f} GB)"
    needed = sample.frame_bytes * float(counts.sum()) * share
    room = max(0.0, min(cache.limit - used, free))
    kept = f"{what}: their frames are cached in {where} as they are read, {_gb(needed)} GB to come"
    if needed <= room:
        return kept
    outside = max(1, round(len(paths) * share * (1 - room / needed)))
    why = "data.cache_gb" if cache.limit - used <= free else "free on the disk"
    return (
        f"{kept}; about {outside} videos do not fit into {_gb(room)} GB ({why}): every epoch decodes them, which takes "
        f"{sample.ratio:.1f} times the processor time of cached ones"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2g}" if size < 1e10 else f"{size / 1e9:.0f}"


def _not_kept(cache: FrameCache, paths: Sequence[Path]) -> np.ndarray:
    """Which of the videos, or of some of them where they are many, are not in the cache."""
    some = np.linspace(0, len(paths) - 1, min(len(paths), _LOOKED_UP)).round().astype(np.int64)

    def there(video: int) -> bool:
        try:
            return cache.file_of(paths[video]).exists()
        except OSError:
            return False

    with ThreadPoolExecutor(_THREADS) as pool:
        return some[~np.array(list(pool.map(there, some.tolist())), bool)]


def _sample(cache: FrameCache, paths: Sequence[Path], counts: np.ndarray) -> _Sample | None:
    """Read a clip from the middle of some of the videos; None where none of its frames decodes."""
    sizes: list[int] = []
    from_video = from_image = 0.0
    for video in np.linspace(0, len(paths) - 1, min(len(paths), _SAMPLED)).round().astype(int).tolist():
        count = int(counts[video])
        frames = np.unique((count // 2 + 2 * np.arange(_CLIP)).clip(0, max(0, count - 1)))
        begin = time.thread_time()
        try:
            read = VideoFrames(paths[video], cache.encoding)
            images = [read(frame) for frame in frames.tolist()]
        except OSError:
            continue
        between = time.thread_time()
        for image in images:
            decode_frame(image)
        from_video += between - begin
        from_image += time.thread_time() - between
        sizes += map(len, images)
    if not sizes:
        return None
    return _Sample(frame_bytes=float(np.mean(sizes)), ratio=1 + from_video / max(1e-9, from_image))
