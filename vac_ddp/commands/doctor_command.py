"""`vac doctor`: measure this machine in a minute, and say what will hold a run back and which settings change that."""

from __future__ import annotations

import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vac_ddp.arguments import parse_settings
from vac_ddp.data.decode import DamagedFrame, frame_size
from vac_ddp.data.loader import clip_bytes, worker_count
from vac_ddp.doctor.machine_rates import (
    all_reduce_rate,
    copy_rate,
    decode_rate_together,
    free_memory,
    make_sample,
    read_rate,
    sample_frames,
)
from vac_ddp.errors import UserError
from vac_ddp.models import VideoModel, build_model
from vac_ddp.models.compilation import train_pass
from vac_ddp.models.precision import AUTOCAST, precision_of
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.training.meters import GIB, clip_flops, matmul_rate

ABOUT = "Measure this machine in a minute; say what will hold a run with these settings back, and what changes that."
SLOW_PASS_S = 6.0  # a pass on the CPU that would take longer is computed from the matrix product
ASSUMED = 0.5  # share of the matrix product that a training step then reaches
GRADIENT = 4  # bytes


@dataclass(kw_only=True)
class Found:
    """What was measured. Rates a second; None: not to be had here, or nothing that it could hold back.

    decode_core, decode_all: clips decoded, cut and resampled by one core and by all `workers` at once; step: clips of
    one GPU (or of the CPU) forward and backward; all_reduce: bytes of gradients of `ranks` ranks; repeats: clips made
    of a decoded video.
    """

    workers: int
    ranks: int
    repeats: int
    frame_bytes: float
    frame_shape: tuple[int, int]
    clip_frames: int
    clip_bytes: int
    decode_core: float
    decode_all: float
    read_bytes: float | None
    copy_bytes: float | None
    step: float | None
    gradient_bytes: int
    all_reduce: float | None
    clips_a_step: int
    cuda: bool
    notes: list[str] = field(default_factory=list)


def limits(found: Found) -> dict[str, float]:
    """Clips a second of all ranks of this machine that each part allows, the slowest first."""
    rates = {"decoding": found.decode_all * found.ranks * found.repeats}
    if found.read_bytes is not None:
        rates["disk"] = found.read_bytes / (found.frame_bytes * found.clip_frames) * found.repeats
    if found.copy_bytes is not None:
        rates["copies to the device"] = found.copy_bytes / found.clip_bytes * found.ranks
    if found.step is not None:
        rates["the model"] = found.step * found.ranks
        if found.all_reduce and found.ranks > 1:
            alone = found.clips_a_step / (found.step * found.ranks)
            rates["the model with all-reduce"] = found.clips_a_step / (alone + found.gradient_bytes / found.all_reduce)
    return dict(sorted(rates.items(), key=lambda item: item[1]))


def advice(found: Found, config: Config) -> list[str]:
    """What holds the run back, and which settings change that; a line each."""
    rates = limits(found)
    model = rates.get("the model")
    first, rate = next(iter(rates.items()))
    lines = [f"held back by {first}: {rate:.3g} clips/s"]
    if first == "decoding" or (model is not None and rates["decoding"] < 1.2 * model):
        if first != "decoding":
            lines.append("decoding is near the model's rate: a busy machine will wait for it")
        lines += _for_decoding(found, config)
    if first == "disk":
        lines.append("copy the data to a local disk; on a network file system pack them: vac pack DATA OUT")
    if first == "copies to the device":
        lines.append("another slot or machine: no setting makes a clip smaller than clip.frames and clip.size do")
    if first == "the model":
        lines += _for_model(found, config)
    if first == "the model with all-reduce":
        if not config.train.bf16_reduce:
            lines.append("train.bf16_reduce=true halves the bytes of the all-reduce")
        lines.append("a larger train.global_batch reduces once for more clips (accumulation)")
        lines += _for_model(found, config)
    return lines


