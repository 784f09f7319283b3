"""Which frames make a clip, and where all randomness of the data comes from. Pure functions, no input or output.

Positions are frame numbers from 0; every result lies in [0, n_frames).
"""

from __future__ import annotations

import numpy as np

from vac_ddp.settings import ClipSettings, ViewSettings

# Streams of random numbers of one sample or draw. They never share numbers, so that one more draw in a stream
# changes nothing in the others.
AUGMENT = 0  # per sample: flip, colour, erasing, ...
FRAMES = 1  # per draw: which frames are decoded
MIX = 2  # per unit: mode, lambda and box of mixup and cutmix
NOISE = 3  # per sample: drop path and dropout masks of the model
ORDER = 4  # per epoch: the order of the videos
CROP = 5  # per sample: the box of the random resized crop


def generator(seed: int, epoch: int, sample: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one sample (or draw, or unit): a pure function of its arguments.

    Philox keyed through numpy's SeedSequence: the numbers go in as entropy and spawn key, so that no two
    (seed, epoch, sample, stream) share a sequence. All arguments are integers >= 0.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch, sample, stream))
    return np.random.Generator(np.random.Philox(sequence))


def train_frames(n_frames: int, clip: ClipSettings, rng: np.random.Generator) -> np.ndarray:
    """Frames of one training clip, (T,) int64.

    sampling="dense": a window with a stride drawn from stride +- stride_jitter (at least 1) and a first frame drawn
    from all that fit. A video shorter than the window starts at a frame below the stride, so that the clip still
    varies, and its end is filled by `short`.
    sampling="segments": the video in T equal segments, one uniformly drawn frame from each (TSN, Wang et al. 2016);
    a video with fewer frames than segments shows frames several times, `short` does not matter.
    """
    _check(n_frames)
    if clip.sampling == "segments":
        return _segment_frames(n_frames, clip.frames, rng.random(clip.frames))
    low, high = max(1, clip.stride - clip.stride_jitter), clip.stride + clip.stride_jitter
    stride = int(rng.integers(low, high + 1))
    slack = n_frames - _span(clip.frames, stride)
    last_start = slack if slack >= 0 else min(stride, n_frames) - 1
    return _window(int(rng.integers(last_start + 1)), stride, n_frames, clip)


def window_count(views: ViewSettings) -> int:
    """The number of windows of a scored video, K of `view_windows`."""
    return len(views.offsets) if views.windows == "offsets" else views.count


def view_windows(n_frames: int, clip: ClipSettings, views: ViewSettings) -> np.ndarray:
    """Frames of the clips of a scored video, (K, T) int64.

    windows="offsets": clip k shows the frames offsets[k] + stride * i, beyond the end filled by `clip.short`
    (the starting notebook's rule, whatever `clip.sampling` is).
    windows="spread": K dense windows from the first to the last that fits; one window is the centre one.
    windows="phases": K clips of one frame a segment, the k-th at the fraction (k + 1/2) / K of every segment.
    windows="official_phases": the k-th at the fraction k / K of segments of n_frames / T frames, which need not be
    whole: for K = 2 the frames of VideoMAE's test on Something-Something v2 (SSVideoClsDataset, mode "test").
    With sampling="segments" a clip spans the whole video, and "spread" means the same as "phases".

    short="hold": the last frame stays. short="repeat": the video starts again from its first frame (position modulo
    n_frames, so with a stride that does not divide n_frames the passes show different frames).
    """
    _check(n_frames)
    if views.windows == "offsets":
        return np.stack([_window(first, clip.stride, n_frames, clip) for first in views.offsets])
    k = views.count
    if views.windows == "official_phases":
        segment, phase = np.arange(clip.frames, dtype=np.int64), np.arange(k, dtype=np.int64)[:, None]
        return n_frames * (k * segment + phase) // (k * clip.frames)
    if views.windows == "phases" or clip.sampling == "segments":
        phases = (np.arange(k) + 0.5) / k
        return np.stack([_segment_frames(n_frames, clip.frames, np.full(clip.frames, phase)) for phase in phases])
    slack = max(0, n_frames - _span(clip.frames, clip.stride))
    starts = [slack // 2] if k == 1 else [round(slack * i / (k - 1)) for i in range(k)]
    return np.stack([_window(start, clip.stride, n_frames, clip) for start in starts])


def _check(n_frames: int) -> None:
    if n_frames < 1:
        raise ValueError(f"a video of {n_frames} frames has none to choose from")


def _span(frames: int, stride: int) -> int:
    return (frames - 1) * stride + 1


def _window(first: int, stride: int, n_frames: int, clip: ClipSettings) -> np.ndarray:
    positions = first + stride * np.arange(clip.frames, dtype=np.int64)
    return positions % n_frames if clip.short == "repeat" else np.minimum(positions, n_frames - 1)


def _segment_frames(n_frames: int, segments: int, shares: np.ndarray) -> np.ndarray:
    """The frame at `shares` (T,) in [0, 1) of each of T segments, (T,) int64.

    The segments are whole frames, equal to one frame, and share none; where there are more segments than frames,
    neighbouring ones have the same.
    """
    edges = np.arange(segments + 1, dtype=np.int64) * n_frames // segments
    return edges[:-1] + (shares * np.diff(edges)).astype(np.int64)
