"""What every model is: `VideoModel`, and the parts that the transformers share (drop path, blocks, classifier)."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vac_ddp.errors import UserError
from vac_ddp.runtime.torch_compat import compile_whole_blocks


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """How many tokens of every clip are computed, and by which policy (`random` or `motion`) they are chosen."""

    count: int
    policy: str


class VideoModel(nn.Module, ABC):
    """A classifier of clips: normalized clips (B, T, 3, H, W) in, logits (B, K) float32 out.

    Its random layers take their numbers from `noise`, which comes with the clips, so that they do not depend on how
    a batch is split into ranks and micro-batches.

    num_depths: depths for layer decay and freezing, embedding and head included.
    checkpointing: blocks from below whose activations are recomputed in the backward pass; may be set at any time.
    spatial_grid: regions a side that `steps` averages each time step over; set before the model is used.
    token_count: tokens of a clip of which it can leave some out; 0: it computes all.
    train_tokens, eval_tokens: those computed in passes with and without noise (None: all), where `all_tokens` is false;
    train_tokens is set before noise is made.
    """

    num_depths: int
    checkpointing: int
    spatial_grid: int = 1
    train_tokens: KeptTokens | None = None
    eval_tokens: KeptTokens | None = None
    all_tokens: bool = False

    @property
    def token_count(self) -> int:
        """Tokens of a clip that can be left out."""
        return 0

    @property
    @abstractmethod
    def noise_size(self) -> int:
        """Random numbers in [0, 1) that a clip brings."""

    @abstractmethod
    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of clips (B, T, 3, H, W), normalized floats.

        noise: (B, noise_size) in [0, 1); without it nothing is dropped and the result is deterministic.
        """

    @abstractmethod
    def steps(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features (B, T', D) float32 of each time step of clips (B, T, 3, H, W), averaged over space.

        With `spatial_grid` above 1 over each of spatial_grid x spatial_grid regions, row by row: D is that many times
        the encoder's width. noise: as for `forward`, of which the encoder's part is read.
        """

    @property
    @abstractmethod
    def step_shape(self) -> tuple[int, int]:
        """(T', D) of `steps`."""

    @abstractmethod
    def keep_encoder(self) -> None:
        """Remove what is above `steps`, so that no parameter is left unused; only `steps` may be called after it."""

    @abstractmethod
    def depth_of(self, name: str) -> int:
        """Depth of a parameter: 0 embedding, i + 1 block i, num_depths - 1 final norm and classifier."""

    @abstractmethod
    def compiled_modules(self) -> list[nn.Module]:
        """The modules that `compile_blocks` compiles, each by itself."""

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """What a checkpoint says of the model beside the settings, in plain types."""

    def head_names(self) -> set[str]:
        """Names of the classifier's parameters."""
        return {"head.weight", "head.bias"}

    def compile_blocks(self) -> None:
        """Compile in place, without graph breaks; parameter names stay as they are."""
        # Blocks share their code, and with it the limit on how often it may be compiled for another batch size,
        # grad mode or frozen block; past the limit fullgraph is an error.
        torch.compiler.config.recompile_limit = max(64, torch.compiler.config.recompile_limit)
        compile_whole_blocks()
        for module in self.compiled_modules():
            module.compile(fullgraph=True)


def check_grid(grid: int, height: int, width: int) -> None:
    """Raise UserError for more regions a side than a map of height x width places has."""
    if grid > min(height, width):
        raise UserError(f"model.spatial_grid={grid}: the encoder's map is {height} x {width}; give no more than that")


def region_means(maps: Tensor, grid: int) -> Tensor:
    """Means (N, grid * grid * C) float32 of maps (N, H, W, C) over grid x grid regions, row by row.

    Regions of sides that `grid` does not divide overlap by a line. UserError for more regions than the map has.
    """
    with full_precision(maps.device):
        maps = maps.float()
        if grid == 1:
            return maps.mean((1, 2))
        check_grid(grid, maps.shape[1], maps.shape[2])
        return F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1).flatten(1)


def drop_rates(last: float, blocks: int) -> Tensor:
    """Drop path rates (2 x blocks,) float32, two a block, rising linearly from 0 to `last` (Huang et al., 2016)."""
    return torch.tensor([last * i / max(1, blocks - 1) for i in range(blocks) for _ in range(2)], device="cpu")


def keep_factors(noise: Tensor | None, rates: Tensor, frames: int = 1) -> Sequence[Tensor] | None:
    """Two factors (B x frames, 1, 1) a block, the same in all frames of a clip; None where nothing is dropped.

    noise: (B, >= 2 x blocks) in [0, 1). A factor is 0 with the branch's rate, else 1 / (1 - rate): the mean stays.
    """
    if noise is None or not len(rates):
        return None
    factors = (noise[:, : len(rates)] >= rates) / (1 - rates)
    return factors.T.repeat_interleave(frames, dim=1)[:, :, None, None].unbind(0)


def add_branch(x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """The residual sum, its branch scaled by `keep`. That float32 factor does not make a bfloat16 stream float32."""
    return x + branch if keep is None else (x + branch * keep).to(x.dtype)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    *,
    keep: Sequence[Tensor] | None,
    checkpointing: int,
    after_block: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Tokens (N, P, C) through the blocks, each called with its two factors of `keep` (see `keep_factors`).

    checkpointing: blocks from below that are recomputed in the backward pass. after_block: changes the tokens behind
    block i.
    """
    for i, block in enumerate(blocks):
        pair = (None, None) if keep is None else (keep[2 * i], keep[2 * i + 1])
        if i < checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, *pair, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *pair)
        if after_block is not None:
            x = after_block(i, x)
    return x


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Switch autocast off inside."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def classify(head: nn.Module, features: Tensor, noise: Tensor | None, rate: float) -> Tensor:
    """Logits (B, K) of features (B, C), in float32 also under autocast; dropout by noise (B, C) in [0, 1)."""
    with full_precision(features.device):
        features = features.float()
        if noise is not None and rate > 0:
            features = features * (noise >= rate).to(features.dtype) / (1 - rate)
        return head(features)


def new_head(width: int, num_classes: int, *, scale: float) -> nn.Linear:
    """A classifier: truncated normal 0.02 times `scale`, zero bias (the recipe of the VideoMAE code)."""
    head = nn.Linear(width, num_classes)
    init_head(head, scale=scale)
    return head


@torch.no_grad()
def init_head(head: nn.Linear, *, scale: float, generator: torch.Generator | None = None) -> None:
    """Draw a classifier's weights as in `new_head`, from `generator` (None: the global one)."""
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator).mul_(scale)
    nn.init.zeros_(head.bias)
