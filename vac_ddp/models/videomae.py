"""The VideoMAE encoder with a classifier on top (Tong et al., 2022, arXiv 2203.12602; V2: arXiv 2303.16727).

Names and numbers follow the official code; `tensor_names.py` maps them to Hugging Face's. Three things differ
from both codes, none of them in what is computed: q, k and v are one matrix product, so is the patch embedding,
and the masks of drop path and dropout are made from numbers that come with the batch, so that they do not
depend on how a batch is split into ranks and micro-batches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models.kept_tokens import moving_tokens, random_tokens
from vac_ddp.models.video_model import (
    VideoModel,
    add_branch,
    check_grid,
    classify,
    drop_rates,
    full_precision,
    init_head,
    keep_factors,
    region_means,
    run_blocks,
)
from vac_ddp.settings import ClipSettings

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a VideoMAE is beside its tensors.

    grids: tokens along (time, height, width). The position table is the sine-cosine table of the first grid,
    interpolated to each following one; the last is what the model takes.
    pooling: `mean` of all tokens, as in the paper, or the `first` token, as Hugging Face's class does when its
    config says use_mean_pooling=false (there is no class token: good for files trained that way only).
    eps, head_eps: LayerNorm epsilon in the blocks and before the classifier. Official: 1e-6 for both; Hugging Face's
    class has 1e-5 before the classifier and no setting for it, so models from scratch take that and can be exported.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int = 16
    tubelet: int = 2
    eps: float = 1e-6
    head_eps: float = 1e-5
    pooling: str = "mean"
    grids: tuple[Grid, ...] = ((8, 14, 14),)

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return self.grids[-1][0] * self.tubelet

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of a clip, in pixels."""
        return self.grids[-1][1] * self.patch, self.grids[-1][2] * self.patch


class Block(nn.Module):
    """A pre-norm transformer block with bias on q and v only: one on k cancels in the softmax."""

    def __init__(self, width: int, heads: int, mlp: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, mlp)
        self.fc2 = nn.Linear(mlp, width)

    def forward(self, x: Tensor, keep_attention: Tensor | None = None, keep_mlp: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) to tokens; the factors (B, 1, 1) scale what the two branches add (None: by 1)."""
        batch, tokens, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(self.norm1(x), self.qkv.weight, bias)
        parts = qkv.chunk(3, dim=-1)  # of the last axis: going back they are put together by one copy, not two
        q, k, v = (part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = add_branch(x, self.proj(mixed), keep_attention)
        return add_branch(x, self.fc2(F.gelu(self.fc1(self.norm2(x)))), keep_mlp)


class VideoMAE(VideoModel):
    """Clips in, logits out.

    `noise_size` numbers a sample make the masks: two a block if drop_path > 0, then `width` for the head's dropout if
    head_dropout > 0, then one a token where training keeps random ones. drop_path rises linearly from 0 at the first
    block to the given value at the last.
    The position table is a buffer that is not saved: it follows from the architecture.
    """

    drop_rates: Tensor
    positions: Tensor

    def __init__(
        self, architecture: Architecture, num_classes: int, *, drop_path: float = 0.0, head_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.arch = arch = architecture
        self.num_classes = num_classes
        self.head_dropout = head_dropout
        self.drop_path = drop_path
        self.checkpointing = 0
        self.num_depths = arch.depth + 2  # embedding, every block, and norm with classifier
        self.patch_embed = nn.Linear(3 * arch.tubelet * arch.patch**2, arch.width)
        self.blocks = nn.ModuleList(Block(arch.width, arch.heads, arch.mlp, arch.eps) for _ in range(arch.depth))
        self.fc_norm = nn.LayerNorm(arch.width, eps=arch.head_eps if arch.pooling == "mean" else arch.eps)
        self.head = nn.Linear(arch.width, num_classes)
        self.set_buffers()

    def set_buffers(self) -> None:
        """What follows from the settings and has to be on the device: no copy in the step, nothing in the files."""
        rates = drop_rates(self.drop_path, self.arch.depth if self.drop_path > 0 else 0)
        self.register_buffer("drop_rates", rates, persistent=False)
        self.register_buffer("positions", position_table(self.arch.grids, self.arch.width), persistent=False)

    @property
    def noise_size(self) -> int:
        """Random numbers in [0, 1) that a sample brings."""
        drawn = self.train_tokens is not None and self.train_tokens.policy == "random"
        return len(self.drop_rates) + self._head_noise + (self.token_count if drawn else 0)

    @property
    def _head_noise(self) -> int:
        return self.arch.width if self.head_dropout > 0 else 0

    @property
    def token_count(self) -> int:
        """Tokens of a clip; 0 where the classifier reads the first one alone."""
        return math.prod(self.arch.grids[-1]) if self.arch.pooling == "mean" else 0

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of clips (B, T, 3, H, W), normalised floats.

        noise: (B, noise_size) in [0, 1); without it nothing is dropped and the result is deterministic.
        """
        return self.classify(self.encode(clips, noise), noise)

    def encode(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) of clips (B, T, 3, H, W) behind the last block, before the final norm.

        N are all tokens, or those that are kept (see `VideoModel`).
        """
        keep = keep_factors(noise, self.drop_rates)
        return run_blocks(self.blocks, self.embed(clips, noise), keep=keep, checkpointing=self.checkpointing)

    def steps(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features (B, T', D) float32 of each tubelet: the tokens after the final norm, averaged over space."""
        tokens = self.encode(clips, noise)
        with full_precision(tokens.device):
            maps = self.fc_norm(tokens.float()).unflatten(1, self.arch.grids[-1])
        return region_means(maps.flatten(0, 1), self.spatial_grid).unflatten(0, maps.shape[:2])

    def set_grid(self, grid: int) -> None:
        """Set `spatial_grid`; UserError where it is finer than the tokens."""
        check_grid(grid, *self.arch.grids[-1][1:])
        self.spatial_grid = grid

    @property
    def step_shape(self) -> tuple[int, int]:
        """(T', D) of `steps`."""
        return self.arch.grids[-1][0], self.spatial_grid**2 * self.arch.width

    def keep_encoder(self) -> None:
        """Remove the classifier."""
        del self.head
        self.head_dropout = 0.0

    def embed(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) with their positions: all, or those that are kept (see `VideoModel`).

        The convolution's kernel is its stride: cutting the patches out and one matrix product are faster. They are cut
        with the channels of a pixel as neighbours, as `normalize` leaves them in memory: in runs of a patch's row.
        """
        batch, frames, channels, height, width = clips.shape
        t, p = self.arch.tubelet, self.arch.patch
        if (frames, height, width) != (self.arch.frames, *self.arch.image) or channels != 3:
            want = (self.arch.frames, 3, *self.arch.image)
            raise ValueError(f"clips are {tuple(clips.shape[1:])}, the model takes (T, C, H, W) = {want}")
        cubes = clips.movedim(2, -1).reshape(batch, frames // t, t, height // p, p, width // p, p * 3)
        cubes = cubes.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, t * p * p * 3)
        positions = self.positions
        chosen = self._chosen(cubes, noise)
        if chosen is not None:
            cubes = cubes.gather(1, chosen[:, :, None].expand(-1, -1, cubes.shape[2]))
            positions = positions[chosen]
        weight = self.patch_embed.weight.view(-1, 3, t, p, p).permute(0, 2, 3, 4, 1).flatten(1)
        tokens = F.linear(cubes, weight, self.patch_embed.bias)
        return tokens + positions.to(tokens.dtype)

    def _chosen(self, cubes: Tensor, noise: Tensor | None) -> Tensor | None:
        """Numbers (B, n) of the tokens that are computed; None for all."""
        kept = self.eval_tokens if noise is None else self.train_tokens
        if kept is None or self.all_tokens:
            return None
        if noise is None or kept.policy == "motion":
            return moving_tokens(cubes, self.arch.grids[-1][0], kept.count)
        return random_tokens(noise[:, -self.token_count :], kept.count)

    def classify(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) of tokens (B, N, D), in float32 also under autocast."""
        with full_precision(x.device):
            pooled = x.float().mean(1) if self.arch.pooling == "mean" else x[:, 0].float()
            pooled = self.fc_norm(pooled)
        drops = len(self.drop_rates)
        head_noise = None if noise is None else noise[:, drops : drops + self._head_noise]
        return classify(self.head, pooled, head_noise, self.head_dropout)

    def compiled_modules(self) -> list[nn.Module]:
        """Every block."""
        return list(self.blocks)

    def depth_of(self, name: str) -> int:
        """Depth of a parameter: 0 embedding, i + 1 block i, num_depths - 1 final norm and classifier."""
        part, _, rest = name.partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1
        return {"patch_embed": 0, "fc_norm": self.num_depths - 1, "head": self.num_depths - 1}[part]

    def architecture(self) -> dict[str, Any]:
        """The architecture in plain types, for the checkpoint."""
        fields = dataclasses.asdict(self.arch)
        return {"name": "videomae", **fields, "grids": [list(grid) for grid in self.arch.grids]}


def architecture_from(fields: dict[str, Any]) -> Architecture:
    """The opposite of `VideoMAE.architecture`; fields that are not of the architecture are left out."""
    known = {field.name for field in dataclasses.fields(Architecture)}
    kept = {name: value for name, value in fields.items() if name in known}
    if "grids" in kept:
        kept["grids"] = tuple((int(t), int(h), int(w)) for t, h, w in kept["grids"])
    return Architecture(**kept)


@torch.no_grad()
def init_weights(model: VideoMAE, generator: torch.Generator, *, head_scale: float) -> None:
    """Sample all parameters for training from scratch.

    Linear layers Xavier uniform with zero bias, as the official code draws them before pre-training (its 0.02 of
    fine-tuning is for weights that are loaded afterwards, and starts a narrow network almost at zero); the patch
    embedding as PyTorch draws a convolution; the classifier truncated normal 0.02 times `head_scale`.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and module is not model.head and module is not model.patch_embed:
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Block):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
    bound = 1 / math.sqrt(model.patch_embed.in_features)
    nn.init.uniform_(model.patch_embed.weight, -bound, bound, generator=generator)
    nn.init.uniform_(model.patch_embed.bias, -bound, bound, generator=generator)
    init_head(model.head, scale=head_scale, generator=generator)


def empty_model(architecture: Architecture, num_classes: int, **options: float) -> VideoMAE:
    """A model whose parameters are memory without values, to be loaded or drawn; its position table is right.

    Within `with torch.device("meta")` the parameters stay there and take no memory.
    """
    with torch.device("meta"):
        model = VideoMAE(architecture, num_classes, **options)
    model.to_empty(device=torch.get_default_device())
    model.set_buffers()
    return model


def grid_of(clip: ClipSettings, *, tubelet: int, patch: int) -> Grid:
    """Tokens along (time, height, width) of a clip; UserError where tubelets or patches do not fill it."""
    if clip.frames % tubelet:
        raise UserError(f"clip.frames={clip.frames} is no multiple of the tubelet's {tubelet} frames")
    if clip.size % patch:
        raise UserError(f"clip.size={clip.size} is no multiple of the patch's {patch} pixels")
    return clip.frames // tubelet, clip.size // patch, clip.size // patch


def position_table(grids: Sequence[Grid], width: int) -> Tensor:
    """Position table (N, D) float32 of the last grid, interpolated from grid to grid."""
    table = sincos_table(math.prod(grids[0]), width)
    for old, new in itertools.pairwise(grids):
        table = interpolate_table(table, old, new)
    return table


def sincos_table(positions: int, width: int) -> Tensor:
    """The fixed sine-cosine table (N, D) float32 of "Attention is all you need", over the flattened tokens."""
    column = torch.arange(width, dtype=torch.float64, device="cpu")
    row = torch.arange(positions, dtype=torch.float64, device="cpu")
    angle = row[:, None] / 10000 ** (2 * (column // 2) / width)
    angle[:, 0::2] = angle[:, 0::2].sin()
    angle[:, 1::2] = angle[:, 1::2].cos()
    return angle.float()


def interpolate_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Interpolate a table (N, D) from one grid (time, height, width) to another.

    Bicubic in space, then linear in time, both without aligned corners. Equal grids give the table itself. The official
    codes differ: VideoMAE and VideoMAEv2 build a fresh sine-cosine table for the new number of tokens (V2's fine-tuning
    interpolates a table only where the checkpoint holds one, and the released checkpoints hold none).
    """
    width = table.shape[1]
    if old[1:] != new[1:]:
        maps = table.view(*old, width).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=new[1:], mode="bicubic", align_corners=False)
        table = maps.permute(0, 2, 3, 1).reshape(-1, width)
    if old[0] != new[0]:
        rows = table.view(1, old[0], -1).transpose(1, 2)
        rows = F.interpolate(rows, size=new[0], mode="linear", align_corners=False)
        table = rows.transpose(1, 2).reshape(-1, width)
    return table.contiguous()
