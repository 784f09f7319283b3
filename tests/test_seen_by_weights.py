"""Fine-tuning from weights that saw the validation videos: the load report, which log and report print, says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import make_videos
from vac_ddp.config import to_dict
from vac_ddp.data.split import write_split
from vac_ddp.models import build_model, file_state
from vac_ddp.settings import Config
from vac_ddp.training import resuming
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


def test_the_load_report_of_a_training_has_the_line(videos: Path, tmp_path: Path) -> None:
    config = Config()
    config.clip.frames, config.clip.size = 2, 32
    config.model.weights, config.model.width, config.model.depth, config.model.heads = None, 32, 1, 2
    first = read(videos, tmp_path / "first", fold="1/3")
    second = read(videos, tmp_path / "second", fold="2/3")
    model = build_model(config.model, config.clip, 2)
    weights = tmp_path / "first" / "best_videomae.pt"
    content = {"model": file_state(model), "classes": first.classes, "config": to_dict(config)}
    torch.save({**content, "architecture": model.architecture()}, weights)
    config.model.weights = str(weights)
    config.model.width = config.model.depth = config.model.heads = None
    new = resuming.Resumed(state=None, facts=None, source=None)
    for data, lines in ((first, 0), (second, 1)):
        notes = resuming.load(config, data, new).report.notes
        assert sum("validation videos have their group" in note for note in notes) == lines, notes
