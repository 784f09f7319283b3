"""One run a directory: a lock file that works on NFS and notices when its owner has died."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vac_ddp.errors import FAILED, UserError
from vac_ddp.runtime.ranks import restarts

BEAT_S = 20.0
STALE_S = 120.0


def _started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot; None where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lock: a process by the machine and the moment it started at, and its SLURM job and attempt."""

    host: str
    pid: int
    started: str | None
    job: str | None
    attempt: int


def _read(path: Path) -> Owner | None:
    """The owner that a lock file names; None where it is empty, damaged or of something else. OSError: no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    names = {"host": str, "pid": int, "started": str | None, "job": str | None, "attempt": int}
    if not isinstance(found, dict):
        return None
    found = {"attempt": 0, **found}
    if not all(isinstance(found.get(name), kind) for name, kind in names.items()):
        return None
    values: dict[str, Any] = {name: found.get(name) for name in names}
    return Owner(**values)


class RunLock:
    """Holds `run.lock` in a run directory, made by O_EXCL and touched every 20 s.

    The lock of a dead process of this machine is taken over at once; that of another machine when it was not touched
    for two minutes by the file server's clock (so that no clock of a client matters), or when it is of an earlier
    attempt of the same SLURM job. A process whose lock was taken over ends at its next touch.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lock, or raise UserError that names who has it."""
        own = _own()
        for _ in range(3):
            try:
                self._make(own)
            except FileExistsError:
                self._remove_if_dead(own)
                continue
            except OSError as error:
                raise UserError(
                    f"cannot write in {self.path.parent}: {error.strerror}; set run.dir elsewhere"
                ) from error
            self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
            self._thread.start()
            return
        raise UserError(f"{self.path} is being taken by other runs; one run a directory, set run.dir elsewhere")

    def _make(self, own: Owner) -> None:
        """Make the lock file, or leave none. FileExistsError where there is one, OSError where the disk is full."""
        handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump(asdict(own), stream)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise

    def _remove_if_dead(self, own: Owner) -> None:
        try:
            owner = _read(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}; set another run.dir") from error
        if owner is not None and owner.host == own.host:
            dead = _started(owner.pid) != owner.started
        else:
            earlier = owner is not None and own.job and owner.job == own.job and owner.attempt < own.attempt
            dead = bool(earlier) or self._age() > STALE_S
        if not dead and owner is None:
            raise UserError(
                f"{self.path} is damaged and was written within the last {STALE_S:.0f} s: try again later, or remove "
                "it if no run uses this directory"
            )
        if not dead and owner is not None:
            raise UserError(
                f"{self.path.parent} is in use by process {owner.pid} on {owner.host}: wait for it, set another "
                f"run.dir, or remove {self.path} if that process is gone"
            )
        # Moved aside before it is removed: where another run was quicker, what is moved is its new lock.
        grave = self.path.with_name(f"run.lock.dead.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(grave)
            if _read(grave) != owner:
                os.link(grave, self.path)
            grave.unlink()

    def _age(self) -> float:
        """Seconds since the lock was touched, by the clock of the file system alone."""
        probe = self.path.with_name(f"run.lock.probe.{os.getpid()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except OSError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        missing = 0
        while not self._stop.wait(BEAT_S):
            owner: Owner | None = None
            try:
                owner = _read(self.path)
                missing = 0
            except FileNotFoundError:  # moved aside for a moment, or taken over and given back
                missing += 1
            except OSError:
                continue
            if (owner is not None and owner != _own()) or missing > 1:
                # SLURM lost sight of this node and started the job elsewhere: two must not write here.
                whom = asdict(owner) if owner else "a process that is done"
                with contextlib.suppress(OSError):  # nobody may listen any more
                    print(f"vac: {self.path.parent} was taken over by {whom}: ending", file=sys.stderr, flush=True)
                os._exit(FAILED)
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give the lock back, if it is ours."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(OSError):
            if _read(self.path) == _own():
                self.path.unlink()


def is_held(folder: Path) -> bool:
    """Whether somebody seems to hold the lock of `folder`; for people to read: takes nothing, writes nothing."""
    path = folder / "run.lock"
    try:
        owner, age = _read(path), time.time() - path.stat().st_mtime
    except OSError:
        return False
    if owner is not None and owner.host == socket.gethostname():
        return _started(owner.pid) == owner.started
    return age < STALE_S


def _own() -> Owner:
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        job=os.environ.get("SLURM_JOB_ID"),
        attempt=restarts("SLURM_RESTART_COUNT"),
    )
