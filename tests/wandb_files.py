"""What W&B has written in its offline mode, read from its files: records behind a LevelDB log."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file whose checksums are right; the torn end of a killed run is left out."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", path
    place, joined = 7, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        check, size, kind = struct.unpack("<IHB", data[place : place + HEADER])
        body = data[place + HEADER : place + HEADER + size]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(body) < size:
            return
        assert zlib.crc32(bytes([kind]) + body) == check, f"{path}: damaged at {place}"
        place += HEADER + size
        joined = body if kind in (FULL, FIRST) else joined + body
        if kind in (FULL, LAST):
            yield joined


class OfflineRun:
    """One offline-run-* folder: its id, configuration, history rows, artifacts and exit status."""

    def __init__(self, folder: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        (self.path,) = folder.glob("*.wandb")
        self.id = ""
        self.exit_code: int | None = None
        self.config: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.artifacts: list[str] = []
        for payload in payloads(self.path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id = record.run.run_id
                self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                items = record.history.item
                self.rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            elif kind == "artifact":
                self.artifacts.append(record.artifact.name)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


def offline_runs(run: Path) -> list[OfflineRun]:
    """All parts of a run's W&B history, in the order of time."""
    return [OfflineRun(folder) for folder in sorted((run / "wandb").glob("offline-run-*"))]
