"""Measure this machine in a minute: decoding, disk, memory, copies, the model of the settings, all-reduce."""

from __future__ import annotations

import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vac_ddp.data.decode import DamagedFrame, frame_size
from vac_ddp.data.loader import clip_bytes, worker_count
from vac_ddp.data.loader_memory import LoaderMemory
from vac_ddp.doctor.advice import Measured, smaller_model
from vac_ddp.doctor.machine_rates import (
    all_reduce_rate,
    copy_rate,
    decode_rate_together,
    free_memory,
    make_sample,
    read_rate,
    sample_frames,
    sample_video_files,
)
from vac_ddp.errors import UserError
from vac_ddp.models import VideoModel, build_model
from vac_ddp.models.compilation import train_pass
from vac_ddp.models.precision import AUTOCAST, precision_of
from vac_ddp.runtime import distributed
from vac_ddp.runtime.gpus import gpu_of
from vac_ddp.runtime.host_memory import memory_limit
from vac_ddp.runtime.torch_compat import FakeTensorMode
from vac_ddp.settings import ClipSettings, Config
from vac_ddp.training.meters import GIB, clip_flops, matmul_rate
from vac_ddp.version import installed

SLOW_PASS_S = 6.0  # a pass on the CPU that would take longer is computed from the matrix product
ASSUMED = 0.5  # share of the matrix product that a training step then reaches
GRADIENT = 4  # bytes
WEIGHT = 4
MOST_CLIPS = 16  # of a pass on a GPU


def model_of(config: Config) -> VideoModel:
    """The model of the settings with random weights; what only a hub or a file knows is guessed by the name."""
    settings = config.model
    if settings.name == "videomae" and settings.weights is not None and settings.size is None:
        asked = settings.weights.lower()
        settings.size = next((s for s in ("small", "base", "large", "huge", "giant") if s in asked), "base")
    return build_model(settings, config.clip, 51)


def unallocated(config: Config) -> VideoModel:
    """The model of the settings on the meta device, where parameters take no memory; else as `model_of` gives it."""
    try:
        with torch.device("meta"):
            return model_of(config)
    except (RuntimeError, NotImplementedError):  # its library computes with values while it is built
        return model_of(config)