def _for_decoding(found: Found, config: Config) -> list[str]:
    lines = []
    spare = (os.cpu_count() or 1) // found.ranks - found.workers
    if found.workers == 0:
        lines.append("data.workers=0 decodes between the steps: leave it unset for one process a core")
    elif spare > 0:
        lines.append(f"data.workers={found.workers + spare} uses the cores that are left")
    if config.augment.repeats == 1:
        lines.append("augment.repeats=2 makes two clips of every decoded video (repeated augmentation)")
    short = min(found.frame_shape)
    if short > 1.6 * config.clip.size:
        lines.append(f"frames of {short} pixels are shrunk in every epoch: vac extract --short-side {config.clip.size}")
        if not config.data.reduced_decode:
            lines.append("data.reduced_decode=true decodes them at a half or a quarter of their size")
    return lines


def smaller_model(config: Config) -> str:
    """The settings that make this model smaller."""
    if config.model.name != "videomae":
        return "a smaller model.backbone" if config.model.name != "hf" else "smaller weights (model.weights)"
    if config.model.weights is not None:
        return "smaller weights (model.weights=MCG-NJU/videomae-small-finetuned-kinetics)"
    return "model.size=small" if config.model.width is None else "a smaller model.width or model.depth"


def _for_model(found: Found, config: Config) -> list[str]:
    lines = []
    if not found.cuda:
        lines.append(f"a GPU is what helps; on the CPU, {smaller_model(config)}, clip.size or clip.frames")
        return lines
    if config.train.compile is False:
        lines.append("train.compile=true compiles the blocks")
    if config.train.precision == "fp32":
        lines.append("train.precision=bf16")
    if config.train.checkpointing:
        lines.append("train.checkpointing=0, or a smaller train.clips_per_gpu in its place, computes nothing twice")
    lines.append("the GPU is the limit, as it should be: more of them, or train.freeze_depth, clip.frames, clip.size")
    return lines


# ---------------------------------------------------------------- the model


def model_of(config: Config) -> VideoModel:
    """The model of the settings with random weights; what only a hub or a file knows is guessed by the name."""
    settings = config.model
    if settings.name == "videomae" and settings.weights is not None and settings.size is None:
        asked = settings.weights.lower()
        settings.size = next((s for s in ("small", "base", "large", "huge", "giant") if s in asked), "base")
    return build_model(settings, config.clip, 51)


def step_rate(config: Config, model: VideoModel, device: torch.device, flops: float, matmul: float) -> float:
    """Clips a second forward and backward, measured, or on a slow CPU from the matrix product."""
    autocast = AUTOCAST[precision_of(config, device)]
    if device.type != "cuda" and flops / matmul > SLOW_PASS_S * ASSUMED:
        return ASSUMED * matmul / flops
    wanted = config.train.clips_per_gpu
    clips = min(wanted, 16) if isinstance(wanted, int) else 16 if device.type == "cuda" else 1
    model = model.to(device).train()
    best = math.inf
    for _ in range(3 if device.type == "cuda" else 2):
        begin = time.perf_counter()
        train_pass(model, config.clip, clips, device, autocast)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return clips / best


# ---------------------------------------------------------------- the program


def pillow_name() -> str:
    """Pillow or Pillow-SIMD, with its version."""
    from PIL import __version__ as version

    return f"{'Pillow-SIMD' if 'post' in version else 'Pillow'} {version}"


