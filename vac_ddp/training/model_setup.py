"""The model of a run on its device: precision, compilation, DDP, average, optimizer, and their state on resume."""

from __future__ import annotations

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
from vac_ddp.models import Loaded, VideoModel
from vac_ddp.models.build import architecture_of
from vac_ddp.models.compilation import compile_if_it_works, train_pass
from vac_ddp.models.precision import AUTOCAST, precision_of, run_precision
from vac_ddp.runtime import distributed
from vac_ddp.runtime.torch_compat import no_buffer_broadcast
from vac_ddp.settings import Config
from vac_ddp.training import checkpoint
from vac_ddp.training.checkpoint_content import check_fits
from vac_ddp.training.data_setup import Data
from vac_ddp.training.ema import Ema
from vac_ddp.training.meters import Meters, clip_flops, keep_freed_memory, matmul_rate
from vac_ddp.training.micro_batch_fit import fit_clips
from vac_ddp.training.optimization import Group, make_groups, make_optimizer
from vac_ddp.training.step import Stepper


def check_grammar(config: Config) -> None:
    """Raise UserError for text settings and sizes that the data or the model would refuse, before either is opened."""
    parse_fold(config.data.fold)
    randaugment.parse(config.augment.randaugment)
    if config.model.name == "videomae" and config.model.weights is None:
        architecture_of(config.model, config.clip)


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
        gather=distributed.all_gather_objects,
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


def _wrap(model: torch.nn.Module, config: Config, device: torch.device) -> torch.nn.Module:
    if not distributed.active():
        return model
    network = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **no_buffer_broadcast(),
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


def _clips_per_gpu(config: Config, model: VideoModel, device: torch.device, resumed: Resumed) -> int:
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
