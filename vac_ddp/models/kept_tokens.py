"""Which tokens of a clip a model computes where it computes a part of them.

`random` is the dropping of VideoMAE's pre-training (Tong et al., 2022) without its tubes; `motion` is after run-length
tokenization (Choudhury et al., NeurIPS 2024): what looks as it did one time step earlier is left out. There the number
of tokens follows from a threshold; here it is fixed, so that batches have one shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vac_ddp.errors import UserError
from vac_ddp.models.video_model import KeptTokens, VideoModel


def kept_tokens(model: VideoModel, fraction: float, policy: str, *, setting: str) -> KeptTokens | None:
    """The tokens that `setting`=`fraction` keeps, at least one; None for all. UserError for a model that cannot."""
    if fraction == 1:
        return None
    total = model.token_count
    if not total:
        raise UserError(f"{setting}={fraction}: only VideoMAE with mean pooling can leave tokens out; set {setting}=1")
    return KeptTokens(count=max(1, round(fraction * total)), policy=policy)


def random_tokens(noise: Tensor, count: int) -> Tensor:
    """Numbers (B, count) int64, ascending, of the tokens with the least noise (B, N); of equal ones the first."""
    return noise.sort(dim=1, stable=True).indices[:, :count].sort(dim=1).values


def moving_tokens(cubes: Tensor, steps: int, count: int) -> Tensor:
    """Numbers (B, count) int64, ascending, of the tokens that differ most from the same place one time step earlier.

    cubes: pixels (B, N, P) of each token, N = steps x places in the order of time. Compared is the mean absolute
    difference; tokens of the first step count as changed. Of equal tokens the first are taken.
    """
    places = cubes.shape[1] // steps
    change = (cubes[:, places:] - cubes[:, :-places]).abs().mean(2)
    first = change.new_full((len(cubes), places), float("inf"))
    change = torch.cat((first, change), dim=1)
    return change.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
