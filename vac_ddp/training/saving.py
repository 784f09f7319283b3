"""Saving a run: rank 0 writes in the background, every rank learns what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vac_ddp.errors import UserError
from vac_ddp.runtime import distributed
from vac_ddp.training import checkpoint
from vac_ddp.training.best_weights import BestFile


@dataclass(kw_only=True)
class Saver:
    """The files of a run. Every rank has one; `writer` is None on other ranks than 0, and so is all that it writes.

    facts: what every checkpoint says beside its state. failed: an error that the other ranks do not know yet.
    """

    folder: Path
    writer: checkpoint.Writer | None
    best: BestFile
    facts: dict[str, Any]
    on_failure: Literal["continue", "stop"]
    say: Callable[..., None]
    last: float = field(default_factory=time.monotonic)
    failed: str | None = None
    identity: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.writer is not None:
            self.identity = _identity(self.folder)

    def due(self, every_minutes: float | None) -> bool:
        """Whether rank 0 wants to save because the last save was so long ago."""
        return (
            self.writer is not None and every_minutes is not None and time.monotonic() - self.last > 60 * every_minutes
        )

    def poll(self) -> bool:
        """Whether the save in flight has failed since the last call, without waiting for it."""
        if self.writer is not None:
            self._take(self.writer.poll())
        failed, self.failed = self.failed, None
        return failed is not None

    def join(self) -> str | None:
        """Wait for the save in flight; what went wrong with it, on every rank. UserError: the directory is gone."""
        failed, gone = None, False
        if self.writer is not None:
            self._take(self.writer.join())
            failed, self.failed = self.failed, None
            gone = _identity(self.folder) != self.identity
        failed, gone = distributed.broadcast_object((failed, gone))
        if gone:
            raise UserError(
                f"{self.folder} was removed or moved during training: the run ends, its files are not there"
            )
        return failed

    def start(self, step: int, state: dict[str, Any], *, epoch: int) -> None:
        """Begin to write a snapshot (on the CPU), and the best weights that are pending. After `join`."""
        self.last = time.monotonic()
        if self.writer is not None:
            facts = {**self.facts, "epoch": epoch, "saved": time.strftime("%Y-%m-%dT%H:%M:%S")}
            self.writer.start(step, state, facts, best=self.best)

    def answer_failure(self) -> None:
        """What checkpoint.on_failure says, on every rank."""
        if self.on_failure == "stop":
            raise RuntimeError("a checkpoint could not be written (rank 0 says why); checkpoint.on_failure=stop")
        self.say("rank 0 could not write a checkpoint; going on, the one before still counts", everywhere=True)

    def finish(self) -> None:
        """The end of the run: nothing is in flight, and the best weights are on the disk as they were written."""
        if self.join():
            self.answer_failure()
        error: Exception | None = None
        if self.writer is not None:
            try:
                self.best.write()
            except (OSError, RuntimeError) as problem:
                error = UserError(
                    f"{self.best.path} could not be written ({checkpoint.reason(problem)}): make room and start again "
                    "with run.resume=auto"
                )
            else:
                if not self.best.intact():
                    error = UserError(
                        f"{self.best.path} was removed or changed during training: it is not what was saved"
                    )
        distributed.raise_together(error)

    def _take(self, result: checkpoint.Saved | None) -> None:
        if result is None:
            return
        for note in result.notes:
            self.say(note)
        if result.error is not None:
            self.failed = result.error
            self.say(f"checkpoint of step {result.step}: {result.error}")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a directory; None where it is not there."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
