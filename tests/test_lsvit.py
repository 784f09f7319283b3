from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vac_ddp.errors import UserError
from vac_ddp.models.lsvit import LMI, SMIF, LSViT, build_lsvit
from vac_ddp.models.video_model import drop_rates, keep_factors
from vac_ddp.settings import ClipSettings, ModelSettings, OptimSettings
from vac_ddp.training.optimization import group_table, make_groups

TINY = {"width": 16, "depth": 3, "heads": 2, "mlp_ratio": 2.0, "patch": 8}
CLIP = ClipSettings(frames=4, size=16)


def settings(**changes) -> ModelSettings:
    return ModelSettings(**({"name": "lsvit", "weights": None, "head_init_scale": 1.0} | TINY | changes))


def build(seed: int = 0, **changes) -> LSViT:
    return build_lsvit(settings(**changes), CLIP, 5, seed=seed).model


def timm_twin(model: LSViT) -> nn.Module:
    """timm's own ViT, with timm's own blocks and forward, and the same weights."""
    twin = timm.create_model(
        "vit_small_patch16_224",
        embed_dim=16,
        depth=3,
        num_heads=2,
        mlp_ratio=2.0,
        patch_size=8,
        img_size=16,
        num_classes=5,
    )
    state = model.state_dict()
    twin.load_state_dict(
        {name.removeprefix("backbone."): value for name, value in state.items() if not name.startswith(("smif", "lmi"))}
    )
    return twin


def smif_by_loops(
    module: SMIF, clips: torch.Tensor, mean: list[float], std: list[float], threshold: float
) -> torch.Tensor:
    """Version 1 is the notebook's cell; version 2 was written after the text of the public code, pixel by pixel."""
    batch, frames, _, height, width = clips.shape
    weight, bias = module.fuse.weight.flatten(1).tolist(), module.fuse.bias.tolist()
    out = clips.clone()
    for b in range(batch):
        for t in range(frames):
            for y in range(height):
                for x in range(width):
                    values = [float(clips[b, t, c, y, x]) for c in range(3)]
                    for c in range(3):
                        motion = 0.0
                        for k in (1, 2):
                            first, last = (0, frames - 1) if module.version == 1 else (t, t)  # beyond the ends
                            ahead = float(clips[b, t + k if t + k < frames else last, c, y, x])
                            behind = float(clips[b, t - k if t >= k else first, c, y, x])
                            here = float(clips[b, t, c, y, x])
                            motion += abs(ahead - here) + abs(here - behind)
                        motion *= std[c] / 0.5
                        motion /= 1 if module.version == 1 else 2
                        values.append(motion if motion > threshold else 0.0)
                    for c in range(3):
                        fused = bias[c] + sum(w * v for w, v in zip(weight[c], values, strict=True))
                        if module.version == 1:
                            out[b, t, c, y, x] += module.gate.item() * fused
                            continue
                        pixel = (float(clips[b, t, c, y, x]) + math.tanh(module.gate.item()) * fused) * std[c] + mean[c]
                        signed = min(1.0, max(-1.0, (pixel - 0.5) / 0.5))
                        out[b, t, c, y, x] = (signed * 0.5 + 0.5 - mean[c]) / std[c]
    return out


