"""The index on the disk: one npz of plain arrays and a JSON text, written atomically, read without pickle."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vac_ddp.data.frame_names import FrameNames, Texts
from vac_ddp.data.scan import Scan, Strays
from vac_ddp.files import write_atomic

VERSION = 1


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
    np.savez(stream, **arrays)


def read_scan(path: Path) -> Scan | None:
    """The scan in `path`; None where there is no such file, or one of another version, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            if facts["version"] != VERSION:
                return None
            frames = FrameNames(
                **{name: stored[name] for name in ("starts", "style", "first", "step", "count", "pads")},
                prefixes=Texts(stored["prefixes"], stored["prefixes_at"]),
                suffixes=Texts(stored["suffixes"], stored["suffixes_at"]),
            )
            return Scan(
                base=facts["base"],
                classes=facts["classes"],
                watched=facts["watched"],
                strays=Strays(**facts["strays"]),
                notes=facts.get("notes", []),
                names=Texts(stored["names"], stored["names_at"]),
                frames=frames,
                **{name: stored[name] for name in ("labels", "states", "damaged", "times")},
            )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def _texts(name: str, texts: Texts) -> dict[str, np.ndarray]:
    return {name: texts.blob, f"{name}_at": texts.offsets}
