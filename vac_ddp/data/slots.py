"""Memory that loader processes decode into and their rank reads: the same pages again and again.

A tensor that torch hands to another process lies in a new shared file every time: the kernel clears each of its pages
and both processes meet them for the first time, which costs a seventh of the time of decoding, and the file counts
against /dev/shm, which containers keep small. These slots are made once, before the processes are forked; they
belong to no file system, so only the memory of the machine or of a control group limits them.
"""

from __future__ import annotations

import itertools
import mmap
import os
import sys
import weakref

import numpy as np
import torch

MAP_NORESERVE = 0x4000  # of Linux; Python's mmap has the name from 3.13 on

_numbers = itertools.count()
_all: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()
_own: tuple[Slots, int] | None = None  # of a loader process: what it writes into, and its number


class Slots:
    """`each` slots of `size` bytes for every one of `workers` processes.

    A loader process takes a free slot of its own, the rank gives it back when the last tensor on it is gone. One byte a
    slot says which: only the loader process sets it, only the rank clears it.
    """

    def __init__(self, *, workers: int, each: int, size: int) -> None:
        self.each, self.size = each, slot_bytes(size)
        # Anonymous and shared, nothing reserved: a page that nobody touches costs nothing.
        flags = mmap.MAP_SHARED | (MAP_NORESERVE if sys.platform == "linux" else 0)
        self._bytes = np.frombuffer(mmap.mmap(-1, workers * each * self.size, flags=flags), np.uint8)
        self._taken = np.frombuffer(mmap.mmap(-1, workers * each, flags=flags), np.uint8)
        self.number = next(_numbers)
        _all[self.number] = self

    def take(self, worker: int, count: int) -> torch.Tensor | None:
        """A slot of loader process `worker` as (count,) uint8; None where none is free or large enough."""
        if count > self.size:
            return None
        for slot in range(worker * self.each, (worker + 1) * self.each):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return torch.from_numpy(self._piece(slot, count))
        return None

    def slot_of(self, tensor: torch.Tensor) -> int | None:
        """The slot that `tensor` begins in, None for one that lies elsewhere."""
        offset = tensor.data_ptr() - self._bytes.ctypes.data
        return offset // self.size if 0 <= offset < len(self._bytes) else None

    def received(self, slot: int, count: int) -> torch.Tensor:
        """In the rank: the first `count` bytes of a slot, which is free again when no tensor lies on it any more."""
        piece = self._piece(slot, count)
        weakref.finalize(piece, self._give_back, slot, os.getpid()).atexit = False
        return torch.from_numpy(piece)  # keeps the piece

    def _give_back(self, slot: int, rank: int) -> None:
        # Not in a loader process that was forked meanwhile and has a copy of the rank's objects.
        if os.getpid() == rank:
            self._taken[slot] = 0

    def _piece(self, slot: int, count: int) -> np.ndarray:
        return self._bytes[slot * self.size : slot * self.size + count]


def slot_bytes(size: int) -> int:
    """Bytes of a slot for `size`: whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def use_slots(slots: Slots, worker: int) -> None:
    """Make this process, loader process `worker`, decode into `slots`."""
    global _own
    _own = (slots, worker)


def buffer(count: int) -> torch.Tensor:
    """(count,) uint8 to decode into: in a loader process one of its slots where one is free."""
    taken = None if _own is None or count == 0 else _own[0].take(_own[1], count)
    return torch.empty(count, dtype=torch.uint8) if taken is None else taken


def packed(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]] | np.ndarray:
    """What goes to the rank for a contiguous uint8 tensor: the place of its slot, or itself where it is in none."""
    slot = None if _own is None else _own[0].slot_of(tensor)
    return tensor.numpy() if _own is None or slot is None else (_own[0].number, slot, tuple(tensor.shape))


def unpacked(sent: tuple[int, int, tuple[int, ...]] | np.ndarray) -> torch.Tensor:
    """The tensor of what `packed` made."""
    if isinstance(sent, np.ndarray):
        return torch.from_numpy(sent)
    number, slot, shape = sent
    return _all[number].received(slot, int(np.prod(shape))).view(shape)
