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

from vac_ddp.errors import UserError
from vac_ddp.results.npz_file import Blocks, text_array, write_npz
from vac_ddp.schema import Array, check, mismatch, parse_json, read_npz
from vac_ddp.text import printable

NAME = "features.npz"
FORMAT = 1
DTYPES = {"float32": "<f4", "float16": "<f2"}
_REMEDY = "it is not a features file, or is damaged: run `vac embed` again"


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
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / NAME
    try:
        values = read_npz(path, FeaturesArrays, remedy=_REMEDY)
        about = check(parse_json(str(values["about"])), About, file=f"{path}: about", remedy=_REMEDY)
    except FileNotFoundError:
        raise UserError(f"no features file at {path}: `vac embed` writes one") from None
    except ValueError as error:
        raise UserError(f"{path}: about: expected JSON, found {error}; {_REMEDY}") from None
    if about["format"] != FORMAT:
        raise UserError(f"{path} has features format {about['format']}, this version reads {FORMAT}")
    _check(path, values)
    ids, groups, classes = (
        [printable(text) for text in values[name].tolist()] for name in ("ids", "groups", "classes")
    )
    for name, texts in (("ids", ids), ("classes", classes)):
        if len(set(texts)) < len(texts):
            raise mismatch(path, name, "different names", "one twice", _REMEDY)
    return Features(
        pooled=values["pooled"],
        steps=values.get("steps"),
        ids=ids,
        labels=values["labels"],
        groups=groups,
        damaged=values["damaged"],
        failed=values["failed"],
        views=values["views"],
        classes=classes,
        about=about,
        path=path,
    )


def _check(path: Path, values: dict[str, np.ndarray]) -> None:
    """What the declaration of the arrays does not say: dtypes, sizes above zero, labels that are classes."""
    features = [name for name in ("pooled", "steps") if name in values]
    for name in features:
        if values[name].dtype.str not in DTYPES.values():
            raise mismatch(path, name, "float32 or float16", str(values[name].dtype), _REMEDY)
        if 0 in values[name].shape[1:]:
            raise mismatch(path, name, "at least one view, step and feature", str(values[name].shape), _REMEDY)
    classes = len(values["classes"])
    if values["labels"].size and values["labels"].max() >= classes:
        raise mismatch(path, "labels", f"numbers below {classes}", str(values["labels"].max()), _REMEDY)
