"""Files that grow line by line, also on a disk that is full for a while, or when somebody removes them;
and metrics.jsonl read back.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO, NotRequired, TypedDict

from vac_ddp.errors import UserError
from vac_ddp.schema import Count, fault, json_lines, parse_json
from vac_ddp.text import encoded

METRICS = "metrics.jsonl"


Figure = float | None  # null: it was not finite


class MetricsLine(TypedDict):
    """A line of metrics.jsonl: what is read of it."""

    kind: str
    step: Count
    epoch: NotRequired[Count]
    lr: NotRequired[Figure]
    loss: NotRequired[Figure]
    accuracy: NotRequired[Figure]
    grad_norm: NotRequired[Figure]
    train_loss: NotRequired[Figure]
    train_accuracy: NotRequired[Figure]
    val_top1: NotRequired[Figure]
    val_loss: NotRequired[Figure]
    clips_per_s: NotRequired[Figure]
    data_wait: NotRequired[Figure]
    mfu: NotRequired[Figure]
    memory_gib: NotRequired[Figure]
    # seconds, in the lines of the kind "speed"
    training: NotRequired[Figure]
    wait: NotRequired[Figure]
    prepare: NotRequired[Figure]
    forward: NotRequired[Figure]
    backward: NotRequired[Figure]
    optimizer: NotRequired[Figure]
    validation: NotRequired[Figure]
    saving: NotRequired[Figure]


class EpochLine(TypedDict):
    """What a line of the kind "epoch" has besides."""

    epoch: Count


def read_metrics(run: Path) -> list[MetricsLine]:
    """The lines of a run's metrics.jsonl; UserError without one, or for a line that is damaged.

    A last line that a crash cut off is left out.
    """
    path = run / METRICS
    if not path.is_file():
        raise UserError(f"{run} is no run directory: it has no {METRICS}")
    found = []
    for number, text in json_lines(path):
        line, problem = metrics_line(text)
        if line is None:
            raise UserError(
                f"{path} line {number}: {problem}; delete that line, or resume the run, which moves it to "
                "metrics.discarded.jsonl"
            )
        found.append(line)
    return found


def metrics_line(text: str) -> tuple[MetricsLine | None, str]:
    """A line of metrics.jsonl and "", or None and what is wrong with it."""
    try:
        value = parse_json(text)
    except ValueError as error:
        return None, f"expected JSON, found {error}"
    problem = fault(value, MetricsLine)
    if not problem and value["kind"] == "epoch":
        problem = fault(value, EpochLine)
    return (None, problem) if problem else (value, "")


def number(figure: float | None) -> float:
    """A figure of a line as a number; NaN for one that was not finite."""
    return math.nan if figure is None else figure


class Lines:
    """A text file that is appended to. What a full disk does not take is kept, and goes out before the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self.error: str | None = None  # why the newest lines are not in the file, while they are not
        self._open()

    def _open(self) -> None:
        self._file: BinaryIO = self.path.open("ab", buffering=0)
        self._identity = _identity(os.fstat(self._file.fileno()))

    def write(self, line: str = "") -> str:
        """Append a line (without its end); nothing: try again what waits. What is new about the file, or ""."""
        before, again = self.error, False
        if line:
            self._waiting += encoded(f"{line}\n")
        try:
            again = self._make_again()
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]  # a part of a line may fit
            self.error = None
        except OSError as problem:
            self.error = problem.strerror or str(problem)
        if before is None and self.error is not None:
            return f"{self.error}; its lines are kept until they can be written"
        return "removed or replaced by somebody; made again, its earlier lines are lost" if again else ""

    def _make_again(self) -> bool:
        """Open the file anew where the path leads elsewhere by now: a removed file would take lines and lose them."""
        try:
            if _identity(self.path.stat()) == self._identity:
                return False
        except FileNotFoundError:
            pass
        self._file.close()
        self._open()
        return True

    def close(self) -> None:
        """Try for the last time, and close."""
        self.write()
        self._file.close()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
