"""The table of epochs: one line each, below 80 columns."""

from __future__ import annotations

import math
from typing import Any

MOST_ROWS = 50  # on the screen, where no validation says which epochs count; log.txt has all
TABLE = "  epoch     step  train loss    acc  val loss    acc  clips/s     time"


def one_of_few(epoch: int, epochs: int) -> bool:
    """Whether this epoch is one of at most `MOST_ROWS`, evenly spread."""
    return epoch % math.ceil(epochs / MOST_ROWS) == 0


def table_row(entry: dict[str, Any], epochs: int, step: int, clips_per_s: float, seconds: float) -> str:
    """The line of an epoch under `TABLE`, below 80 columns: figures of an entry of metrics.jsonl, time of the epoch."""
    number = f"{entry['epoch']}/{epochs}"
    cells = [f"{number:>7}", f"{step:>7}"]
    for loss, accuracy, width in (("train_loss", "train_accuracy", 10), ("val_loss", "val_top1", 8)):
        known = loss in entry
        cells.append(f"{entry[loss]:>{width}.4f}" if known else " " * width)
        cells.append(f"{entry[accuracy]:>5.3f}" if known else " " * 5)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return "  ".join(cells) + f"  {clips_per_s:>7.4g}  {clock:>7}"
