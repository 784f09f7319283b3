"""The model of a run on its device: precision, compilation, DDP, average, optimizer, and their state on resume."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from vac_ddp.data import randaugment
from vac_ddp.data.split import parse_fold
from vac_ddp.errors import UserError
from vac_ddp.models import Loaded
from vac_ddp.models.build import architecture_of
from vac_ddp.runtime import distributed
from vac_ddp.settings import ClipSettings, Config
from vac_ddp.training import checkpoint
from vac_ddp.training.checkpoint_content import check_fits
from vac_ddp.training.data_setup import Data
from vac_ddp.training.ema import Ema
from vac_ddp.training.meters import Meters, clip_flops, keep_freed_memory, matmul_rate
from vac_ddp.training.micro_batch_fit import fit_clips
from vac_ddp.training.optimization import Group, make_groups, make_optimizer
from vac_ddp.training.step import Stepper

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def precision_of(config: Config, device: torch.device) -> str:
    """The precision that train.precision=auto means on this device."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if device.type == "cuda" else "fp32"


def check_grammar(config: Config) -> None:
    """Raise UserError for text settings and sizes that the data or the model would refuse, before either is opened."""
    parse_fold(config.data.fold)
    randaugment.parse(config.augment.randaugment)
    if config.model.name == "videomae" and config.model.weights is None:
        architecture_of(config.model, config.clip)


def run_precision(config: Config, device: torch.device, facts: dict[str, Any] | None) -> str:
    """The precision of a run: that of the checkpoint it resumes from, else that of the settings on this device.

    UserError where the device lacks it: a GPU before Ampere only emulates bf16.
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
    return saved


@dataclass(kw_only=True)
class Resumed:
    """What a run goes on from: the state on rank 0, the facts on every rank; both None in a new run."""

    state: dict[str, Any] | None
    facts: dict[str, Any] | None
    source: Path | None

    @property
    def yes(self) -> bool:
        """Whether there is something to go on from."""
        return self.facts is not None

    def part(self, name: str) -> Any:
        """A part of the state, on rank 0."""
        return self.state[name] if self.state is not None else None


def make_stepper(
    config: Config, device: torch.device, data: Data, loaded: Loaded, resumed: Resumed, say: Callable[[str], None]
) -> tuple[Stepper, list[Group], Meters]:
    """The model on its device, compiled and wrapped as set, with average, optimizer and scaler, restored if resumed."""
    if device.type == "cpu":
        keep_freed_memory()
    model = loaded.model.to(device)
    precision = run_precision(config, device, resumed.facts)
    model.checkpointing = config.train.checkpointing
    groups = make_groups(model, config.optim, config.train.freeze_depth)
    clips_per_gpu = _clips_per_gpu(config, model, device, resumed)
    if resumed.yes:
        averaged = config.train.ema_decay is not None
        distributed.main_first(
            lambda: check_fits(resumed.state, resumed.source, model, groups, averaged=averaged), lambda: None
        )
        _broadcast_state(model, resumed.part("model"))
    ema = Ema(model, config.train.ema_decay) if config.train.ema_decay is not None else None
    if resumed.yes and ema is not None:
        _broadcast_state(ema.module, resumed.part("ema"))
    flops = clip_flops(model, config.clip) if distributed.is_main() else None  # rank 0 writes the figures
    matmul = matmul_rate(device, AUTOCAST[precision])
    compiled = compile_if_it_works(
        model,
        lambda: train_pass(model, config.clip, clips_per_gpu, device, AUTOCAST[precision]),
        setting="train.compile",
        wanted=config.train.compile,
        default=device.type == "cuda",
        say=say,
    )
    network = _wrap(model, config, device)
    optimizer = make_optimizer(groups, config.optim, lr=0.0)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    if resumed.yes:
        _restore_optimizer(optimizer, scaler, resumed)
    stepper = Stepper(
        config=config,
        model=model,
        network=network,
        optimizer=optimizer,
        ema=ema,
        scaler=scaler,
        device=device,
        autocast=AUTOCAST[precision],
        precision=precision,
        compiled=compiled,
        clips_per_gpu=clips_per_gpu,
        num_classes=len(data.classes),
        mean=tuple(loaded.mean),
        std=tuple(loaded.std),
        class_weights=_class_weights(config, data, device),
        world_size=distributed.world_size(),
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the passes that were tried are not of the training
    meters = Meters(
        device=device, world_size=distributed.world_size(), flops_per_clip=flops and flops[1], matmul=matmul
    )
    return stepper, groups, meters


def compile_if_it_works(
    model: torch.nn.Module,
    first_pass: Callable[[], None],
    *,
    setting: str,
    wanted: bool | None,
    default: bool,
    say: Callable[[str], None],
) -> bool:
    """Compile the blocks of a model where it is `wanted`, or `default` where nothing is said; whether they are.

    first_pass: runs the model at the size that counts, so that this size gets kernels of its own. Where nobody asked
    for it and that fails on any rank, all ranks go on without, and the reason is said; where it was asked for,
    UserError. To be called before DDP is built.
    """
    if not (wanted if wanted is not None else default):
        return False
    model.compile_blocks()
    reason = None
    try:
        first_pass()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a dozen kinds: no compiler, no Triton, an operation that it does not know
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    model.zero_grad(set_to_none=True)
    reasons = [told for told in distributed.all_gather_objects(reason) if told]
    if not reasons:
        return True
    if wanted:
        raise UserError(f"{setting}=true, but the blocks cannot be compiled ({reasons[0]}); set {setting}=false")
    for module in model.modules():
        module._compiled_call_impl = None
    say(f"compile off: {reasons[0]}")
    return False


def train_pass(
    model: torch.nn.Module, clip: ClipSettings, clips: int, device: torch.device, autocast: torch.dtype | None
) -> None:
    """A forward and backward pass of clips of zeros."""
    pixels = torch.zeros(clips, clip.frames, 3, clip.size, clip.size, device=device)
    noise = torch.full((clips, model.noise_size), 0.5, device=device)
    with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(pixels, noise).float().sum() * 0.0
    loss.backward()


def _wrap(model: torch.nn.Module, config: Config, device: torch.device) -> torch.nn.Module:
    if not distributed.active():
        return model
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.15
    network = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{buffers: False},
    )
    if config.train.bf16_reduce:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        network.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return network


def _broadcast_state(module: torch.nn.Module, state: dict[str, Any] | None) -> None:
    """Load rank 0's state on every rank."""
    if state is not None:
        module.load_state_dict(state)
    if distributed.active():
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)


