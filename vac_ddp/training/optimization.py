"""Parameter groups (layer decay, weight decay, head rate, frozen layers) and AdamW over them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from vac_ddp.errors import UserError
from vac_ddp.models import VideoModel
from vac_ddp.runtime.data_parallel import sharded_adamw
from vac_ddp.settings import OptimSettings

Group = dict[str, Any]

# Learnt tables that are added to or stand among the tokens: no weight decay, whatever their number of axes.
TABLES = re.compile(
    r"pos_embed|position_embedding|temporal_embedding|time_embed|rel_pos|relative_position|"
    r"(cls|class|reg|register|dist|mask|query)_(token|embedding)|^(.*\.)?query$"
)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to 1-D parameters and scalars, biases, position tables and learnt tokens."""
    return parameter.ndim > 1 and not name.endswith("bias") and TABLES.search(name) is None


def freeze(model: VideoModel, freeze_depth: int) -> list[str]:
    """Switch gradients off below `freeze_depth` (1: the embedding, 2: and the first block...); returns the names.

    To be called before the model is wrapped by DDP. All layers, head included, cannot be frozen: UserError.
    """
    if not 0 <= freeze_depth < model.num_depths:
        raise UserError(
            f"train.freeze_depth={freeze_depth}: this model has {model.num_depths} layers, embedding and head "
            f"included; give 0 (none) to {model.num_depths - 1} (all but the head)"
        )
    frozen = [name for name, _ in model.named_parameters() if model.depth_of(name) < freeze_depth]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def make_groups(model: VideoModel, settings: OptimSettings, freeze_depth: int = 0) -> list[Group]:
    """The parameter groups of a bare model, embedding first.

    Each group: params, names, depth, lr_scale, weight_decay. lr_scale = layer_decay ** (num_depths - 1 - depth),
    times head_lr_scale for the classifier (official VideoMAE and BEiT code: layer_decay ** (L + 1 - id)). Every
    parameter is in exactly one group, but for frozen ones: `freeze` is called here, parameters without gradient are
    left out.
    """
    if not 0 < settings.layer_decay <= 1:
        raise UserError(f"optim.layer_decay={settings.layer_decay}: above 0, at most 1 (1: the same rate everywhere)")
    freeze(model, freeze_depth)
    heads = model.head_names()
    unknown = heads - {name for name, _ in model.named_parameters()}
    assert not unknown, f"head_names() names no parameter: {sorted(unknown)}"
    groups: dict[tuple[int, bool, bool], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth, head, decay = model.depth_of(name), name in heads, decays(name, parameter)
        assert 0 <= depth < model.num_depths, f"depth {depth} of {name} is not within 0..{model.num_depths - 1}"
        key = (depth, head, decay)
        if key not in groups:
            scale = settings.layer_decay ** (model.num_depths - 1 - depth)
            groups[key] = {
                "params": [],
                "names": [],
                "depth": depth,
                "lr_scale": scale * (settings.head_lr_scale if head else 1.0),
                "weight_decay": settings.weight_decay if decay else 0.0,
            }
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def group_table(groups: list[Group], model: nn.Module | None = None) -> str:
    """A table for people: depth, scale of the learning rate, weight decay, tensors, parameters of each group.

    With `model`, a line counts its frozen parameters.
    """
    rows = [("depth", "lr scale", "decay", "tensors", "parameters")]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        tensors = len(group["params"])
        rows.append(
            (
                str(group["depth"]),
                f"{group['lr_scale']:.5g}",
                f"{group['weight_decay']:g}",
                str(tensors),
                f"{count:,}",
            )
        )
    trained = [parameter for group in groups for parameter in group["params"]]
    rows.append(("all", "", "", str(len(trained)), f"{sum(p.numel() for p in trained):,}"))
    if model is not None:
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        if frozen:
            rows.append(("frozen", "0", "", str(len(frozen)), f"{sum(p.numel() for p in frozen):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def make_optimizer(groups: list[Group], settings: OptimSettings, *, lr: float) -> torch.optim.Optimizer:
    """AdamW over the groups; with optim.shard its state is spread over the ranks (ZeRO stage 1).

    lr: rate of the first step before scaling; see `set_lr`. A sharded optimizer needs the process group.
    """
    options: dict[str, Any] = {
        "lr": lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "fused": settings.fused,
    }
    optimizer = sharded_adamw(groups, **options) if settings.shard else torch.optim.AdamW(groups, **options)
    set_lr(optimizer, lr)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate, `lr` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