def examine(config: Config, say: Callable[[str], None]) -> Found:
    """Measure everything, a line each."""
    device = distributed.pick_device()
    cuda = device.type == "cuda"
    ranks = torch.cuda.device_count() if cuda else 1
    cores = len(os.sched_getaffinity(0))
    workers = worker_count(config.data.workers, local_ranks=ranks)
    name = torch.cuda.get_device_name(device) if cuda else "no GPU"
    say(f"{'machine':<22} {cores} cores, {ranks if cuda else 0} GPUs ({name}); torch {torch.__version__}")
    say(f"{'decoders':<22} simplejpeg {_version('simplejpeg')} for JPEG, {pillow_name()} for the rest")
    root = Path(config.data.train)
    with tempfile.TemporaryDirectory() as folder:
        paths = sample_frames(root) if root.is_dir() else []
        where = f"{len(paths)} frames of {root}" if paths else f"made frames ({root} has none)"
        paths = paths or make_sample(Path(folder))
        read = read_rate(paths)
        frames = [path.read_bytes() for path in paths]
    frames = [data for data in frames if _whole(data)]
    if not frames:
        raise UserError(
            f"none of the {len(paths)} sampled frames of {root} can be decoded: "
            f"vac audit {shlex.quote(str(root))} says more"
        )
    size, shape = float(np.mean([len(data) for data in frames])), frame_size(frames[0])
    say(f"{'frames':<22} {where}: {shape[1]}x{shape[0]}, {size / 1024:.1f} KB")
    one = decode_rate_together(frames, config, 1)
    every = decode_rate_together(frames, config, max(1, min(cores, workers * ranks)))
    clip = config.clip
    say(f"{'decoding':<22} {one:.1f} clips/s a core ({one * clip.frames:.0f} frames/s), {every:.1f} by "
        f"{max(1, min(cores, workers * ranks))} processes")  # fmt: skip
    say(f"{'disk':<22} {read / 1e6:.0f} MB/s, {read / size:.0f} frames/s (what the page cache holds is faster)")
    notes = []
    if workers:
        free, batch = free_memory(), config.train.clips_per_gpu
        batches = workers * ranks * (config.data.prefetch + 1)
        needed = batches * (batch if isinstance(batch, int) else 8) * clip_bytes(clip)
        say(f"{'memory':<22} {free / GIB:.1f} GiB free, batches on their way may take {needed / GIB:.2f} GiB")
        if needed > free:
            notes.append("batches do not fit into memory: lower data.workers or data.prefetch")
    copy = copy_rate(device) if cuda else None
    if copy is not None:
        say(f"{'host to device':<22} {copy / 1e9:.1f} GB/s, {copy / clip_bytes(clip):.0f} clips/s")
    matmul = matmul_rate(device, AUTOCAST[precision_of(config, device)])
    say(f"{'matrix product':<22} {matmul / 1e12:.4g} TFLOP/s in {precision_of(config, device)}")
    step, gradient = None, 0
    model = model_of(config)
    flops = clip_flops(model, clip)
    if flops is not None:
        gradient = sum(p.numel() for p in model.parameters()) * (2 if config.train.bf16_reduce else GRADIENT)
        step = step_rate(config, model, device, flops[1], matmul)
        say(
            f"{'model':<22} {flops[1] / 1e9:.4g} GFLOP a clip, {step:.3g} clips/s, {step * flops[1] / matmul:.2f} of it"
        )
    together = max(2, ranks)
    reduce = all_reduce_rate(together)
    if reduce is not None:
        say(f"{'all-reduce':<22} {reduce / 1e9:.2f} GB/s over {together} {'GPUs' if ranks > 1 else 'processes'}")
    return Found(
        workers=workers,
        ranks=ranks,
        repeats=config.augment.repeats,
        frame_bytes=size,
        frame_shape=shape,
        clip_frames=clip.frames,
        clip_bytes=clip_bytes(clip),
        decode_core=one,
        decode_all=every / ranks,
        read_bytes=read,
        copy_bytes=copy,
        step=step,
        gradient_bytes=gradient,
        all_reduce=reduce,
        clips_a_step=config.train.global_batch,
        cuda=cuda,
        notes=notes,
    )


def _whole(data: bytes) -> bool:
    try:
        frame_size(data)
        return True
    except DamagedFrame:
        return False


def _version(name: str) -> str:
    from importlib import metadata

    return metadata.version(name)


def main(argv: list[str] | None = None) -> int:
    """`vac doctor [--config NAME] [group.name=value ...]`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    config = parse_settings(argv, program="vac doctor", about=ABOUT).config
    found = examine(config, print)
    print("\nwith these settings, clips/s of this machine:")
    for name, rate in limits(found).items():
        print(f"  {name:<26} {rate:.3g}")
    print()
    for line in [*advice(found, config), *found.notes]:
        print(line)
    return 0


if __name__ == "__main__":
    from vac_ddp.runtime.exit_status import run_command

    sys.exit(run_command(main, sys.argv[1:]))
