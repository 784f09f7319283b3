"""Groups of settings as YAML with comments: a probe, fine-tuning of a VideoMAE, or a small model from scratch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics

from vac_ddp.config import find_config
from vac_ddp.init.dataset_metadata import Metadata
from vac_ddp.init.weights_choice import FEW, IMAGE_BACKBONE, Weights
from vac_ddp.settings import ClipSettings, Config

SMALL_STEPS = 3600  # of a small model from scratch: what scratch_small was tuned with
FINETUNE = {"frame_vit": "finetune_frames", "videomae": "finetune_videomae", "hf": "finetune_vjepa2"}  # presets
PROBE_FRAMES = 24  # of an image network: as the preset probe_frames
TUNED_STEPS = 600  # at least, of pretrained weights on a small set


def wants_probe(weights: Weights, *, gpus: int, videos: int) -> bool:
    """Whether a probe comes first: few videos, no GPU, or an encoder other than VideoMAE."""
    if weights.name is None or weights.family == "probe":
        return False
    return not gpus or videos < FEW or weights.family != "videomae"


def text(value: str) -> str:
    """A text as YAML takes it: in the quotes of JSON."""
    return json.dumps(value, ensure_ascii=False)


def data_group(metadata: Metadata, weights: Weights, *, probe: bool) -> str:
    """Where the videos are, and which of them form a group."""
    rule = metadata.rule
    lines = ["data:", f"  train: {text(metadata.data)}"]
    if metadata.frame_pattern:
        lines += [f"  frame_pattern: {text(metadata.frame_pattern)}"]
    if rule.group_by == "regex":
        lines += ["  group_by: regex              # clips of one group stay in one split"]
        lines += [f"  group_regex: '{rule.group_regex}'"]
    elif rule.group_by == "none":
        lines += [
            "  group_by: none               # the names show no groups: if clips are cut from longer videos, give"
        ]
        lines += ["                               # data.group_regex or data.group_csv, or validation is too good"]
    else:
        why = {"auto": "some names fit no rule", "numbered": "a number at the end of a name is the clip's"}
        comment = f"  # {why[rule.group_by]}" if rule.group_by in why else ""
        lines += [f"  {f'group_by: {rule.group_by}':<28}{comment}".rstrip()]
    if probe:
        lines += [
            "  val_fraction: 0              # every video takes part: the folds of the selection are the validation"
        ]
        return "\n".join(lines) + "\n"
    if weights.family == "probe" and weights.run is not None:
        lines += _split_of(weights.run)
    else:
        lines += ["  val_fraction: 0.2            # 0 for a last training on everything"]
    if max(metadata.counts) > 5 * max(1, min(metadata.counts)):
        lines += ["  balance: class               # the classes' sizes differ by more than five times"]
    if not weights.name and metadata.videos * statistics.mean(metadata.lengths) < 50_000:
        lines += ["  workers: 0                   # few small frames decode faster than they travel between processes"]
    return "\n".join(lines) + "\n"


def _split_of(run: Config) -> list[str]:
    """The split of the run that a probe was fitted by: what it was fitted on can't validate."""
    lines = [
        f"  {f'val_fraction: {run.data.val_fraction:g}':<28} # as the probe's: what it was fitted on can't validate"
    ]
    given = {"val": run.data.val, "fold": run.data.fold}
    return lines + [f"  {name}: {text(value)}" for name, value in given.items() if value]


