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
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from vac_ddp import checks, config, errors, files
from vac_ddp.errors import UserError

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
    command = config.parse(argv, program="vac train", about="")
    checks.check(command.config, ranks=ranks)
    from vac_ddp.job_model import check_grammar

    check_grammar(command.config)
    from vac_ddp.data.index import open_index
    from vac_ddp.data.split import make_split

    index = open_index(command.config.data.train, labelled=True, settings=command.config.data)
    make_split(index, command.config.data, seed=command.config.seed)
    if command.config.data.val:
        open_index(command.config.data.val, labelled=True, settings=command.config.data, classes=index.classes)


def _shutdown_timeout(launch_config: type) -> dict[str, int]:
    """The time that ranks get to save, where this torch can be told: 2.11 cannot, and kills after 30 s."""
    known = {field.name for field in dataclasses.fields(launch_config)}
    return {"shutdown_timeout": SAVE_TIME_S} if "shutdown_timeout" in known else {}


def run_ranks(module: str, argv: list[str], ranks: int) -> int:
    """Run `python -m module argv` on `ranks` ranks of this machine; its exit status, told by its status file."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each of them has a level of its own
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    with tempfile.TemporaryDirectory() as folder:
        told = Path(os.environ.setdefault("VAC_STATUS_FILE", str(Path(folder) / "status.json")))
        with contextlib.suppress(FileNotFoundError):
            told.unlink()
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            signals_to_handle=SIGNALS,
            **_shutdown_timeout(LaunchConfig),
        )
        failed: BaseException | None = None
        try:
            elastic_launch(launch, sys.executable)("-m", module, *argv)
        except (ChildFailedError, SignalException) as error:
            failed = error
        if told.exists():
            return int(files.read_json(told)["status"])
    if failed is None:
        return errors.DONE
    print("vac: the ranks ended without a word (killed, or out of memory?)", file=sys.stderr)
    return errors.FAILED
