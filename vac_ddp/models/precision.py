"""The floating-point precision of training and prediction: its name, its data type under autocast, the autocast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vac_ddp.errors import UserError
from vac_ddp.settings import Config

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def precision_of(config: Config, device: torch.device) -> str:
    """The precision that train.precision=auto means on this device."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if device.type == "cuda" else "fp32"


def run_precision(config: Config, device: torch.device, facts: Mapping[str, Any] | None) -> str:
    """The precision of a run: that of the checkpoint it resumes from, else that of the settings on this device.

    facts: of that checkpoint, None in a new run. UserError where the device lacks the precision: a GPU before Ampere
    only emulates bf16.
    """
    saved = None if facts is None else facts.get("precision")
    if facts is None or saved is None:
        return precision_of(config, device)
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    emulated = saved == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if saved not in AUTOCAST or (emulated and here not in str(facts.get("device")).split(" + ")):
        raise UserError(
            f"the run was trained in {saved} on {facts.get('device')}, which {here} lacks: resume it where it was "
            "trained, or start a new run.dir"
        )
    return str(saved)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on `device`; None: off."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
