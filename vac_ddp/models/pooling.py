"""Pooling over time: from the features of every time step to one vector a clip.

The mean cannot tell a clip from its reverse, nor can the statistics; attention pooling weighs steps but does not know
their order; attentive pooling with positions and the transformer do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models.video_model import full_precision
from vac_ddp.settings import ModelSettings

STATISTICS = ("mean", "std", "difference")


class MeanPool(nn.Module):
    """The mean over time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_width = width

    def forward(self, features: Tensor) -> Tensor:
        """From features (B, T, C) to (B, C)."""
        return features.mean(1)


class StatisticsPool(nn.Module):
    """Mean, std (divided by T) and mean absolute difference of neighbouring steps, concatenated in the given order."""

    def __init__(self, width: int, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.out_width = width * len(self.names)

    def forward(self, features: Tensor) -> Tensor:
        """From features (B, T, C) to (B, statistics x C) float32; the difference of a single step is 0."""
        with full_precision(features.device):
            features = features.float()
            return torch.cat([_STATISTIC[name](features) for name in self.names], dim=1)


def _std(features: Tensor) -> Tensor:
    variance = (features - features.mean(1, keepdim=True)).square().mean(1)
    # The square root of 0 has an infinite gradient; features that never fire are 0 in all steps.
    return torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)


def _difference(features: Tensor) -> Tensor:
    if features.shape[1] == 1:
        return torch.zeros_like(features[:, 0])
    return (features[:, 1:] - features[:, :-1]).abs().mean(1)


_STATISTIC = {"mean": lambda features: features.mean(1), "std": _std, "difference": _difference}


class AttentionPool(nn.Module):
    """One learnt query attends to the frames (several heads), which are normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.out_width = width
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, width))
        self.norm = nn.LayerNorm(width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """From features (B, T, C) to (B, C)."""
        batch, frames, width = features.shape
        kv = self.kv(self.norm(features)).view(batch, frames, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        q = self.query.to(k.dtype).view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).reshape(batch, width))


class AttentivePool(nn.Module):
    """Cross-attention pooling by several learned queries with positions; the classifier holds the value projection.

    Scores of query h and step t: q_h . x_t / sqrt(C) + b[h, t]; out: for each query the sum of the steps by the
    softmax of its scores. positions=False: b stays 0.
    """

    bias: Tensor

    def __init__(self, width: int, steps: int, queries: int, *, positions: bool = True) -> None:
        super().__init__()
        self.out_width = queries * width
        self.positions = positions
        self.query = nn.Parameter(torch.empty(queries, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        if positions:
            self.bias = nn.Parameter(torch.zeros(queries, steps))
        else:
            self.register_buffer("bias", torch.zeros(queries, steps))

    def forward(self, features: Tensor) -> Tensor:
        """From features (B, T, C) to (B, queries x C) float32."""
        _check_steps(features, self.bias.shape[1])
        with full_precision(features.device):
            features = features.float()
            scores = self.query @ features.transpose(1, 2) / math.sqrt(features.shape[2]) + self.bias
            return (scores.softmax(2) @ features).flatten(1)


class TimeTransformer(nn.Module):
    """Pre-norm transformer layers over the frames with a learnt position table, then norm and mean."""

    def __init__(self, width: int, heads: int, frames: int, layers: int = 2) -> None:
        super().__init__()
        self.out_width = width
        self.time_embed = nn.Parameter(torch.empty(1, frames, width))
        nn.init.trunc_normal_(self.time_embed, std=0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """From features (B, T, C) to (B, C)."""
        _check_steps(features, self.time_embed.shape[1])
        x = features + self.time_embed
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(1)


Pool = MeanPool | StatisticsPool | AttentionPool | AttentivePool | TimeTransformer


def make_pool(settings: ModelSettings, steps: int, width: int, *, positions: bool = True) -> Pool:
    """The pooling `settings.pooling` of features (B, steps, width) to (B, out_width), drawn from the global generator.

    positions: whether attentive pooling learns a bias for each step. UserError for statistics that do not exist.
    """
    heads = next(n for n in (max(1, width // 64), 8, 4, 2, 1) if width % n == 0)
    if settings.pooling == "mean":
        return MeanPool(width)
    if settings.pooling == "statistics":
        names = settings.statistics
        if not names or len(set(names)) < len(names) or not set(names) <= set(STATISTICS):
            raise UserError(f"model.statistics={','.join(names)}: expected some of {', '.join(STATISTICS)}, each once")
        return StatisticsPool(width, names)
    if settings.pooling == "attention":
        return AttentionPool(width, heads)
    if settings.pooling == "attentive":
        return AttentivePool(width, steps, settings.queries, positions=positions)
    if settings.pooling == "transformer":
        return TimeTransformer(width, heads, steps)
    raise UserError(f"model.pooling={settings.pooling}: mean, statistics, attention, attentive or transformer")


def pooling_text(settings: ModelSettings, steps: int) -> str:
    """A pooling over so many time steps, in words."""
    name = {"statistics": " and ".join(settings.statistics), "attentive": f"attentive ({settings.queries} queries)"}
    return f"{name.get(settings.pooling, settings.pooling)} over {steps} time steps"


def _check_steps(features: Tensor, steps: int) -> None:
    if features.shape[1] != steps:
        raise ValueError(f"{features.shape[1]} frames, the model takes {steps}")
