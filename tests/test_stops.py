"""Ends of programs before there is anything to save: Ctrl-C, SIGTERM, closed pipes, files that cannot be written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import Workplace, no_orphans, one_line
from tests.support import environment
from vac_ddp.cli import COMMANDS
from vac_ddp.errors import UserError
from vac_ddp.runtime.lock import RunLock, is_held


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("stops"))


def has_begun(pid: int) -> bool:
    """Whether a Python program has its own handlers: Python itself catches SIGINT only, not SIGTERM."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_startup(program: subprocess.Popen[str], ranks: int) -> None:
    """Until the program, or the ranks that it starts, can answer signals: they import torch from then on."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        begun = [child for child in children(program.pid) if has_begun(child)] if ranks else [program.pid]
        if has_begun(program.pid) and len(begun) >= max(1, ranks):
            return
        time.sleep(0.01)
    raise AssertionError("the program did not begin")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("words", "ranks", "number", "times"),
    [
        (["-m", "vac_ddp.cli", "train", "--nproc", "2"], 2, signal.SIGINT, 1),
        (["-m", "vac_ddp.cli", "train", "--nproc", "1"], 0, signal.SIGINT, 2),
        (["-m", "vac_ddp.train"], 0, signal.SIGTERM, 1),
    ],
)
def test_a_signal_in_startup_is_one_line_and_its_status(
    place: Workplace, words: list[str], ranks: int, number: signal.Signals, times: int
) -> None:
    run = f"{words[-1]}{times}"
    status = place.folder / f"{run}.status.json"
    program = subprocess.Popen(
        [sys.executable, *words, *place.arguments(run, "train.epochs=100")],
        cwd=place.folder,
        env=environment(VAC_STATUS_FILE=str(status)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_startup(program, ranks)
    for _ in range(times):  # as a terminal does: to all processes
        os.killpg(program.pid, number)
    _, stderr = program.communicate(timeout=60)
    assert stderr.splitlines() == [f"vac: stopped by {number.name}, there was nothing to save"]
    assert program.returncode == 128 + number
    assert json.loads(status.read_text())["status"] == 128 + number
    assert no_orphans(place) == []


HELP = """
import importlib, os, sys
from vac_ddp import cli

for module, _ in cli.COMMANDS.values():
    importlib.import_module(module)  # once for all: each command is a fork
for command in ["", *cli.COMMANDS]:
    if os.fork():
        print(command, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        continue
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    try:
        code = cli.main([command, "--help"] if command else ["--help"])
    except SystemExit as leaving:
        code = leaving.code
    sys.stdout.flush()  # as the interpreter does in the end
    os._exit(code or 0)
"""


def test_a_reader_of_the_help_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP], env=environment(), capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{command} 0" for command in ["", *COMMANDS]]


def test_a_status_file_that_cannot_be_written_is_a_warning(place: Workplace) -> None:
    done = place.python(
        "-m", "vac_ddp.train", *place.arguments("unwritten", "train.epoch=1"), VAC_STATUS_FILE="/proc/no/file"
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 2
    assert "train.epoch" in lines[0]
    assert lines[1].startswith("vac: warning: VAC_STATUS_FILE /proc/no/file cannot be written: ")


def test_a_count_of_restarts_that_is_none_is_one_line(place: Workplace) -> None:
    done = place.python("-m", "vac_ddp.train", *place.arguments("restarts"), SLURM_RESTART_COUNT="abc")
    assert "SLURM_RESTART_COUNT=abc" in one_line(done)


LOCKS = ["", "[]", "null", "3", '"a"', "{}", '{"host": 1}', '{"host": "a", "pid": "b"}', "[" * 100_000, "\x00", "{"]


@pytest.mark.parametrize("content", LOCKS, ids=range(len(LOCKS)))
def test_a_damaged_lock_is_one_line_until_it_is_old(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        RunLock(tmp_path).take()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert is_held(tmp_path)
    os.utime(path, (1e9, 1e9))
    assert not is_held(tmp_path)
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []
