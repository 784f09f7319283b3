"""Leaving tokens out: which ones, what the model makes of the others, and that a run stays exact."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEModel

from tests.runs import Workplace, assert_same_end
from vac_ddp.errors import UserError
from vac_ddp.models import videomae
from vac_ddp.models.kept_tokens import kept_tokens, moving_tokens, random_tokens
from vac_ddp.models.tensor_names import to_hf
from vac_ddp.models.video_model import KeptTokens
from vac_ddp.results.logits_file import read_views

ARCH = videomae.Architecture(width=32, depth=2, heads=2, mlp=64, grids=((4, 2, 2),), head_eps=1e-6)
CLIPS = torch.randn(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(arch: videomae.Architecture = ARCH) -> videomae.VideoMAE:
    model = videomae.empty_model(arch, 5)
    videomae.init_weights(model, torch.Generator().manual_seed(1), head_scale=1.0)
    return model


def test_random_tokens_are_those_with_the_least_noise() -> None:
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.1, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2]])
    assert random_tokens(noise, 2).tolist() == [[1, 3], [0, 1]]
    assert random_tokens(noise, 4).tolist() == [[0, 1, 3, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize("count", [1, 4, 5, 9, 16])
def test_moving_tokens_against_a_plain_sort(count: int) -> None:
    rng = np.random.default_rng(0)
    cubes = rng.integers(0, 3, (2, 16, 2)).astype(np.float32)  # many ties
    for clip, found in zip(cubes, moving_tokens(torch.from_numpy(cubes), 4, count).tolist(), strict=True):
        change = [np.inf if i < 4 else float(np.abs(clip[i] - clip[i - 4]).mean()) for i in range(16)]
        assert found == sorted(sorted(range(16), key=lambda i: (-change[i], i))[:count])


@pytest.mark.parametrize("policy", ["random", "motion"])
def test_logits_of_kept_tokens_against_the_library(policy: str) -> None:
    """Hugging Face's encoder takes a mask of tokens that it leaves out."""
    model = model_of()
    model.train_tokens = KeptTokens(count=7, policy=policy)
    noise = torch.rand(3, model.noise_size, generator=torch.Generator().manual_seed(2))
    assert noise.shape[1] == (16 if policy == "random" else 0)
    settings = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, layer_norm_eps=1e-6, use_mean_pooling=True,
    )  # fmt: skip
    library = VideoMAEModel(settings).eval()
    names = to_hf(model.state_dict(), ARCH)
    wanted = {name.removeprefix("videomae."): tensor for name, tensor in names.items() if name.startswith("videomae.")}
    assert library.load_state_dict(wanted, strict=False).unexpected_keys == []
    left_out = torch.ones(3, 16, dtype=torch.bool)
    for row, clip in enumerate(CLIPS):
        cubes = clip.unflatten(0, (4, 2)).unflatten(-1, (2, 16)).unflatten(-3, (2, 16))  # 4, 2, 3, 2, 16, 2, 16
        change = (cubes[1:] - cubes[:-1]).abs().mean((1, 2, 4, 6)).flatten()
        key = noise[row] if policy == "random" else torch.cat((torch.full((4,), -torch.inf), -change))
        left_out[row, key.argsort()[:7]] = False
    with torch.no_grad():
        hidden = library(CLIPS, bool_masked_pos=left_out).last_hidden_state
        expected = model.head(model.fc_norm(hidden.mean(1)))
        torch.testing.assert_close(model(CLIPS, noise), expected, rtol=1e-5, atol=1e-5)


