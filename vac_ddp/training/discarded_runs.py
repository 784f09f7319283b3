"""What becomes of a run that is overwritten: renamed first, removed once the new run has a checkpoint.

`<dir>.discarded-<time>` is the earlier run; `start.json` in the new run directory names it, so that a start after a
kill knows what it finds. A discarded run that no `start.json` names is never removed, only mentioned.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vac_ddp import files
from vac_ddp.errors import UserError
from vac_ddp.report.run_reader import DISCARDED as MARK
from vac_ddp.schema import read_json

RECORD = "start.json"
FORMAT = 1
LOCK = "run.lock"


def set_aside(folder: Path, foreign: Iterable[Path], start: str | None) -> Path:
    """Rename the run directory and make an empty one in its place; returns the new path of the earlier run.

    The lock and `foreign` (what no run wrote) stay in `folder`. start: identifies the attempts of one start, see
    `RECORD`. UserError where the directory cannot be renamed; nothing has changed then.
    """
    real, earlier = folder.resolve(), recorded(folder)
    if real == Path.cwd() or real in Path.cwd().parents:
        raise UserError(f"run.dir={folder} holds the current directory: start from elsewhere to overwrite it")
    aside = _free_name(real)
    try:
        real.rename(aside)
    except OSError as error:
        raise UserError(
            f"run.dir={folder} cannot be overwritten: renaming it to {aside.name} failed ({error.strerror}); nothing "
            "was changed: set another run.dir, or move the earlier run yourself"
        ) from error
    try:
        real.mkdir(mode=aside.stat().st_mode & 0o7777)
        _move_lock(aside / LOCK, real / LOCK)
    except OSError as error:
        raise UserError(
            f"the earlier run is {aside} now, and run.dir={folder} was taken by somebody else at once "
            f"({error.strerror}): set another run.dir"
        ) from error
    for path in foreign:
        (aside / path.name).rename(real / path.name)
    try:
        write_record(folder, start, [*earlier, aside])
    except OSError:
        put_back(real, aside)
        raise
    return aside


def _move_lock(lock: Path, target: Path) -> None:
    """Move the lock that this process holds; FileExistsError where another run has taken the new directory."""
    try:
        os.link(lock, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        lock.rename(target)
    else:
        lock.unlink()


def _free_name(real: Path) -> Path:
    name = f"{real.name}{MARK}{time.strftime('%Y%m%d-%H%M%S')}"
    tries = (real.with_name(name if number == 1 else f"{name}-{number}") for number in range(1, 1000))
    return next(path for path in tries if not path.exists())


def write_record(folder: Path, start: str | None, discarded: list[Path]) -> None:
    """Note in the run directory which start took it (by overwriting or by run.resume=PATH), and what it overwrote."""
    record = {"format": FORMAT, "start": start, "discarded": [path.name for path in discarded]}
    files.write_json(folder / RECORD, record)


class Record(TypedDict):
    """What is read of `start.json`."""

    start: NotRequired[str | None]
    discarded: NotRequired[list[str]]


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run directory; an empty one where there is none or it is damaged."""
    try:
        return read_json(folder / RECORD, Record, remedy="it is left out")
    except (OSError, UserError):
        return {}


def recorded(folder: Path) -> list[Path]:
    """The discarded runs that the run in `folder` replaces and that still exist."""
    there, names = found(folder), read_record(folder).get("discarded", [])
    return [path for path in there if path.name in names]


def found(folder: Path) -> list[Path]:
    """Every discarded run beside `folder`, oldest first."""
    real = folder.resolve()
    if not real.parent.is_dir():
        return []
    return sorted(path for path in real.parent.iterdir() if path.name.startswith(real.name + MARK))


def describe(folder: Path) -> list[str]:
    """Lines about the discarded runs beside `folder`, for the log of a start."""
    known = recorded(folder)
    return [
        f"{path} holds the run that was overwritten: it is removed after the next checkpoint of this run"
        if path in known
        else f"found {path}: an earlier run, set aside by a start with run.overwrite=true that was killed; it is not "
        "removed: rename it to keep it, or remove it yourself"
        for path in found(folder)
    ]


def put_back(folder: Path, aside: Path) -> None:
    """Undo `set_aside`, where nothing of the new run is in `folder`."""
    for path in aside.iterdir():
        path.rename(folder / path.name)
    aside.rmdir()


def remove(paths: Iterable[Path]) -> list[str]:
    """Remove discarded runs; returns a line for each that could not be removed."""
    problems = []
    for path in paths:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{path}, the run that was overwritten, cannot be removed: {error.strerror}")
    return problems