def lmi_by_loops(module: LMI, tokens: torch.Tensor) -> torch.Tensor:
    batch, frames, count, _ = tokens.shape
    out = tokens.clone()

    def linear(layer: nn.Linear, vector: list[float]) -> list[float]:
        rows, bias = layer.weight.tolist(), layer.bias.tolist()
        return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in zip(rows, bias, strict=True)]

    for b in range(batch):
        narrow = [[linear(module.reduce, tokens[b, t, n].tolist()) for n in range(count)] for t in range(frames)]
        for t in range(frames):
            motion = []
            for other in (t + 1, t - 1):
                at = t
                if module.version == 2 and frames > 1:  # beyond the ends the neighbouring difference is repeated
                    at = min(max(t, t - other), frames - 1 - max(0, other - t))
                    other = at + other - t
                for c in range(len(narrow[0][0])):
                    total = 0.0
                    if 0 <= other < frames:
                        total = sum(abs(narrow[other][n][c] - narrow[at][n][c]) for n in range(count))
                    motion.append(total / count)
            if module.version == 2:
                middle = sum(motion) / len(motion)
                spread = math.sqrt(sum((v - middle) ** 2 for v in motion) / len(motion) + 1e-5)
                scale, shift = module.norm.weight.tolist(), module.norm.bias.tolist()
                motion = [(v - middle) / spread * w + b for v, w, b in zip(motion, scale, shift, strict=True)]
            hidden = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in linear(module.fc1, motion)]
            gate = linear(module.expand, [1 / (1 + math.exp(-v)) for v in linear(module.fc2, hidden)])
            for n in range(count):
                factor = module.factor.item() if module.version == 1 else math.tanh(module.factor.item())
                for c, g in enumerate(gate):
                    out[b, t, n, c] += factor * float(tokens[b, t, n, c]) * g
    return out


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("mean", "std"), [([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
)
@pytest.mark.parametrize("scale", [0.03, 2.0])  # about half of the sums below the threshold; pixels beyond white
@pytest.mark.parametrize("frames", [1, 2, 6])
def test_smif_equals_loops(version, mean, std, scale, frames):
    torch.manual_seed(0)
    module = SMIF(mean, std, version=version).double()
    clips = torch.randn(2, frames, 3, 3, 2, dtype=torch.float64) * scale
    expected = smif_by_loops(module, clips, mean, std, 0.05)
    torch.testing.assert_close(module(clips), expected, rtol=1e-6, atol=1e-6)
    if version == 2 and scale == 2.0:
        assert (module(clips) == module.white).any()


def test_smif_threshold_is_in_units_from_minus_one_to_one():
    grey = torch.full((1, 4, 3, 1, 1), 0.4)
    grey[:, 2] += 0.02  # from black 0 to white 1; four |differences| of 0.02 at frame 2: 0.16 in units of [-1, 1]
    for mean, std, quiet in ((0.5, 0.5, False), (0.45, 0.225, False), (0.5, 0.5, True)):
        clips = ((grey if not quiet else 0.4 + (grey - 0.4) * 0.25) - mean) / std
        module = SMIF([mean] * 3, [std] * 3, version=1)
        with torch.no_grad():
            module.fuse.weight.zero_()
            module.fuse.bias.zero_()
            module.fuse.weight[0, 3] = 1.0
            module.gate.fill_(1.0)
        moved = (module(clips) - clips)[0, 2, 0].item()
        assert moved == pytest.approx(0.0 if quiet else 0.16, abs=1e-5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_lmi_equals_loops(version, frames):
    torch.manual_seed(0)
    module = LMI(8, version=version).double()
    with torch.no_grad():
        for parameter in module.norm.parameters():
            parameter.normal_()
    tokens = torch.randn(2, frames, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(module(tokens), lmi_by_loops(module, tokens), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_closed_gates_equal_timm_averaged_over_time_bit_for_bit(training, version):
    model = build(smif=True, lmi=True, lsvit_version=version).train(training)
    twin = timm_twin(model).train(training)
    clips = torch.rand(2, 4, 3, 16, 16) * 1.9 - 0.95  # version 2 clamps to the range of pixels
    with torch.no_grad():
        opened = model(clips)
        model.smif.gate.zero_()
        for module in model.lmi:
            module.factor.zero_()
        closed = model(clips)
        features = twin.forward_head(twin.forward_features(clips.flatten(0, 1)), pre_logits=True)
        expected = twin.head(features.view(2, 4, -1).mean(1))
    assert torch.equal(closed, expected)
    assert not torch.allclose(opened, expected, atol=1e-4)


def test_parts_can_be_left_out():
    bare = build(smif=False, lmi=False)
    assert bare.smif is None
    assert bare.lmi is None
    clips = torch.randn(2, 4, 3, 16, 16)
    twin = timm_twin(bare).eval()
    features = twin.forward_head(twin.forward_features(clips.flatten(0, 1)), pre_logits=True)
    assert torch.equal(bare.eval()(clips), twin.head(features.view(2, 4, -1).mean(1)))


def test_order_of_frames_is_seen_only_with_lmi():
    clips = torch.randn(1, 4, 3, 16, 16)
    for lmi, alike in ((False, True), (True, False)):
        model = build(smif=True, lmi=lmi).eval()
        with torch.no_grad():
            for parameter in model.lmi.parameters() if lmi else ():
                parameter.add_(torch.randn_like(parameter))
        difference = (model(clips) - model(clips.flip(1))).abs().max()
        assert (difference < 1e-5) == alike


def test_seeds_and_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = build(seed=1), build(seed=1), build(seed=2)
    assert torch.rand(1) == expected
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    assert build(head_init_scale=0.001).head.weight.abs().max() < 1e-4


def test_layers_are_counted_once_with_distinct_scales():
    model = build()
    groups = make_groups(model, OptimSettings(layer_decay=0.75, head_lr_scale=5.0))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert model.num_depths == 5
    assert scale["backbone.pos_embed"] == scale["backbone.cls_token"] == 0.75**4
    assert [scale[f"backbone.blocks.{i}.attn.qkv.weight"] for i in range(3)] == [0.75**3, 0.75**2, 0.75]
    assert scale["backbone.norm.weight"] == scale["smif.gate"] == scale["lmi.0.fc1.weight"] == 1.0
    assert scale["head.weight"] == 5.0
    print("\n" + group_table(groups, model))


def test_drop_path_masks_are_of_the_clip_and_keep_the_mean():
    torch.manual_seed(0)
    rates = drop_rates(0.4, 3)
    assert torch.allclose(rates, torch.tensor([0.0, 0.0, 0.2, 0.2, 0.4, 0.4]))
    noise = torch.rand(20000, 6)
    factors = torch.stack(keep_factors(noise, rates, frames=2))
    assert factors.shape == (6, 40000, 1, 1)
    assert torch.equal(factors[:, 0::2], factors[:, 1::2])
    for i, rate in enumerate(rates):
        assert factors[i].mean().item() == pytest.approx(1.0, abs=0.02)
        assert (factors[i] == 0).float().mean().item() == pytest.approx(float(rate), abs=0.02)


def test_a_dropped_branch_is_left_out_and_the_rest_scaled():
    model = build(smif=False, lmi=False, drop_path=0.5, depth=2).eval()
    assert model.noise_size == 4
    clips = torch.randn(2, 4, 3, 16, 16)
    assert torch.equal(model(clips), build(smif=False, lmi=False, depth=2).eval()(clips))  # no noise: nothing drops
    noise = torch.tensor([[0.9, 0.9, 0.1, 0.9], [0.9, 0.9, 0.9, 0.1]])
    got = model(clips, noise)
    vit = model.backbone
    expected = []
    for row, (attention, mlp) in enumerate([(0.0, 2.0), (2.0, 0.0)]):
        x = vit.blocks[0](vit._pos_embed(vit.patch_embed(clips[row])))
        block = vit.blocks[1]
        x = x + attention * block.attn(block.norm1(x))
        x = x + mlp * block.mlp(block.norm2(x))
        expected.append(model.head(vit.norm(x)[:, 0].mean(0)))
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_head_dropout_follows_the_noise():
    model = build(head_dropout=0.5, drop_path=0.2).eval()
    assert model.noise_size == 6 + 16
    noise = torch.full((1, 22), 0.99)
    clips = torch.randn(1, 4, 3, 16, 16)
    noise[:, 6:] = 0.0
    torch.testing.assert_close(model(clips, noise)[0], model.head.bias)


def test_micro_batches_do_not_matter():
    model = build(drop_path=0.3, head_dropout=0.3).train()
    clips, noise = torch.randn(4, 4, 3, 16, 16), torch.rand(4, model.noise_size)
    parts = torch.cat([model(clips[:1], noise[:1]), model(clips[1:], noise[1:])])
    torch.testing.assert_close(model(clips, noise), parts, rtol=1e-5, atol=1e-6)


def test_checkpointing_gives_the_same_gradients():
    model = build(drop_path=0.3)
    clips, noise = torch.randn(2, 4, 3, 16, 16), torch.rand(2, model.noise_size)
    gradients, calls = [], []
    for number, block in enumerate(model.backbone.blocks):
        block.norm1.register_forward_hook(lambda *_, number=number: calls.append(number))
    for model.checkpointing in (0, 2):
        calls.clear()
        model.zero_grad()
        model(clips, noise).square().sum().backward()
        assert [calls.count(number) for number in range(3)] == ([1, 1, 1] if model.checkpointing == 0 else [2, 2, 1])
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert len(gradients[0]) == len(list(model.parameters()))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_blocks_compile_without_breaks():
    model = build(drop_path=0.3, depth=1)
    clips, noise = torch.randn(2, 4, 3, 16, 16), torch.rand(2, model.noise_size)
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == model.state_dict().keys()
    logits = compiled(clips, noise)
    torch.testing.assert_close(logits, model(clips, noise), rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.parameters())


def test_bfloat16_autocast_gives_float32_logits():
    model = build(drop_path=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(2, 4, 3, 16, 16), torch.rand(2, model.noise_size))
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["safetensors", "pth", "directory"])
def test_weights_from_a_file_with_another_size(tmp_path, kind):
    donor = timm.create_model("test_vit", img_size=160)
    if kind == "pth":
        path = tmp_path / "vit.pth"
        torch.save({"state_dict": {f"module.{name}": value for name, value in donor.state_dict().items()}}, path)
    else:
        path = tmp_path / "model.safetensors"
        save_file(donor.state_dict(), path)
        if kind == "directory":
            (tmp_path / "config.json").write_text(
                '{"architecture": "test_vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}'
            )
            path = tmp_path
    wanted = ModelSettings(name="lsvit", backbone="test_vit", weights=str(path))
    loaded = build_lsvit(wanted, ClipSettings(size=96), 5, seed=0)
    state = loaded.model.state_dict()
    for name, value in donor.state_dict().items():
        if name != "pos_embed" and not name.startswith("head."):
            assert torch.equal(state[f"backbone.{name}"], value), name
    assert state["backbone.pos_embed"].shape[1] == 37  # 6 x 6 patches and the class token
    report = loaded.report
    assert any("pos_embed" in line for line in report.reshaped)
    assert report.used == len(donor.state_dict()) - 2
    assert set(report.unused) == {"head.weight", "head.bias"}
    assert 0 < report.covered < 1
    assert "smif.gate" in report.missing
    assert not any(name.startswith("backbone.") for name in report.missing)
    assert loaded.mean == ((0.1, 0.2, 0.3) if kind == "directory" else (0.5, 0.5, 0.5))


def test_a_file_of_another_model_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(
        {name: v for name, v in timm.create_model("test_vit").state_dict().items() if "blocks.0" not in name}, path
    )
    wanted = ModelSettings(name="lsvit", backbone="test_vit", weights=str(path))
    with pytest.raises(UserError, match=r"lacks \d+ of .*blocks\.0"):
        build_lsvit(wanted, ClipSettings(size=160), 5, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vit_smal_patch16_224"}, "vit_small_patch16_224"),
        ({"backbone": "test_resnet", **dict.fromkeys(TINY)}, "plain ViT"),
        ({"width": None}, "together"),
        ({"patch": 5}, "no multiple"),
        ({"size": "base"}, "of videomae"),
        ({"weights": "MCG-NJU/videomae-base", **dict.fromkeys(("width", "depth", "heads"))}, "timm name"),
        ({"weights": "vit_base_patch16_224", **dict.fromkeys(("width", "depth", "heads"))}, "another architecture"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    wanted = settings(**changes)
    with pytest.raises(UserError, match=message):
        build_lsvit(wanted, CLIP, 5, seed=0)
