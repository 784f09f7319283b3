"""The features file: what a frozen encoder gave for every view of every video. Read by numpy alone, no pickle.

    pooled   (V, n, D)           mean over the time steps of `steps`; V videos, n views each, D features
    steps    (V, n, T', D)       features of each time step, only where they were asked for
    ids      (V,) text           the video's name in the data ("00012", "wave/clip_3"), in the data's order
    labels   (V,) int64          class number, -1 where it is not known
    groups   (V,) text           the video's group, by the rule of data.group_by; empty where it is not known
    damaged  (V,) int64          frames of the clips that could not be read
    failed   (V,) bool           nothing could be read: the row holds zeros
    views    (n, 3) int64        window, crop, mirrored (0 or 1) of each view
    classes  (K,) text           class names
    about    () text             JSON: format, weights (SHA-256), settings, fingerprint, versions

pooled and steps are float32 or float16. A zip of .npy files as `np.savez` writes it; every array begins at a multiple
of 64 bytes, so that it can be memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np

from vac_ddp.results.npz_file import Blocks, Format, read_videos, text_array, write_npz
from vac_ddp.schema import Array, mismatch

NAME = "features.npz"
FORMAT = 1
DTYPES = {"float32": "<f4", "float16": "<f2"}


class FeaturesArrays(TypedDict):
    """The arrays of the file, as the module's head describes them."""

    pooled: Annotated[np.ndarray, Array(kind="f", shape=("videos", "views", "width"), mapped=True)]
    steps: NotRequired[Annotated[np.ndarray, Array(kind="f", shape=("videos", "views", "steps", "width"), mapped=True)]]
    ids: Annotated[np.ndarray, Array(kind="U", shape=("videos",))]
    labels: Annotated[np.ndarray, Array(kind="i", shape=("videos",), low=-1)]
    groups: Annotated[np.ndarray, Array(kind="U", shape=("videos",))]
    damaged: Annotated[np.ndarray, Array(kind="i", shape=("videos",), low=0)]
    failed: Annotated[np.ndarray, Array(kind="b", shape=("videos",))]
    views: Annotated[np.ndarray, Array(kind="i", shape=("views", 3), low=0)]
    classes: Annotated[np.ndarray, Array(kind="U", shape=("classes",))]
    about: Annotated[np.ndarray, Array(kind="U", shape=())]


class About(TypedDict):
    """The JSON text `about`: what is read of it."""

    format: int
    weights: str
    fingerprint: dict[str, str]
    settings: NotRequired[dict[str, Any]]
    versions: NotRequired[dict[str, str]]


_FORM = Format(
    name=NAME,
    noun="features",
    command="vac embed",
    number=FORMAT,
    arrays=FeaturesArrays,
    about=About,
    remedy="it is not a features file, or is damaged: run `vac embed` again",
)


@dataclass(kw_only=True)
class FeaturesHead:
    """All of a features file but its features."""

    ids: list[str]
    labels: np.ndarray
    groups: list[str]
    damaged: np.ndarray
    failed: np.ndarray
    views: np.ndarray
    classes: list[str]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Features(FeaturesHead):
    """A whole features file; shapes and meaning as in the module's head. Read from a file, both arrays are mapped."""

    pooled: np.ndarray
    steps: np.ndarray | None = None
    path: Path | None = None


def write_features(
    path: str | Path,
    head: FeaturesHead,
    blocks: Mapping[str, Iterable[np.ndarray]],
    *,
    dtype: str,
    width: int,
    steps: int | None = None,
) -> None:
    """Write a features file atomically; one block is in memory at a time.

    blocks: "pooled" in blocks (c, n, width), and "steps" (c, n, steps, width) where `steps` is given, in the order of
    `ids`. dtype: "float32" or "float16". Raises ValueError if the blocks do not add up to the ids.
    """
    shape = (len(head.ids), len(head.views))
    arrays: dict[str, np.ndarray | Blocks] = {
        "pooled": Blocks(dtype=DTYPES[dtype], shape=(*shape, width), blocks=blocks["pooled"])
    }
    if steps is not None:
        arrays["steps"] = Blocks(dtype=DTYPES[dtype], shape=(*shape, steps, width), blocks=blocks["steps"])
    about = {"format": FORMAT, **head.about}
    small = {
        "ids": text_array(head.ids),
        "labels": np.asarray(head.labels, np.int64),
        "groups": text_array(head.groups),
        "damaged": np.asarray(head.damaged, np.int64),
        "failed": np.asarray(head.failed, np.bool_),
        "views": np.asarray(head.views, np.int64),
        "classes": text_array(head.classes),
        "about": np.array(json.dumps(about, ensure_ascii=False, sort_keys=True)),
    }
    write_npz(path, {**arrays, **small})


def read_features(path: str | Path) -> Features:
    """Read a features file, or the one in a folder; pooled and steps are memory-mapped, read-only.

    Everything is checked once, features included. UserError if the file is missing or invalid.
    """
    path, values = read_videos(path, _FORM)
    for name in ("pooled", "steps"):
        if name not in values:
            continue
        if values[name].dtype.str not in DTYPES.values():
            raise mismatch(path, name, "float32 or float16", str(values[name].dtype), _FORM.remedy)
        if 0 in values[name].shape[1:]:
            raise mismatch(path, name, "at least one view, step and feature", str(values[name].shape), _FORM.remedy)
    return Features(path=path, **values)
