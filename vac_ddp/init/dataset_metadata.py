"""What the settings of a data set depend on: classes, lengths, sources, sizes, colours; GPUs and weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from vac_ddp.data.augment import flip_guard
from vac_ddp.data.decode import DamagedFrame, decode_frame
from vac_ddp.data.grouping import Sources, find_sources
from vac_ddp.data.index import Index
from vac_ddp.errors import UserError
from vac_ddp.settings import DataSettings

TUNED, SELF_SUPERVISED = "MCG-NJU/videomae-base-finetuned-kinetics", "MCG-NJU/videomae-base"
SAMPLE = 64  # frames that are decoded to see sizes and colours
# "set1_seq01_clip002", "s003_c00", "film7-part3": what stands before a word for a piece and its number
PIECE = re.compile(r"^(.+?)([ _.-]+(?:clip|c|part|p|piece|segment|seg|shot|take|cut)[ _.-]?)\d+$", re.IGNORECASE)


@dataclass(kw_only=True)
class Metadata:
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


def inspect(data: str, index: Index, frame_pattern: str | None = None) -> Metadata:
    """Everything the settings depend on."""
    names, classes = list(index.names), [index.classes[label] for label in index.labels.tolist()]
    regex, sources = group(names, classes)
    short_sides, mean, std = inspect_frames(index)
    gpus = _gpus()
    weights, why = choose_weights(bool(gpus), len(index))
    return Metadata(
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


def inspect_frames(index: Index) -> tuple[list[int], list[float], list[float]]:
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
