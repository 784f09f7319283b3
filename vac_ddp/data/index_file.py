"""The index on the disk: one npz of plain arrays and a JSON text, written atomically, read without pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NotRequired, TypedDict

import numpy as np

from vac_ddp.data.frame_names import NO_NUMBER, FrameNames, Texts
from vac_ddp.data.scan import Scan, Strays
from vac_ddp.data.video_scan import STATES
from vac_ddp.errors import UserError
from vac_ddp.files import write_atomic
from vac_ddp.schema import Array, Count, check, mismatch, parse_json, read_npz
from vac_ddp.settings import DataSettings

VERSION = 1
_UNKNOWN = "\0"  # pattern of a scan that was made before types of pictures were told apart: it is made again
_MOST = 10**15  # frames, and their numbers: sums of them stay far from the end of int64


class StrayFacts(TypedDict):
    """`Strays` as it is stored."""

    hidden: Count
    stray: Count
    examples: list[str]


class ScanFacts(TypedDict):
    """The JSON text in the file."""

    version: int
    base: str
    classes: list[str]
    watched: dict[str, int]
    strays: StrayFacts
    notes: NotRequired[list[str]]
    pattern: NotRequired[str | None]


class ScanArrays(TypedDict):
    """The arrays in the file: V videos, R runs of frame names in S styles."""

    facts: Annotated[np.ndarray, Array(kind="u1", shape=("bytes of facts",))]
    labels: Annotated[np.ndarray, Array(kind="i8", shape=("V",), low=-1)]
    states: Annotated[np.ndarray, Array(kind="u1", shape=("V",), high=len(STATES) - 1)]
    damaged: Annotated[np.ndarray, Array(kind="i8", shape=("V",), low=0, high=_MOST)]
    times: Annotated[np.ndarray, Array(kind="i8", shape=("V",))]
    starts: Annotated[np.ndarray, Array(kind="i8", shape=("V + 1",), low=0)]
    style: Annotated[np.ndarray, Array(kind="i4", shape=("R",), low=0)]
    first: Annotated[np.ndarray, Array(kind="i8", shape=("R",), low=0, high=10**18)]
    step: Annotated[np.ndarray, Array(kind="i8", shape=("R",), low=1, high=10**18)]
    count: Annotated[np.ndarray, Array(kind="i8", shape=("R",), low=1, high=_MOST)]
    pads: Annotated[np.ndarray, Array(kind="i4", shape=("S",), low=NO_NUMBER, high=255)]
    names: Annotated[np.ndarray, Array(kind="u1", shape=("bytes of names",))]
    names_at: Annotated[np.ndarray, Array(kind="i8", shape=("V + 1",), low=0)]
    prefixes: Annotated[np.ndarray, Array(kind="u1", shape=("bytes of prefixes",))]
    prefixes_at: Annotated[np.ndarray, Array(kind="i8", shape=("S + 1",), low=0)]
    suffixes: Annotated[np.ndarray, Array(kind="u1", shape=("bytes of suffixes",))]
    suffixes_at: Annotated[np.ndarray, Array(kind="i8", shape=("S + 1",), low=0)]
    files: NotRequired[Annotated[np.ndarray, Array(kind="b1", shape=("V",))]]


def write_scan(path: Path, scan: Scan) -> None:
    """Write `scan` to `path`, whole or not at all. Raises OSError where that is impossible."""
    write_atomic(path, lambda stream: dump_scan(stream, scan))


def dump_scan(stream: BinaryIO, scan: Scan) -> None:
    """Write `scan` as npz into an open file."""
    frames = scan.frames
    facts = {
        "version": VERSION,
        "base": scan.base,
        "classes": scan.classes,
        "watched": scan.watched,
        "strays": dataclasses.asdict(scan.strays),
        "notes": scan.notes,
        "pattern": scan.pattern,
    }
    arrays: dict[str, Any] = {
        "facts": np.frombuffer(json.dumps(facts).encode("ascii"), np.uint8),
        "labels": scan.labels,
        "states": scan.states,
        "damaged": scan.damaged,
        "times": scan.times,
        **{name: getattr(frames, name) for name in ("starts", "style", "first", "step", "count", "pads")},
        **_texts("names", scan.names),
        **_texts("prefixes", frames.prefixes),
        **_texts("suffixes", frames.suffixes),
    }
    if scan.files is not None:
        arrays["files"] = scan.files
    np.savez(stream, **arrays)


def read_scan(path: Path) -> Scan | None:
    """The scan in `path`; None where there is no such file, or one of another version, or a damaged one."""
    try:
        return load_scan(path, remedy="it is made again")
    except (UserError, OSError):
        return None


def load_scan(path: Path, *, remedy: str) -> Scan:
    """The scan in `path`. Raises UserError for a file that is missing, damaged, of another version, or contradicts
    itself.
    """
    try:
        stored = read_npz(path, ScanArrays, remedy=remedy)
        facts = check(parse_json(stored["facts"].tobytes()), ScanFacts, file=path, remedy=remedy)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: facts: expected JSON, found {error}; {remedy}") from None
    if facts["version"] != VERSION:
        raise mismatch(path, "version", str(VERSION), str(facts["version"]), remedy)
    _check_consistent(stored, facts, path, remedy)
    frames = FrameNames(
        **{name: stored[name] for name in ("starts", "style", "first", "step", "count", "pads")},
        prefixes=Texts(stored["prefixes"], stored["prefixes_at"]),
        suffixes=Texts(stored["suffixes"], stored["suffixes_at"]),
    )
    return Scan(
        base=facts["base"],
        classes=facts["classes"],
        watched=facts["watched"],
        strays=Strays(**{name: facts["strays"][name] for name in ("hidden", "stray", "examples")}),
        notes=facts.get("notes", []),
        pattern=facts.get("pattern", _UNKNOWN),
        names=Texts(stored["names"], stored["names_at"]),
        frames=frames,
        files=stored.get("files"),
        **{name: stored[name] for name in ("labels", "states", "damaged", "times")},
    )


def _check_consistent(stored: dict[str, np.ndarray], facts: ScanFacts, path: Path, remedy: str) -> None:
    """Raise UserError where arrays point outside each other, or a name leads out of the data folder."""

    def need(good: bool, field: str, wanted: str) -> None:
        if not good:
            raise mismatch(path, field, wanted, "others", remedy)

    rising = {"starts": len(stored["style"]), **{f"{n}_at": len(stored[n]) for n in ("names", "prefixes", "suffixes")}}
    for name, end in rising.items():
        values = stored[name]
        good = len(values) > 0 and values[0] == 0 and values[-1] == end and bool((np.diff(values) >= 0).all())
        need(good, name, f"offsets that rise from 0 to {end}")
    for one, other in (("starts", "names_at"), ("prefixes_at", "suffixes_at")):
        need(len(stored[one]) == len(stored[other]), one, f"as many as {other}")
    videos, styles = len(stored["labels"]), len(stored["pads"])
    need(len(stored["starts"]) == videos + 1, "starts", f"{videos + 1} offsets")
    need(len(stored["prefixes_at"]) == styles + 1, "prefixes_at", f"{styles + 1} offsets")
    need(not (stored["style"] >= styles).any(), "style", f"numbers below {styles}")
    need(not (stored["labels"] >= max(1, len(facts["classes"]))).any(), "labels", "numbers of classes")
    need(len(set(facts["classes"])) == len(facts["classes"]), "classes", "different names")
    need(float(stored["count"].sum(dtype=np.float64)) <= _MOST, "count", f"at most {_MOST} frames")
    last = stored["first"] + stored["step"].astype(np.float64) * stored["count"]
    need(not (last > 2.0**62).any(), "step", "frame numbers below 2^62")
    need(not any((stored[name] == 0).any() for name in ("names", "prefixes", "suffixes")), "names", "text without NUL")
    slash = ord("/")
    need(not any((stored[name] == slash).any() for name in ("prefixes", "suffixes")), "prefixes", "names of files")


def _texts(name: str, texts: Texts) -> dict[str, np.ndarray]:
    return {name: texts.blob, f"{name}_at": texts.offsets}


# ---------------------------------------------------------------- where it is kept


def cache_name(root: Path, *, labelled: bool, settings: DataSettings) -> str:
    """The file name under which the scan of `root` is kept."""
    where = os.path.realpath(root)
    pattern = f"\n{settings.frame_pattern}" if settings.frame_pattern else ""
    key = hashlib.sha256(f"{where}\n{labelled}{pattern}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return f"index-{key}.npz"


def cache_path(root: Path, *, labelled: bool, settings: DataSettings) -> Path | None:
    """Where the scan of `root` is kept; None: the setting names no folder, and this user has no home."""
    folder = cache_folder(settings)
    return None if folder is None else folder / cache_name(root, labelled=labelled, settings=settings)


def cache_folder(settings: DataSettings) -> Path | None:
    """Where scans and frames are kept; None: the setting names no folder, and this user has no home."""
    if settings.cache:
        return Path(settings.cache).expanduser()
    try:
        return Path.home() / ".cache" / "vac_ddp"
    except RuntimeError:  # no HOME and no passwd entry, as in a container with a user id of its own
        return None
