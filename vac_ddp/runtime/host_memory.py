"""How much memory this machine gives its processes, and what the C library does with what a process frees."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

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


def memory_limit() -> int:
    """Bytes that all processes of a job can have on this machine: its memory, or what a control group leaves of it."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return installed
    return min([installed, *control_group_limits(groups, Path("/sys/fs/cgroup"))])


def control_group_limits(groups: str, mount: Path) -> list[int]:
    """The memory limits of the control groups in `groups` (lines of /proc/PID/cgroup) and of all those above them.

    Both versions count, version 1 in `mount`/memory. In a container the paths may be those of the host, which it does
    not see: then the limits of the top folder are its own.
    """
    found = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops, name = [mount, mount / "unified"], "memory.max"
        elif "memory" in controllers.split(","):
            tops, name = [mount / "memory"], "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for folder in (top.joinpath(*parts[:depth]) for top in tops for depth in range(len(parts) + 1)):
            with contextlib.suppress(OSError, ValueError):  # no such group here, or its limit is "max"
                found.append(int((folder / name).read_text()))
    return found
