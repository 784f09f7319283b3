"""What the logits of a prediction depend on, as short texts by name: results count only where all of them agree.

Left out is what changes a logit by rounding alone and may differ between the starts of one prediction: the number of
ranks and loader processes, and the clips of a pass. Files without a `format`, of the first version, recorded less.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from vac_ddp.checks import leaves
from vac_ddp.data.dataset import Videos
from vac_ddp.settings import REMOVED, Config
from vac_ddp.version import installed

FORMAT = "2"
RECORDED_AT_FIRST = ("weights", "data", "precision")
SETTINGS = ("clip.", "predict.views.", "data.reduced_decode", "data.frame_pattern", "predict.compile")
LATER = (
    "predict.keep_tokens",
    "data.cache_format",
    "data.video_short_side",
)  # settings of a later version: recorded where they are not the default
SAMPLED = 100  # videos of which a frame is hashed
LIBRARIES = ("torch", "simplejpeg", "pillow", "pillow-simd", "torchvision")  # they compute, decode or resample


def fingerprint(
    config: Config, index: Videos, *, weights: str, precision: str, device: str, version: str, frames: bool = True
) -> dict[str, str]:
    """The fingerprint of predicting the videos of `index`.

    weights: SHA-256 of their file, which also holds the model's settings, mean, std and classes; device: its type;
    version: of vac_ddp; frames: read some frames, for one rank to do.
    """
    return {
        "format": FORMAT,
        "weights": weights[:16],
        "data": data_mark(index),
        "frames": frames_mark(index) if frames else "",
        "device": device,
        "precision": precision,
        **{_short(name): str(_value(config, name)) for name in leaves() if name.startswith(SETTINGS)},
        **{name: str(_value(config, name)) for name in LATER if _value(config, name) != _value(Config(), name)},
        "versions": ", ".join([f"vac_ddp {version}", *(f"{name} {installed(name) or 'none'}" for name in LIBRARIES)]),
    }


def differences(stored: dict[str, str], now: dict[str, str]) -> tuple[list[str], list[str]]:
    """(what differs between two fingerprints, names that the stored one is too old to have).

    A name that either lacks is a difference. Only in a fingerprint without a format a setting that was not recorded
    counts as its default, and what else was not recorded as equal. Harmless values of removed settings do not count.
    """
    old = "format" not in stored
    if old:
        stored = {("data.decode" if name == "decode" else name): value for name, value in stored.items()}
    stored = {n: value for n, value in stored.items() if n not in REMOVED or value not in REMOVED[n].harmless}
    missing = [name for name in now if old and name not in stored and name not in RECORDED_AT_FIRST]
    defaults = {_short(name): str(_value(Config(), name)) for name in leaves() if name.startswith(SETTINGS)}
    before = stored | {name: defaults.get(name, now[name]) for name in missing}
    names = [*now, *(name for name in before if name not in now)]
    changed = [
        f"{name} ({before.get(name, 'none')} there, {now.get(name, 'none')} now)"
        for name in names
        if before.get(name) != now.get(name)
    ]
    return changed, [name for name in missing if name != "format"]


def data_mark(index: Videos) -> str:
    """What tells one set of videos from another: how many, and a hash over their names and numbers of frames."""
    digest = hashlib.sha256("\n".join(index.names).encode("utf-8", "surrogateescape"))
    digest.update(np.asarray(index.frame_counts, "<i8").tobytes())
    return f"{len(index)} videos, {digest.hexdigest()[:16]}"


def frames_mark(index: Videos) -> str:
    """A hash over the middle frames of some videos, spread over all: the same names may come to hold other pictures."""
    digest = hashlib.sha256()
    for video in sorted({round(place) for place in np.linspace(0, len(index) - 1, min(SAMPLED, len(index))).tolist()}):
        frame = int(index.frame_counts[video]) // 2
        try:
            data = bytes(index.reader(video)(frame)) if index.frame_counts[video] else b""
        except OSError:
            data = b""
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:16]


def _short(name: str) -> str:
    return name.removeprefix("predict.") if name.startswith("predict.views.") else name


def _value(config: Config, name: str) -> object:
    return functools.reduce(getattr, name.split("."), config)
