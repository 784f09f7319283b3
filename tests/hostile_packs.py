"""Packed sets with random faults in them, for `test_hostile_files.py` and `long/packs.py`."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from tests.test_index import tree
from vac_ddp.data.index import open_index
from vac_ddp.data.pack_writer import pack
from vac_ddp.errors import UserError
from vac_ddp.files import sha256
from vac_ddp.settings import DataSettings

VALUES = (None, True, -1, 0, 1, 3, 255, 10**15, 2**62, 2**64, 1.5, float("nan"), "", "x", "../x", "/etc/passwd")
VALUES += ("a\0b", "shard-00000.bin", [], {}, [1], {"file": "x"})
NUMBERS = (-(2**63), -(10**15), -2, -1, 0, 1, 2, 200, 10**6, 10**15, 2**62, 2**63 - 1)
MEMORY = 8 << 20  # bytes that a set of 10 KB may take to open and read


def good_pack(folder: Path) -> dict[str, bytes]:
    """The files of a labelled packed set of 4 videos in two shards."""
    tree(folder / "data", count=4)
    pack(folder / "data", folder / "good", settings=DataSettings(cache=str(folder / "cache")), shard_bytes=3000)
    return {path.name: path.read_bytes() for path in (folder / "good").iterdir()}


def attack(good: dict[str, bytes], target: Path, rng: np.random.Generator) -> str:
    """Write `good` to `target`, put one to three faults into it and try it; what came of it.

    Everything but a UserError of one line, or a set that can be read whole, is raised; so is a use of memory that the
    size of the files does not justify.
    """
    target.mkdir(exist_ok=True)
    for name, data in good.items():
        (target / name).write_bytes(data)
    for _ in range(rng.integers(1, 4)):
        (_edit_json, _edit_arrays, _edit_offsets, _edit_bytes)[rng.integers(4)](target, rng)
    tracemalloc.start()
    try:
        labelled = bool(rng.integers(2))
        index = open_index(target, labelled=labelled, settings=DataSettings(on_bad_video="skip", max_damaged=1))
        for video in range(len(index)):
            for frame in range(index.frame_counts[video]):
                index.frame_bytes(video, frame)
                index.frame_name(video, frame)
        if labelled:
            assert 0 <= index.labels.min() <= index.labels.max() < len(index.classes)
        came = "read"
    except UserError as error:
        came = "refused" if "\n" not in str(error) else "several lines"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak} bytes"
    return came


def _pick(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _edit_json(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "pack.json"
    try:
        facts = json.loads(path.read_text())
    except ValueError:
        return
    node, key = {"": facts}, ""
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = _pick(rng, list(node) if isinstance(node, dict) else range(len(node)))
    if rng.random() < 0.2 and key != "":
        del node[key]
    else:
        node[key] = _pick(rng, VALUES)
    if key == "":
        facts = node[""]
    path.write_text(json.dumps(facts))


def _edit_arrays(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "index.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    except Exception:  # an earlier fault
        return
    name = _pick(rng, sorted(arrays))
    arrays[name] = _changed(arrays[name], rng)
    if arrays[name] is None:
        del arrays[name]
    if name == "facts" and name in arrays and rng.random() < 0.7:
        facts = {"version": 1, "base": "", "classes": ["run", "walk"], "watched": {}, "strays": {}}
        facts["strays"] = {"hidden": 0, "stray": 0, "examples": []}
        facts[_pick(rng, list(facts))] = _pick(rng, VALUES)
        arrays[name] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    (np.savez_compressed if rng.random() < 0.1 else np.savez)(path, **arrays)
    _correct_sizes(folder)


def _edit_offsets(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "offsets.npy"
    try:
        offsets = _changed(np.load(path, allow_pickle=False), rng)
    except Exception:  # an earlier fault
        return
    if offsets is None:
        path.unlink()
    else:
        np.save(path, offsets)
    _correct_sizes(folder)


def _changed(array: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """An array with another value, type, shape or length; None: without it."""
    array = array.copy()
    how = rng.integers(7)
    if how < 3 and array.size:
        number = _pick(rng, NUMBERS)
        array.flat[rng.integers(array.size)] = np.int64(number).astype(array.dtype) if number < 2**63 else 0
    elif how == 3:
        return array[: len(array) // 2] if array.ndim else array
    elif how == 4:
        return array.astype(_pick(rng, ("f8", "i4", "u1", ">i8", "U3")))
    elif how == 5:
        return _pick(rng, (array[None], np.concatenate([array, array]), array[:0], np.zeros((), array.dtype)))
    elif how == 6:
        return None
    return array


def _edit_bytes(folder: Path, rng: np.random.Generator) -> None:
    path = _pick(rng, sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 5)):
        if data:
            data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
    path.write_bytes(data[: rng.integers(len(data) + 1)] if rng.random() < 0.2 else data)
    _correct_sizes(folder)


def _correct_sizes(folder: Path) -> None:
    """Let pack.json have the size and hash of every file, as somebody would who means harm."""
    mark = folder / "pack.json"
    try:
        facts = json.loads(mark.read_text())
        for entry in [*facts["shards"], *facts["files"]]:
            path = folder / entry["file"]
            if path.is_file():
                entry["bytes"], entry["sha256"] = path.stat().st_size, sha256(path)
    except Exception:  # an earlier fault
        return
    mark.write_text(json.dumps(facts))
