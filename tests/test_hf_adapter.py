from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from vac_ddp.errors import UserError
from vac_ddp.models.hf_adapter import build_hf
from vac_ddp.models.hf_families import FAMILIES
from vac_ddp.models.load_report import file_state, load_file_state
from vac_ddp.settings import ClipSettings, ModelSettings, OptimSettings
from vac_ddp.training.optimization import group_table, make_groups

CLIP = ClipSettings(frames=4, size=16)
KINDS = ["timesformer", "vivit", "vjepa2", "videoprism"]
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 7}


def tiny(kind: str, **changes):
    """A transformers model with random weights."""
    from transformers import AutoModelForVideoClassification, TimesformerConfig, VivitConfig, VJEPA2Config
    from transformers import VideoPrismVisionConfig as PrismConfig

    drops = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    if kind == "timesformer":
        more = {"image_size": 16, "patch_size": 8, "num_frames": 4, "intermediate_size": 32}
        config = TimesformerConfig(**SMALL, **drops, **{**more, **changes})
    elif kind == "vivit":
        more = {"image_size": 16, "tubelet_size": [2, 8, 8], "num_frames": 4, "intermediate_size": 32}
        config = VivitConfig(**SMALL, **drops, **{**more, **changes})
    elif kind == "videoprism":
        more = {"image_size": 16, "tubelet_size": [1, 8, 8], "num_frames": 4, "intermediate_size": 32}
        counts = {"num_spatial_layers": 2, "num_temporal_layers": 1}
        config = PrismConfig(**SMALL, **drops, **{**more, **counts, **changes})
    else:
        more = {"crop_size": 16, "patch_size": 8, "frames_per_clip": 8, "num_pooler_layers": 1, "drop_path_rate": 0.2}
        predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
        config = VJEPA2Config(**SMALL, **{**more, **predictor, **changes})
    torch.manual_seed(0)
    net = AutoModelForVideoClassification.from_config(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    net = tiny(request.param)
    net.save_pretrained(folder)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
    processor |= {"video_processor_type": "VideoMAEVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return request.param, folder, net


def build(folder, *, classes: int = 5, clip: ClipSettings = CLIP, **changes):
    wanted = ModelSettings(name="hf", weights=str(folder), **{"head_init_scale": 1.0, **changes})
    return build_hf(wanted, clip, classes, seed=0)


def test_logits_equal_transformers(saved):
    kind, folder, net = saved
    loaded = build(folder)
    head = loaded.model.net.classifier
    assert head.out_features == 5
    net = copy.deepcopy(net).eval()
    net.classifier = head
    clips = torch.randn(2, 4, 3, 16, 16)
    expected = net(**{net.main_input_name: clips}).logits.view(2, 5)
    torch.testing.assert_close(loaded.model.eval()(clips), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loaded.model.train()(clips), expected, rtol=1e-5, atol=1e-6)  # nothing is random
    report = loaded.report
    assert loaded.mean == (0.1, 0.2, 0.3)
    assert loaded.std == (0.4, 0.5, 0.6)
    assert report.used == len(net.state_dict()) - 2
    assert report.missing == ["net.classifier.weight", "net.classifier.bias"]
    supported = kind in ("vivit", "vjepa2")
    assert loaded.model.net.config._attn_implementation == ("sdpa" if supported else "eager")
    assert any("attention without" in n for n in report.notes) == (not supported)
    assert any("drop_path_rate was 0.2" in n or "hidden_dropout_prob was 0.2" in n for n in report.notes)
    assert (report.file or "").endswith("model.safetensors")
    assert len(report.sha256 or "") == 64
    assert loaded.model.architecture()["config"]["model_type"].startswith(kind)


# Depths, written down by hand: of the starts of a name that fit, the longest one counts.
DEPTHS = {
    "timesformer": {
        "": 3,
        "timesformer.embeddings": 0,
        "timesformer.encoder.layer.0": 1,
        "timesformer.encoder.layer.1": 2,
    },
    "vivit": {"": 3, "vivit.embeddings": 0, "vivit.layers.0": 1, "vivit.layers.1": 2},
    "vjepa2": {
        "": 3,
        "vjepa2.encoder.embeddings": 0,
        "vjepa2.predictor": 0,
        "vjepa2.encoder.layer.0": 1,
        "vjepa2.encoder.layer.1": 2,
    },
    "videoprism": {
        "": 4,
        "vision_model.spatial_embeddings": 0,
        "vision_model.spatial_layers.0": 1,
        "vision_model.spatial_layers.1": 2,
        "vision_model.layernorm1": 2,
        "vision_model.temporal_embeddings": 2,
        "vision_model.temporal_layers.0": 3,
    },
}


def test_every_parameter_has_its_depth(saved):
    kind, folder, _ = saved
    model = build(folder).model
    assert model.num_depths == max(DEPTHS[kind].values()) + 1
    for name, parameter in model.named_parameters():
        fits = [(len(start), depth) for start, depth in DEPTHS[kind].items() if name.startswith(f"net.{start}")]
        assert model.depth_of(name) == max(fits)[1], name
        assert parameter.requires_grad == (not name.startswith("net.vjepa2.predictor")), name
    groups = make_groups(model, OptimSettings(layer_decay=0.75, head_lr_scale=2.0))
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert scale.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    top = model.num_depths - 1
    for name in scale:
        assert scale[name] == 0.75 ** (top - model.depth_of(name)) * (2.0 if "classifier" in name else 1.0)
        if "position_embeddings" in name or "time_embeddings" in name or "token" in name:
            assert decay[name] == 0.0, name
    print("\n" + group_table(groups, model))


def test_names_of_older_versions_have_the_same_depths():
    names = ["embeddings.cls_token", "encoder.layer.0.output.dense.bias", "encoder.layer.1.output.dense.bias"]
    depths, count = FAMILIES["vivit"].depths([f"vivit.{name}" for name in names] + ["classifier.bias"], "vivit")
    assert (list(depths.values()), count) == ([0, 1, 2, 3], 4)


@pytest.mark.parametrize("name", ["vivit.new.weight", "vivit.layersx.0.weight", "scale"])
def test_a_name_that_fits_nowhere_is_an_error(name):
    with pytest.raises(UserError, match=rf"the vivit .* place is not known here \(1: {name}\): install"):
        FAMILIES["vivit"].depths(["vivit.embeddings.cls_token", name], "vivit")


def test_every_trained_parameter_gets_a_gradient(saved):
    model = build(saved[1]).model.train()
    model(torch.randn(1, 4, 3, 16, 16)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


class Scripted(nn.Module):
    """Scales its input by the next of the factors (B,) at every call: in place of a class's own drop path."""

    def __init__(self, factors: list[torch.Tensor]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x):
        factor = self.factors.pop(0)
        return x * factor.repeat_interleave(len(x) // len(factor)).view(-1, 1, 1)


def test_drop_path_is_that_of_the_class_with_masks_from_noise(saved):
    kind, folder, _ = saved
    model = build(folder, drop_path=0.4).model.train()
    assert model.state_dict().keys() == build(folder).model.state_dict().keys()
    a_layer, layers = (3 if kind == "timesformer" else 2), len(model.layers())
    assert model.noise_size == a_layer * layers
    rates = [0.4 * i / (layers - 1) for i in range(layers) for _ in range(a_layer)]
    noise, clips = torch.rand(3, model.noise_size), torch.randn(3, 4, 3, 16, 16)
    noise[:, -1] = torch.tensor([0.39, 0.41, 0.9])
    factors = [(noise[:, i] >= rate) / (1 - rate) for i, rate in enumerate(rates)]
    reference = copy.deepcopy(build(folder).model)
    reference.net.classifier = model.net.classifier
    for i, layer in enumerate(reference.layers()):
        own = "drop_path" if kind in ("timesformer", "vjepa2") else "dropout"
        setattr(layer, own, Scripted(factors[i * a_layer : (i + 1) * a_layer]))
    logits = model(clips, noise)
    torch.testing.assert_close(logits, reference(clips), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits, model(clips), rtol=1e-3, atol=1e-4)
    for i in range(3):  # whatever else is in the micro-batch
        torch.testing.assert_close(model(clips[i : i + 1], noise[i : i + 1]), logits[i : i + 1], rtol=1e-5, atol=1e-6)


def test_checkpointing_gives_the_same_gradients(saved):
    model = build(saved[1], drop_path=0.5).model.train()
    clips, noise = torch.randn(2, 4, 3, 16, 16), torch.rand(2, model.noise_size)
    gradients, calls = [], []
    first = model.layers()[0]
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    inner = next(module for module in first.modules() if isinstance(module, nn.LayerNorm))
    inner.register_forward_hook(lambda *_: calls.append(1))
    for model.checkpointing in (0, 1):
        calls.clear()
        model.zero_grad()
        model(clips, noise).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        assert len(calls) == (2 if model.checkpointing == 0 else 3)
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-7)


def test_blocks_compile_without_breaks(saved):
    kind, folder, _ = saved
    model = build(folder, drop_path=0.5 if kind == "vivit" else 0.0).model.eval()
    clips, noise = torch.randn(1, 4, 3, 16, 16), torch.rand(1, model.noise_size)
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == model.state_dict().keys()
    for numbers in (None, noise, 1 - noise) if kind == "vivit" else (None,):
        torch.testing.assert_close(compiled(clips, numbers), model(clips, numbers), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_ours_builds_the_same_model(saved):
    model = build(saved[1]).model
    state, architecture = file_state(model), json.loads(json.dumps(model.architecture()))
    wanted = ModelSettings(name="hf", weights=None)
    again = build_hf(wanted, CLIP, 5, seed=1, architecture=architecture).model
    load_file_state(again, state)
    assert again.unused == model.unused
    clips = torch.randn(1, 4, 3, 16, 16)
    assert torch.equal(again.eval()(clips), model.eval()(clips))


def test_batch_norm_keeps_its_statistics_but_in_runs_from_before_the_setting(tmp_path):
    tiny("vivit").save_pretrained(tmp_path)
    first = build(tmp_path).model
    old = {name: value for name, value in first.architecture().items() if name != "batch_norm"}
    for setting, architecture, keeps in (
        ("stored", None, True),
        ("batch", None, False),
        ("stored", first.architecture(), True),
        ("stored", old, False),
    ):
        wanted = ModelSettings(name="hf", weights=str(tmp_path), batch_norm=setting)
        model = build_hf(wanted, CLIP, 5, seed=0, architecture=architecture).model
        norm = model.net.vivit.layernorm = nn.BatchNorm1d(9)  # of 2 x 2 x 2 patches and the class token
        model.train()(torch.randn(4, 4, 3, 16, 16))
        assert bool(norm.running_mean.any()) != keeps


def test_videomae_goes_another_way(tmp_path):
    with pytest.raises(UserError, match=r"model\.name=videomae"):
        build("MCG-NJU/videomae-base")
    (tmp_path / "config.json").write_text('{"model_type": "videomae"}')
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.name=videomae"):
        build(tmp_path)


def test_other_tasks_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a bert"):
        build(tmp_path)


def test_missing_tensors_of_the_backbone_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny("vivit").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    dropped = next(name for name in state if "layers.1" in name or "layer.1" in name)
    save_file({name: value for name, value in state.items() if name != dropped}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (ClipSettings(frames=8, size=16), r"clip\.frames=4 clip\.size=16"),
        (ClipSettings(frames=4, size=32), r"clip\.frames=4 clip\.size=16"),
    ],
)
def test_clips_of_another_shape(tmp_path, clip, message):
    tiny("timesformer").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        build(tmp_path, clip=clip)


def test_settings_that_would_be_ignored_are_refused():
    with pytest.raises(UserError, match=r"model\.head_dropout"):
        build("anything", head_dropout=0.5)


def test_weights_are_needed():
    with pytest.raises(UserError, match=r"needs model\.weights"):
        build_hf(ModelSettings(name="hf", weights=None), CLIP, 5, seed=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 10**9}, "intermediate_size: expected numbers up to"),
        ({"intermediate_size": 1 << 20, "hidden_size": 1 << 20, "num_hidden_layers": 1}, "parameters, the file holds"),
        ({"intermediate_size": -1}, "no timesformer can be built of its config"),
        ({"patch_size": 0}, "ZeroDivisionError"),
        ({"hidden_act": "none"}, "KeyError"),
        ({"num_labels": 10**12}, "num_labels: expected a whole number"),
        ({"extra_layers": 10**7}, "extra_layers: expected numbers up to 1000"),
        ({"num_channels": 4}, "does not take 4 frames"),
    ],
)
def test_a_config_of_which_no_model_can_be_built_is_refused_before_memory_is_allocated(tmp_path, changes, words):
    tiny("timesformer").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=words):
        build(tmp_path)


def test_what_a_config_would_have_fetched_or_imported_is_left_out(tmp_path):
    net = tiny("timesformer")
    net.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    foreign = {
        "_attn_implementation": "kernels-community/flash-attn",
        "attn_implementation": "kernels-community/flash-attn",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "dtype": "float16",
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **foreign}))
    loaded = build(tmp_path).model.net
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.timesformer.embeddings.cls_token, net.timesformer.embeddings.cls_token)
