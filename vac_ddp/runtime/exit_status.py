"""How a program ends: one line for its user, an exit status, and a JSON file for scripts.

torchrun turns every worker's status into 1, so rank 0 also writes {status, message, run, step} to $VAC_STATUS_FILE.
The first cause of any rank is told, with its status, not what it led to elsewhere. With VAC_STATUS_ONLY=1 beside the
file, an end that starting again would not change (done, interrupted, stopped, findings, an error of the user's) is told
by the file only and is 0 for torchrun: it restarts nothing and prints no page.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from vac_ddp import errors, files
from vac_ddp.errors import Cause
from vac_ddp.runtime import ranks
from vac_ddp.runtime.monitor import PROCESS, does_not_answer, stopped_by_signals
from vac_ddp.text import escape_output

OUT_OF_MEMORY = (
    "CUDA out of memory: in training lower train.clips_per_gpu (train.global_batch is kept by accumulation), "
    "clip.frames or clip.size, or raise train.checkpointing; in prediction lower predict.clips_per_gpu"
)


def run_entry_point(program: Callable[[list[str]], dict[str, Any] | None], argv: list[str]) -> int:
    """Run a program that may be one of many ranks; returns or leaves the process with its exit status.

    program: takes the arguments, returns what the status file says of it (`run`, `step`) or None. What it raises
    becomes one line of rank 0; a failure of ours keeps its traceback. With --debug nothing is caught.
    """
    escape_output()
    if "--debug" in argv and not ranks.under_torchrun():
        program(argv)
        return errors.DONE
    global _told
    _told = False
    PROCESS.start(end_at_once)
    try:
        with unbroken_stdout():
            try:
                where = program(argv) or {}
            except SystemExit as leaving:
                return leaving.code if isinstance(leaving.code, int) else errors.FAILED
            except (Exception, KeyboardInterrupt) as caught:
                return _end_by(caught)
            done = Cause(rank=0, status=errors.DONE, message="done")
            _tell(done, done, where)
            _leave(errors.DONE, together=True)
            return _code(errors.DONE)
    finally:
        PROCESS.stop()


def run_command(program: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Call a program and turn what it raises into an exit status and one line. Ctrl-C and SIGTERM are one as well."""
    escape_output()
    try:
        with unbroken_stdout(), stopped_by_signals(end_at_once):
            return program(argv) or 0
    except (Exception, KeyboardInterrupt) as caught:
        error = errors.plain(caught)
        if errors.exit_status(error) == errors.FAILED:
            raise
        if "--debug" in argv:
            traceback.print_exc()
        else:
            print(f"vac: {error}", file=sys.stderr)
        return write_status(errors.exit_status(error), str(error))