def test_all_tokens_without_noise_and_in_the_last_epochs() -> None:
    model = model_of()
    with torch.no_grad():
        whole = model(CLIPS)
        model.train_tokens = KeptTokens(count=16, policy="random")
        noise = torch.rand(3, model.noise_size, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(model(CLIPS, noise), whole, rtol=1e-5, atol=1e-5)
        model.train_tokens = KeptTokens(count=4, policy="random")
        assert torch.equal(model(CLIPS), whole), "a validation computes all"
        assert not torch.allclose(model(CLIPS, noise), whole)
        model.all_tokens = True
        assert torch.equal(model(CLIPS, noise), whole)
        model.all_tokens, model.train_tokens = False, None
        model.eval_tokens = KeptTokens(count=8, policy="motion")
        still = CLIPS[:, :2].repeat(1, 4, 1, 1, 1)
        still[:, 4:6] += 1
        found = model(still)
        model.eval_tokens, model.train_tokens = None, KeptTokens(count=8, policy="random")
        order = torch.full((3, 16), 0.9)
        order[:, [0, 1, 2, 3, 8, 9, 10, 11]] = 0.1  # the first step, and the one in which all changes
        assert torch.equal(model(still, order), found)


def test_what_cannot_leave_tokens_out_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^predict.keep_tokens=0.5: only VideoMAE with mean pooling can leave tokens out"
    ):
        kept_tokens(model_of(dataclasses.replace(ARCH, pooling="first")), 0.5, "motion", setting="predict.keep_tokens")
    assert kept_tokens(model_of(), 1.0, "random", setting="train.keep_tokens") is None
    kept = kept_tokens(model_of(), 0.42, "random", setting="train.keep_tokens")
    assert kept == KeptTokens(count=7, policy="random")


@pytest.mark.distributed
def test_one_clear_line_for_other_families_and_for_epochs_without_effect(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    other = place.alone("other", "train.keep_tokens=0.5", "model.name=frame_vit", "model.backbone=resnet10t")
    line = "train.keep_tokens=0.5: only VideoMAE can leave tokens out; set train.keep_tokens=1 for model.name=frame_vit"
    assert (other.returncode, other.stderr.strip()) == (2, f"vac: {line}")
    epochs = place.alone("epochs", "train.keep_tokens=0.5", "train.full_token_epochs=3")
    assert epochs.returncode == 2
    assert "train.full_token_epochs=3 leaves none of train.epochs=3" in epochs.stderr


@pytest.mark.fault
@pytest.mark.distributed
@pytest.mark.parametrize("policy", ["random", "motion"])
def test_killed_and_resumed_with_half_of_the_tokens(tmp_path: Path, policy: str) -> None:
    """Two epochs with half of the tokens, one with all; that ranks and micro-batches change nothing: test_faults.py."""
    place = Workplace(tmp_path)
    words = ["train.keep_tokens=0.5", f"train.keep_policy={policy}", "train.full_token_epochs=1", "data.workers=0"]
    assert place.train("whole", *words).returncode == 0
    assert f"tokens       4 of 8 a clip, {policy}; all in the last 1 epochs" in (tmp_path / "whole/log.txt").read_text()
    assert place.train("killed", *words, fault="SIGKILL step=7 rank=1").returncode != 0
    resumed = place.train("killed", *words, "run.resume=auto")
    assert "resumed at step 6 of 12" in resumed.stdout, resumed.stderr
    assert_same_end(place, "whole", "killed")


@pytest.mark.distributed
def test_a_prediction_with_moving_tokens(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    assert place.alone("run", "train.max_steps=1", "optim.warmup_epochs=0").returncode == 0
    test = ["--run", tmp_path / "run", "--data", tmp_path / "data_val"]
    for out, words in (("all", []), ("part", ["predict.keep_tokens=0.5"])):
        done = place.python("-m", "vac_ddp.predict", *test, "--out", tmp_path / out, *words)
        assert done.returncode == 0, done.stderr
    logits = {name: read_views(next((tmp_path / name).rglob("views.npz"))).logits for name in ("all", "part")}
    assert not np.allclose(logits["all"], logits["part"])
    again = place.python("-m", "vac_ddp.predict", *test, "--out", tmp_path / "all", "predict.keep_tokens=0.5")
    assert again.returncode == 2 and "keep_tokens" in again.stderr
