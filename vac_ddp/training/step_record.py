"""What an optimizer step leaves on the device, and how long its phases took."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(kw_only=True)
class StepRecord:
    """What a step leaves on the device until the log is written. Nothing here was waited for."""

    step: int
    samples: list[torch.Tensor]
    losses: list[torch.Tensor]
    correct: list[torch.Tensor]
    norm: torch.Tensor
    found_inf: torch.Tensor
    lr: float
    busy: tuple[Any, Any]
    marks: list[tuple[str, Any]]  # what had ended and when, from the end of the step before (see `phases`)
    compiled: bool = False  # in this step, on this rank


def phases(record: StepRecord) -> dict[str, float]:
    """Seconds of a step by phase: idle (since the step before), prepare, forward, backward, optimizer.

    On CUDA of the device, which must have come to the step's end: the host was done long before.
    """
    spent: dict[str, float] = {}
    for (_, begin), (name, end) in itertools.pairwise(record.marks):
        spent[name] = spent.get(name, 0.0) + seconds_between(begin, end)
    return spent


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds between two times of the host, or two CUDA events that have happened."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000.0
