"""Fine-tuning from weights that saw the validation videos says so: in log, load_report.json and the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.runs import make_videos
from vac_ddp.data.split import write_split
from vac_ddp.settings import Config
from vac_ddp.training.data_setup import Data, read_data, seen_by_weights


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two classes of six videos, in three groups of two videos each."""
    root = make_videos(tmp_path / "data_train", classes=2, videos=6, frames=2)
    for folder in root.glob("class*/v*"):
        number = int(folder.name[1:])
        folder.rename(folder.with_name(f"g{number // 2}_{number}"))
    return root


def read(videos: Path, folder: Path, **data: str) -> Data:
    config = Config()
    config.data.train, config.data.cache = str(videos), str(folder)
    config.data.group_by, config.data.group_regex = "regex", r"^(g\d)_"
    for name, value in data.items():
        setattr(config.data, name, value)
    folder.mkdir(exist_ok=True)
    return read_data(config, folder, resumed=False, say=lambda line: None)


def test_validation_videos_of_the_other_folds_were_seen(videos: Path, tmp_path: Path) -> None:
    first = read(videos, tmp_path / "first", fold="1/3")
    second = read(videos, tmp_path / "second", fold="2/3")
    weights = str(tmp_path / "first" / "best_probe.pt")
    assert seen_by_weights(weights, first) is None, "the same split"
    note = seen_by_weights(weights, second)
    assert note is not None and note.startswith("warning: 4 of 4 validation videos"), note
    assert str(tmp_path / "first" / "split.csv") in note


def test_a_video_of_a_seen_group_counts_and_other_videos_do_not(videos: Path, tmp_path: Path) -> None:
    data = read(videos, tmp_path / "own", fold="1/3")
    group = data.split.groups[int(data.split.val[0])]
    members = [v for v in data.split.val.tolist() if data.split.groups[v] == group]
    kept = data.split.val[data.split.val != members[0]]
    written = dataclasses.replace(data.split, train=np.append(data.split.train, members[0]), val=kept)
    write_split(tmp_path / "own" / "split.csv", data.index, written)
    note = seen_by_weights(str(tmp_path / "own" / "best_probe.pt"), data)
    assert note is not None and f"warning: {len(members)} of {len(data.split.val)}" in note, note

    other = make_videos(tmp_path / "other", classes=2, videos=4, frames=2)
    assert (
        seen_by_weights(str(tmp_path / "own" / "best_probe.pt"), read(other, tmp_path / "new", group_by="none")) is None
    )
    assert seen_by_weights(None, data) is None
    assert seen_by_weights(str(tmp_path / "elsewhere" / "weights.pth"), data) is None


def test_a_damaged_split_is_named_and_ends_nothing(videos: Path, tmp_path: Path) -> None:
    data = read(videos, tmp_path / "own", fold="1/3")
    (tmp_path / "own" / "split.csv").write_text("nothing\n")
    note = seen_by_weights(str(tmp_path / "own" / "best_probe.pt"), data)
    assert note is not None and "not known" in note and "split.csv" in note
