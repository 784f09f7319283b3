"""The floating-point precision of training and prediction: its name, its data type under autocast, the autocast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vac_ddp.errors import UserError
from vac_ddp.runtime.gpus import Gpu
from vac_ddp.settings import Config

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def precision_of(config: Config, gpu: Gpu | None, trained: str | None = None) -> str:
    """The precision of train.precision, where auto depends on `gpu`, the weakest of all ranks (None: a CPU).

    trained: the precision that the weights were trained in. A GPU keeps fp16, and cannot keep bf16 if it only emulates
    that.
    """
    if config.train.precision != "auto":
        return config.train.precision
    if gpu is None:
        return "fp32"
    return "bf16" if gpu.bf16 and trained != "fp16" else "fp16"


def run_precision(config: Config, gpu: Gpu | None, facts: Mapping[str, Any] | None) -> str:
    """The precision of a run: that of the checkpoint it resumes from, else that of the settings on `gpu`.

    gpu: the weakest of all ranks, None: a CPU. facts: of that checkpoint, None in a new run. UserError where the GPU
    lacks the precision: before Ampere (compute capability 8.0) bf16 is only emulated.
    """
    saved = None if facts is None else facts.get("precision")
    if facts is None or saved is None:
        return precision_of(config, gpu)
    here = gpu.name if gpu is not None else "the CPU"
    emulated = saved == "bf16" and gpu is not None and not gpu.bf16
    if saved not in AUTOCAST or (emulated and here not in str(facts.get("device")).split(" + ")):
        raise UserError(
            f"the run was trained in {saved} on {facts.get('device')}, which {here} lacks: resume it where it was "
            "trained, or start a new run.dir"
        )
    return str(saved)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on `device`; None: off."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
