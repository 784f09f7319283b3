"""Commands of this package in processes of their own, one after the other; signals go down to the one that runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from vac_ddp import errors
from vac_ddp.errors import Interrupted

# Handed down to the process that runs; a terminal that went away asks it to save and end as well.
FORWARDED = {
    **{number: number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)},
    signal.SIGHUP: signal.SIGTERM,
}


@contextmanager
def children() -> Iterator[Callable[[Sequence[str]], int]]:
    """A function that runs `vac WORDS...` in a process of its own and returns its status; signals go down to it.

    Each is in a session of its own, so that a key press reaches it once, by way of this process. After a signal none
    is started any more: the function raises Interrupted.
    """
    child: subprocess.Popen[bytes] | None = None
    asked = 0

    def hand_down(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        if child is not None and child.poll() is None:
            child.send_signal(FORWARDED[signal.Signals(number)])

    def run(words: Sequence[str]) -> int:
        nonlocal child
        if not asked:
            environment = {name: value for name, value in os.environ.items() if name != "VAC_STATUS_FILE"}
            child = subprocess.Popen(
                [sys.executable, "-m", "vac_ddp.cli", *words], env=environment, start_new_session=True
            )
            if asked:  # it came while the process was being made
                child.send_signal(FORWARDED[signal.Signals(asked)])
            status = child.wait()
            before_it_listened = asked and status == -FORWARDED[signal.Signals(asked)]
            if not (asked and status in (errors.DONE, errors.FINDINGS)) and not before_it_listened:
                return status
        raise Interrupted(f"{signal.Signals(asked).name}: the same command goes on from here")

    before = {number: signal.signal(number, hand_down) for number in FORWARDED}
    try:
        yield run
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
