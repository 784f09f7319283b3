"""Settings with comments that fit a data set, as YAML: the recipe for pretrained weights, or a small model."""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.checks import check
from vac_ddp.data.index import open_index
from vac_ddp.data.split import Split, make_split
from vac_ddp.init.dataset_metadata import TUNED, Metadata, inspect
from vac_ddp.settings import Config, DataSettings

SMALL_STEPS = 3600  # of a small model from scratch: what scratch_small was tuned with
TUNED_STEPS = 600  # at least, of pretrained weights on a small set


def write_settings(data: str, out: Path, *, frame_pattern: str | None = None) -> tuple[Metadata, Split]:
    """Write settings for training on `data` to `out`; returns what they follow from, and the split they make.

    Nothing is written where a training with them would be refused: then a UserError says why.
    """
    index = open_index(data, labelled=True, settings=DataSettings(frame_pattern=frame_pattern))
    metadata = inspect(data, index, frame_pattern)
    text = settings_text(metadata)
    checked = read_text(text, out)
    split = make_split(index, checked.data, seed=checked.seed)
    files.write_text(out, text)
    return metadata, split


def read_text(text: str, out: Path) -> Config:
    """The settings that the text means, checked as `vac train` will check them."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        files.write_text(beside, text)
        read = settings_io.read_yaml(beside)
    finally:
        beside.unlink(missing_ok=True)
    check(read)
    return read


def summary(metadata: Metadata) -> list[str]:
    """What was found, for people; the same lines begin the file."""
    few, many = min(metadata.counts), max(metadata.counts)
    middle = round(statistics.median(metadata.lengths))
    example = f"{metadata.example} -> {metadata.sources.groups[0]}"
    told = f"{len(set(metadata.sources.groups))}, told by group_by={metadata.sources.grammar}, {example}"
    if metadata.regex:
        told = f"{len(set(metadata.sources.groups))}, told by names like {example}"
    elif metadata.sources.grammar == "none":
        told = f"not told by names like {metadata.example}: every video counts as its own"
    lines = [
        f"classes      {len(metadata.classes)}, {few} to {many} videos each, {metadata.videos} in all",
        f"lengths      {min(metadata.lengths)} to {max(metadata.lengths)} frames, half of them {middle} or more",
        f"frames       short side {min(metadata.short_sides)} to {max(metadata.short_sides)} pixels",
        f"sources      {told}",
        f"GPUs         {len(metadata.gpus)}" + (f" ({metadata.gpus[0]})" if metadata.gpus else ""),
        f"weights      {metadata.weights or 'none, from scratch'} ({metadata.why_weights})",
    ]
    return [*lines, *metadata.notes]


def settings_text(metadata: Metadata) -> str:
    """The YAML: the recipe for pretrained weights, or the small model from scratch."""
    groups = [_data(metadata), *(_tuned(metadata) if metadata.weights else _small(metadata))]
    where = Path(metadata.data).expanduser().resolve()
    name = where.parent.name if where.stem in ("train", "data_train") else where.stem
    groups.append(f"run:\n  dir: {_text(f'runs/{name or where.stem}')}\n")
    head = "".join(f"# {line}\n" for line in ["Written by `vac init`. Found:", *(f"  {x}" for x in summary(metadata))])
    return f"{head}# Every setting and its meaning: vac train --help\n\n" + "\n".join(groups)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # quoted: YAML takes JSON's strings


def _data(metadata: Metadata) -> str:
    lines = ["data:", f"  train: {_text(metadata.data)}"]
    if metadata.frame_pattern:
        lines += [f"  frame_pattern: {_text(metadata.frame_pattern)}"]
    if metadata.regex:
        lines += ["  group_by: regex              # clips of one source stay on one side of the split"]
        lines += [f"  group_regex: '{metadata.regex}'"]
    elif metadata.sources.grammar in ("hmdb51", "ucf101"):
        lines += [f"  group_by: {metadata.sources.grammar}"]
    elif metadata.sources.grammar == "none":
        lines += [
            "  group_by: none               # no source is told by the names: if clips are cut from longer videos,"
        ]
        lines += ["                               # give data.group_regex or data.group_csv, or validation is too good"]
    else:
        lines += ["  group_by: auto               # a number at the end of a name is taken for the clip's"]
    lines += ["  val_fraction: 0.2            # 0 for a last training on everything"]
    if max(metadata.counts) > 5 * max(1, min(metadata.counts)):
        lines += ["  balance: class               # the classes' sizes differ by more than five times"]
    if not metadata.weights and metadata.videos * statistics.mean(metadata.lengths) < 50_000:
        lines += ["  workers: 0                   # few small frames decode faster than they travel between processes"]
    return "\n".join(lines) + "\n"


def _clip(metadata: Metadata, frames: int, size: int, most_stride: int) -> str:
    middle = statistics.median(metadata.lengths)
    lines = ["clip:", f"  frames: {frames}"]
    if middle >= frames and most_stride:
        stride = max(1, min(most_stride, int(middle // frames)))
        lines += [f"  stride: {stride}                    # {frames} x {stride} frames fit into half of the videos"]
    else:
        lines += [f"  sampling: segments           # one frame of each {frames}th of the video: seen whole"]
    return "\n".join([*lines, f"  size: {size}", ""])


def _flip(metadata: Metadata) -> str:
    if metadata.sided:
        return f"  flip: 0                      # left and right may make these: {', '.join(metadata.sided[:4])}"
    return "  flip: 0.5                    # 0 where left and right make the class"


def _tuned(metadata: Metadata) -> list[str]:
    """Kinetics-tuned VideoMAE-B further at 2e-5, or from self-supervised weights on large sets: see the presets."""
    assert metadata.weights is not None
    train = 0.8 * metadata.videos
    tuned = metadata.weights == TUNED
    epochs = max(10, min(60, math.ceil(TUNED_STEPS * 32 / train))) if tuned else 30
    rate = "  lr: 2.0e-5                   # weights that know actions already are tuned further, gently"
    if not tuned:
        rate = "  base_lr: 5.0e-4              # per 256 clips: the official recipe for self-supervised weights"
    return [
        _clip(metadata, 16, 224, 4),
        f"model:\n  weights: {_text(metadata.weights)}\n  drop_path: 0.1\n"
        f"  head_dropout: {0.5 if train < 20_000 else 0.0}\n",
        "augment:                       # the official recipe\n  repeats: 2\n  crop_scale: [0.08, 1.0]\n"
        f"{_flip(metadata)}\n  randaugment: rand-m7-n4-mstd0.5-inc1\n  erase: 0.25\n  mixup: 0.8\n  cutmix: 1.0\n",
        f"optim:\n{rate}\n  min_lr: 1.0e-6\n  warmup_epochs: {1 if tuned else 5}\n  weight_decay: 0.05\n"
        "  layer_decay: 0.75\n" + ("  head_lr_scale: 10.0          # the classifier is new\n" if tuned else ""),
        f"train:\n  epochs: {epochs}\n  global_batch: 64             # kept on any number of GPUs, by accumulation\n"
        "  label_smoothing: 0.1\n",
        "predict:\n  views:\n    windows: spread\n    count: 5\n    crops: 3\n",
    ]


def _small(metadata: Metadata) -> list[str]:
    """The preset scratch_small, fitted: steps by the number of videos, colours as measured, size as there is."""
    train = max(1.0, 0.8 * metadata.videos)
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
        f"  global_batch: {batch}\n  clips_per_gpu: {batch // 2}\n  val_every: {max(1, epochs // 20)}\n",
        "val:\n  windows: phases              # five clips of other frames of the same parts,\n"
        "  count: 5                     # as in the prediction\n",
        "predict:\n  views:\n    windows: phases\n    count: 5\n",
    ]
