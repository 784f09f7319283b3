"""View tables, dealing by cost, and the views file read by numpy alone."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vac_ddp.data.clip_sampling import view_windows as windows
from vac_ddp.errors import UserError
from vac_ddp.results.logits_file import ViewsHead, read_views, write_views
from vac_ddp.scoring.views import deal, video_costs, view_table
from vac_ddp.settings import ClipSettings, ViewSettings


def test_the_view_table_counts_window_by_window() -> None:
    table = view_table(ViewSettings(crops=3, flip=True), 2)
    assert table.dtype == np.int64
    assert table.tolist() == [list(row) for row in itertools.product(range(2), range(3), range(2))]
    assert view_table(ViewSettings(), 3).tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), max_size=12), st.integers(1, 5))
def test_every_video_is_dealt_once_and_near_the_best(costs: list[int], ranks: int) -> None:
    dealt = deal(np.array(costs, np.int64), ranks)
    assert len(dealt) == ranks
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(costs)))
    assert all((np.diff(places) > 0).all() for places in dealt)
    loads = [sum(costs[i] for i in places) for places in dealt]
    if not costs:
        return
    # Graham 1969: at most 4/3 - 1/(3m) of the best; the best is at least each of these.
    ordered = sorted(costs, reverse=True)
    least = max(sum(costs) / ranks, ordered[0], sum(ordered[ranks - 1 : ranks + 1]) if len(costs) > ranks else 0)
    if len(costs) <= 8 and ranks <= 3:
        least = min(
            max(sum(c for c, r in zip(costs, where, strict=True) if r == rank) for rank in range(ranks))
            for where in itertools.product(range(ranks), repeat=len(costs))
        )
        assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * least + 1e-9
    assert max(loads) <= least + ordered[0]


def test_more_ranks_than_videos() -> None:
    assert [places.tolist() for places in deal(np.array([5, 9]), 4)] == [[1], [0], [], []]


def test_costs_count_decoded_frames_once_and_every_view() -> None:
    clip, views = ClipSettings(frames=4, stride=2), ViewSettings(offsets=[0, 4], crops=3, flip=True)
    costs = video_costs(np.array([30, 3, 0, 30]), lambda n: windows(n, clip, views), 6)
    # 30 frames: 0 2 4 6 and 4 6 8 10 are 6 frames; 3 frames: 0 2; none counts as one, and its 2 windows
    # are the same; 2 windows x 4 x 6 views
    assert costs.tolist() == [6 + 48, 2 + 48, 1 + 24, 6 + 48]


def head(videos: int = 3, views: int = 2, classes: int = 4) -> ViewsHead:
    return ViewsHead(
        ids=[f"{i:05}" for i in range(1, videos)] + ["Ünïcode/clip"],
        classes=[f"c{i}" for i in range(classes)],
        views=view_table(ViewSettings(), views),
        labels=np.array([0] * (videos - 1) + [-1]),
        sources=["a"] * (videos - 1) + [""],
        damaged=np.arange(videos),
        failed=np.arange(videos) == 1,
        about={"weights": "ab12", "settings": {"clip": {"frames": 16}}},
    )


def test_a_views_file_is_read_by_numpy_alone(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    write_views(tmp_path / "views.npz", head(), iter([logits[:2], logits[2:2], logits[2:]]))
    with np.load(tmp_path / "views.npz") as stored:  # allow_pickle is off by default
        assert (stored["logits"] == logits).all()
        assert stored["logits"].dtype == np.float32
        assert stored["ids"].tolist() == ["00001", "00002", "Ünïcode/clip"]
        assert stored["views"].tolist() == [[0, 0, 0], [1, 0, 0]]
        assert json.loads(str(stored["about"]))["weights"] == "ab12"
    views = read_views(tmp_path)  # a folder of predictions will do
    assert (views.logits == logits).all()
    assert views.failed.tolist() == [False, True, False]
    assert views.labels.tolist() == [0, 0, -1]
    assert views.about["settings"] == {"clip": {"frames": 16}}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    logits = np.ones((3, 2, 4), np.float32)
    for name, cut in (("a", 1), ("b", 2)):
        write_views(tmp_path / name, head(), iter([logits[:cut], logits[cut:]]))
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in "ab"}
    assert len(digests) == 1


@pytest.mark.parametrize("rows", [2, 4])
def test_rows_that_do_not_add_up_leave_no_file(tmp_path: Path, rows: int) -> None:
    with pytest.raises(ValueError, match="rows of logits"):
        write_views(tmp_path / "views.npz", head(), [np.zeros((rows, 2, 4), np.float32)])
    assert list(tmp_path.iterdir()) == []


def test_bad_views_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no views file"):
        read_views(tmp_path)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="no views file, or is damaged"):
        read_views(tmp_path / "text.npz")
    write_views(tmp_path / "good.npz", head(), [np.zeros((3, 2, 4), np.float32)])
    data = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="no views file, or is damaged"):
        read_views(tmp_path / "cut.npz")
    middle = data.index(b"logits") + 200
    (tmp_path / "flipped.npz").write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(UserError, match="damaged"):
        read_views(tmp_path / "flipped.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="no views file"):
        read_views(tmp_path / "other.npz")
