"""How long a run with some settings will take: one forward pass is timed (CPU) or its FLOP counted (GPUs)."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import torch

from vac_ddp.data.clip_sampling import window_count
from vac_ddp.models import VideoModel, build_model, load_model
from vac_ddp.settings import Config, ViewSettings

BACKWARD = 3  # a training step costs about as much as three forward passes
STEP_S = 0.03  # of an optimizer step on a CPU beside the network: augmentation, AdamW, log (seen with scratch_small)
LONG_S = 5.0  # a pass that is not repeated
GPU_RATE = 20e12  # FLOP/s that a T4 sustains in fp16 (65e12 on paper); an A100 about 100e12


def time_line(config: Config, *, probe: bool, gpus: int, videos: int, train: int, decode_s: float) -> str:
    """How long it will take, for people: training (with validation), or embedding where a `probe` comes first.

    videos: in the data; train: of these, to train on; decode_s: processor time to decode a frame.
    """
    model = model_of(config)
    if model is None:
        return "not estimated: the sizes of this network are in its weights"
    passes = videos * views(config.predict.views) if probe else training_passes(config, videos=videos, train=train)
    what = f"to embed {videos} videos" if probe else f"to train {config.train.epochs} epochs"
    if gpus:
        seconds = passes * forward_flop(model, config) / (gpus * GPU_RATE)
        how = (
            f"{gpus} GPU{'s' if gpus > 1 else ''} at {GPU_RATE / 1e12:.0f} TFLOP/s (a T4; an A100 has five times that)"
        )
        return f"{duration(seconds)} {what} on {how}, where decoding keeps up (vac doctor)"
    cores = len(os.sched_getaffinity(0))
    forward = forward_seconds(model, config, clips=1 if probe else _clips(config))
    decoded = (passes / BACKWARD if not probe else passes) * config.clip.frames
    steps = 0 if probe else config.train.epochs * train / config.train.global_batch
    seconds = (passes * forward + decoded * decode_s) / cores + steps * STEP_S
    return (
        f"{duration(seconds)} {what} on {cores} cores like these ({forward:.2g} s a forward pass of a clip, one core)"
    )


def training_passes(config: Config, *, videos: int, train: int) -> float:
    """Forward passes of clips that a training costs, a backward pass counting as two more."""
    epochs, validations = config.train.epochs, -(-config.train.epochs // config.train.val_every)
    return BACKWARD * epochs * train * config.augment.repeats + validations * (videos - train) * views(config.val)


def views(settings: ViewSettings) -> int:
    """Views of one video."""
    return window_count(settings) * settings.crops * (2 if settings.flip else 1)


def model_of(config: Config) -> VideoModel | None:
    """The network with its weights where they are on this disk, else random; None where only weights say its sizes.

    A VideoMAE's size is then guessed by the name. UserError where weights that are here don't fit.
    """
    settings = dataclasses.replace(config.model)
    if settings.weights is not None and Path(settings.weights).expanduser().exists():
        return load_model(settings, config.clip, ["a", "b"], seed=0).model.eval()
    if settings.name == "probe":
        settings.name = settings.encoder
    if settings.name == "hf":
        return None
    if settings.name == "videomae" and settings.weights is not None:
        named = settings.weights.lower()
        settings.size = next((size for size in ("small", "base", "large", "huge", "giant") if size in named), "base")
    return build_model(settings, config.clip, 2).eval()


def forward_seconds(model: VideoModel, config: Config, *, clips: int = 1) -> float:
    """Processor time a clip of a forward pass on one core, the best of three, or of one that took long.

    Time on the wall would count what else runs on this machine.
    """
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            begin = time.thread_time()
            _forward(model, config, clips)
            best = min(best, time.thread_time() - begin)
            if best > LONG_S:
                break
    finally:
        torch.set_num_threads(threads)
    return best / clips


def forward_flop(model: VideoModel, config: Config) -> float:
    """FLOP of a forward pass of one clip, a multiply-add counting as two; nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    from vac_ddp.runtime.torch_compat import FakeTensorMode

    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        _forward(model, config, 1)
    return float(counter.get_total_flops())


def duration(seconds: float) -> str:
    """About so long, in the unit that people would use."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"about {seconds / size:.2g} {unit}"
    return "less than a minute"


def _clips(config: Config) -> int:
    wanted = config.train.clips_per_gpu
    return min(wanted, 8) if isinstance(wanted, int) else 1


def _forward(model: VideoModel, config: Config, clips: int) -> None:
    clip = config.clip
    with torch.inference_mode():
        model(torch.zeros(clips, clip.frames, 3, clip.size, clip.size))
