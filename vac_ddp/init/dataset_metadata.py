"""What the settings of a data set depend on: classes, lengths, groups, sizes, colours, the time of decoding."""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass

import numpy as np

from vac_ddp.data.augment import flip_guard
from vac_ddp.data.decode import DamagedFrame, decode_frame
from vac_ddp.data.grouping import Sources, find_sources
from vac_ddp.data.index import Index
from vac_ddp.errors import UserError
from vac_ddp.settings import DataSettings

SAMPLE = 64  # frames that are decoded to see sizes and colours
# "set1_seq01_clip002", "s003_c00", "film7-part3": what stands before a word for a piece and its number
PIECE = re.compile(r"^(.+?)([ _.-]+(?:clip|c|part|p|piece|segment|seg|shot|take|cut)[ _.-]?)\d+$", re.IGNORECASE)

NAMED = {  # what group_by=auto recognizes, by the setting that asks for it
    "hmdb51": DataSettings(group_by="hmdb51"),
    "ucf101": DataSettings(group_by="ucf101"),
    "numbered": DataSettings(group_by="numbered"),
    "last number": DataSettings(group_by="numbered"),
    "none": DataSettings(group_by="none"),
}


@dataclass(kw_only=True)
class Metadata:
    """What was found in the data. mean, std: of the pixels, 0 to 1, by channel.

    rule: settings with the group rule alone; grouping: the groups that it gives. decode_s: processor time of a frame.
    """

    data: str
    frame_pattern: str | None
    classes: list[str]
    counts: list[int]
    lengths: list[int]
    short_sides: list[int]
    mean: list[float]
    std: list[float]
    rule: DataSettings
    grouping: Sources
    example: str
    sided: list[str]
    notes: list[str]
    decode_s: float

    @property
    def videos(self) -> int:
        """Number of videos."""
        return len(self.lengths)


def inspect(data: str, index: Index, frame_pattern: str | None = None) -> Metadata:
    """Everything the settings depend on."""
    names, classes = list(index.names), [index.classes[label] for label in index.labels.tolist()]
    rule, grouping = group_rule(names, classes)
    short_sides, mean, std, decode_s = inspect_frames(index)
    return Metadata(
        data=data,
        frame_pattern=frame_pattern,
        classes=list(index.classes),
        counts=np.bincount(index.labels, minlength=len(index.classes)).tolist(),
        lengths=np.asarray(index.frame_counts).tolist(),
        short_sides=short_sides,
        mean=mean,
        std=std,
        rule=rule,
        grouping=grouping,
        example=names[0],
        sided=flip_guard(index.classes),
        notes=list(index.notes),
        decode_s=decode_s,
    )


def group_rule(names: list[str], classes: list[str]) -> tuple[DataSettings, Sources]:
    """(group_by and group_regex, the groups they give): by a word for a piece at the end of the names, or as auto does.

    What `group_by=auto` recognizes is named, so that more videos can't change it, unless some names don't fit it.
    """
    auto = find_sources(names, classes, DataSettings())
    candidates = []
    if auto.grammar not in ("hmdb51", "ucf101") and (regex := _piece_regex(names)):
        candidates.append(DataSettings(group_by="regex", group_regex=regex))
    candidates.append(NAMED[auto.grammar])
    for rule in candidates:
        try:
            found = find_sources(names, classes, rule)
        except UserError:  # a name that does not fit, or a class that would have a single group
            continue
        same = found.groups == auto.groups
        if same if rule.group_by != "regex" else len(set(found.groups)) < len(names):
            return rule, found
    return DataSettings(), auto


def _piece_regex(names: list[str]) -> str | None:
    found = [PIECE.match(name.rpartition("/")[2]) for name in names]
    words = {match.group(2) if match else None for match in found}
    if len(words) != 1 or None in words:
        return None
    return rf"^(.+){re.escape(words.pop() or '')}\d+$"


def inspect_frames(index: Index) -> tuple[list[int], list[float], list[float], float]:
    """(short sides, mean, std, decoding time) of some frames from the middle of videos all over the set."""
    videos = np.linspace(0, len(index) - 1, min(SAMPLE, len(index))).round().astype(int)
    sides, means, squares, seconds = [], [], [], []
    for video in videos.tolist():
        begin = time.thread_time()
        try:
            pixels = decode_frame(index.frame_bytes(video, int(index.frame_counts[video]) // 2))
        except (OSError, DamagedFrame):
            continue  # `vac audit` and the training count and name damaged frames
        seconds.append(time.thread_time() - begin)
        sides.append(min(pixels.shape[:2]))
        values = pixels.reshape(-1, 3) / 255.0
        means.append(values.mean(axis=0))
        squares.append((values**2).mean(axis=0))
    if not sides:
        raise UserError(f"{index.root}: none of {len(videos)} frames that were tried can be decoded: see vac audit")
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, 1e-4))
    mean, std = ([round(float(x), 3) for x in values] for values in (mean, std))
    return sides, mean, std, statistics.median(seconds)
