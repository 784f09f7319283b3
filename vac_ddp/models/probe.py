"""A probe: an encoder, its features of every time step pooled over time, and a linear classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vac_ddp.models.load_report import Loaded, LoadReport
from vac_ddp.models.pooling import AttentivePool, Pool, make_pool, pooling_text
from vac_ddp.models.timm_backbone import seeded
from vac_ddp.models.video_model import VideoModel, classify, full_precision, new_head
from vac_ddp.settings import ModelSettings


class Probe(VideoModel):
    """Clips in, logits out: encoder, pooling over time, classifier; the latter two in float32.

    encoder: after `keep_encoder`. A standardization of the pooled features is part of the classifier's numbers.
    `noise_size` numbers a clip: the encoder's, then `out_width` of the pooling if head_dropout > 0.
    """

    def __init__(self, encoder: VideoModel, pool: Pool, num_classes: int, settings: ModelSettings) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool: nn.Module = pool
        self.head = new_head(pool.out_width, num_classes, scale=settings.head_init_scale)
        self.head_dropout = settings.head_dropout
        self.num_depths = encoder.num_depths

    @property
    def checkpointing(self) -> int:
        """Blocks of the encoder that are recomputed in the backward pass."""
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, blocks: int) -> None:
        self.encoder.checkpointing = blocks

    @property
    def noise_size(self) -> int:
        """Random numbers in [0, 1) that a clip brings."""
        return self.encoder.noise_size + (self.head.in_features if self.head_dropout > 0 else 0)

    @property
    def step_shape(self) -> tuple[int, int]:
        """(T', D) of the encoder's steps."""
        return self.encoder.step_shape

    def steps(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """The encoder's features (B, T', D) float32 of each time step."""
        return self.encoder.steps(clips, noise)

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of clips (B, T, 3, H, W), normalized floats; noise (B, noise_size) in [0, 1)."""
        return self.classify(self.steps(clips, noise), noise)

    def classify(self, steps: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of features (B, T', D) of each time step."""
        with full_precision(steps.device):
            pooled = self.pool(steps.float())
        head_noise = None if noise is None else noise[:, self.encoder.noise_size :]
        return classify(self.head, pooled, head_noise, self.head_dropout)

    def keep_encoder(self) -> None:
        """Remove pooling and classifier."""
        self.pool = nn.Identity()
        del self.head
        self.head_dropout = 0.0

    def depth_of(self, name: str) -> int:
        """Depth of a parameter: the encoder's, pooling and classifier on top."""
        part, _, rest = name.partition(".")
        return self.encoder.depth_of(rest) if part == "encoder" else self.num_depths - 1

    def compiled_modules(self) -> list[nn.Module]:
        """Those of the encoder."""
        return self.encoder.compiled_modules()

    def architecture(self) -> dict[str, Any]:
        """The encoder's architecture, and whether attentive pooling has positions."""
        positions = {"positions": self.pool.positions} if isinstance(self.pool, AttentivePool) else {}
        return {"name": "probe", "encoder": self.encoder.architecture(), **positions}


def make_probe(
    encoder: Loaded, settings: ModelSettings, num_classes: int, *, seed: int, positions: bool = True
) -> Loaded:
    """The probe over a loaded model, of which the encoder is kept; pooling and classifier are drawn from `seed`.

    positions: see `make_pool`.
    """
    model, report = encoder.model, encoder.report
    whole = {name: tensor.numel() for name, tensor in model.named_parameters()}
    model.keep_encoder()
    kept = {name for name, _ in model.named_parameters()}
    with seeded(seed):
        pool = make_pool(settings, *model.step_shape, positions=positions)
        probe = Probe(model, pool, num_classes, settings)
    _describe(report, probe, left=whole.keys() - kept, kept=kept)
    report.pooling = pooling_text(settings, model.step_shape[0])
    report.head = f"drawn for {num_classes} classes"
    return Loaded(model=probe, report=report)


def _describe(report: LoadReport, probe: Probe, *, left: set[str], kept: set[str]) -> None:
    """Bring an encoder's report up to date: what was left of its model, what is new on top."""
    loaded = sorted(left - set(report.missing))
    new = [name for name, _ in probe.named_parameters() if not name.startswith("encoder.")]
    if report.used:
        report.used -= len(loaded)
        report.unused += [f"{name} (above the encoder)" for name in loaded]
    report.missing = [f"encoder.{name}" for name in report.missing if name in kept] + new
    sizes = {name: parameter.numel() for name, parameter in probe.named_parameters()}
    drawn = sum(sizes[name] for name in report.missing)
    report.covered = 1 - drawn / sum(sizes.values()) if report.used else 0.0
