"""`vac init DATA`: look at a folder of frames and write settings with comments that fit it, ready to train."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.arguments import ArgumentParser
from vac_ddp.data.augment import flip_guard
from vac_ddp.data.decode import DamagedFrame, decode_frame
from vac_ddp.data.grouping import Sources, find_sources
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.split import make_split
from vac_ddp.errors import UserError
from vac_ddp.settings import Config, DataSettings

ABOUT = "Look at a folder of frames and write settings with comments that fit it. Asks nothing, overwrites nothing."
TUNED, SELF_SUPERVISED = "MCG-NJU/videomae-base-finetuned-kinetics", "MCG-NJU/videomae-base"
SAMPLE = 64  # frames that are decoded to see sizes and colours
# "set1_seq01_clip002", "s003_c00", "film7-part3": what stands before a word for a piece and its number
PIECE = re.compile(r"^(.+?)([ _.-]+(?:clip|c|part|p|piece|segment|seg|shot|take|cut)[ _.-]?)\d+$", re.IGNORECASE)
SMALL_STEPS = 3600  # of a small model from nothing: what scratch_small was tuned with
TUNED_STEPS = 600  # at least, of pretrained weights on a small set


@dataclass(kw_only=True)
class Facts:
    """What was found. mean, std: of the pixels, 0 to 1, by channel."""

    data: str
    frame_pattern: str | None
    classes: list[str]
    counts: list[int]
    lengths: list[int]
    short_sides: list[int]
    mean: list[float]
    std: list[float]
    sources: Sources
    example: str
    regex: str | None
    sided: list[str]
    notes: list[str]
    gpus: list[str]
    weights: str | None
    why_weights: str

    @property
    def videos(self) -> int:
        """Number of videos."""
        return len(self.lengths)


def main(argv: list[str] | None = None) -> int:
    """Look, write, check that it would train, and say what was found and what to type next."""
    parser = ArgumentParser(prog="vac init", description=ABOUT)
    parser.add_argument("data", metavar="DATA", help="<class>/<video>/*.jpg, a packed set, or a CSV (path,label)")
    parser.add_argument("--out", metavar="FILE", default="train.yaml", help="what to write (default: train.yaml)")
    parser.add_argument("--frame-pattern", metavar="X", help="data.frame_pattern, where folders hold other pictures")
    options = parser.parse_args(argv)
    out = Path(options.out).expanduser()
    if out.exists():
        raise UserError(f"{out} is there already: nothing is overwritten; move it away, or give --out FILE")
    inside = Path(options.data).expanduser() / "data_train"
    if inside.is_dir():
        raise UserError(f"{options.data} holds a data_train: give that, {inside}")
    settings = DataSettings(frame_pattern=options.frame_pattern)
    index = open_index(options.data, labelled=True, settings=settings)
    facts = look(options.data, index, settings.frame_pattern)
    text = settings_text(facts)
    checked = read_text(text, out)
    split = make_split(index, checked.data, seed=checked.seed)
    files.write_text(out, text)
    print("\n".join(summary(facts)))
    print(f"parts        {len(split.train)} videos to train on, {len(split.val)} to validate")
    words = [f"data.frame_pattern={settings.frame_pattern}"] if settings.frame_pattern else []
    print(f"\nwrote {out}; next:")
    for command in (["vac", "audit", options.data, *words], ["vac", "train", "--config", str(out)]):
        print(f"  {shlex.join(command)}")
    return 0


def read_text(text: str, out: Path) -> Config:
    """The settings that the text means, checked as `vac train` will check them."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        files.write_text(beside, text)
        read = settings_io.read_yaml(beside)
    finally:
        beside.unlink(missing_ok=True)
    settings_io.check(read)
    return read


# ---------------------------------------------------------------- looking


def look(data: str, index: Index, frame_pattern: str | None = None) -> Facts:
    """Everything the settings depend on."""
    names, classes = list(index.names), [index.classes[label] for label in index.labels.tolist()]
    regex, sources = group(names, classes)
    short_sides, mean, std = look_at_frames(index)
    gpus = _gpus()
    weights, why = choose_weights(bool(gpus), len(index))
    return Facts(
        data=data,
        frame_pattern=frame_pattern,
        classes=list(index.classes),
        counts=np.bincount(index.labels, minlength=len(index.classes)).tolist(),
        lengths=np.asarray(index.frame_counts).tolist(),
        short_sides=short_sides,
        mean=mean,
        std=std,
        sources=sources,
        example=names[0],
        regex=regex,
        sided=flip_guard(index.classes),
        notes=list(index.notes),
        gpus=gpus,
        weights=weights,
        why_weights=why,
    )


