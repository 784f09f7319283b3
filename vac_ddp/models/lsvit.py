"""LS-ViT: an image ViT on every frame, with motion mixed into pixels and tokens.

Chen et al., "LS-VIT: Vision Transformer for action recognition based on long and short-term temporal
difference", Frontiers in Neurorobotics 18 (2024), doi 10.3389/fnbot.2024.1457843. Both parts can be left out; with
closed gates (0) the model is the timm ViT averaged over time, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models.batch_norm import batch_norm_note
from vac_ddp.models.feature_map import pool_frames
from vac_ddp.models.load_report import Loaded
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

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class SMIF(nn.Module):
    """Short-term motion, fused into the pixels: clip + gate * conv1x1([clip, motion]).

    motion of frame t: the sum of |x[t+k] - x[t]| and |x[t] - x[t-k]| over k = 1 .. window // 2, a channel at a time.
    Sums up to `threshold` count as no motion. Version 1 (the starting notebook): frames before the first and after the
    last are those two. Version 2 (github.com/buistung/LS-ViT-Action-Recog): a difference beyond the ends is 0, the sum
    is divided by window // 2, the gate passes through tanh, and pixels are clamped to the range from black to white.

    Threshold and range are in units of pixels from -1 to 1, what a mean and std of 0.5 make of an image: 0.05 is 0.025
    of the range from black to white. Clips normalized otherwise are compared in these units, by their `mean` and `std`.
    """

    units: Tensor
    black: Tensor
    white: Tensor

    def __init__(
        self,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        *,
        version: int = 2,
        window: int = 5,
        threshold: float = 0.05,
        gate: float = 0.5,
    ) -> None:
        super().__init__()
        if window < 3 or window % 2 == 0:
            raise ValueError(f"window={window}: an odd number of frames, at least 3")
        self.version, self.reach, self.threshold = version, window // 2, threshold
        self.fuse = nn.Conv2d(6, 3, 1)
        self.gate = nn.Parameter(torch.tensor(gate))
        mean_of, std_of = (torch.tensor(list(values)).view(3, 1, 1) for values in (mean, std))
        self.register_buffer("units", std_of / 0.5, persistent=False)
        self.register_buffer("black", (0 - mean_of) / std_of, persistent=False)
        self.register_buffer("white", (1 - mean_of) / std_of, persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        """From clips (B, T, 3, H, W), normalized, to the same shape."""
        motion = self._motion(clips) * self.units
        motion = torch.where(motion > self.threshold, motion, torch.zeros_like(motion))
        fused = self.fuse(torch.cat((clips, motion), dim=2).flatten(0, 1)).view_as(clips)
        if self.version == 1:
            return clips + self.gate * fused
        return torch.clamp(clips + self.gate.tanh() * fused, self.black, self.white)

    def _motion(self, clips: Tensor) -> Tensor:
        frames, reach = clips.shape[1], self.reach
        motion = torch.zeros_like(clips)
        if self.version == 1:
            first, last = clips[:, :1].expand(-1, reach, -1, -1, -1), clips[:, -1:].expand(-1, reach, -1, -1, -1)
            padded = torch.cat((first, clips, last), dim=1)
            for k in range(1, reach + 1):
                motion = motion + (padded[:, reach + k : reach + k + frames] - clips).abs()
                motion = motion + (clips - padded[:, reach - k : reach - k + frames]).abs()
            return motion
        for k in range(1, min(reach, frames - 1) + 1):
            change = (clips[:, k:] - clips[:, :-k]).abs()
            motion = motion + F.pad(change, (0,) * 6 + (0, k)) + F.pad(change, (0,) * 6 + (k, 0))
        return motion / reach


class LMI(nn.Module):
    """Long-term motion, as a gate on the tokens of a frame: x + factor * x * gate.

    gate (per frame and channel): tokens reduced to C / 4 channels; absolute differences to the next and to the
    previous frame, each averaged over the tokens; both side by side through a small MLP, sigmoid, expanded to C. The
    paper takes segments of a video; here they are the frames of the clip, however these were sampled.
    Version 1 (the starting notebook): differences beyond the ends are 0. Version 2 (buistung/LS-ViT-Action-Recog): they
    repeat their neighbour, a LayerNorm comes before the MLP, and the factor passes through tanh.

    Ours, in both versions: the two differences are not added up. Their sum is the same for a clip and its reverse, so
    the direction of a motion could not be seen.
    """

    def __init__(self, width: int, *, version: int = 2, reduction: int = 4, factor: float = 0.1) -> None:
        super().__init__()
        narrow = max(1, width // reduction)
        self.version = version
        self.reduce = nn.Linear(width, narrow)
        self.norm = nn.LayerNorm(2 * narrow) if version > 1 else nn.Identity()
        self.fc1 = nn.Linear(2 * narrow, narrow)
        self.fc2 = nn.Linear(narrow, narrow)
        self.expand = nn.Linear(narrow, width)
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, tokens: Tensor) -> Tensor:
        """From tokens (B, T, N, C) to the same shape."""
        narrow = self.reduce(tokens)
        change = (narrow[:, 1:] - narrow[:, :-1]).abs().mean(2)
        if self.version == 1 or tokens.shape[1] == 1:
            motion = torch.cat((F.pad(change, (0, 0, 0, 1)), F.pad(change, (0, 0, 1, 0))), dim=2)
        else:
            ahead, behind = torch.cat((change, change[:, -1:]), dim=1), torch.cat((change[:, :1], change), dim=1)
            motion = torch.cat((ahead, behind), dim=2)
        gate = self.expand(torch.sigmoid(self.fc2(F.gelu(self.fc1(self.norm(motion))))))
        factor = self.factor if self.version == 1 else self.factor.tanh()
        return (tokens + factor * tokens * gate[:, :, None]).to(tokens.dtype)


class LSViT(FrameModel):
    """Clips in, logits out: SMIF, a ViT on frames with an LMI after every block, the mean of the CLS tokens over time.

    mean, std: what the clips are normalized with, for SMIF; frames: of a clip.
    """

    backbone: VisionTransformer

    def __init__(
        self,
        backbone: VisionTransformer,
        num_classes: int,
        settings: ModelSettings,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        frames: int,
    ) -> None:
        super().__init__()
        width = backbone.embed_dim
        self.frames, self.spatial_grid = frames, settings.spatial_grid
        self.checkpointing = 0
        self.version = version = settings.lsvit_version
        self.smif = SMIF(mean, std, version=version) if settings.smif else None
        self.backbone = backbone
        self.lmi = nn.ModuleList(LMI(width, version=version) for _ in backbone.blocks) if settings.lmi else None
        self.add_classifier(self.step_shape[1], num_classes, settings)

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of clips (B, T, 3, H, W), normalized floats; noise (B, noise_size) in [0, 1)."""
        return self.classify(self.frame_features(clips, noise).mean(1), noise)

    def frame_features(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features (B, T, D) of the frames of clips (B, T, 3, H, W), as the backbone pools them or over regions."""
        batch, frames = clips.shape[:2]
        lmi = self.lmi
        if self.smif is not None:
            clips = self.smif(clips)

        def integrate(i: int, tokens: Tensor) -> Tensor:
            return tokens if lmi is None else lmi[i](tokens.unflatten(0, (batch, frames))).flatten(0, 1)

        keep = keep_factors(noise, self.rates, frames)
        tokens = encode_tokens(
            self.backbone, clips.flatten(0, 1), keep=keep, checkpointing=self.checkpointing, after_block=integrate
        )
        return pool_frames(self.backbone, tokens, self.spatial_grid).unflatten(0, (batch, frames))

    def compiled_modules(self) -> list[nn.Module]:
        """Every block, the LMIs and the SMIF."""
        return [*self.backbone.blocks, *(self.lmi or ()), *([self.smif] if self.smif is not None else ())]

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint says of the model beside the settings, in plain types."""
        return {"name": "lsvit", "lsvit_version": self.version}


def build_lsvit(settings: ModelSettings, clip: ClipSettings, num_classes: int, *, seed: int) -> Loaded:
    """LS-ViT over the timm ViT `settings.backbone` with settings.weights; all that is new is drawn from `seed`."""
    if settings.lsvit_version not in (1, 2):
        raise UserError(f"model.lsvit_version={settings.lsvit_version}: there are 1 and 2")
    with seeded(seed):
        backbone, report = create_backbone(settings, size=clip.size)
        if not is_plain_vit(backbone):
            raise UserError(
                f"model.backbone={settings.backbone} is no plain ViT of timm (vit_*, deit_*), which lsvit needs: "
                "give one, or model.name=frame_vit"
            )
        report.notes += batch_norm_note(backbone, settings.batch_norm, trained=settings.weights is not None)
        model = LSViT(backbone, num_classes, settings, mean=report.mean, std=report.std, frames=clip.frames)
    motion = ["SMIF"] * settings.smif + ["LMI"] * settings.lmi
    versioned = [f"{part} (version {settings.lsvit_version})" for part in motion]
    return finish(model, report, ", ".join(["classifier", *versioned]))
