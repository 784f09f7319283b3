r"""How names that cannot be printed are written: one escape for log, tables, JSON, YAML, report and services.

A name from the disk may hold bytes that are not UTF-8 (Python has them as the surrogates U+DC80 to U+DCFF), line ends
and other control characters. These are written as in a Python string: the byte 0xB0 as `\udcb0`, a line end as `\n`.
A backslash that would look like such an escape is written as `\x5c`, so that the name can be got back. All other
names are written as they are.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

from vac_ddp.errors import UNPRINTABLE, one_line

_CODE = r"[tnr]|x[0-9a-f]{2}|u[0-9a-f]{4}"
_UNSAFE = re.compile(rf"{UNPRINTABLE.pattern}|\\(?={_CODE})")


def escaped(name: str) -> str:
    r"""A name as it is written.

    >>> escaped("walk\udcb0\r")
    'walk\\udcb0\\r'
    """
    return _UNSAFE.sub(_code, name)


def printable(text: str) -> str:
    """`text` from a file, where a name may be in either form: escaped where it could not be printed."""
    return escaped(text) if UNPRINTABLE.search(text) else text


def printable_values(value: Any) -> Any:
    """Nested dicts, lists and texts with every text `printable`: for services that take nothing else."""
    if isinstance(value, dict):
        return {name: printable_values(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return [printable_values(inside) for inside in value]
    return printable(value) if isinstance(value, str) else value


def _code(found: re.Match[str]) -> str:
    return "\\x5c" if found[0] == "\\" else one_line(found[0])


def listed(names: Sequence[str], limit: int) -> str:
    """The first `limit` names, and how many more there are.

    >>> listed(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def encoded(text: str) -> bytes:
    """`text` as UTF-8, with what UTF-8 cannot hold escaped as in `escaped` (and valid in JSON as it is)."""
    return text.encode("utf-8", "backslashreplace")


def escape_output() -> None:
    """Let everything be printed: what an output's encoding cannot hold is escaped as in `escaped`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):  # it is closed
                stream.reconfigure(errors="backslashreplace")
