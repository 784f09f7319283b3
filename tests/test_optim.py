from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vac_ddp.errors import UserError
from vac_ddp.settings import OptimSettings
from vac_ddp.training.optimization import decays, freeze, group_table, make_groups, make_optimizer, set_lr


class Tiny(nn.Module):
    """Embedding, two blocks, head, with the names a transformer has."""

    num_depths = 4

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 6))
        self.patch = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def depth_of(self, name: str) -> int:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("pos_embed", "patch")) else 3

    def head_names(self) -> set[str]:
        return {"head.weight", "head.bias"}

    def forward(self, x):
        x = self.patch(x) + self.pos_embed
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x.mean(1)))


def test_scales_follow_the_official_rule():
    groups = make_groups(Tiny(), OptimSettings(layer_decay=0.75, head_lr_scale=5.0, weight_decay=0.05))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["pos_embed"] == 0.75**3
    assert scales["blocks.0.1.weight"] == 0.75**2
    assert scales["blocks.1.0.bias"] == 0.75
    assert scales["norm.weight"] == 1.0
    assert scales["head.weight"] == 5.0
    assert [group["depth"] for group in groups] == sorted(group["depth"] for group in groups)


def test_every_parameter_once_and_what_decays():
    model = Tiny()
    groups = make_groups(model, OptimSettings(weight_decay=0.05))
    placed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(placed) == sorted(id(parameter) for parameter in model.parameters())
    decay = {name for group in groups for name in group["names"] if group["weight_decay"] == 0.05}
    assert decay == {"patch.weight", "blocks.0.1.weight", "blocks.1.1.weight", "head.weight"}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("embeddings.position_embeddings", (1, 9, 4), False),
        ("backbone.cls_token", (1, 1, 4), False),
        ("layers.0.attn.relative_position_bias_table", (9, 4), False),
        ("pool.query", (1, 4), False),
        ("pooler.query_tokens", (1, 1, 4), False),
        ("attention.query.weight", (4, 4), True),
        ("gate", (), False),
        ("conv.weight", (4, 4, 1, 1), True),
        ("odd.bias", (4, 4), False),
    ],
)
def test_no_decay_on_tables_and_small_tensors(name, shape, expected):
    assert decays(name, nn.Parameter(torch.zeros(shape))) is expected


def test_frozen_layers_are_left_out_and_stay():
    model = Tiny()
    groups = make_groups(model, OptimSettings(), freeze_depth=2)
    names = {name for group in groups for name in group["names"]}
    assert names == {name for name, _ in model.named_parameters() if not name.startswith(("pos", "patch", "blocks.0"))}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(groups, OptimSettings(), lr=0.1)
    model(torch.randn(2, 5, 4)).sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names
    assert "frozen" in group_table(groups, model)


@pytest.mark.parametrize("depth", [-1, 4])
def test_freezing_has_bounds(depth):
    with pytest.raises(UserError, match=r"train\.freeze_depth"):
        freeze(Tiny(), depth)


def test_layer_decay_has_bounds():
    with pytest.raises(UserError, match=r"optim\.layer_decay"):
        make_groups(Tiny(), OptimSettings(layer_decay=1.5))


def test_table_shows_every_group():
    groups = make_groups(Tiny(), OptimSettings(layer_decay=0.5))
    lines = group_table(groups).splitlines()
    assert lines[0].split() == ["depth", "lr", "scale", "decay", "tensors", "parameters"]
    assert lines[1].split() == ["0", "0.125", "0", "2", "36"]  # pos_embed 30, patch.bias 6
    assert lines[-1].split() == ["all", "15", str(sum(p.numel() for p in Tiny().parameters()))]


def test_fused_adamw_equals_the_formula():
    torch.manual_seed(0)
    model = Tiny().double()
    twin = copy.deepcopy(model)
    settings = OptimSettings(layer_decay=0.75, weight_decay=0.05, head_lr_scale=3.0, betas=(0.9, 0.98), eps=1e-8)
    groups = make_groups(model, settings)
    optimizer = make_optimizer(groups, settings, lr=1e-2)
    assert optimizer.defaults["fused"]
    scale = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    first = {name: torch.zeros_like(value) for name, value in twin.named_parameters()}
    second = {name: torch.zeros_like(value) for name, value in twin.named_parameters()}
    for step, rate in enumerate([1e-2, 5e-3, 2e-3], start=1):
        clips = torch.randn(3, 5, 4, dtype=torch.float64)
        set_lr(optimizer, rate)
        for net in (model, twin):
            net.zero_grad()
            net(clips).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in twin.named_parameters():
                lr, decay = rate * scale[name][0], scale[name][1]
                first[name] = 0.9 * first[name] + 0.1 * value.grad
                second[name] = 0.98 * second[name] + 0.02 * value.grad**2
                update = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.98**step)).sqrt() + 1e-8)
                value -= lr * decay * value + lr * update
    for name, value in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-10, atol=1e-12)


def test_groups_survive_a_weights_only_checkpoint(tmp_path):
    model = Tiny()
    optimizer = make_optimizer(make_groups(model, OptimSettings(layer_decay=0.5)), OptimSettings(), lr=1e-3)
    model(torch.randn(2, 5, 4)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    again = make_optimizer(make_groups(model, OptimSettings(layer_decay=0.5)), OptimSettings(), lr=1.0)
    again.load_state_dict(state)
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert [group["lr_scale"] for group in again.param_groups] == [g["lr_scale"] for g in optimizer.param_groups]
