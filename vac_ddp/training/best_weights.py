"""The best weights of a run: kept in memory until they are on the disk, and checked at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vac_ddp import files
from vac_ddp.models.torch_file import write_tensors

FORMAT = 1


class BestFile:
    """best_<model>.pt. `written` is what is known of the file on the disk: epoch, bytes and sha256, or None."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: dict[str, Any] | None = None
        self.pending: tuple[int, dict[str, Any]] | None = None

    @property
    def empty(self) -> bool:
        """Whether there is neither a file nor anything to write."""
        return self.written is None and self.pending is None

    def offer(self, content: dict[str, Any], epoch: int) -> None:
        """Take the content of the file (on the CPU), to be written by `write` instead of an earlier one."""
        self.pending = (epoch, {"format": FORMAT, **content})

    def write(self) -> None:
        """Write what is pending. It stays pending where that fails (OSError, or torch.save's RuntimeError)."""
        if self.pending is None:
            return
        epoch, content = self.pending
        size, digest = write_tensors(self.path, content)
        self.written, self.pending = {"epoch": epoch, "bytes": size, "sha256": digest}, None

    def intact(self) -> bool:
        """Whether the file on the disk is what was written, by size and hash."""
        return self.written is not None and is_file(self.path, self.written)


def is_file(path: Path, record: dict[str, Any]) -> bool:
    """Whether `path` is the file that `record` (bytes, sha256) describes."""
    try:
        return path.stat().st_size == record["bytes"] and files.sha256(path) == record["sha256"]
    except OSError:
        return False
