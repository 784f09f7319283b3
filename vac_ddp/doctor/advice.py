"""What holds a run back on a machine that was measured, and which settings change that. Nothing is measured here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from vac_ddp.settings import Config


@dataclass(kw_only=True)
class Measured:
    """What was measured. Rates a second; None: not to be had here, or nothing that it could hold back.

    decode_all: clips decoded, cut and resampled by all `workers` at once; step: clips of one GPU (or of the CPU)
    forward and backward; all_reduce: bytes of gradients of `ranks` ranks; repeats: clips made of a decoded video.
    """

    workers: int
    ranks: int
    repeats: int
    frame_bytes: float
    frame_shape: tuple[int, int]
    clip_frames: int
    clip_bytes: int
    decode_all: float
    read_bytes: float | None
    copy_bytes: float | None
    step: float | None
    gradient_bytes: int
    all_reduce: float | None
    clips_a_step: int
    cuda: bool
    notes: list[str] = field(default_factory=list)


def limits(measured: Measured) -> dict[str, float]:
    """Clips a second of all ranks of this machine that each part allows, the slowest first."""
    rates = {"decoding": measured.decode_all * measured.ranks * measured.repeats}
    if measured.read_bytes is not None:
        rates["disk"] = measured.read_bytes / (measured.frame_bytes * measured.clip_frames) * measured.repeats
    if measured.copy_bytes is not None:
        rates["copies to the device"] = measured.copy_bytes / measured.clip_bytes * measured.ranks
    if measured.step is not None:
        rates["the model"] = measured.step * measured.ranks
        if measured.all_reduce and measured.ranks > 1:
            alone = measured.clips_a_step / (measured.step * measured.ranks)
            rates["the model with all-reduce"] = measured.clips_a_step / (
                alone + measured.gradient_bytes / measured.all_reduce
            )
    return dict(sorted(rates.items(), key=lambda item: item[1]))


def advice(measured: Measured, config: Config) -> list[str]:
    """What holds the run back, and which settings change that; a line each."""
    rates = limits(measured)
    model = rates.get("the model")
    first, rate = next(iter(rates.items()))
    lines = [f"held back by {first}: {rate:.3g} clips/s"]
    if first == "decoding" or (model is not None and rates["decoding"] < 1.2 * model):
        if first != "decoding":
            lines.append("decoding is near the model's rate: a busy machine will wait for it")
        lines += _for_decoding(measured, config)
    if first == "disk":
        lines.append("copy the data to a local disk; on a network file system pack them: vac pack DATA OUT")
    if first == "copies to the device":
        lines.append("another slot or machine: no setting makes a clip smaller than clip.frames and clip.size do")
    if first == "the model":
        lines += _for_model(measured, config)
    if first == "the model with all-reduce":
        if not config.train.bf16_reduce:
            lines.append("train.bf16_reduce=true halves the bytes of the all-reduce")
        lines.append("a larger train.global_batch reduces once for more clips (accumulation)")
        lines += _for_model(measured, config)
    return lines


def _for_decoding(measured: Measured, config: Config) -> list[str]:
    lines = []
    spare = (os.cpu_count() or 1) // measured.ranks - measured.workers
    if measured.workers == 0:
        lines.append("data.workers=0 decodes between the steps: leave it unset for one process a core")
    elif spare > 0:
        lines.append(f"data.workers={measured.workers + spare} uses the cores that are left")
    if config.augment.repeats == 1:
        lines.append("augment.repeats=2 makes two clips of every decoded video (repeated augmentation)")
    short = min(measured.frame_shape)
    if short > 1.6 * config.clip.size:
        lines.append(f"frames of {short} pixels are shrunk in every epoch: vac extract --short-side {config.clip.size}")
        if not config.data.reduced_decode:
            lines.append("data.reduced_decode=true decodes them at a half or a quarter of their size")
    return lines


def smaller_model(config: Config) -> str:
    """The settings that make this model smaller."""
    if config.model.family != "videomae":
        return "a smaller model.backbone" if config.model.family != "hf" else "smaller weights (model.weights)"
    if config.model.weights is not None:
        return "smaller weights (model.weights=MCG-NJU/videomae-small-finetuned-kinetics)"
    return "model.size=small" if config.model.width is None else "a smaller model.width or model.depth"


def _for_model(measured: Measured, config: Config) -> list[str]:
    lines = []
    if not measured.cuda:
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
