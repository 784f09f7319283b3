"""What a load batch is: the clips of one rank and load, on their way from a loader process to the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vac_ddp.data import slots
from vac_ddp.data.augment import HOST_PARAMETERS


@dataclass(kw_only=True)
class Batch:
    """The clips of one load batch of one rank: B clips, B >= 0.

    Rows stand in units: the two clips of a pair (clip r of draw a, clip r of draw b) are neighbours, so an even number
    of rows from an even start is whole pairs; a clip without a partner is among the last R rows.

    clips : (B, T, S, S, 3) uint8
    labels : (B,) int64
    samples : (B,) int64, sample numbers of the epoch
    videos : (B,) int64, numbers in the index
    noise : (B, n) float32 in [0, 1)
    params : name -> (B, ...): parameters of `augment_clips`; `partner` (B,) int64, the row a clip is mixed with or its
        own; and the parameters of `mix`
    units : (U, 2) int64, the rows of every pair, -1 for none
    damage : one line for every damaged frame that was met and replaced; a `Loader` names each once
    """

    clips: Tensor
    labels: Tensor
    samples: Tensor
    videos: Tensor
    noise: Tensor
    params: dict[str, Tensor]
    units: Tensor
    damage: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """What the step computes with on `device`; the parameters of `augment_clips` stay in host memory."""
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in ("clips", "labels", "noise")}
        params = {
            name: value if name in HOST_PARAMETERS else value.to(device, non_blocking=non_blocking)
            for name, value in self.params.items()
        }
        return replace(self, params=params, **moved)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory (called by the DataLoader's pinning thread)."""
        pinned = {n: getattr(self, n).pin_memory() for n in ("clips", "labels", "samples", "noise")}
        return replace(self, params={name: value.pin_memory() for name, value in self.params.items()}, **pinned)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors."""
        yield from (value for value in vars(self).values() if isinstance(value, Tensor))
        yield from self.params.values()

    def __getstate__(self) -> dict[str, Any]:
        return {**_as_arrays(vars(self)), "params": {name: t.numpy() for name, t in self.params.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        params = {name: torch.from_numpy(array) for name, array in state["params"].items()}
        vars(self).update({**_as_tensors(state), "params": params})


@dataclass(kw_only=True)
class TestBatch:
    """The views of N scored videos.

    clips : (N, K * crops, T, S, S, 3) uint8, window k and crop c at k * crops + c
    places : (N,) int64, places in the data set (`TestViews.videos[place]` is the number in the index)
    videos : (N,) int64, numbers in the index
    labels : (N,) int64, -1 where there is none
    decoded : (N,) bool, False: no frame of the video could be decoded, its clips are zero
    clip_of_view : (K * crops,) int64, the clip that each view has, where windows of a short video are the same frames
        and are in `clips` once (of a single video, N = 1); None: view i is clip i
    damage : one line for every damaged frame that was met; a `Loader` names each once
    """

    __test__ = False

    clips: Tensor
    places: Tensor
    videos: Tensor
    labels: Tensor
    decoded: Tensor
    clip_of_view: Tensor | None = None
    damage: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> TestBatch:
        """The clips on `device`, the rest stays in host memory."""
        return replace(self, clips=self.clips.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TestBatch:
        """The same with the clips in page-locked memory."""
        return replace(self, clips=self.clips.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors."""
        yield from (value for value in vars(self).values() if isinstance(value, Tensor))

    def __getstate__(self) -> dict[str, Any]:
        return _as_arrays(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(_as_tensors(state))


def _as_arrays(fields: dict[str, Any]) -> dict[str, Any]:
    """What goes between processes: the place of the clips in shared memory, all else through the pipe."""
    arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in fields.items()}
    return {**arrays, "clips": slots.packed(fields["clips"])}


def _as_tensors(fields: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in fields.items()}
    return {**tensors, "clips": slots.unpacked(fields["clips"])}


def clip_buffer(*shape: int) -> Tensor:
    """An uint8 tensor to decode into; in a loader process, where a slot is free, in memory that the rank sees."""
    return slots.buffer(math.prod(shape)).view(shape)


def unit_rows(draws: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a load batch of whole units, `draws` draws of `repeats` clips each.

    Returns
    -------
    rows : (draws, repeats) int64
        Row of every clip: of the draws a, b of a unit a0 b0 a1 b1 ..., of a single last draw a0 a1 ...
    units : (U, 2) int64
        Rows of the clips that belong together, -1 for none.

    """
    first, member, members = np.arange(draws) // 2 * 2, np.arange(draws) % 2, np.full(draws, 2)
    if draws % 2:
        members[-1] = 1
    rows = (first * repeats + member)[:, None] + np.arange(repeats) * members[:, None]
    partners = np.full_like(rows[0::2], -1)
    partners[: draws // 2] = rows[1::2]
    return rows, np.stack([rows[0::2].reshape(-1), partners.reshape(-1)], axis=1)