def group(names: list[str], classes: list[str]) -> tuple[str | None, Sources]:
    """(regular expression, sources): by a word for a piece at the end of the names, else as group_by=auto tells."""
    told = find_sources(names, classes, DataSettings())
    if told.grammar in ("hmdb51", "ucf101"):
        return None, told
    found = [PIECE.match(name.rpartition("/")[2]) for name in names]
    words = {match.group(2) if match else None for match in found}
    if len(words) != 1 or None in words:
        return None, told
    regex = rf"^(.+){re.escape(words.pop() or '')}\d+$"
    try:
        pieces = find_sources(names, classes, DataSettings(group_by="regex", group_regex=regex))
    except UserError:  # a class would have a single source
        return None, told
    return (regex, pieces) if len(set(pieces.groups)) < len(names) else (None, told)


def look_at_frames(index: Index) -> tuple[list[int], list[float], list[float]]:
    """Short sides, and mean and deviation of the colours, of some frames from the middle of videos all over the set."""
    videos = np.linspace(0, len(index) - 1, min(SAMPLE, len(index))).round().astype(int)
    sides, means, squares = [], [], []
    for video in videos.tolist():
        try:
            pixels = decode_frame(index.frame_bytes(video, int(index.frame_counts[video]) // 2))
        except (OSError, DamagedFrame):
            continue  # `vac audit` and the training count and name damaged frames
        sides.append(min(pixels.shape[:2]))
        values = pixels.reshape(-1, 3) / 255.0
        means.append(values.mean(axis=0))
        squares.append((values**2).mean(axis=0))
    if not sides:
        raise UserError(f"{index.root}: none of {len(videos)} frames that were tried can be decoded: see vac audit")
    mean = np.mean(means, axis=0)
    deviation = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, 1e-4))
    return sides, [round(float(x), 3) for x in mean], [round(float(x), 3) for x in deviation]


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def choose_weights(gpu: bool, videos: int) -> tuple[str | None, str]:
    """(hub id or None, why): pretrained where there is a GPU to tune them and a way to get them."""
    if not gpu:
        return None, "no GPU here: a ViT-B takes tens of seconds a clip on a CPU"
    from huggingface_hub import constants, try_to_load_from_cache

    from vac_ddp.report.services import answers

    wanted = TUNED if videos < 50_000 else SELF_SUPERVISED
    if any(
        isinstance(try_to_load_from_cache(wanted, name), str) for name in ("model.safetensors", "pytorch_model.bin")
    ):
        return wanted, "in the cache of the Hugging Face hub"
    if not constants.HF_HUB_OFFLINE and answers(constants.ENDPOINT):
        return wanted, "from the Hugging Face hub, which answers"
    return None, f"{constants.ENDPOINT} does not answer and {wanted} is not in its cache"


# ---------------------------------------------------------------- writing


def summary(facts: Facts) -> list[str]:
    """What was found, for people; the same lines begin the file."""
    few, many = min(facts.counts), max(facts.counts)
    middle = round(statistics.median(facts.lengths))
    example = f"{facts.example} -> {facts.sources.groups[0]}"
    told = f"{len(set(facts.sources.groups))}, told by group_by={facts.sources.grammar}, {example}"
    if facts.regex:
        told = f"{len(set(facts.sources.groups))}, told by names like {example}"
    elif facts.sources.grammar == "none":
        told = f"not told by names like {facts.example}: every video counts as its own"
    lines = [
        f"classes      {len(facts.classes)}, {few} to {many} videos each, {facts.videos} in all",
        f"lengths      {min(facts.lengths)} to {max(facts.lengths)} frames, half of them {middle} or more",
        f"frames       short side {min(facts.short_sides)} to {max(facts.short_sides)} pixels",
        f"sources      {told}",
        f"GPUs         {len(facts.gpus)}" + (f" ({facts.gpus[0]})" if facts.gpus else ""),
        f"weights      {facts.weights or 'none, from scratch'} ({facts.why_weights})",
    ]
    return [*lines, *facts.notes]


def settings_text(facts: Facts) -> str:
    """The YAML: the recipe for pretrained weights, or the small model from nothing."""
    groups = [_data(facts), *(_tuned(facts) if facts.weights else _small(facts))]
    where = Path(facts.data).expanduser().resolve()
    name = where.parent.name if where.stem in ("train", "data_train") else where.stem
    groups.append(f"run:\n  dir: {_text(f'runs/{name or where.stem}')}\n")
    head = "".join(f"# {line}\n" for line in ["Written by `vac init`. Found:", *(f"  {x}" for x in summary(facts))])
    return f"{head}# Every setting and its meaning: vac train --help\n\n" + "\n".join(groups)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # quoted: YAML takes JSON's strings


