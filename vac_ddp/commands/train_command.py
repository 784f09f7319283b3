"""`vac train [--nproc N] ...`: check settings and data, start torchrun, end with one line and the run's status.

torchrun turns every exit status of a worker into 1 and prints a page; here its agent runs in this process without
its page, and what rank 0 wrote to the status file decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from vac_ddp import checks, errors, files
from vac_ddp.arguments import parse_settings
from vac_ddp.errors import Stopped, UserError
from vac_ddp.runtime.exit_status import write_status
from vac_ddp.runtime.monitor import AT_ONCE, STOP_SIGNALS

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
SAVE_TIME_S = 300  # from a signal to SIGKILL; torchrun's own 30 s are short for a large checkpoint


def main(argv: Sequence[str]) -> int:
    """`vac train`: in this process for one rank, under torchrun for several."""
    ranks, rest = take_nproc(list(argv))
    if ranks == 1 or "--debug" in rest or {"-h", "--help", "--print-config"} & set(rest):
        from vac_ddp import train

        return train.main(rest)
    check_first(rest, ranks)
    return run_ranks("vac_ddp.train", rest, ranks)


def take_nproc(argv: list[str]) -> tuple[int, list[str]]:
    """The number of ranks (--nproc N, default: one a GPU, or one) and the other arguments."""
    for place, word in enumerate(argv):
        if word == "--nproc" or word.startswith("--nproc="):
            inside = "=" in word
            text = word.partition("=")[2] if inside else "".join(argv[place + 1 : place + 2])
            if not re.fullmatch("[1-9][0-9]{0,3}", text):
                raise UserError(f"--nproc {text or '(nothing)'}: a number of ranks from 1")
            return int(text), argv[:place] + argv[place + (1 if inside else 2) :]
    import torch

    return max(1, torch.cuda.device_count()), argv


def check_first(argv: list[str], ranks: int) -> None:
    """Settings and data as rank 0 will read them, so that a mistake is one line and not that of every rank."""
    command = parse_settings(argv)
    checks.check(command.config, ranks=ranks)
    from vac_ddp.training.model_setup import check_grammar

    check_grammar(command.config)
    from vac_ddp.data.index import open_index
    from vac_ddp.data.split import make_split

    index = open_index(command.config.data.train, labelled=True, settings=command.config.data)
    make_split(index, command.config.data, seed=command.config.seed)
    if command.config.data.val:
        open_index(command.config.data.val, labelled=True, settings=command.config.data, classes=index.classes)


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


def _save_time(launch_config: type) -> dict[str, int]:
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