def probe_groups(metadata: Metadata, weights: Weights) -> list[str]:
    """A probe on the frozen network: one view of each video and its mirror image, as the preset probe_frames."""
    model = [
        "model:",
        "  name: probe",
        f"  {f'encoder: {weights.family}':<28} # frozen: its features are pooled over time",
    ]
    model += [f"  backbone: {weights.backbone}"] if weights.backbone else []
    model += [f"  weights: {text(weights.name or '')}", ""]
    probe = []
    groups = len(set(metadata.grouping.groups))
    if groups < 5:
        probe += [f"  {f'folds: {groups}':<28} # as many as there are groups"]
    if weights.family == "hf":
        probe += ["  probes: [ridge, logistic, attentive]  # features of V-JEPA 2 should not only be averaged"]
    frames, max_stride = (PROBE_FRAMES, 0) if weights.family == "frame_vit" else (weights.frames, 4)
    clip = _clip(metadata, frames, weights.size, max_stride)
    return [
        clip,
        "\n".join(model),
        *(["\n".join(["probe:", *probe, ""])] if probe else []),
        _probe_views(metadata, clip),
    ]


def _probe_views(metadata: Metadata, clip: str) -> str:
    """The middle of every video, mirrored as well unless left and right make the class."""
    windows, what = ("phases", "of every segment") if "sampling: segments" in clip else ("spread", "of the video")
    lines = ["predict:", "  views:", f"    {f'windows: {windows}':<26} # the middle {what}", "    count: 1"]
    return "\n".join([*lines, _flip(metadata, "    ", off="false", on="true"), ""])


def finetune_groups(metadata: Metadata, weights: Weights) -> list[str]:
    """The preset for fine-tuning from a probe on such an encoder, with the probe's weights and clips."""
    preset = find_config(FINETUNE.get(weights.encoder or "", "finetune_frames")).read_text(encoding="utf-8")
    groups = []
    for group in re.split(r"^(?=\w+:)", preset, flags=re.MULTILINE)[1:]:
        name = group.partition(":")[0]
        if name in ("data", "run"):
            continue
        if name == "clip" and weights.run is not None:
            group = _same_clip(weights.run.clip)
        elif name == "model":
            group = _without(group, "weights|backbone")
            group += f"  backbone: {weights.backbone}\n" if weights.backbone else ""
            group += f"  weights: {text(weights.name or '')}\n"
        elif name == "augment" and metadata.sided:
            group = f"{_without(group, 'flip')}{_flip(metadata)}\n"
        elif name in ("val", "predict") and metadata.sided:
            group = group.replace("flip: true", "flip: false")
        elif name == "train" and weights.backbone != IMAGE_BACKBONE:
            group = _without(group, "freeze_depth")  # a number of that network's layers
        groups.append(group.rstrip() + "\n")
    return groups


def _without(group: str, names: str) -> str:
    """A group without the settings of these names."""
    return re.sub(rf"^  ({names}):.*\n", "", group, flags=re.MULTILINE).rstrip() + "\n"


def _same_clip(clip: ClipSettings) -> str:
    """The clips of a run, as YAML: frames, sampling, size, and what is not by default."""
    always, default = ("frames", "sampling", "size"), ClipSettings()
    lines = ["clip:                          # as the probe"]
    for name, value in dataclasses.asdict(clip).items():
        if name in always or value != getattr(default, name):
            lines += [f"  {name}: {value}"]
    return "\n".join([*lines, ""])


def tuned_groups(metadata: Metadata, weights: Weights, *, train: int) -> list[str]:
    """Kinetics-tuned VideoMAE-B further at 2e-5, or from self-supervised weights on large sets: see the presets."""
    tuned, repeats, batch = weights.tuned, 2, 64
    epochs = max(10, min(60, math.ceil(TUNED_STEPS * 32 / train))) if tuned else 30
    rate = "  lr: 2.0e-5                   # weights that know actions already are tuned further, gently"
    if not tuned:
        rate = "  base_lr: 5.0e-4              # per 256 clips: the official recipe for self-supervised weights"
    return [
        _clip(metadata, weights.frames, weights.size, 4),
        f"model:\n  weights: {text(weights.name or '')}\n  drop_path: 0.1\n"
        f"  head_dropout: {0.5 if train < 20_000 else 0.0}\n",
        f"augment:                       # the official recipe\n  repeats: {repeats}\n  crop_scale: [0.08, 1.0]\n"
        f"{_flip(metadata)}\n  randaugment: rand-m7-n4-mstd0.5-inc1\n  erase: 0.25\n  mixup: 0.8\n  cutmix: 1.0\n",
        f"optim:\n{rate}\n  min_lr: 1.0e-6\n  warmup_epochs: {1 if tuned else 5}\n  weight_decay: 0.05\n"
        "  layer_decay: 0.75\n" + ("  head_lr_scale: 10.0          # the classifier is new\n" if tuned else ""),
        f"train:\n  epochs: {epochs}\n  global_batch: {batch}             # on any number of GPUs, by accumulation\n"
        f"{_even(train, batch // repeats)}  label_smoothing: 0.1\n",
        "predict:\n  views:\n    windows: spread\n    count: 5\n    crops: 3\n",
    ]


