from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

from vac_ddp.errors import UserError
from vac_ddp.models.batch_norm import batch_norms
from vac_ddp.models.frame_vit import FrameViT, build_frame_vit
from vac_ddp.models.pooling import AttentionPool, TimeTransformer
from vac_ddp.settings import ClipSettings, ModelSettings, OptimSettings
from vac_ddp.training.optimization import group_table, make_groups

TINY = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "patch": 8}
CLIP = ClipSettings(frames=4, size=16)
OTHERS = ["test_resnet", "test_convnext", "test_efficientnet", "resnet18", "test_vit2"]


def build(clip: ClipSettings = CLIP, **changes) -> FrameViT:
    values = {"name": "frame_vit", "weights": None, "head_init_scale": 1.0}
    sizes = {} if "backbone" in changes else TINY
    return build_frame_vit(ModelSettings(**(values | sizes | changes)), clip, 5, seed=0).model


def test_mean_of_a_plain_vit_equals_timm():
    model = build().eval()
    twin = timm.create_model(
        "vit_small_patch16_224",
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        patch_size=8,
        img_size=16,
        num_classes=5,
    ).eval()
    twin.load_state_dict({name.removeprefix("backbone."): value for name, value in model.state_dict().items()})
    clips = torch.randn(2, 4, 3, 16, 16)
    expected = torch.stack([twin.forward_head(twin.forward_features(clip), pre_logits=True).mean(0) for clip in clips])
    torch.testing.assert_close(model(clips), twin.head(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backbone", OTHERS)
def test_any_timm_model_with_the_mean(backbone):
    clip = ClipSettings(frames=3, size=64)
    model = build(clip, backbone=backbone).train()
    twin = timm.create_model(backbone, num_classes=0, **({"img_size": 64} if "vit" in backbone else {})).eval()
    twin.load_state_dict(
        {n.removeprefix("backbone."): v for n, v in model.state_dict().items() if n.startswith("backbone.")}
    )
    clips = torch.randn(2, 3, 3, 64, 64)
    expected = model.head(twin(clips.flatten(0, 1)).view(2, 3, -1).mean(1))
    torch.testing.assert_close(model(clips), expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_keeps_its_statistics():
    model = build(ClipSettings(frames=2, size=32), backbone="test_resnet")
    norms = batch_norms(model.backbone)
    assert norms
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    clips = torch.randn(3, 2, 3, 32, 32)
    together = model(clips)
    parts = torch.cat([model(clips[:1]), model(clips[1:])])
    torch.testing.assert_close(together, parts, rtol=1e-4, atol=1e-6)
    together.sum().backward()
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name
    assert all(norm.weight.grad is not None for norm in norms)
    report = build_frame_vit(
        ModelSettings(name="frame_vit", weights=None, backbone="test_resnet"), ClipSettings(size=32), 5, seed=0
    ).report
    assert any("BatchNorm" in note for note in report.notes)


def test_attention_pooling_equals_loops():
    torch.manual_seed(0)
    pool = AttentionPool(8, heads=2).double()
    features = torch.randn(2, 3, 8, dtype=torch.float64)
    normed = pool.norm(features)
    expected = torch.zeros(2, 8, dtype=torch.float64)
    for b in range(2):
        keys, values = pool.kv(normed[b]).split(8, dim=1)
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            scores = [math.exp((pool.query[0, part] @ keys[t, part]).item() / 2.0) for t in range(3)]
            for t in range(3):
                expected[b, part] += scores[t] / sum(scores) * values[t, part]
    torch.testing.assert_close(pool(features), pool.proj(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("pooling", "ordered"), [("mean", False), ("attention", False), ("transformer", True)])
def test_only_the_transformer_knows_the_order(pooling, ordered):
    model = build(pooling=pooling).eval()
    with torch.no_grad():
        for parameter in model.pool.parameters():
            parameter.add_(torch.randn_like(parameter))
    clips = torch.randn(1, 4, 3, 16, 16)
    difference = (model(clips) - model(clips.flip(1))).abs().max().item()
    assert (difference > 1e-2) if ordered else (difference < 1e-4)


def test_the_transformer_wants_its_number_of_frames():
    pool = TimeTransformer(8, 2, frames=4)
    assert pool(torch.randn(2, 4, 8)).shape == (2, 8)
    with pytest.raises(ValueError, match="takes 4"):
        pool(torch.randn(2, 5, 8))


@pytest.mark.parametrize("pooling", ["mean", "attention", "transformer"])
def test_layers_of_a_vit_are_counted_once(pooling):
    model = build(pooling=pooling)
    groups = make_groups(model, OptimSettings(layer_decay=0.75, head_lr_scale=2.0))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["backbone.patch_embed.proj.weight"] == 0.75**3
    assert [scale[f"backbone.blocks.{i}.mlp.fc1.bias"] for i in range(2)] == [0.75**2, 0.75]
    assert scale["head.bias"] == 2.0
    assert {scale[name] for name in names if name.startswith("pool.")} <= {1.0}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    for table in {"pool.query", "pool.time_embed", "backbone.pos_embed", "backbone.cls_token"} & decay.keys():
        assert decay[table] == 0.0


@pytest.mark.parametrize("backbone", OTHERS)
def test_layers_of_other_backbones_are_counted_once(backbone):
    model = build(ClipSettings(frames=2, size=64), backbone=backbone)
    groups = make_groups(model, OptimSettings(layer_decay=0.75))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    depths = {group["depth"] for group in groups}
    assert depths == set(range(model.num_depths))
    assert len({group["lr_scale"] for group in groups}) == model.num_depths > 3
    assert model.depth_of("head.weight") == model.num_depths - 1
    if backbone == "resnet18":
        places = ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer4.1.conv2"]
        assert [model.depth_of(f"backbone.{place}.weight") for place in places] == [0, 1, 2, 3, 8]
    print("\n" + group_table(groups, model))


def test_drop_path_masks_are_of_the_clip():
    model = build(drop_path=0.5).eval()
    clips = torch.randn(2, 4, 3, 16, 16)
    noise = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.0, 0.0]])
    logits = model(clips, noise)
    x = model.backbone.blocks[0](model.backbone._pos_embed(model.backbone.patch_embed(clips[1])))
    expected = model.head(model.backbone.norm(x)[:, 0].mean(0))  # both branches of the last block dropped
    torch.testing.assert_close(logits[1], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits[0], model(clips)[0])


def test_drop_path_of_other_backbones_is_refused():
    with pytest.raises(UserError, match=r"model\.drop_path"):
        build(ClipSettings(frames=2, size=64), backbone="test_convnext", drop_path=0.1)


def test_random_layers_of_the_backbone_are_off(monkeypatch):
    create = timm.create_model

    def noisy(name, **options):
        model = create(name, **options)
        model.blocks[1].attn.proj_drop = nn.Dropout(0.3)
        return model

    monkeypatch.setattr(timm, "create_model", noisy)
    loaded = build_frame_vit(ModelSettings(name="frame_vit", weights=None, **TINY), CLIP, 5, seed=0)
    assert any("blocks.1.attn.proj_drop" in note for note in loaded.report.notes)
    clips = torch.randn(1, 4, 3, 16, 16)
    assert torch.equal(loaded.model.train()(clips), loaded.model.train()(clips))


@pytest.mark.parametrize("backbone", [None, "test_convnext"])
def test_checkpointing_gives_the_same_gradients(backbone):
    clip = ClipSettings(frames=2, size=64)
    model = build(clip, backbone=backbone) if backbone else build(clip)
    clips = torch.randn(2, 2, 3, 64, 64)
    gradients, calls = [], []
    inner = next(m for n, m in model.backbone.named_modules() if "blocks.0" in n and isinstance(m, nn.LayerNorm))
    inner.register_forward_hook(lambda *_: calls.append(1))
    for model.checkpointing in (0, 1):
        calls.clear()
        model.zero_grad()
        model(clips).square().sum().backward()
        assert len(calls) == (1 if model.checkpointing == 0 else 2)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pooling", ["attention", "transformer"])
def test_blocks_compile_without_breaks(pooling):
    model = build(pooling=pooling, depth=1)
    clips = torch.randn(2, 4, 3, 16, 16)
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(compiled(clips), model(clips), rtol=1e-4, atol=1e-5)
