"""The views file: what a model said about every view of every video. Read by numpy alone, `np.load(path)`, no pickle.

    logits   (V, n, K) float32   before any softmax, one row a view; V videos, n views each, K classes
    ids      (V,) text           the video's name in the data ("00012", "wave/clip_3"), in the data's order
    labels   (V,) int64          class number, -1 where it is not known
    sources  (V,) text           where the video was cut from, empty where it is not known
    damaged  (V,) int64          frames of the scored clips that could not be read
    failed   (V,) bool           nothing could be read: the row holds the logarithm of the class prior
    views    (n, 3) int64        window, crop, mirrored (0 or 1) of each view
    classes  (K,) text           class names
    about    () text             JSON: format, weights (SHA-256), settings, versions

A zip of .npy files as `np.savez` writes it, with fixed dates: the same content gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np

from vac_ddp.results.npz_file import Blocks, Format, read_videos, text_array, write_npz
from vac_ddp.schema import Array, Count, mismatch

NAME = "views.npz"
FORMAT = 1
VIEW_COLUMNS = ("window", "crop", "flip")


class ViewsArrays(TypedDict):
    """The arrays of the file, as the module's head describes them."""

    logits: Annotated[np.ndarray, Array(kind="f", shape=("videos", "views", "classes"))]
    ids: Annotated[np.ndarray, Array(kind="U", shape=("videos",))]
    classes: Annotated[np.ndarray, Array(kind="U", shape=("classes",))]
    views: Annotated[np.ndarray, Array(kind="i", shape=("views", 3), low=0)]
    labels: Annotated[np.ndarray, Array(kind="i", shape=("videos",), low=-1)]
    sources: Annotated[np.ndarray, Array(kind="U", shape=("videos",))]
    damaged: Annotated[np.ndarray, Array(kind="i", shape=("videos",), low=0)]
    failed: Annotated[np.ndarray, Array(kind="b", shape=("videos",))]
    about: Annotated[np.ndarray, Array(kind="U", shape=())]


class About(TypedDict):
    """The JSON text `about`: what is read of it."""

    format: int
    weights: NotRequired[str]
    fingerprint: NotRequired[dict[str, str]]
    epoch: NotRequired[Count]
    averaged: NotRequired[Count]


_FORM = Format(
    name=NAME,
    noun="views",
    command="vac predict",
    number=FORMAT,
    arrays=ViewsArrays,
    about=About,
    remedy="it is no views file, or is damaged: predict it anew",
)


@dataclass(kw_only=True)
class ViewsHead:
    """All of a views file but its logits."""

    ids: list[str]
    classes: list[str]
    views: np.ndarray
    labels: np.ndarray
    sources: list[str]
    damaged: np.ndarray
    failed: np.ndarray
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Views(ViewsHead):
    """A whole views file; shapes and meaning as in the module's head."""

    logits: np.ndarray
    path: Path | None = None

    @property
    def labelled(self) -> bool:
        """Whether any video has a label."""
        return bool((self.labels >= 0).any())


def write_views(path: str | Path, head: ViewsHead, chunks: Iterable[np.ndarray]) -> None:
    """Write a views file atomically; `chunks` are (c, n, K) float32 blocks of the logits, in the order of `ids`.

    Only one chunk is in memory at a time. Raises ValueError if the chunks do not add up to the ids.
    """
    shape = (len(head.ids), len(head.views), len(head.classes))
    write_npz(path, {"logits": Blocks(dtype="<f4", shape=shape, blocks=chunks), **_small_arrays(head)})


def read_views(path: str | Path) -> Views:
    """Read a views file, or the one in a folder of predictions. UserError if there is none, or no good one."""
    path, values = read_videos(path, _FORM)
    if not len(values["views"]):
        raise mismatch(path, "views", "at least one view", "none", _FORM.remedy)
    return Views(path=path, **values)


def log_prior(counts: list[int] | None, classes: int) -> np.ndarray:
    """Logarithm of the class prior (K,) float32: the shares in the training part, or equal ones where not known.

    A class that was never trained on counts as half a video, so that its logarithm is a number.
    """
    if counts is None or len(counts) != classes or sum(counts) <= 0:
        return np.full(classes, -math.log(classes), np.float32)
    shares = np.maximum(np.asarray(counts, np.float64), 0.5)
    return np.log(shares / shares.sum()).astype(np.float32)


def _small_arrays(head: ViewsHead) -> dict[str, np.ndarray]:
    about = {"format": FORMAT, **head.about}
    return {
        "ids": text_array(head.ids),
        "labels": np.asarray(head.labels, np.int64),
        "sources": text_array(head.sources),
        "damaged": np.asarray(head.damaged, np.int64),
        "failed": np.asarray(head.failed, np.bool_),
        "views": np.asarray(head.views, np.int64),
        "classes": text_array(head.classes),
        "about": np.array(json.dumps(about, ensure_ascii=False, sort_keys=True)),
    }
