"""Start ranks on this machine by torchrun's agent, in this process and without its page.

torchrun turns every exit status of a worker into 1 and prints a page; here the status file of rank 0 decides.
`python -m vac_ddp.runtime.torchrun SECONDS` prints the option of torchrun for the time to save, for slurm/common.sh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vac_ddp import errors, files
from vac_ddp.errors import Stopped
from vac_ddp.runtime.exit_status import write_status
from vac_ddp.runtime.monitor import AT_ONCE, STOP_SIGNALS

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
SAVE_TIME_S = 300  # from a signal to SIGKILL; torchrun's own 30 s are short for a large checkpoint


def save_time_words(seconds: int) -> list[str]:
    """The option of torchrun for the time that ranks get to save after a signal, where its own parser takes it.

    torch 2.11 has none: there it is a line on stderr that says what that means.
    """
    from torch.distributed.run import get_args_parser

    words = [f"--shutdown-timeout={seconds}"]
    if not get_args_parser().parse_known_args([*words, "program"])[1]:
        return words
    _say_short_time(sys.stderr)  # the words go to stdout, to a script
    return []


def _say_short_time(stream: TextIO) -> None:
    import torch

    print(
        f"vac: torch {torch.__version__} kills ranks 30 s after a signal, however long they save (its torchrun has no "
        "--shutdown-timeout): checkpoint.before_end_s and checkpoint.every_minutes save earlier",
        file=stream,
        flush=True,
    )


def _save_time(launch_config: type) -> dict[str, Any]:
    """As `save_time_words`, for torchrun's agent in this process."""
    if "shutdown_timeout" in {field.name for field in dataclasses.fields(launch_config)}:
        return {"shutdown_timeout": SAVE_TIME_S}
    _say_short_time(sys.stdout)  # stderr is for the one line of an error
    return {}


def run_ranks(module: str, argv: list[str], ranks: int) -> int:
    """Run `python -m module argv` on `ranks` ranks of this machine; its exit status, told by its status file."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    asked = os.environ.get("VAC_STATUS_FILE")
    if asked:
        with contextlib.suppress(OSError):
            Path(asked).unlink()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "status.json"
        os.environ["VAC_STATUS_FILE"] = str(path)
        failed: BaseException | None = None
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals() & set(STOP_SIGNALS)}
        try:
            failed = _run_agent(module, argv, ranks)
        except SignalException as error:  # a second signal, while the ranks were ending
            failed = error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.environ.pop("VAC_STATUS_FILE")
            if asked:
                os.environ["VAC_STATUS_FILE"] = asked
        told = files.read_json(path) if path.exists() else None
    if told is not None:
        return write_status(**told)
    if failed is None:
        return errors.DONE
    if isinstance(failed, SignalException) and failed.sigval in AT_ONCE:
        raise Stopped(failed.sigval)
    message = "the ranks ended without a word (killed, or out of memory?)"
    print(f"vac: {message}", file=sys.stderr)
    return write_status(errors.FAILED, message)


def _run_agent(module: str, argv: list[str], ranks: int) -> BaseException | None:
    """Let torchrun's agent start the ranks in this process, without its page; what it ended with."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each of them has a level of its own
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=SIGNALS,
        **_save_time(LaunchConfig),
    )
    try:
        with _signals_kept_for_ranks():
            elastic_launch(launch, sys.executable)("-m", module, *argv)
    except (ChildFailedError, SignalException) as error:
        return error
    return None


@contextlib.contextmanager
def _signals_kept_for_ranks() -> Iterator[None]:
    """Ranks that are started within it have the signals blocked until they can answer them (`Monitor.start`).

    A process inherits what the thread that starts it blocks. Another thread takes the signals of this process
    meanwhile; their handlers run in the main thread as ever.
    """
    end = threading.Event()
    threading.Thread(target=end.wait, name="signals", daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        end.set()


if __name__ == "__main__":  # for slurm/common.sh
    print(*save_time_words(int(sys.argv[1])))
