"""Work on many items of which one bad one ends nothing: its line, and exit status 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from vac_ddp.errors import UserError, reason

Item = TypeVar("Item")
Made = TypeVar("Made")


def each(items: Iterable[Item], work: Callable[[Item], Made]) -> tuple[list[Made], list[str]]:
    """What `work` made of the items it can be done for, and a line for each of the others."""
    made, problems = [], []
    for item in items:
        try:
            made.append(work(item))
        except Exception as error:
            problems.append(str(error) if isinstance(error, UserError) else f"{item}: {reason(error)}")
    return made, problems
