"""A thread that ends this process when its main thread cannot: stuck in native code, or waiting for a lost rank.

Python's signal handlers run in the main thread, between two of its instructions: one that is inside a C call (a
collective, a driver) sees no signal, and NCCL's watchdog aborts without an exception. The thread learns of signals by
`signal.set_wakeup_fd`. A main thread that keeps the interpreter's lock while it is stuck stops this thread as well:
for it faulthandler's own thread, which needs no lock, is armed again with every beat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any

from vac_ddp.errors import FAILED, Cause, Stopped
from vac_ddp.runtime import ranks

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
AT_ONCE = (signal.SIGTERM, signal.SIGINT)  # these end the program where there is nothing to save

BEAT_S = 0.5
SILENT_S = 2.5  # a rank without a beat for so long does not answer
SILENT_WITH_SIGNAL_S = 10.0  # and is not waited for once a signal has come: nothing can be saved without it
GRACE_S = 2.0  # for the main thread to end by itself, and for the rank that is stuck to say so before those that wait
STUCK_AFTER_SIGNAL_S = 20.0  # at least; torchrun kills after 30 s
SAME_KEY_S = 1.0  # a terminal sends Ctrl-C to the process, and torchrun forwards it: one key press


class Monitor:
    """Signals, beats, and the limit on the time without progress, of this process.

    `progress()` starts the time again; `waiting` says that the main thread waits for other ranks, so that the rank that
    is stuck speaks before them. `saving`: there is something to save, signals are for `runtime.signals.StopRequest`.
    """

    def __init__(self) -> None:
        self.limit_s: float | None = None
        self.step: int | None = None
        self.waiting = False
        self.saving = False
        self.reacted = False  # the main thread has seen the signal: from then on it has the time it needs to save
        self.pending = 0  # SIGUSR1 or 2 that came while there was nothing to save; answered at the first step
        self._stopped: tuple[int, float] | None = None
        self._since = time.monotonic()
        self._longest = 0.0  # time without progress so far
        self._signalled: tuple[int, float, bool] | None = None  # the first signal, when, and whether it was to save
        self._again: float | None = None  # when a second one came
        self._closing = False
        self._raises = False
        self._lock = threading.Lock()
        self._cause_since: float | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}  # the last beat of each rank, and since when it is the same
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self.group: Any = None  # the module `distributed`, once its group is up
        self._end: Callable[[Cause], None] = lambda cause: None
        self._before: dict[int, Any] = {}

    # ------------------------------------------------------------ the main thread's side

    def start(self, end: Callable[[Cause], None]) -> None:
        """Take over the signals and start the thread. `end` tells the cause and leaves the process.

        Until there is something to save, Ctrl-C and SIGTERM raise `Stopped` where something is to be closed, else end
        the process at once, as a second one does.
        """
        self.__init__()  # type: ignore[misc]  # a program after another in one process begins anew
        self._end = end
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by `vac train --nproc` until now

    def connect(self, group: ModuleType) -> None:
        """Begin to beat in the store of the process group, and to look there for the first cause of an end.

        group: the module `distributed`, which imports this one.
        """
        self.group = group
        if self._thread is not None:
            self._raises = True
            self._store = group.side_store("monitor")
            self._wake()

    def stop(self) -> None:
        """Give the signals back and end the thread."""
        if self._thread is None:
            return
        self.release()
        signal.set_wakeup_fd(self._wakeup_before)
        _give_back(self._before, leaving=self._stopped is not None)
        thread, self._thread, self._store = self._thread, None, None
        os.write(self._writing, b"\0")
        thread.join(timeout=5 * BEAT_S)
        os.close(self._writing)

    def watch(self, limit_s: float) -> None:
        """From here on the process ends when the main thread makes no progress for `limit_s` seconds."""
        self.progress()
        self._longest, self.limit_s = 0.0, limit_s
        self._arm(time.monotonic())  # not at the next beat: the lock may be gone by then

    def release(self) -> None:
        """The limit no longer counts, nor the causes of other ranks: what is left is to close files and services."""
        with self._lock:
            self.limit_s, self._closing = None, True
            if self._thread is not None:
                faulthandler.cancel_dump_traceback_later()

    def progress(self, step: int | None = None) -> None:
        """The main thread got on; `step`: with so many training steps done."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._since)
        self._since, self.waiting = now, False
        if step is not None:
            self.step = step

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """While the main thread waits for other ranks."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def silent_ranks(self) -> list[int]:
        """Ranks that do not beat (stopped or gone); takes some seconds, or less where another rank has left a cause."""
        store, begun = self._store, time.monotonic()
        if store is None:
            return []
        with contextlib.suppress(RuntimeError):
            before = _read_beats(store)
            while time.monotonic() - begun < SILENT_S:
                if self.group.first_cause() is not None:
                    return []
                time.sleep(0.1)
            after = _read_beats(store)
            return [rank for rank in range(ranks.world_size()) if before.get(rank) == after.get(rank)]
        return []

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number not in AT_ONCE:
            self.pending = number
        elif self._stopped is None:
            self._stopped = (number, now)
            if self._raises and not _importing(frame):
                raise Stopped(number)
            self._end(_own(Stopped(number)))
        elif now - self._stopped[1] > SAME_KEY_S:  # whatever is being closed
            self._end(_own(Stopped(self._stopped[0])))

    # ------------------------------------------------------------ the thread

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._writing, b"\1")

    def _watch(self) -> None:
        count = 0
        while True:
            idle = self._store is None and self._signalled is None
            readable, _, _ = select.select([self._reading], [], [], None if idle else BEAT_S)
            received = os.read(self._reading, 4096) if readable else b""
            if self._thread is None:
                os.close(self._reading)
                return
            now = time.monotonic()
            for number in received:
                if number in STOP_SIGNALS:
                    self._receive(number, now)
            count += 1
            try:
                self._beat(count, now)
            except RuntimeError:  # torchrun is gone, and its store: nobody can be seen any more
                self._lose_store()
            cause = self._reason(now)
            if cause is not None and self._thread is not None:
                self._end(cause)

    def _lose_store(self) -> None:
        with self._lock:
            self._store = None
            faulthandler.cancel_dump_traceback_later()

    def _receive(self, number: int, now: float) -> None:
        if self._signalled is None:
            self._signalled = (number, now, self.saving)
        elif self._signalled[0] == signal.SIGINT and number in AT_ONCE and now - self._signalled[1] > SAME_KEY_S:
            self._again = self._again or now

    def _beat(self, count: int, now: float) -> None:
        store = self._store
        if store is None or self._closing:
            return
        self._arm(now)
        store.set(str(ranks.rank()), str(count))
        deadline = self._deadline()
        if self._signalled is not None or (deadline is not None and now > deadline - SILENT_S - BEAT_S):
            beats = _read_beats(store)
            for rank in range(ranks.world_size()):
                beat = beats.get(rank, b"")
                if rank not in self._seen or self._seen[rank][0] != beat:
                    self._seen[rank] = (beat, now)
        else:
            self._seen.clear()

    def _arm(self, now: float) -> None:
        """Let faulthandler end the process after the deadline, should this thread not get the lock to do it."""
        with self._lock:
            deadline = self._deadline()
            if deadline is not None and self._store is not None:
                late = max(0.0, deadline - now) + GRACE_S
                faulthandler.dump_traceback_later(late, exit=True, file=sys.__stderr__ or 2)

    def _deadline(self) -> float | None:
        """When the main thread must have got on; sooner once a signal has come, as a kill comes after it."""
        if self.limit_s is None:
            return None
        deadline = self._since + self.limit_s
        if self._signalled is not None and not self.reacted:
            usual = max(STUCK_AFTER_SIGNAL_S, 3 * self._longest)
            deadline = min(deadline, max(self._signalled[1], self._since) + usual)
        return deadline

    def _reason(self, now: float) -> Cause | None:
        """Why this process must end now; None where it need not."""
        if self._again is not None and now - self._again > GRACE_S:
            return _own(Stopped(signal.SIGINT))
        if self._signalled is not None:
            number, since, saving = self._signalled
            if number in AT_ONCE and not saving and now - since > 2 * GRACE_S:
                return _own(Stopped(number))
        if self._store is None or self._closing:
            return None
        cause = self.group.first_cause()
        if cause is not None:  # the main thread may be on its way out
            self._cause_since = self._cause_since or now
            return cause if now - self._cause_since > GRACE_S else None
        deadline = self._deadline()
        if deadline is None:
            return None
        over = now - deadline
        silent = self._silent(now, SILENT_S if over > 0 else SILENT_WITH_SIGNAL_S)
        if silent and (over > 0 or self._signalled is not None):
            return Cause(rank=ranks.rank(), status=FAILED, message=does_not_answer(silent), gone=silent)
        if over > (GRACE_S if self.waiting else 0):
            return Cause(rank=ranks.rank(), status=FAILED, message=self._stuck(now))
        return None

    def _silent(self, now: float, longer_s: float) -> list[int]:
        own = ranks.rank()
        return [rank for rank, (_, since) in self._seen.items() if rank != own and now - since > longer_s]

    def _stuck(self, now: float) -> str:
        step = "" if self.step is None else f" after step {self.step}"
        doing = "waits for the others" if self.waiting else "is"
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        where = "" if frame is None else f" in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
        return f"no progress for {now - self._since:.0f} s{step}; its main thread {doing}{where}"


@contextlib.contextmanager
def stopped_by_signals(end: Callable[[Cause], None]) -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM raise `Stopped`; `end`: leaves where that cannot be, or with a second one."""
    first: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        again = bool(first)
        if again and time.monotonic() - first[0] <= SAME_KEY_S:
            return
        first.append(time.monotonic())
        if not again and not _importing(frame):
            raise Stopped(number)
        end(_own(Stopped(number)))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.signal(number, stop) for number in AT_ONCE}
    try:
        yield
    finally:
        _give_back(before, leaving=bool(first))


def _give_back(handlers: dict[int, Any], *, leaving: bool) -> None:
    """Restore the handlers of signals; once a program was stopped it is on its way out, and they are ignored."""
    global _leaving
    _leaving = _leaving or leaving
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_IGN if _leaving else handler)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: C++ code that is, ends the process with a page where Python raises in it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def end_imports_quietly() -> None:
    """Until `Monitor.start`: Ctrl-C and SIGTERM end this process with one line, whatever is being imported."""

    def leave(number: int, frame: FrameType | None) -> None:
        if ranks.is_main():
            os.write(2, f"vac: {Stopped(number)}\n".encode())
        os._exit(128 + number)

    for number in AT_ONCE:
        signal.signal(number, leave)


def does_not_answer(silent: list[int]) -> str:
    """One line on ranks without a beat."""
    several = len(silent) > 1
    return (
        f"rank{'s' if several else ''} {', '.join(map(str, silent))} {'do' if several else 'does'} not answer "
        "(stopped, dead, or stuck in native code)"
    )


def _own(error: Stopped) -> Cause:
    return Cause(rank=ranks.rank(), status=128 + error.number, message=str(error))


def _read_beats(store: Any) -> dict[int, bytes]:
    names = [str(rank) for rank in range(ranks.world_size())]
    there = names if store.check(names) else [name for name in names if store.check([name])]
    return {int(name): beat for name, beat in zip(there, store.multi_get(there), strict=True)} if there else {}


_leaving = False
PROCESS = Monitor()  # signals and the main thread are there once in a process
