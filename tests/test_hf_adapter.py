from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from vac_ddp.errors import UserError
from vac_ddp.models.hf_adapter import build_hf, depths_by_number
from vac_ddp.models.load_report import file_state, load_file_state
from vac_ddp.settings import ClipSettings, ModelSettings, OptimSettings
from vac_ddp.training.optimization import group_table, make_groups

CLIP = ClipSettings(frames=4, size=16)
KINDS = ["timesformer", "vivit", "vjepa2"]
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 7}


def tiny(kind: str, **changes):
    """A transformers model with random weights."""
    from transformers import AutoModelForVideoClassification, TimesformerConfig, VivitConfig, VJEPA2Config

    drops = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    if kind == "timesformer":
        more = {"image_size": 16, "patch_size": 8, "num_frames": 4, "intermediate_size": 32}
        config = TimesformerConfig(**SMALL, **drops, **{**more, **changes})
    elif kind == "vivit":
        more = {"image_size": 16, "tubelet_size": [2, 8, 8], "num_frames": 4, "intermediate_size": 32}
        config = VivitConfig(**SMALL, **drops, **{**more, **changes})
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
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
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
    expected = net(**{net.main_input_name: clips}).logits
    torch.testing.assert_close(loaded.model.eval()(clips), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loaded.model.train()(clips), expected, rtol=1e-5, atol=1e-6)  # nothing is random
    report = loaded.report
    assert loaded.mean == (0.1, 0.2, 0.3)
    assert loaded.std == (0.4, 0.5, 0.6)
    assert report.used == len(net.state_dict()) - 2
    assert report.missing == ["net.classifier.weight", "net.classifier.bias"]
    assert any("drop_path_rate was 0.2" in n or "hidden_dropout_prob was 0.2" in n for n in report.notes)
    assert (report.file or "").endswith("model.safetensors")
    assert len(report.sha256 or "") == 64
    assert kind == loaded.model.architecture()["config"]["model_type"]


def test_layers_are_counted_once(saved):
    kind, folder, _ = saved
    model = build(folder).model
    groups = make_groups(model, OptimSettings(layer_decay=0.75, head_lr_scale=2.0))
    names = [name for group in groups for name in group["names"]]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted(trained)
    assert (len(trained) < len(list(model.parameters()))) == (kind == "vjepa2")
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert model.num_depths == 4
    inside = {
        "timesformer": "net.timesformer.encoder.layer.{}.temporal_dense.weight",
        "vivit": "net.vivit.layers.{}.mlp.fc1.weight",
        "vjepa2": "net.vjepa2.encoder.layer.{}.mlp.fc1.weight",
    }[kind]
    embedding = [name for name in names if "patch_embeddings" in name]
    assert {scale[name] for name in embedding} == {0.75**3}
    assert [scale[inside.format(i)] for i in range(2)] == [0.75**2, 0.75]
    final = {"vjepa2": "net.vjepa2.encoder.layernorm.weight"}.get(kind, f"net.{kind}.layernorm.weight")
    assert scale[final] == 1.0
    assert scale["net.classifier.weight"] == 2.0
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    for name in names:
        if "position_embeddings" in name or "time_embeddings" in name or "token" in name:
            assert decay[name] == 0.0, name
    print("\n" + group_table(groups, model))


def test_every_trained_parameter_gets_a_gradient(saved):
    model = build(saved[1]).model.train()
    model(torch.randn(1, 4, 3, 16, 16)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_checkpointing_gives_the_same_gradients(saved):
    model = build(saved[1]).model.train()
    clips = torch.randn(1, 4, 3, 16, 16)
    gradients, calls = [], []
    first = model.layers()[0]
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    inner = next(module for module in first.modules() if isinstance(module, nn.LayerNorm))
    inner.register_forward_hook(lambda *_: calls.append(1))
    for model.checkpointing in (0, 1):
        calls.clear()
        model.zero_grad()
        model(clips).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        assert len(calls) == (2 if model.checkpointing == 0 else 3)
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-7)


def test_blocks_compile_without_breaks(saved):
    model = build(saved[1]).model.eval()
    clips = torch.randn(1, 4, 3, 16, 16)
    expected = model(clips)
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(compiled(clips), expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_ours_builds_the_same_model(saved):
    model = build(saved[1]).model
    state, architecture = file_state(model), json.loads(json.dumps(model.architecture()))
    wanted = ModelSettings(name="hf", weights=None)
    again = build_hf(wanted, CLIP, 5, seed=1, architecture=architecture).model
    load_file_state(again, state)
    assert again.unused == model.unused
    clips = torch.randn(1, 4, 3, 16, 16)
    assert torch.equal(again.eval()(clips), model.eval()(clips))


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


@pytest.mark.parametrize(("name", "value"), [("drop_path", 0.1), ("head_dropout", 0.5)])
def test_settings_that_would_be_ignored_are_refused(name, value):
    with pytest.raises(UserError, match=rf"model\.{name}"):
        build("anything", **{name: value})


def test_weights_are_needed():
    with pytest.raises(UserError, match=r"needs model\.weights"):
        build_hf(ModelSettings(name="hf", weights=None), CLIP, 5, seed=0)


def test_several_stacks_are_counted_on():
    names = [
        "net.embed.weight",
        "net.low.layers.0.a",
        "net.low.layers.1.a",
        "net.between.weight",
        "net.high.layer.0.a",
        "net.norm.weight",
        "pool.layers.0.a",
        "head.weight",
    ]
    depths, count = depths_by_number(names, "net")
    assert [depths[name] for name in names] == [0, 1, 2, 2, 3, 4, 4, 4]
    assert count == 5
    assert depths_by_number(["net.a", "head.b"], "net") == ({"net.a": 0, "head.b": 1}, 2)


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
