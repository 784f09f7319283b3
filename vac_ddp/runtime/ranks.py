"""Which of the ranks this process is, by the environment that torchrun makes. Imports no torch."""

from __future__ import annotations

import os

from vac_ddp.errors import UserError


def under_torchrun() -> bool:
    """Whether this process was started by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def restarts(name: str) -> int:
    """How often this attempt was started again, by the variable `name`. UserError where it is not a number."""
    text = os.environ.get(name) or "0"
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}={text[:40]} in the environment is not a number of restarts: unset it")
    return int(text)


def say(text: str) -> None:
    """Print one line for people, from rank 0."""
    if is_main():
        print(text, flush=True)