class _Unbroken:
    """A stream whose reader may go away (`| head`): what is written from then on is lost, and nothing fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose it."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        """Flush, or lose it."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._lose()

    def _lose(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbroken_stdout() -> Iterator[None]:
    """Within it a reader of the output that goes away ends nothing, and prints no traceback."""
    before = sys.stdout
    sys.stdout = unbroken = _Unbroken(before)
    try:
        yield
    finally:
        unbroken.flush()
        sys.stdout = before


def _end_by(error: BaseException) -> int:
    """Tell why the program ends, and leave the process where it is one of several."""
    if isinstance(error, errors.Interrupted | errors.Findings):
        status = errors.exit_status(error)
        where = {"run": error.run, "step": error.step} if isinstance(error, errors.Interrupted) else {}
        agreed = Cause(rank=0, status=status, message=one_line(error))
        _tell(agreed, agreed, where)
        _leave(status, together=True)
    else:
        first, mine = report(error), cause_of(error)
        status = first.status
        if status == errors.FAILED and mine.message == first.message:
            traceback.print_exception(error)
        _tell(first, mine)
        _leave(status, together=False)
    return _code(status)


def end_at_once(cause: Cause) -> None:
    """For the monitor, while the main thread is stuck or waits in vain: tell the first cause, and leave the process."""
    first = cause if PROCESS.group is None else PROCESS.group.report_cause(cause)
    mine = cause if cause.rank == ranks.rank() else None
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if first == mine and first.status == errors.FAILED and not first.gone and frame is not None:
        os.write(2, "".join(["Main thread:\n", *traceback.format_stack(frame)]).encode(errors="backslashreplace"))
    _tell(first, mine, stuck=True)
    os._exit(_code(first.status))


def report(error: BaseException) -> Cause:
    """Leave the cause of `error` for the other ranks, as early as it is known; returns the first cause of any rank.

    An error that a rank that is gone may have led to (a lost connection, torchrun's SIGTERM) is not a cause before it
    is known that all ranks are there.
    """
    group = PROCESS.group
    if group is None:
        return cause_of(error)
    first = group.first_cause()
    if first is None and _may_follow(error):
        silent = PROCESS.silent_ranks()
        if silent:
            message = f"{does_not_answer(silent)}: {one_line(error)}"
            return group.report_cause(Cause(rank=ranks.rank(), status=errors.FAILED, message=message, gone=silent))
    return group.report_cause(cause_of(error))


def _may_follow(error: BaseException) -> bool:
    """Whether `error` may be what the end of another rank led to: gloo raises plain RuntimeErrors."""
    if isinstance(error, errors.Stopped):
        return errors.exit_status(error) == errors.TERMINATED
    return type(error) is RuntimeError or isinstance(error, sys.modules["torch"].distributed.DistError)


def cause_of(error: BaseException) -> Cause:
    """What `error` of this rank means to the others."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return Cause(rank=ranks.rank(), status=errors.USER_ERROR, message=OUT_OF_MEMORY)
    error = errors.plain(error)
    return Cause(rank=ranks.rank(), status=errors.exit_status(error), message=one_line(error))


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


_told = False


def _tell(first: Cause, mine: Cause | None, where: dict[str, Any] | None = None, *, stuck: bool = False) -> None:
    """Say once why the program ends. The line and the status file are of rank 0, or the first one that is not gone.

    Other ranks say only what they themselves failed by. mine: the cause that this rank met. stuck: the main thread may
    hold the lock of Python's output.
    """
    global _told
    if _told:
        return
    _told = True
    alike = mine is not None and first.message == mine.message
    speaker = next((rank for rank in range(ranks.world_size()) if rank not in first.gone), 0)
    message = first.message
    if ranks.under_torchrun() and not first.gone and not (alike and first.status != errors.FAILED):
        message = f"rank {ranks.rank() if alike else first.rank}: {message}"
    if first.status != errors.DONE and (ranks.rank() == speaker or (alike and first.status == errors.FAILED)):
        if stuck:
            os.write(2, f"vac: {message}\n".encode(errors="backslashreplace"))
        else:
            print(f"vac: {message}", file=sys.stderr, flush=True)
    if ranks.rank() == speaker:
        write_status(first.status, message, **(where or {}))


def write_status(status: int, message: str, *, run: str | None = None, step: int | None = None) -> int:
    """Write $VAC_STATUS_FILE where it is set, a warning where it cannot be written; returns `status`."""
    path = os.environ.get("VAC_STATUS_FILE")
    if path:
        try:
            files.write_json(path, {"status": status, "message": message, "run": run, "step": step})
        except OSError as error:
            warning = f"vac: warning: VAC_STATUS_FILE {path} cannot be written: {error.strerror}\n"
            os.write(2, warning.encode(errors="backslashreplace"))
    return status


def _code(status: int) -> int:
    """The exit status of this process: 0 where the status file is what counts, see the head of this file."""
    by_file = bool(os.environ.get("VAC_STATUS_FILE")) and os.environ.get("VAC_STATUS_ONLY") == "1"
    return errors.DONE if by_file and status != errors.FAILED else status


def _leave(status: int, *, together: bool) -> None:
    """Leave the process where it is one of several; `together`: all ranks do, none is inside a collective."""
    if PROCESS.group is None or not PROCESS.group.active():
        return
    if together:
        PROCESS.group.end(_code(status))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_code(status))
