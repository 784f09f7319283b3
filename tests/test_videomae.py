"""VideoMAE against Hugging Face's class, a transcription of the official layout, and the recipe's rules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models import build_model, file_state, load_file_state, load_model, videomae
from vac_ddp.settings import ClipSettings, ModelSettings

TINY = ClipSettings(frames=4, size=32)


def tiny(clip: ClipSettings = TINY, *, classes: int = 5, random: bool = True, **changes) -> videomae.VideoMAE:
    settings = ModelSettings(**{"weights": None, "width": 32, "depth": 3, "heads": 4, **changes})
    model = build_model(settings, clip, classes, seed=1)
    return randomise(model) if random else model


def randomise(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Values that show in the result for every parameter: biases and norms are not at 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, std, generator=generator)
    return model


def clips(clip: ClipSettings = TINY, batch: int = 2) -> Tensor:
    shape = (batch, clip.frames, 3, clip.size, clip.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def hf_twin(model: videomae.VideoMAE, clip: ClipSettings):
    """Hugging Face's class of the same sizes with the same weights, loaded from what goes to our files."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    arch = model.arch
    config = VideoMAEConfig(
        hidden_size=arch.width,
        num_hidden_layers=arch.depth,
        num_attention_heads=arch.heads,
        intermediate_size=arch.mlp,
        patch_size=arch.patch,
        tubelet_size=arch.tubelet,
        image_size=clip.size,
        num_frames=clip.frames,
        num_labels=model.num_classes,
        layer_norm_eps=arch.eps,
        use_mean_pooling=arch.pooling == "mean",
    )
    twin = VideoMAEForVideoClassification(config)
    twin.load_state_dict(file_state(model), strict=True)
    return twin.eval()


# The official modeling_finetune.py, written down plainly: (B, C, T, H, W) in, one head after another.