def _restore_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, resumed: Resumed) -> None:
    """The optimizer's state of rank 0 on every rank; each keeps its share where it is sharded."""
    saved, scale = distributed.broadcast_object((resumed.part("optimizer"), resumed.part("scaler")))
    optimizer.load_state_dict(checkpoint.snapshot(saved))  # ZeRO changes its argument
    if scaler is not None and scale is not None:
        scaler.load_state_dict(scale)


def _clips_per_gpu(config: Config, model: torch.nn.Module, device: torch.device, resumed: Resumed) -> int:
    """The micro-batch: as set, as the run had it, 8 on the CPU, or what fits on the smallest GPU."""
    wanted = config.train.clips_per_gpu
    if isinstance(wanted, int):
        return wanted
    if resumed.facts is not None:
        return int(resumed.facts["clips_per_gpu"])
    if device.type != "cuda":
        return 8
    share = math.ceil(config.train.global_batch / distributed.world_size())
    autocast = AUTOCAST[precision_of(config, device)]
    own = fit_clips(model, config.clip, autocast=autocast, most=share, device=device)
    return min(distributed.all_gather_objects(own))


def _class_weights(config: Config, data: Data, device: torch.device) -> torch.Tensor | None:
    """Weights by inverse frequency in the training part, mean 1 over its videos; None where off."""
    if config.train.class_weights == "none":
        return None
    counts = np.bincount(data.index.labels[data.split.train], minlength=len(data.classes)).clip(min=1)
    weights = counts.sum() / (len(counts) * counts)
    return torch.tensor(weights, dtype=torch.float32, device=device)
