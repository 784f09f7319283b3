"""Loader processes that begin for certain: forked, and forked again where a child never came back from the fork.

A rank has threads of the process group that may hold a lock of the interpreter at the moment of the fork; nobody gives
it back in the child, which then waits inside fork() for ever (seen with gloo and CPython 3.11 on a busy machine: about
once in a hundred runs, right after a collective). The forkserver that the standard library offers instead imports torch
once more for every rank, and would copy the index of a million videos into every process.
"""

from __future__ import annotations

import multiprocessing.context
import multiprocessing.popen_fork
import os
import select
import signal
from typing import Any

# Typeshed lacks the methods that are overridden here.
_ForkPopen: Any = multiprocessing.popen_fork.Popen
_ForkProcess: Any = multiprocessing.context.ForkProcess

IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FIRST_WAIT_S = 5.0  # doubled with every try: a busy machine is no reason to give up
TRIES = 5


def ignore_signals() -> None:
    """Let this loader process live on whatever signal its process group gets: its rank decides when it ends."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)


class _Popen(_ForkPopen):
    """A forked child that has said that it runs Python again."""

    def _launch(self, process_obj: LoaderProcess) -> None:
        # Held back in the child until `ignore_signals`: SLURM signals every process of a job, also one that begins.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self._fork(process_obj)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _fork(self, process_obj: LoaderProcess) -> None:
        for attempt in range(TRIES):
            reading, writing = os.pipe()
            process_obj.began = (reading, writing)
            try:
                super()._launch(process_obj)
                os.close(writing)
                # An end of file counts: what dies after the fork is the DataLoader's to report.
                if select.select([reading], [], [], FIRST_WAIT_S * 2**attempt)[0]:
                    return
            finally:
                os.close(reading)
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.finalizer()  # closes this child's pipes
        raise RuntimeError(f"a loader process did not begin in {TRIES} tries; data.workers=0 does without them")


class LoaderProcess(_ForkProcess):
    """A process whose start waits until the child runs."""

    began: tuple[int, int]

    @staticmethod
    def _Popen(process_obj: LoaderProcess) -> _Popen:  # the standard library's name
        return _Popen(process_obj)

    def _bootstrap(self, *arguments: Any, **named: Any) -> int:
        reading, writing = self.began
        os.write(writing, b"1")
        os.close(reading)
        os.close(writing)
        return super()._bootstrap(*arguments, **named)


class LoaderContext(multiprocessing.context.ForkContext):
    """What the DataLoader makes its processes and queues from."""

    Process = LoaderProcess
