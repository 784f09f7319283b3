"""What becomes of a process whose parent dies."""

from __future__ import annotations

import ctypes
import sys

SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def signal_when_parent_dies(number: int) -> None:
    """Let the kernel send this process the signal `number` when its parent is gone; Linux only, elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, int(number))