def small_groups(metadata: Metadata, *, train: int) -> list[str]:
    """The preset scratch_small, fitted: steps by the number of videos, colours as measured, size as there is."""
    batch = 8 if train < 2000 else 32
    epochs = max(10, min(400, round(SMALL_STEPS * batch / train)))
    size = int(max(32, min(64, 16 * (statistics.median(metadata.short_sides) // 16))))
    mean, std = (", ".join(f"{x:.3f}" for x in values) for values in (metadata.mean, metadata.std))
    return [
        _clip(metadata, 8, size, 0),
        "model:\n  weights: null                # from scratch; a hub id, file or run where there is one\n"
        f"  width: 128\n  depth: 4\n  heads: 4\n  patch: {16 if size >= 64 else 8}\n  head_init_scale: 1.0\n"
        f"  mean: [{mean}]  # of these frames\n  std: [{std}]\n",
        f"augment:\n  crop_scale: [0.5, 1.0]\n{_flip(metadata)}\n  color_jitter: 0.3\n",
        f"optim:\n  lr: 4.0e-4\n  min_lr: 1.0e-5\n  warmup_epochs: {5 if epochs >= 20 else 1}\n  betas: [0.9, 0.95]\n",
        f"train:\n  epochs: {epochs:<20} # about {SMALL_STEPS} steps: from scratch it is their number that counts\n"
        f"  global_batch: {batch}\n  clips_per_gpu: {batch // 2}\n{_even(train, batch)}"
        f"  val_every: {max(1, epochs // 20)}\n",
        "val:\n  windows: phases              # five clips of other frames of the same segments,\n"
        "  count: 5                     # as in the prediction\n",
        "predict:\n  views:\n    windows: phases\n    count: 5\n",
    ]


def _clip(metadata: Metadata, frames: int, size: int, max_stride: int) -> str:
    """Dense clips that fit into half of the videos, at most `max_stride` frames apart; else one frame a segment."""
    middle = statistics.median(metadata.lengths)
    lines = ["clip:", f"  frames: {frames}"]
    if middle >= frames and max_stride:
        stride = max(1, min(max_stride, int(middle // frames)))
        lines += [f"  stride: {stride}                    # {frames} x {stride} frames fit into half of the videos"]
    else:
        lines += [f"  sampling: segments           # one frame of each {frames}th of the video: seen whole"]
    return "\n".join([*lines, f"  size: {size}", ""])


def _flip(metadata: Metadata, indent: str = "  ", *, off: str = "0", on: str = "0.5") -> str:
    width = 30 - len(indent)
    if metadata.sided:
        return f"{indent}{f'flip: {off}':<{width}} # left and right may make these: {', '.join(metadata.sided[:4])}"
    return f"{indent}{f'flip: {on}':<{width}} # {off} where left and right make the class"


def _even(train: int, videos: int) -> str:
    """even_steps, where the last step of an epoch would have at most a quarter of the `videos` of the others."""
    left = train % videos
    if train < videos or not 0 < left <= videos // 4:
        return ""
    return f"  even_steps: true             # {train} videos in steps of {videos} would leave {left} for the last\n"
