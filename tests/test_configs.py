"""Every preset is read, checked, and built: the real architecture's shape, as small as it goes, without weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import REPO
from vac_ddp import config
from vac_ddp.arguments import parse_settings
from vac_ddp.data import clip_sampling
from vac_ddp.data.augment import augment_clips, draw_parameters
from vac_ddp.data.grouping import find_sources
from vac_ddp.models import build_model
from vac_ddp.settings import Config
from vac_ddp.training.lr_schedule import count_warmup_steps, learning_rate, resolve_lr
from vac_ddp.training.optimization import make_groups

PRESETS = sorted((REPO / "configs").glob("*.yaml"))
ISSUE = {"notebook", "hmdb51_videomae_base", "ucf101_videomae_base", "ssv2_videomae_base", "scratch_small"}


def read(name: str) -> Config:
    return parse_settings([f"--config={name}"]).config


def test_all_presets_are_there() -> None:
    assert {path.stem for path in PRESETS} >= ISSUE | {
        "quickstart",
        "debug",
        "probe_frames",
        "finetune_frames",
        "finetune_videomae",
        "finetune_vjepa2",
    }


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_parses_by_path_and_by_name_and_survives_writing(path: Path, tmp_path: Path) -> None:
    parsed = read(str(path))
    assert parsed == read(path.stem)
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(parsed), encoding="utf-8")
    assert read(str(again)) == parsed


# V-JEPA 2 is built of the config.json beside its weights: tests/test_hf_parity.py has steps of it.
BUILT = [path for path in PRESETS if path.stem != "finetune_vjepa2"]


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
def test_preset_builds_and_takes_a_step(path: Path) -> None:
    """From frame numbers to a gradient, with everything of the preset but the weights and the width."""
    c = read(path.stem)
    c.train.freeze_depth = min(c.train.freeze_depth, 3)  # the smaller network has fewer layers
    rng = np.random.default_rng(0)
    for n_frames in (1, 24, 300):
        frames = clip_sampling.train_frames(n_frames, c.clip, rng)
        assert frames.shape == (c.clip.frames,)
        windows = clip_sampling.view_windows(n_frames, c.clip, c.predict.views)
        assert windows.shape[1] == c.clip.frames
        assert (windows >= 0).all()
        assert (windows < n_frames).all()

    small = {"width": 16, "depth": 2, "heads": 2} if c.model.family == "videomae" else {"backbone": "test_efficientnet"}
    tiny = dataclasses.replace(c.model, **small, size=None, weights=None)
    model = build_model(tiny, c.clip, 5, seed=0)
    parameters = draw_parameters(rng, c.augment, size=c.clip.size)
    batch = {name: torch.as_tensor(np.stack([value])) for name, value in parameters.items()}
    pixels = torch.randint(0, 256, (1, c.clip.frames, c.clip.size, c.clip.size, 3), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    clips = augment_clips(pixels, batch, c.augment, mean=mean, std=std, dtype=torch.float32)
    logits = model(clips, torch.rand(1, model.noise_size))
    assert logits.shape == (1, 5)
    torch.nn.functional.cross_entropy(logits, torch.tensor([3])).backward()

    groups = make_groups(model, c.optim, c.train.freeze_depth)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == sum(p.requires_grad for p in model.parameters())
    peak, minimum, start = resolve_lr(c.optim, c.train.global_batch, c.augment.repeats)
    total = 10 * c.train.epochs
    warmup = count_warmup_steps(c.optim.warmup_epochs, epochs=c.train.epochs, total_steps=total)
    rates = [
        learning_rate(s, total_steps=total, warmup_steps=warmup, peak=peak, minimum=minimum, warmup_start=start)
        for s in range(total)
    ]
    assert max(rates) == pytest.approx(peak)
    assert 0 <= min(rates) < peak


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_sizes_from_nothing_are_given_where_there_are_no_weights(path: Path) -> None:
    model = read(path.stem).model
    sizes = (model.width, model.depth, model.heads)
    assert (model.weights is None) == all(size is not None for size in sizes)
    if model.weights is None:
        assert model.width is not None
        assert model.heads is not None
        assert model.width % model.heads == 0


def test_notebook_has_the_notebooks_parameters() -> None:
    c = read("notebook")
    assert (c.clip.frames, c.clip.stride, c.clip.size, c.clip.sampling) == (16, 2, 224, "dense")
    assert (c.train.epochs, c.train.global_batch, c.train.clips_per_gpu) == (20, 8 * 8, 8)
    assert (c.optim.lr, c.optim.weight_decay) == (2e-5, 0.05)
    assert (c.predict.views.windows, c.predict.views.offsets) == ("offsets", [0, 4, 8])
    assert c.model.weights == "MCG-NJU/videomae-base"


def test_recipes_are_the_published_ones() -> None:
    """Values of the official scripts; HMDB51 tunes a fine-tuned backbone further, at 2e-5."""
    hmdb, ucf, ssv2 = (read(f"{name}_videomae_base") for name in ("hmdb51", "ucf101", "ssv2"))
    for c in (hmdb, ucf, ssv2, read("kinetics_videomae_base")):
        assert (c.augment.mixup, c.augment.cutmix, c.augment.mix_probability, c.augment.mix_switch) == (0.8, 1, 1, 0.5)
        assert (c.augment.erase, c.augment.repeats, c.train.label_smoothing) == (0.25, 2, 0.1)
        assert c.augment.randaugment == "rand-m7-n4-mstd0.5-inc1"
        assert c.augment.crop_scale == (0.08, 1.0)
        assert c.augment.crop_ratio == pytest.approx((3 / 4, 4 / 3))
        assert c.predict.views.crops == 3
    assert "finetuned-kinetics" in str(hmdb.model.weights)
    assert hmdb.optim.lr == 2e-5
    assert (ssv2.augment.flip, ssv2.clip.sampling, ssv2.predict.views.count) == (0.0, "segments", 2)
    assert (hmdb.clip.stride, ucf.clip.stride) == (2, 4)
    kinetics = read("kinetics_videomae_base")
    assert (kinetics.optim.min_lr, kinetics.train.global_batch, kinetics.train.epochs) == (1e-6, 768, 75)
    assert (kinetics.optim.layer_decay, kinetics.model.drop_path, kinetics.model.head_dropout) == (0.75, 0.1, 0.0)
    assert (kinetics.clip.stride, kinetics.predict.views.count, kinetics.predict.views.crops) == (4, 5, 3)
    assert resolve_lr(kinetics.optim, 768, 2)[0] == pytest.approx(7.5e-4)
    # 8 GPUs x 16 videos: 5e-4 * 128 / 256; 64 GPUs x 6 videos: 5e-4 * 384 / 256
    assert resolve_lr(ucf.optim, ucf.train.global_batch, 2)[0] == pytest.approx(2.5e-4)
    assert resolve_lr(ssv2.optim, ssv2.train.global_batch, 2)[0] == pytest.approx(7.5e-4)


def test_debug_goes_over_any_preset() -> None:
    for path in PRESETS:
        c = parse_settings([f"--config={path}", "--debug"]).config
        assert c.model.weights is None
        assert c.data.workers == 0
        assert c.train.max_steps is not None
        assert c.train.max_steps <= 10
        assert c.run.dir == "runs/debug"
        assert build_model(c.model, c.clip, 3, seed=0).noise_size >= 0


@pytest.mark.parametrize(
    ("preset", "names", "sources"),
    [
        ("quickstart", ["a_b_c/s000_c00", "a_b_c/s000_c01", "b_c_a/s000_c00", "b_c_a/s012_c02", "a_b_c/s012_c00"], 2),
        ("scratch_small", [f"{c}/set1_seq0{i}_clip{i:03d}" for c in ("hug", "kick") for i in (1, 2)], 2),
        ("scratch_small", ["hug/film_001", "hug/film_002", "hug/show_001", "kick/film_003", "kick/news_001"], 3),
    ],
)
def test_presets_know_the_sources_of_their_data(preset: str, names: list[str], sources: int) -> None:
    found = find_sources(names, [name.split("/")[0] for name in names], read(preset).data)
    assert len(set(found.groups)) == sources


def test_short_schedules_have_steps_after_the_warm_up() -> None:
    for path in PRESETS:
        c = read(path.stem)
        assert c.optim.warmup_epochs <= math.ceil(c.train.epochs / 2)
