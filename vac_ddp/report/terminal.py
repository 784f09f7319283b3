"""What only a terminal gets: progress bars, and lines that fit its width."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

REFRESH_S = 0.5  # a bar is drawn this often at most: calm to look at, and light over slow connections
SHAPE = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {rate_noinv_fmt}{postfix}  {remaining} left"


def start_bar(phase: str, total: int, done: int = 0, unit: str = "clips") -> Any:
    """A bar on standard error as wide as the terminal, gone when it is closed: share, units a second, time left."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread beside a process that forks
    return tqdm(
        total=total,
        initial=done,
        desc=phase,
        unit=f" {unit}",
        leave=False,
        dynamic_ncols=True,
        mininterval=REFRESH_S,
        bar_format=SHAPE,
    )


def fitted(text: str) -> str:
    """`text` with its lines broken between words where they are longer than the terminal is wide."""
    columns = shutil.get_terminal_size().columns
    return "\n".join(_fitted(line, columns) for line in text.split("\n"))


def _fitted(line: str, columns: int) -> str:
    if len(line) <= columns:
        return line
    return textwrap.fill(
        line,
        columns,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )
