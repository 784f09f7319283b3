"""One run a directory: a lock file that works on NFS and notices when its owner has died."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from vac_ddp.errors import FAILED, UserError

BEAT_S = 20.0
STALE_S = 120.0


def _started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot; None where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


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
        for _ in range(3):
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._remove_if_dead()
                continue
            except OSError as error:
                raise UserError(
                    f"cannot write in {self.path.parent}: {error.strerror}; set run.dir elsewhere"
                ) from error
            with os.fdopen(handle, "w") as stream:
                json.dump(_own(), stream)
            self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
            self._thread.start()
            return
        raise UserError(f"{self.path} is being taken by other runs; one run a directory, set run.dir elsewhere")

    def _remove_if_dead(self) -> None:
        try:
            owner = json.loads(self.path.read_text() or "{}")
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            owner = {}
        own = _own()
        if owner.get("host") == own["host"]:
            dead = _started(int(owner.get("pid", -1))) != owner.get("started")
        else:
            earlier = own["job"] and owner.get("job") == own["job"] and owner.get("attempt", 0) < own["attempt"]
            dead = bool(earlier) or self._age() > STALE_S
        if not dead:
            raise UserError(
                f"{self.path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}: "
                f"wait for it, set another run.dir, or remove {self.path} if that process is gone"
            )
        # Moved aside before it is removed: where another run was quicker, what is moved is its new lock.
        grave = self.path.with_name(f"run.lock.dead.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(grave)
            if json.loads(grave.read_text() or "{}") != owner:
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
            owner: object = None
            try:
                owner = json.loads(self.path.read_text())
                missing = 0
            except FileNotFoundError:  # moved aside for a moment, or taken over and given back
                missing += 1
            except (OSError, ValueError):
                continue
            if (owner is not None and owner != _own()) or missing > 1:
                # SLURM lost sight of this node and started the job elsewhere: two must not write here.
                whom = owner or "a process that is done"
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
        with contextlib.suppress(OSError, ValueError):
            if json.loads(self.path.read_text()) == _own():
                self.path.unlink()


def is_held(folder: Path) -> bool:
    """Whether somebody seems to hold the lock of `folder`; for people to read: takes nothing, writes nothing."""
    path = folder / "run.lock"
    try:
        owner, age = json.loads(path.read_text() or "{}"), time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return False
    if owner.get("host") == socket.gethostname():
        return _started(int(owner.get("pid", -1))) == owner.get("started")
    return age < STALE_S


def _own() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "attempt": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }
