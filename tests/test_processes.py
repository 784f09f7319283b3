"""Loader processes begin, also where a fork goes wrong."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from vac_ddp.data import loader_processes

# The child of the first fork never leaves os.fork(), as with a lock of the interpreter that another thread had held.
STUCK = """
import os, sys, threading
from vac_ddp.data import loader_processes
loader_processes.FIRST_WAIT_S = 0.2
forks = []
os.register_at_fork(before=lambda: forks.append(1))
os.register_at_fork(after_in_child=lambda: len(forks) <= int(sys.argv[1]) and threading.Event().wait())
from torch.utils.data import DataLoader
loader = DataLoader(range(6), batch_size=2, num_workers=2, multiprocessing_context=loader_processes.LoaderContext())
print([batch.tolist() for batch in loader])
print(len(forks))
"""


def run(stuck: int) -> subprocess.CompletedProcess[str]:
    """Load six numbers with two processes, where the first `stuck` forks do not come back."""
    words = [sys.executable, "-c", STUCK, str(stuck)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_a_child_that_is_stuck_in_the_fork_is_forked_again() -> None:
    done = run(stuck=1)
    batches, forks = done.stdout.splitlines()[:2]
    assert batches == "[[0, 1], [2, 3], [4, 5]]", done.stderr
    assert int(forks) >= 3  # two processes and the one that was stuck; on a busy machine others may be slow as well


def test_it_gives_up_with_a_remedy() -> None:
    done = run(stuck=loader_processes.TRIES)
    assert done.returncode != 0
    assert "did not begin in 5 tries; data.workers=0" in done.stderr


def test_nothing_is_left_open() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    child = loader_processes.LoaderContext().Process(target=threading.Event)
    child.start()
    child.join()
    assert child.exitcode == 0
    child.close()
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_signals_before_a_process_is_set_up_do_not_end_it() -> None:
    """SLURM signals every process of a job; torch sets a handler that ends a loader process, before our set-up runs."""
    context = loader_processes.LoaderContext()
    reading, writing = context.Pipe(duplex=False)
    child = context.Process(target=_signal_early, args=(writing,))
    child.start()
    writing.close()
    assert reading.recv() == "set up"
    child.join()
    assert child.exitcode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # nothing stays blocked in this process


def _signal_early(said: Connection) -> None:
    torch.utils.data._utils.signal_handling._set_worker_signal_handlers()
    for number in loader_processes.IGNORED_SIGNALS:
        os.kill(os.getpid(), number)
    loader_processes.ignore_signals()
    for number in loader_processes.IGNORED_SIGNALS:
        os.kill(os.getpid(), number)
    said.send("set up")


def test_the_loader_takes_the_context() -> None:
    """The DataLoader wants a context of the standard library's kind; its parent is this process."""
    context = loader_processes.LoaderContext()
    assert isinstance(context, multiprocessing.context.BaseContext)
    loader = DataLoader(_Parents(), batch_size=None, num_workers=1, multiprocessing_context=context)
    assert list(loader) == [os.getpid()]


class _Parents:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: int) -> int:
        return os.getppid()
