"""Which frames: in range and in order for every video length, and equal to rules written as plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vac_ddp.data.clip_sampling import generator, train_frames, view_windows
from vac_ddp.settings import ClipSettings, ViewSettings

settings.register_profile("no deadline", deadline=None)  # the machine may be busy
settings.load_profile("no deadline")

clips = st.builds(
    ClipSettings,
    frames=st.integers(1, 40),
    stride=st.integers(1, 9),
    stride_jitter=st.integers(0, 9),
    sampling=st.sampled_from(["dense", "segments"]),
    short=st.sampled_from(["hold", "repeat"]),
)
views = st.builds(
    ViewSettings,
    windows=st.sampled_from(["offsets", "spread", "phases", "official_phases"]),
    offsets=st.lists(st.integers(0, 100), min_size=1, max_size=4),
    count=st.integers(1, 6),
)
lengths = st.integers(1, 300)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(lengths, clips, st.integers(0, 2**31))
def test_train_frames_are_in_range_and_in_order(n: int, clip: ClipSettings, seed: int) -> None:
    frames = train_frames(n, clip, rng(seed))
    assert frames.shape == (clip.frames,)
    assert frames.dtype == np.int64
    assert frames.min() >= 0
    assert frames.max() < n
    if clip.short == "hold" or clip.sampling == "segments":
        assert (np.diff(frames) >= 0).all()


@given(lengths, clips, views)
def test_test_windows_are_in_range_and_in_order(n: int, clip: ClipSettings, view: ViewSettings) -> None:
    windows = view_windows(n, clip, view)
    assert windows.shape == (len(view.offsets) if view.windows == "offsets" else view.count, clip.frames)
    assert windows.dtype == np.int64
    assert windows.min() >= 0
    assert windows.max() < n
    if clip.short == "hold":
        assert (np.diff(windows, axis=1) >= 0).all()


@given(lengths, clips, st.integers(0, 2**31))
def test_dense_training_window_is_evenly_spaced_where_it_fits(n: int, clip: ClipSettings, seed: int) -> None:
    clip.sampling = "dense"
    frames = train_frames(n, clip, rng(seed))
    smallest, largest = max(1, clip.stride - clip.stride_jitter), clip.stride + clip.stride_jitter
    if n > (clip.frames - 1) * largest and clip.frames > 1:
        steps = np.diff(frames)
        assert len(set(steps.tolist())) == 1
        assert smallest <= steps[0] <= largest


def test_every_start_and_every_stride_is_drawn() -> None:
    clip = ClipSettings(frames=4, stride=3, stride_jitter=1)
    seen = {tuple(train_frames(14, clip, rng(seed))) for seed in range(600)}
    expected = {tuple(start + stride * i for i in range(4)) for stride in (2, 3, 4) for start in range(14 - 3 * stride)}
    assert seen == expected


def test_short_video_still_varies_and_holds_its_last_frame() -> None:
    clip = ClipSettings(frames=6, stride=2)
    seen = {tuple(train_frames(7, clip, rng(seed))) for seed in range(50)}
    assert seen == {(0, 2, 4, 6, 6, 6), (1, 3, 5, 6, 6, 6)}


@given(lengths, st.integers(1, 40), st.integers(0, 2**31))
def test_segments_take_one_frame_each(n: int, count: int, seed: int) -> None:
    frames = train_frames(n, ClipSettings(frames=count, sampling="segments"), rng(seed)).tolist()
    for i, frame in enumerate(frames):
        assert i * n // count <= frame <= max(i * n // count, (i + 1) * n // count - 1)
    assert len(set(frames)) == min(n, count)


def test_every_frame_of_a_segment_is_drawn() -> None:
    clip = ClipSettings(frames=3, sampling="segments")
    seen = np.array([train_frames(11, clip, rng(seed)) for seed in range(200)])
    assert [sorted(set(column.tolist())) for column in seen.T] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]


@pytest.mark.parametrize("short", ["hold", "repeat"])
@given(n=lengths, stride=st.integers(1, 9), offsets=st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_offsets_are_the_notebooks_rule(short: str, n: int, stride: int, offsets: list[int]) -> None:
    clip = ClipSettings(frames=16, stride=stride, short=short)
    expected = []
    for offset in offsets:
        window = []
        for i in range(16):
            position = offset + stride * i
            if position > n - 1:
                position = n - 1 if short == "hold" else position % n
            window.append(position)
        expected.append(window)
    assert view_windows(n, clip, ViewSettings(offsets=offsets)).tolist() == expected


def test_spread_windows_reach_from_the_first_to_the_last_frame() -> None:
    clip = ClipSettings(frames=4, stride=2)
    windows = view_windows(27, clip, ViewSettings(windows="spread", count=3))
    assert windows.tolist() == [[0, 2, 4, 6], [10, 12, 14, 16], [20, 22, 24, 26]]
    centre = view_windows(27, clip, ViewSettings(windows="spread", count=1))
    assert centre.tolist() == [[10, 12, 14, 16]]
    short = view_windows(5, clip, ViewSettings(windows="spread", count=2))
    assert short.tolist() == [[0, 2, 4, 4]] * 2


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 12))
def test_phases_of_a_video_of_whole_segments_show_every_frame_once(k: int, count: int, times: int) -> None:
    """K phases of segments of K frames each are all frames of the video."""
    windows = view_windows(count * k, ClipSettings(frames=count), ViewSettings(windows="phases", count=k))
    assert sorted(windows.reshape(-1).tolist()) == list(range(count * k))
    longer = view_windows(count * k * times, ClipSettings(frames=count), ViewSettings(windows="phases", count=k))
    assert (longer // (k * times) == np.arange(count)).all()


def test_spread_means_phases_where_clips_are_segments() -> None:
    clip = ClipSettings(frames=5, sampling="segments")
    spread = view_windows(61, clip, ViewSettings(windows="spread", count=2))
    assert np.array_equal(spread, view_windows(61, clip, ViewSettings(windows="phases", count=2)))
    assert spread[0, 0] < 61 / 5
    assert spread[-1, -1] > 61 * 4 / 5


@given(st.integers(1, 400), st.sampled_from([4, 8, 16, 32]))
def test_official_phases_are_the_frames_of_the_official_test(n: int, segments: int) -> None:
    """As SSVideoClsDataset of MCG-NJU/VideoMAE reads them in test mode with test_num_segment=2."""
    tick = n / segments
    halves = [int(tick / 2.0 + tick * x) for x in range(segments)]
    starts = [int(tick * x) for x in range(segments)]
    together = sorted(halves + starts)
    official = [together[chunk::2] for chunk in range(2)]
    for sampling in ("dense", "segments"):
        clip = ClipSettings(frames=segments, sampling=sampling)
        assert view_windows(n, clip, ViewSettings(windows="official_phases", count=2)).tolist() == official


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="0 frames"):
        train_frames(0, ClipSettings(), rng())
    with pytest.raises(ValueError, match="0 frames"):
        view_windows(0, ClipSettings(), ViewSettings())


def test_generators_are_reproducible_and_never_share_numbers() -> None:
    keys = [(s, e, i, t) for s in (0, 1, 2**32, 2**32 + 1) for e in (0, 1) for i in (0, 1, 2**33) for t in (0, 1, 5)]
    drawn = {key: tuple(generator(*key).random(4)) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    assert drawn == {key: tuple(generator(*key).random(4)) for key in reversed(keys)}
    flat = np.sort(np.concatenate([generator(7, 3, sample).random(50) for sample in range(200)]))
    assert np.abs(flat - np.linspace(0, 1, len(flat))).max() < 0.02  # uniform over samples too (Kolmogorov-Smirnov)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_temporal_jitter_differs_between_epochs(seed: int, draw: int) -> None:
    clip = ClipSettings(frames=8, stride=2)
    seen = {tuple(train_frames(500, clip, generator(seed, epoch, draw, 1))) for epoch in range(8)}
    assert len(seen) > 4
