"""Frame ViT: any timm image backbone on the frames of a clip, its features brought together over time.

The "lightweight" model of the starting notebook is a ViT-S with the mean over time. The mean cannot tell a clip
from its reverse; attention pooling weighs frames but does not know their order either; the transformer does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models.load_report import Loaded
from vac_ddp.models.timm_backbone import FrameModel, create_backbone, encode, finish, is_plain_vit, seeded
from vac_ddp.models.video_model import keep_factors
from vac_ddp.settings import ClipSettings, ModelSettings


class MeanPool(nn.Module):
    """The mean over time."""

    def forward(self, features: Tensor) -> Tensor:
        """From features (B, T, C) to (B, C)."""
        return features.mean(1)


class AttentionPool(nn.Module):
    """One learnt query attends to the frames (several heads), which are normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
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


class TimeTransformer(nn.Module):
    """Pre-norm transformer layers over the frames with a learnt position table, then norm and mean."""

    def __init__(self, width: int, heads: int, frames: int, layers: int = 2) -> None:
        super().__init__()
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
        if features.shape[1] != self.time_embed.shape[1]:
            raise ValueError(f"{features.shape[1]} frames, the model takes {self.time_embed.shape[1]}")
        x = features + self.time_embed
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(1)


class FrameViT(FrameModel):
    """Clips in, logits out: the backbone on every frame, aggregation over time, classifier.

    BatchNorm layers of the backbone keep the statistics they came with, in training too: a clip's result must not
    depend on the others of its micro-batch. Drop path is for plain ViTs.
    """

    def __init__(self, backbone: Any, num_classes: int, settings: ModelSettings, *, frames: int) -> None:
        super().__init__()
        self.plain = is_plain_vit(backbone)
        if settings.drop_path > 0 and not self.plain:
            raise UserError(
                f"model.drop_path={settings.drop_path} is for plain ViTs, not {type(backbone).__name__}: give 0"
            )
        width = backbone.head_hidden_size
        heads = next(n for n in (max(1, width // 64), 8, 4, 2, 1) if width % n == 0)
        self._checkpointing = 0
        self.backbone = backbone
        self.pool: nn.Module
        if settings.pooling == "mean":
            self.pool = MeanPool()
        elif settings.pooling == "attention":
            self.pool = AttentionPool(width, heads)
        elif settings.pooling == "transformer":
            self.pool = TimeTransformer(width, heads, frames)
        else:
            raise UserError(f"model.pooling={settings.pooling}: mean, attention or transformer")
        self.add_classifier(width, num_classes, settings)
        self.train(self.training)

    @property
    def checkpointing(self) -> int:
        """Blocks from below recomputed in the backward pass; other backbones than plain ViTs: all or none."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, blocks: int) -> None:
        self._checkpointing = blocks
        if not self.plain:
            self.backbone.set_grad_checkpointing(blocks > 0)

    def train(self, mode: bool = True) -> FrameViT:
        """Training or evaluation mode; BatchNorm stays in the latter."""
        super().train(mode)
        for module in batch_norms(self.backbone):
            module.eval()
        return self

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of clips (B, T, 3, H, W), normalized floats; noise (B, noise_size) in [0, 1)."""
        batch, frames = clips.shape[:2]
        images = clips.flatten(0, 1)
        if self.plain:
            keep = keep_factors(noise, self.rates, frames)
            features = encode(self.backbone, images, keep=keep, checkpointing=self.checkpointing)
        else:
            features = self.backbone(images)
        return self.classify(self.pool(features.unflatten(0, (batch, frames))), noise)

    def compiled_modules(self) -> list[nn.Module]:
        """Every block of a plain ViT, or another backbone as a whole, and the pooling."""
        return [*(self.backbone.blocks if self.plain else [self.backbone]), self.pool]

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint says of the model beside the settings, in plain types."""
        return {"name": "frame_vit"}


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of a model."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [module for module in model.modules() if isinstance(module, kinds)]


def build_frame_vit(settings: ModelSettings, clip: ClipSettings, num_classes: int, *, seed: int) -> Loaded:
    """Frame ViT over the timm model `settings.backbone` with settings.weights; all that is new is drawn from `seed`."""
    with seeded(seed):
        backbone, report = create_backbone(settings, size=clip.size)
        model = FrameViT(backbone, num_classes, settings, frames=clip.frames)
    norms = len(batch_norms(backbone))
    if norms:
        report.notes.append(f"{norms} BatchNorm layers keep their statistics in training")
        if settings.weights is None:
            report.notes.append("BatchNorm from scratch has no statistics to keep: pretrained weights are advised")
    return finish(
        model, report, "classifier" if settings.pooling == "mean" else f"classifier, {settings.pooling} pooling"
    )
