"""Frame ViT: any timm image backbone on the frames of a clip, its features pooled over time.

The "lightweight" model of the starting notebook is a ViT-S with the mean over time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models.batch_norm import batch_norm_note, batch_norms
from vac_ddp.models.feature_map import pool_frames
from vac_ddp.models.load_report import Loaded
from vac_ddp.models.pooling import make_pool
from vac_ddp.models.timm_backbone import (
    FrameModel,
    create_backbone,
    encode_tokens,
    finish,
    is_plain_vit,
    seeded,
)
from vac_ddp.models.video_model import keep_factors
from vac_ddp.settings import ClipSettings, ModelSettings


class FrameViT(FrameModel):
    """Clips in, logits out: the backbone on every frame, aggregation over time, classifier.

    BatchNorm layers of the backbone keep the statistics they came with, in training too, unless model.batch_norm=batch:
    a clip's result must not depend on the others of its micro-batch. Drop path is for plain ViTs.
    """

    def __init__(self, backbone: Any, num_classes: int, settings: ModelSettings, *, frames: int) -> None:
        super().__init__()
        self.plain = is_plain_vit(backbone)
        if settings.drop_path > 0 and not self.plain:
            raise UserError(
                f"model.drop_path={settings.drop_path} is for plain ViTs, not {type(backbone).__name__}: give 0"
            )
        self._checkpointing = 0
        self.keeps_statistics = settings.batch_norm == "stored"
        self.backbone = backbone
        self.frames, self.spatial_grid = frames, settings.spatial_grid
        pool = make_pool(settings, *self.step_shape)
        self.pool: nn.Module = pool
        self.add_classifier(pool.out_width, num_classes, settings)
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
        """Training or evaluation mode; BatchNorm stays in the latter where it is to keep its statistics."""
        super().train(mode)
        for module in batch_norms(self.backbone) if self.keeps_statistics else ():
            module.eval()
        return self

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of clips (B, T, 3, H, W), normalized floats; noise (B, noise_size) in [0, 1)."""
        return self.classify(self.pool(self.frame_features(clips, noise)), noise)

    def frame_features(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features (B, T, D) of the frames of clips (B, T, 3, H, W), as the backbone pools them or over regions."""
        batch, frames = clips.shape[:2]
        images = clips.flatten(0, 1)
        if self.plain:
            keep = keep_factors(noise, self.rates, frames)
            tokens = encode_tokens(self.backbone, images, keep=keep, checkpointing=self.checkpointing)
            features = pool_frames(self.backbone, tokens, self.spatial_grid)
        elif self.spatial_grid == 1:
            features = self.backbone(images)
        else:
            features = pool_frames(self.backbone, self.backbone.forward_features(images), self.spatial_grid)
        return features.unflatten(0, (batch, frames))

    def keep_encoder(self) -> None:
        """Remove pooling and classifier."""
        super().keep_encoder()
        self.pool = nn.Identity()

    def compiled_modules(self) -> list[nn.Module]:
        """Every block of a plain ViT, or another backbone as a whole, and the pooling."""
        return [*(self.backbone.blocks if self.plain else [self.backbone]), self.pool]

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint says of the model beside the settings, in plain types."""
        return {"name": "frame_vit"}


def build_frame_vit(settings: ModelSettings, clip: ClipSettings, num_classes: int, *, seed: int) -> Loaded:
    """Frame ViT over the timm model `settings.backbone` with settings.weights; all that is new is drawn from `seed`."""
    with seeded(seed):
        backbone, report = create_backbone(settings, size=clip.size)
        model = FrameViT(backbone, num_classes, settings, frames=clip.frames)
    report.notes += batch_norm_note(backbone, settings.batch_norm, trained=settings.weights is not None)
    return finish(
        model, report, "classifier" if settings.pooling == "mean" else f"classifier, {settings.pooling} pooling"
    )
