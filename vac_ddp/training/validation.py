"""Validation without padding: every video once, rows keyed by their place, the bare module on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from vac_ddp.data.augment import normalise
from vac_ddp.data.loader import TestBatch
from vac_ddp.runtime import distributed
from vac_ddp.runtime.monitor import PROCESS

ASK_EVERY = 8


def rank_places(total: int, rank: int, world: int) -> list[int]:
    """The videos of one rank: its places among `total`, dealt in turns. Ranks may differ by one, or get none."""
    return list(range(rank, total, world))


@torch.no_grad()
def video_logits(
    model: nn.Module,
    batches: Iterable[TestBatch],
    *,
    rounds: int,
    total: int,
    num_classes: int,
    clips_per_gpu: int,
    flip: bool,
    device: torch.device,
    autocast: torch.dtype | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    stop: Callable[[], bool],
    advance: Callable[[int], None],
    damage: Callable[[list[str]], None],
) -> tuple[torch.Tensor | None, bool]:
    """Mean logits of the views of every video, on rank 0: ((total, K) float32 or None, whether it was stopped).

    batches: this rank's videos, on `device`. rounds: the largest number of batches of any rank, so that all ask `stop`,
    an agreement of all ranks, equally often; once it says yes, all return (None, True).
    """
    was_training = model.training
    model.eval()
    places, rows = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, num_classes)]
    mine = iter(batches)
    try:
        for turn in range(rounds):
            if turn % ASK_EVERY == 0 and stop():
                return None, True
            batch = next(mine, None)
            if batch is None:
                continue
            PROCESS.progress()
            damage(batch.damage)
            advance(len(batch.places))
            parts = []
            for clips in batch.clips.flatten(0, 1).split(clips_per_gpu):
                pixels = normalise(clips, mean, std, torch.float32)
                with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                    logits = model(pixels).float()
                    parts.append((logits + model(pixels.flip(-1)).float()) / 2 if flip else logits)
            logits = torch.cat(parts).view(*batch.clips.shape[:2], -1)
            if batch.clip_of_view is not None:
                logits = logits[:, batch.clip_of_view]
            rows.append(logits.mean(1).cpu())
            places.append(batch.places)
    finally:
        model.train(was_training)
    return distributed.gather_rows(torch.cat(places), torch.cat(rows), total=total), False
