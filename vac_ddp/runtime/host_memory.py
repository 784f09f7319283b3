"""How the C library handles memory that a process frees."""

from __future__ import annotations

import ctypes

GIB = 1 << 30


def keep_freed_memory() -> None:
    """Let the C library keep what is freed: else a step on the CPU pays a page fault for every 4 KiB, each time.

    By itself it keeps tensors of up to 32 MiB: three clips of 16 frames of 224 as floats. glibc alone is asked;
    elsewhere nothing happens.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # of <malloc.h>
        # Setting one of them ends that glibc adapts the other, and an older one refuses more than 32 MiB.
        if library.mallopt(mmap_threshold, GIB) or library.mallopt(mmap_threshold, 32 << 20):
            library.mallopt(trim_threshold, GIB)