def flops_without_memory(model: VideoModel, clip: ClipSettings) -> tuple[float, float] | None:
    """FLOP of one clip as `clip_flops` counts them, by a pass that computes nothing; parameters become fake ones."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        return clip_flops(model, clip)


def step_rate(config: Config, parameters: int, device: torch.device, flops: float, matmul: float) -> float | None:
    """Clips a second forward and backward, measured, or on a slow CPU from the matrix product.

    parameters: how many the model has. None where it does not fit into memory with one clip.
    """
    autocast = AUTOCAST[precision_of(config, gpu_of(device))]
    if device.type != "cuda" and flops / matmul > SLOW_PASS_S * ASSUMED:
        return ASSUMED * matmul / flops
    host = min(free_memory(), memory_limit())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    if parameters * WEIGHT > host or parameters * (WEIGHT + GRADIENT) > free:
        return None
    wanted = config.train.clips_per_gpu
    clips = min(wanted, MOST_CLIPS) if isinstance(wanted, int) else MOST_CLIPS if device.type == "cuda" else 1
    model = model_of(config).train()
    model.checkpointing = config.train.checkpointing
    while clips:
        try:
            return clips / _pass_seconds(model.to(device), config.clip, clips, autocast)
        except torch.OutOfMemoryError:
            clips //= 2
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return None


def _pass_seconds(model: VideoModel, clip: ClipSettings, clips: int, autocast: torch.dtype | None) -> float:
    device, best = next(model.parameters()).device, math.inf
    for _ in range(3 if device.type == "cuda" else 2):
        begin = time.perf_counter()
        train_pass(model, clip, clips, device, autocast)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def pillow_name() -> str:
    """Pillow or Pillow-SIMD, with its version."""
    from PIL import __version__ as version

    return f"{'Pillow-SIMD' if 'post' in version else 'Pillow'} {version}"


def examine(config: Config, say: Callable[[str], None]) -> Measured:
    """Measure everything, a line each. UserError where there are frames and none of them decodes."""
    device, clip = distributed.pick_device(), config.clip
    cuda = device.type == "cuda"
    ranks = torch.cuda.device_count() if cuda else 1
    cores = len(os.sched_getaffinity(0))
    workers = worker_count(config.data.workers, local_ranks=ranks)
    name = torch.cuda.get_device_name(device) if cuda else "no GPU"
    say(f"{'machine':<22} {cores} cores, {ranks if cuda else 0} GPUs ({name}); torch {torch.__version__}")
    say(f"{'decoders':<22} simplejpeg {installed('simplejpeg')} for JPEG, {pillow_name()} for the rest")
    frames, read = _sampled_frames(Path(config.data.train), config, say)
    size = float(np.mean([len(data) for data in frames]))
    processes = max(1, min(cores, workers * ranks))
    one, every = decode_rate_together(frames, config, 1), decode_rate_together(frames, config, processes)
    say(f"{'decoding':<22} {one:.1f} clips/s a core ({one * clip.frames:.0f} frames/s), {every:.1f} by "
        f"{processes} processes")  # fmt: skip
    say(f"{'disk':<22} {read / 1e6:.0f} MB/s, {read / size:.0f} frames/s (what the page cache holds is faster)")
    notes = _check_memory(config, workers, ranks, cuda=cuda, say=say) if workers else []
    copy = copy_rate(device) if cuda else None
    if copy is not None:
        say(f"{'host to device':<22} {copy / 1e9:.1f} GB/s, {copy / clip_bytes(clip):.0f} clips/s")
    step, gradient = _measure_model(config, device, say)
    if step is None and gradient:
        notes.append(
            "one clip does not fit into memory: raise train.checkpointing, lower clip.frames or clip.size, or take "
            + smaller_model(config)
        )
    together = ranks if cuda else 2
    reduce = all_reduce_rate(together) if together > 1 else None
    if reduce is not None:
        say(f"{'all-reduce':<22} {reduce / 1e9:.2f} GB/s over {together} {'GPUs' if ranks > 1 else 'processes'}")
    return Measured(
        workers=workers,
        ranks=ranks,
        repeats=config.augment.repeats,
        frame_bytes=size,
        frame_shape=frame_size(frames[0]),
        clip_frames=clip.frames,
        clip_bytes=clip_bytes(clip),
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


def _sampled_frames(root: Path, config: Config, say: Callable[[str], None]) -> tuple[list[bytes], float]:
    """Files of some frames of `root` that decode, or synthetic ones; and the bytes a second of reading them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = sample_frames(root) if root.is_dir() else []
        where = f"{len(paths)} frames of {root}" if paths else f"made frames ({root} has none)"
        if not paths and (paths := sample_video_files(root, Path(folder), config)):
            where = f"{len(paths)} frames of the video files of {root}, as they are cached"
        paths = paths or make_sample(Path(folder))
        read = read_rate(paths)
        frames = [path.read_bytes() for path in paths]
    frames = [data for data in frames if _whole(data)]
    if not frames:
        raise UserError(
            f"none of the {len(paths)} sampled frames of {root} can be decoded: "
            f"vac audit {shlex.quote(str(root))} says more"
        )
    size, (height, width) = float(np.mean([len(data) for data in frames])), frame_size(frames[0])
    say(f"{'frames':<22} {where}: {width}x{height}, {size / 1024:.1f} KB")
    return frames, read


def _check_memory(config: Config, workers: int, ranks: int, *, cuda: bool, say: Callable[[str], None]) -> list[str]:
    """Whether the batches of all ranks' loaders fit into memory; a line where they do not."""
    free, batch = min(free_memory(), memory_limit()), config.train.clips_per_gpu
    clips = batch if isinstance(batch, int) else 8
    memory = LoaderMemory(batch_bytes=clips * clip_bytes(config.clip), workers=workers, held=2, pin=cuda)
    needed = ranks * memory.needed(memory.prefetch(config.data.prefetch, sys.maxsize))
    say(f"{'memory':<22} {free / GIB:.1f} GiB free, batches on their way may take {needed / GIB:.2f} GiB")
    return ["batches do not fit into memory: lower data.workers or data.prefetch"] if needed > free else []


def _measure_model(config: Config, device: torch.device, say: Callable[[str], None]) -> tuple[float | None, int]:
    """Clips a second forward and backward, and bytes of gradients.

    None for the clips where the model does not fit into memory, or, with no bytes, its FLOP cannot be counted.
    """
    matmul = matmul_rate(device, AUTOCAST[precision_of(config, gpu_of(device))])
    say(f"{'matrix product':<22} {matmul / 1e12:.4g} TFLOP/s in {precision_of(config, gpu_of(device))}")
    model = unallocated(config)
    flops = flops_without_memory(model, config.clip)
    if flops is None:
        return None, 0
    parameters = sum(p.numel() for p in model.parameters())
    step = step_rate(config, parameters, device, flops[1], matmul)
    rate = "does not fit into memory" if step is None else f"{step:.3g} clips/s, {step * flops[1] / matmul:.2f} of it"
    say(f"{'model':<22} {flops[1] / 1e9:.4g} GFLOP a clip, {rate}")
    return step, parameters * (2 if config.train.bf16_reduce else GRADIENT)


def _whole(data: bytes) -> bool:
    try:
        frame_size(data)
        return True
    except DamagedFrame:
        return False