def official_table(positions: int, width: int) -> Tensor:
    rows = [
        [(math.sin if j % 2 == 0 else math.cos)(position / 10000 ** (2 * (j // 2) / width)) for j in range(width)]
        for position in range(positions)
    ]
    return torch.tensor(rows)


def official_logits(state: dict[str, Tensor], video: Tensor, *, heads: int, eps: float, head_eps: float) -> Tensor:
    kernel = state["patch_embed.proj.weight"]
    x = F.conv3d(video, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    width = x.shape[2]
    x = x + official_table(x.shape[1], width)

    def norm(name: str, value: Tensor, eps: float) -> Tensor:
        return F.layer_norm(value, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    for i in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        b = f"blocks.{i}"
        h = norm(f"{b}.norm1", x, eps)
        q, k, v = F.linear(h, state[f"{b}.attn.qkv.weight"]).chunk(3, dim=-1)
        q, v = q + state[f"{b}.attn.q_bias"], v + state[f"{b}.attn.v_bias"]
        parts = []
        for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            weights = (qh * (width // heads) ** -0.5 @ kh.transpose(1, 2)).softmax(-1)
            parts.append(weights @ vh)
        x = x + linear(f"{b}.attn.proj", torch.cat(parts, -1))
        h = norm(f"{b}.norm2", x, eps)
        x = x + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", h)))
    return linear("head", norm("fc_norm", x.mean(1), head_eps))


def official_state(model: videomae.VideoMAE) -> dict[str, Tensor]:
    """Our weights under the official names, by a table of its own."""
    arch, out = model.arch, {}
    outside = {"patch_embed": "patch_embed.proj", "fc_norm": "fc_norm", "head": "head"}
    inside = {"qkv": "attn.qkv", "q_bias": "attn.q_bias", "v_bias": "attn.v_bias", "proj": "attn.proj"}
    inside |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2"}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            official = ".".join(["blocks", parts[1], inside[parts[2]], *parts[3:]])
        else:
            official = ".".join([outside[parts[0]], *parts[1:]])
        if name == "patch_embed.weight":
            tensor = tensor.reshape(arch.width, 3, arch.tubelet, arch.patch, arch.patch)
        out[official] = tensor.clone()
    return out


# ---------------------------------------------------------------- the same function


@pytest.mark.parametrize(("frames", "tubelet"), [(4, 2), (6, 3), (2, 1)])
@torch.no_grad()
def test_tiny_logits_equal_hugging_face_and_official(frames, tubelet):
    clip = ClipSettings(frames=frames, size=48)
    model = tiny(clip, tubelet=tubelet)
    video = clips(clip)
    ours = model(video)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, hf_twin(model, clip)(video).logits, atol=1e-5, rtol=0)
    arch = model.arch
    official = official_logits(
        official_state(model), video.transpose(1, 2), heads=arch.heads, eps=arch.eps, head_eps=arch.head_eps
    )
    torch.testing.assert_close(ours, official, atol=1e-5, rtol=0)


@torch.no_grad()
def test_base_logits_equal_hugging_face_and_official():
    clip = ClipSettings(
        frames=16, size=112
    )  # all weights, a quarter of the tokens: the same function in a fifth of the time
    model = build_model(ModelSettings(size="base", head_init_scale=1.0), clip, 400, seed=0)
    generator = torch.Generator().manual_seed(5)
    for block in model.blocks:
        block.q_bias.normal_(0, 0.5, generator=generator)
        block.v_bias.normal_(0, 0.5, generator=generator)
    video = clips(clip, batch=1)
    ours = model(video)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, hf_twin(model, clip)(video).logits, atol=1e-5, rtol=0)
    official = official_logits(official_state(model), video.transpose(1, 2), heads=12, eps=1e-6, head_eps=1e-5)
    torch.testing.assert_close(ours, official, atol=1e-5, rtol=0)


def test_file_state_is_what_hugging_face_has_in_memory_and_comes_back_bit_for_bit():
    model = tiny()
    state = file_state(model)
    assert set(state) == set(hf_twin(model, TINY).state_dict())
    other = tiny(random=False)
    load_file_state(other, state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    state["fc_norm.weight"].zero_()
    assert model.fc_norm.weight.abs().sum() > 0, "the saved state shares memory with the model"


def test_a_state_of_another_model_is_refused():
    with pytest.raises(UserError, match="another model"):
        load_file_state(tiny(), file_state(tiny(depth=2)))
    with pytest.raises(UserError, match="another model"):
        load_file_state(tiny(), file_state(tiny(classes=7)))


# ---------------------------------------------------------------- positions


def test_position_table_is_hugging_faces():
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

    ours = videomae.sincos_table(1568, 96)
    assert torch.equal(ours, get_sinusoid_encoding_table(1568, 96)[0])
    torch.testing.assert_close(ours[:50], official_table(50, 96))


def test_interpolation_to_the_same_grid_changes_no_bit():
    table = torch.randn(8 * 14 * 14, 12)
    assert torch.equal(videomae.interpolate_table(table, (8, 14, 14), (8, 14, 14)), table)
    grids = [(8, 14, 14), (8, 14, 14)]
    assert torch.equal(videomae.position_table(grids, 12), videomae.sincos_table(1568, 12))


def test_interpolation_in_space_then_time_follows_the_official_code():
    old, new, width = (4, 7, 7), (8, 10, 10), 6
    table = torch.randn(math.prod(old), width)
    maps = table.reshape(4, 7, 7, width).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(10, 10), mode="bicubic", align_corners=False)
    volume = maps.permute(0, 2, 3, 1)
    want = torch.empty(8, 10, 10, width)
    for t in range(8):  # linear with half-pixel centres, clamped at the ends
        place = min(max((t + 0.5) / 2 - 0.5, 0), 3)
        low = math.floor(place)
        high, share = min(low + 1, 3), place - low
        want[t] = volume[low] * (1 - share) + volume[high] * share
    got = videomae.interpolate_table(table, old, new)
    torch.testing.assert_close(got, want.reshape(-1, width), atol=1e-6, rtol=0)


def test_buffers_stay_out_of_the_state():
    model = tiny(drop_path=0.1)
    assert {"positions", "drop_rates"} <= {name for name, _ in model.named_buffers()}
    assert not {"positions", "drop_rates"} & set(model.state_dict())


def test_clips_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 3, 32, 32\)"):
        tiny()(clips(ClipSettings(frames=8, size=32)))


# ---------------------------------------------------------------- drop path and dropout


def block_outputs(model: videomae.VideoMAE, video: Tensor, noise: Tensor | None) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: found.append(out)) for block in model.blocks]
    model(video, noise)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_drop_path_keeps_the_mean_in_training():
    model = tiny(drop_path=0.4).train()
    nn.init.zeros_(model.blocks[1].fc2.weight)
    nn.init.zeros_(model.blocks[1].fc2.bias)
    draws = 200  # evenly spread numbers: the mean is exact where the rate is right
    noise = ((torch.arange(draws) + 0.5) / draws)[:, None].expand(draws, model.noise_size).clone()
    noise[:, :2], noise[:, 4:] = 0.99, 0.99
    video = clips(batch=1)
    plain = block_outputs(model, video, None)
    dropped = block_outputs(model, video.expand(draws, -1, -1, -1, -1), noise)
    assert not torch.equal(dropped[1][0], dropped[1][-1])
    torch.testing.assert_close(dropped[1].mean(0), plain[1][0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_drop_path_rises_linearly_and_drops_whole_branches():
    model = tiny(drop_path=0.3).train()
    assert model.noise_size == 6
    video = clips(batch=1)
    for i, rate in enumerate([0.0, 0.15, 0.3]):
        noise = torch.full((1, 6), 0.999)
        noise[0, 2 * i : 2 * i + 2] = max(rate - 1e-3, 0.0)
        outputs = block_outputs(model, video, noise)
        before = model.embed(video) if i == 0 else outputs[i - 1]
        assert torch.equal(outputs[i], before) == (rate > 0), f"block {i} just below its rate"
        noise[0, 2 * i : 2 * i + 2] = rate + 1e-3
        assert not torch.equal(block_outputs(model, video, noise)[i], before), f"block {i} just above its rate"
    noise = torch.full((1, 6), 0.999)
    noise[0, 4] = 0.0
    block, outputs = model.blocks[2], block_outputs(model, video, noise)
    mlp = block.fc2(F.gelu(block.fc1(block.norm2(outputs[1]))))
    torch.testing.assert_close(outputs[2], outputs[1] + mlp / 0.7)  # a block's first number is attention's


@torch.no_grad()
def test_without_noise_nothing_is_dropped_in_either_mode():
    model, video = tiny(drop_path=0.5, head_dropout=0.5), clips()
    assert torch.equal(model.train()(video), model.eval()(video))
    assert torch.equal(model(video), tiny()(video))
    assert tiny().noise_size == 0


@torch.no_grad()
def test_masks_belong_to_the_sample_not_to_the_batch():
    model, video = tiny(drop_path=0.5, head_dropout=0.3).train(), clips(batch=3)
    noise = torch.rand(3, model.noise_size, generator=torch.Generator().manual_seed(6))
    together = model(video, noise)
    assert not torch.allclose(together, model(video))
    alone = torch.cat([model(video[i : i + 1], noise[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("drop_path", [0.0, 0.1])
@torch.no_grad()
def test_head_dropout_takes_the_last_numbers(drop_path):
    model = tiny(head_dropout=0.25, drop_path=drop_path)
    assert model.noise_size == 32 + (6 if drop_path else 0)
    tokens = torch.randn(1, 8, 32)
    noise = torch.linspace(0, 0.999, model.noise_size)[None]
    features = model.fc_norm(tokens.mean(1))
    want = F.linear(features * (noise[:, -32:] >= 0.25) / 0.75, model.head.weight, model.head.bias)
    torch.testing.assert_close(model.classify(tokens, noise), want)


# ---------------------------------------------------------------- how it runs


def test_checkpointed_blocks_give_the_same_gradients():
    video = clips()
    gradients = []
    for blocks in (0, 2):
        model = tiny(drop_path=0.5)
        model.checkpointing = blocks
        runs = []
        for i, block in enumerate(model.blocks):
            block.fc1.register_forward_hook(lambda *_, i=i, runs=runs: runs.append(i))
        noise = torch.rand(2, model.noise_size, generator=torch.Generator().manual_seed(7))
        model(video, noise).square().sum().backward()
        assert sorted(runs) == sorted([0, 1, 2, *range(blocks)])
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bfloat16_keeps_the_stream_narrow_and_the_logits_wide():
    model, video = tiny(drop_path=0.2), clips()
    noise = torch.rand(2, model.noise_size, generator=torch.Generator().manual_seed(8))
    full = model(video, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block_outputs(model, video, noise)
        logits = model(video, noise)
    assert {out.dtype for out in found} == {torch.bfloat16}
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, full, atol=0.1, rtol=0.1)


def test_blocks_compile_without_graph_breaks():
    model, video = tiny(depth=2, drop_path=0.2), clips()
    noise = torch.rand(2, model.noise_size, generator=torch.Generator().manual_seed(9))
    plain = model(video, noise)
    names = set(model.state_dict())
    model.compile_blocks()
    compiled = model(video, noise)
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
    compiled.sum().backward()
    assert model.blocks[0].q_bias.grad is not None
    assert set(model.state_dict()) == names


# ---------------------------------------------------------------- sizes, names, first values


@pytest.mark.parametrize(
    ("size", "millions"), [("small", 22), ("base", 87), ("large", 304), ("huge", 633), ("giant", 1013)]
)
def test_sizes_by_name_have_the_published_parameters(size, millions):
    from vac_ddp.models.build import architecture_of

    arch = architecture_of(ModelSettings(size=size), ClipSettings())
    with torch.device("meta"):
        model = videomae.VideoMAE(arch, 400)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1.0


def test_numbers_go_before_the_name():
    model = tiny(ClipSettings(frames=8, size=24), size="base", width=64, depth=2, heads=2, patch=8, mlp_ratio=2.0)
    arch = model.arch
    assert (arch.width, arch.depth, arch.heads, arch.mlp, arch.patch, arch.grids) == (64, 2, 2, 128, 8, ((4, 3, 3),))


@pytest.mark.parametrize(
    ("changes", "clip", "words"),
    [
        ({"width": None}, TINY, "model.size"),
        ({"heads": 5}, TINY, "multiple of model.heads"),
        ({}, ClipSettings(frames=5, size=32), "clip.frames"),
        ({}, ClipSettings(frames=4, size=40), "clip.size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, clip, words):
    with pytest.raises(UserError, match=words):
        tiny(clip, **changes)


def test_depths_run_from_the_embedding_to_the_head():
    model = tiny()
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert model.num_depths == 5
    assert {d for n, d in depths.items() if n.startswith("patch_embed")} == {0}
    assert all(d == int(n.split(".")[1]) + 1 for n, d in depths.items() if n.startswith("blocks"))
    assert {d for n, d in depths.items() if n.startswith(("fc_norm", "head"))} == {4}
    assert model.head_names() == {n for n in depths if n.startswith("head.")}


def test_first_values_are_the_recipes_and_follow_from_the_seed():
    settings = ModelSettings(weights=None, width=256, depth=2, heads=4)
    state = torch.random.get_rng_state()
    model = load_model(settings, TINY, [f"c{i}" for i in range(64)], seed=5).model
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"
    again, other = (build_model(settings, TINY, 64, seed=seed) for seed in (5, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.head.weight, other.head.weight)
    assert model.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.05)
    assert model.blocks[1].fc1.weight.std().item() == pytest.approx(math.sqrt(2 / (256 + 1024)), rel=0.05)
    bound = 1 / math.sqrt(3 * 2 * 16 * 16)
    assert model.patch_embed.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias") and "patch_embed" not in n)
    assert all((p == 1).all() for n, p in model.named_parameters() if "norm" in n and n.endswith("weight"))
