"""What goes wrong on one rank, said on all: non-finite steps, diverging weights, slow ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vac_ddp.runtime import distributed
from vac_ddp.training.step_record import StepRecord, phases, seconds_between

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # the bits of an element, by its bytes
PIECE = 1 << 20  # elements that are summed at a time
WORTH_NAMING_S = 0.5  # lost between two lines of the log; less is the noise of a busy machine


@dataclass(kw_only=True)
class Summary:
    """The counters of some steps, summed over the ranks."""

    loss: float
    accuracy: float
    samples: int
    finite: int
    norm: float
    lr: float
    bad_steps: list[int]
    bad_samples: dict[int, list[int]]
    busy_s: list[float]
    phases: dict[str, float]
    memory_gib: float


def summarise(records: list[StepRecord], device: torch.device, memory_gib: float = 0.0) -> Summary:
    """Read the records of all ranks: the one place where the host waits for the device. Every rank must call it.

    loss: mean of the finite samples' losses; accuracy: share of them whose largest target is on top; norm: the last
    step's gradient norm; bad_samples: samples with a non-finite loss, by rank; busy_s: seconds each rank had worked
    before it began to wait for the others, in the steps in which none compiled; phases: seconds of this rank (see
    `phases`); memory_gib: the most of any rank's `memory_gib`.
    """
    losses = torch.cat([x for r in records for x in r.losses] or [torch.zeros(0, device=device)]).double().cpu()
    correct = torch.cat([x for r in records for x in r.correct] or [torch.zeros(0, device=device)]).double().cpu()
    found = torch.stack([r.found_inf for r in records]).cpu() > 0
    finite = torch.isfinite(losses)
    samples = torch.cat([x for r in records for x in r.samples] or [torch.zeros(0, dtype=torch.int64)]).cpu()
    own = {
        "loss": float(losses[finite].sum()),
        "correct": float(correct[finite].sum()),
        "finite": int(finite.sum()),
        "samples": len(losses),
        "bad": samples[~finite].tolist(),
        "busy": [seconds_between(*r.busy) for r in records],
        "compiled": [r.compiled for r in records],
        "memory": memory_gib,
    }
    everyone: list[dict[str, Any]] = distributed.all_gather_objects(own)
    total = max(1, sum(o["finite"] for o in everyone))
    usual = [not any(o["compiled"][i] for o in everyone) for i in range(len(records))]
    spent: dict[str, float] = {}
    for record in records:
        for name, seconds in phases(record).items():
            spent[name] = spent.get(name, 0.0) + seconds
    return Summary(
        loss=sum(o["loss"] for o in everyone) / total,
        accuracy=sum(o["correct"] for o in everyone) / total,
        samples=sum(o["samples"] for o in everyone),
        finite=sum(o["finite"] for o in everyone),
        norm=float(records[-1].norm),
        lr=records[-1].lr,
        bad_steps=[r.step for r, bad in zip(records, found.tolist(), strict=True) if bad],
        bad_samples={rank: o["bad"] for rank, o in enumerate(everyone) if o["bad"]},
        busy_s=[sum(s for s, counts in zip(o["busy"], usual, strict=True) if counts) for o in everyone],
        phases=spent,
        memory_gib=max(o["memory"] for o in everyone),
    )


def describe_bad(summary: Summary) -> str:
    """One line on skipped steps: which steps, which ranks, which samples."""
    steps = ", ".join(map(str, summary.bad_steps))
    where = "; ".join(f"rank {rank}: samples {', '.join(map(str, s[:8]))}" for rank, s in summary.bad_samples.items())
    return f"non-finite loss or gradient, no rank stepped at step {steps} ({where or 'in the gradients alone'})"


def slow_ranks(busy_s: list[float], factor: float) -> list[int]:
    """Ranks that worked `factor` times as long as the median of the others before they could reduce."""
    if len(busy_s) < 2:
        return []
    typical = [median_of_others(busy_s, rank) for rank in range(len(busy_s))]
    return [r for r, s in enumerate(busy_s) if s > factor * typical[r] and s - typical[r] > WORTH_NAMING_S]


def median_of_others(busy_s: list[float], rank: int) -> float:
    """The upper median of what the other ranks took."""
    others = sorted(s for r, s in enumerate(busy_s) if r != rank)
    return others[len(others) // 2]


@torch.no_grad()
def check_same_weights(model: nn.Module, step: int) -> None:
    """RuntimeError on every rank where the parameters of the ranks are not the same to the last bit."""
    sums = distributed.all_gather_objects(checksums(model.parameters()))
    odd = [rank for rank, s in enumerate(sums) if s != sums[0]]
    if odd:
        raise RuntimeError(
            f"the weights of ranks {', '.join(map(str, odd))} differ from rank 0's at step {step}: "
            "this must not happen; go on from an earlier checkpoint and report it"
        )


@torch.no_grad()
def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """Two sums modulo 2**64 over the bits of tensors on one device: of all elements, and of each times its place.

    Sums of integers are exact in any order: equal bits give equal sums on any device, also where they are NaN.
    """
    pieces = [piece for tensor in tensors for piece in tensor.detach().flatten().split(PIECE)]
    total = torch.zeros(2, dtype=torch.int64, device=pieces[0].device)
    for number, piece in enumerate(pieces):
        bits = piece.view(WORDS[piece.element_size()]).long()
        places = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # odd: no bit of an element is shifted out
        total += torch.stack([bits.sum(), (bits * places).sum()]) * (2 * number + 1)
    return [int(value) for value in total.tolist()]