def _data(facts: Facts) -> str:
    lines = ["data:", f"  train: {_text(facts.data)}"]
    if facts.frame_pattern:
        lines += [f"  frame_pattern: {_text(facts.frame_pattern)}"]
    if facts.regex:
        lines += ["  group_by: regex              # clips of one source stay on one side of the split"]
        lines += [f"  group_regex: '{facts.regex}'"]
    elif facts.sources.grammar in ("hmdb51", "ucf101"):
        lines += [f"  group_by: {facts.sources.grammar}"]
    elif facts.sources.grammar == "none":
        lines += [
            "  group_by: none               # no source is told by the names: if clips are cut from longer videos,"
        ]
        lines += ["                               # give data.group_regex or data.group_csv, or validation is too good"]
    else:
        lines += ["  group_by: auto               # a number at the end of a name is taken for the clip's"]
    lines += ["  val_fraction: 0.2            # 0 for a last training on everything"]
    if max(facts.counts) > 5 * max(1, min(facts.counts)):
        lines += ["  balance: class               # the classes' sizes differ by more than five times"]
    if not facts.weights and facts.videos * statistics.mean(facts.lengths) < 50_000:
        lines += ["  workers: 0                   # few small frames decode faster than they travel between processes"]
    return "\n".join(lines) + "\n"


def _clip(facts: Facts, frames: int, size: int, most_stride: int) -> str:
    middle = statistics.median(facts.lengths)
    lines = ["clip:", f"  frames: {frames}"]
    if middle >= frames and most_stride:
        stride = max(1, min(most_stride, int(middle // frames)))
        lines += [f"  stride: {stride}                    # {frames} x {stride} frames fit into half of the videos"]
    else:
        lines += [f"  sampling: segments           # one frame of each {frames}th of the video: seen whole"]
    return "\n".join([*lines, f"  size: {size}", ""])


def _flip(facts: Facts) -> str:
    if facts.sided:
        return f"  flip: 0                      # left and right may make these: {', '.join(facts.sided[:4])}"
    return "  flip: 0.5                    # 0 where left and right make the class"


def _tuned(facts: Facts) -> list[str]:
    """Kinetics-tuned VideoMAE-B further at 2e-5, or from self-supervised weights on large sets: see the presets."""
    assert facts.weights is not None
    train = 0.8 * facts.videos
    tuned = facts.weights == TUNED
    epochs = max(10, min(60, math.ceil(TUNED_STEPS * 32 / train))) if tuned else 30
    rate = "  lr: 2.0e-5                   # weights that know actions already are tuned further, gently"
    if not tuned:
        rate = "  base_lr: 5.0e-4              # per 256 clips: the official recipe for self-supervised weights"
    return [
        _clip(facts, 16, 224, 4),
        f"model:\n  weights: {_text(facts.weights)}\n  drop_path: 0.1\n"
        f"  head_dropout: {0.5 if train < 20_000 else 0.0}\n",
        "augment:                       # the official recipe\n  repeats: 2\n  crop_scale: [0.08, 1.0]\n"
        f"{_flip(facts)}\n  randaugment: rand-m7-n4-mstd0.5-inc1\n  erase: 0.25\n  mixup: 0.8\n  cutmix: 1.0\n",
        f"optim:\n{rate}\n  min_lr: 1.0e-6\n  warmup_epochs: {1 if tuned else 5}\n  weight_decay: 0.05\n"
        "  layer_decay: 0.75\n" + ("  head_lr_scale: 10.0          # the classifier is new\n" if tuned else ""),
        f"train:\n  epochs: {epochs}\n  global_batch: 64             # kept on any number of GPUs, by accumulation\n"
        "  label_smoothing: 0.1\n",
        "predict:\n  views:\n    windows: spread\n    count: 5\n    crops: 3\n",
    ]


def _small(facts: Facts) -> list[str]:
    """The preset scratch_small, fitted: steps by the number of videos, colours as measured, size as there is."""
    train = max(1.0, 0.8 * facts.videos)
    batch = 8 if train < 2000 else 32
    epochs = max(10, min(400, round(SMALL_STEPS * batch / train)))
    size = int(max(32, min(64, 16 * (statistics.median(facts.short_sides) // 16))))
    mean, std = (", ".join(f"{x:.3f}" for x in values) for values in (facts.mean, facts.std))
    return [
        _clip(facts, 8, size, 0),
        "model:\n  weights: null                # from nothing; a hub id, file or run where there is one\n"
        f"  width: 128\n  depth: 4\n  heads: 4\n  patch: {16 if size >= 64 else 8}\n  head_init_scale: 1.0\n"
        f"  mean: [{mean}]  # of these frames\n  std: [{std}]\n",
        f"augment:\n  crop_scale: [0.5, 1.0]\n{_flip(facts)}\n  color_jitter: 0.3\n",
        f"optim:\n  lr: 4.0e-4\n  min_lr: 1.0e-5\n  warmup_epochs: {5 if epochs >= 20 else 1}\n  betas: [0.9, 0.95]\n",
        f"train:\n  epochs: {epochs:<20} # about {SMALL_STEPS} steps: from nothing it is their number that counts\n"
        f"  global_batch: {batch}\n  clips_per_gpu: {batch // 2}\n  val_every: {max(1, epochs // 20)}\n",
        "val:\n  windows: phases              # five clips of other frames of the same parts,\n"
        "  count: 5                     # as in the prediction\n",
        "predict:\n  views:\n    windows: phases\n    count: 5\n",
    ]


if __name__ == "__main__":
    from vac_ddp.runtime.exit_status import run_command

    sys.exit(run_command(main, sys.argv[1:]))
