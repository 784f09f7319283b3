"""`vac init`: settings that fit a folder of frames, checked against what the folder was made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import one_line
from tests.support import environment, shared
from vac_ddp import cli, config
from vac_ddp.checks import check
from vac_ddp.data.index import open_index
from vac_ddp.data.split import make_split
from vac_ddp.init import dataset_metadata
from vac_ddp.settings import Config, DataSettings


def make(root: Path, videos: dict[str, list[str]], *, frames: int = 20, height: int = 70, width: int = 90) -> Path:
    """<class>/<name>/0001.png ... of one colour, noise on top."""
    rng = np.random.default_rng(0)
    for label, names in videos.items():
        for name in names:
            folder = root / label / name
            folder.mkdir(parents=True)
            for frame in range(frames):
                pixels = np.full((height, width, 3), (200, 100, 50)) + rng.integers(-40, 41, (height, width, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{frame + 1:04d}.png")
    return root


PIECES = {label: [f"film{f}_clip{c:03d}" for f in range(4) for c in range(2)] for label in ("hug", "kick", "wave")}


def run(*words: str | Path) -> int:
    return cli.main(["init", *map(str, words)])


def read(path: Path) -> Config:
    read_back = config.read_yaml(path)
    check(read_back)
    return read_back


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(dataset_metadata, "_gpus", list)
    return tmp_path


def test_settings_fit_what_is_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(here / "moves" / "data_train", PIECES)
    assert run("moves/data_train") == 0
    said = capsys.readouterr().out
    assert "classes      3, 8 to 8 videos each, 24 in all" in said
    assert "vac train --config train.yaml" in said
    c = read(here / "train.yaml")
    assert c.data.train == "moves/data_train"
    assert (c.data.group_by, c.data.group_regex) == ("regex", r"^(.+)_clip\d+$")
    split = make_split(open_index("moves/data_train", labelled=True, settings=c.data), c.data, seed=0)
    assert set(split.groups) == {"film0", "film1", "film2", "film3"}
    assert c.model.weights is None
    assert c.clip.size == 64
    assert c.run.dir == "runs/moves"
    assert c.model.mean == pytest.approx((200 / 255, 100 / 255, 50 / 255), abs=0.01)
    assert c.model.std == pytest.approx([np.sqrt((81**2 - 1) / 12) / 255] * 3, abs=0.01)  # of a uniform noise
    text = (here / "train.yaml").read_text(encoding="utf-8")
    assert all(f"#   {line}" in text for line in said.splitlines() if line.startswith(("classes", "sources", "GPUs")))


def test_nothing_is_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(here / "data", PIECES)
    (here / "train.yaml").write_text("mine")
    assert run("data") == 2
    assert "train.yaml is there already" in capsys.readouterr().err
    assert (here / "train.yaml").read_text() == "mine"
    assert run("data", "--out", "other.yaml") == 0
    assert {path.name for path in here.iterdir() if path.suffix == ".yaml"} == {"train.yaml", "other.yaml"}


def test_names_without_sources_and_sides_and_sizes(here: Path) -> None:
    few = {"turn_left": [f"{chr(97 + i)}x" for i in range(12)], "turn_right": ["ax", "bx"]}
    make(here / "data", few, height=40, width=40, frames=5)
    assert run("data") == 0
    c = read(here / "train.yaml")
    assert c.data.group_by == "none"
    assert c.augment.flip == 0
    assert c.data.balance == "class"
    assert c.clip.size == 32
    assert c.clip.sampling == "segments"


def test_known_grammars_are_named(here: Path) -> None:
    make(
        here / "data",
        {label: [f"v_{label}_g{g:02d}_c0{c}" for g in (1, 2, 3) for c in (1, 2)] for label in ("Archery", "Rowing")},
    )
    assert run("data") == 0
    assert read(here / "train.yaml").data.group_by == "ucf101"


def test_with_a_gpu_pretrained_weights_are_tuned(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(here / "data", PIECES, frames=40, width=75)
    monkeypatch.setattr(dataset_metadata, "_gpus", lambda: ["NVIDIA H200"])
    monkeypatch.setattr(
        dataset_metadata, "choose_weights", lambda gpu, videos: (dataset_metadata.TUNED if gpu else None, "test")
    )
    assert run("data") == 0
    c = read(here / "train.yaml")
    assert c.model.weights == "MCG-NJU/videomae-base-finetuned-kinetics"
    assert (c.clip.frames, c.clip.stride, c.clip.size) == (16, 2, 224)
    assert (c.optim.lr, c.optim.base_lr, c.optim.layer_decay) == (2e-5, None, 0.75)
    assert c.train.epochs >= 10
    assert c.model.mean is None
    monkeypatch.setattr(
        dataset_metadata, "choose_weights", lambda gpu, videos: (dataset_metadata.SELF_SUPERVISED, "test")
    )
    assert run("data", "--out", "large.yaml") == 0
    large = read(here / "large.yaml")
    assert (large.optim.lr, large.optim.base_lr, large.train.epochs) == (None, 5e-4, 30)


def test_weights_are_chosen_by_what_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from vac_ddp.report import services

    cached: list[str] = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda hub, name: "path" if hub in cached else None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(services, "answers", lambda url: False)
    assert dataset_metadata.choose_weights(False, 100)[0] is None
    assert dataset_metadata.choose_weights(True, 100)[0] is None
    monkeypatch.setattr(services, "answers", lambda url: True)
    assert dataset_metadata.choose_weights(True, 100)[0] == dataset_metadata.TUNED
    assert dataset_metadata.choose_weights(True, 200_000)[0] == dataset_metadata.SELF_SUPERVISED
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert dataset_metadata.choose_weights(True, 100)[0] is None
    cached.append(dataset_metadata.TUNED)
    assert dataset_metadata.choose_weights(True, 100)[0] == dataset_metadata.TUNED


def test_mistakes_are_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("no_such_folder") == 2
    assert run() == 2
    make(here / "one", {"only": ["a", "b"]})
    assert run("one") == 2
    make(here / "project" / "data_train", PIECES)
    assert run("project") == 2
    assert cli.main(["inti"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    assert said[3] == "vac: project holds a data_train: give that, project/data_train"
    assert said[4] == "vac: unknown command inti: did you mean init?"
    assert not (here / "train.yaml").exists()


def test_real_clips_are_grouped_by_their_recording(here: Path) -> None:
    assert run(shared("clips", "data_train"), "--out", "real.yaml") == 0
    c = read(here / "real.yaml")
    index = open_index(c.data.train, labelled=True, settings=DataSettings(cache=str(here / "cache")))
    split = make_split(index, c.data, seed=c.seed)
    names = [name.rpartition("/")[2] for name in index.names]
    assert [name.rpartition("_")[0] for name in names] == split.groups
    assert not {split.groups[i] for i in split.train} & {split.groups[i] for i in split.val}


def test_a_training_starts_from_it(here: Path) -> None:
    import subprocess
    import sys

    make(here / "data", PIECES)
    assert run("data") == 0
    words = ["-m", "vac_ddp.cli", "train", "--config", "train.yaml"]
    done = subprocess.run(
        [sys.executable, *words, "train.max_steps=2"], cwd=here, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (here / "runs" / "data" / "best_videomae.pt").exists()
    again = subprocess.run([sys.executable, *words], cwd=here, env=environment(), capture_output=True, text=True)
    assert "holds a run already" in one_line(again)
