"""What a run looks like on a terminal, in a file, and on the ranks that have none of it."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.runs import Workplace
from tests.support import environment
from vac_ddp.report.epoch_table import TABLE, one_of_few, table_row
from vac_ddp.report.terminal import fitted
from vac_ddp.report.tracker import Tracker
from vac_ddp.settings import LogSettings


def on_terminal(words: list[str], folder: Path, columns: int) -> tuple[int, str]:
    """Run a program on a terminal of its own; (exit status, everything it wrote there)."""
    own, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environ = environment(TERM="xterm")
    environ.pop("COLUMNS", None)
    with subprocess.Popen(words, cwd=folder, env=environ, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        data = b""
        while True:
            try:
                piece = os.read(own, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            data += piece
        status = process.wait(timeout=120)
    os.close(own)
    return status, data.decode("utf-8")


class Screen:
    """What stays of characters on a terminal: carriage returns and line ends, nothing else is expected."""

    def __init__(self, text: str) -> None:
        self.lines, self.drawn = [""], []
        column = 0
        for character in text:
            if character in "\r\n":
                self.drawn.append(self.lines[-1])
                column = 0
                if character == "\n":
                    self.lines.append("")
                continue
            assert character.isprintable(), repr(character)
            line = self.lines[-1]
            self.lines[-1] = line[:column] + character + line[column + 1 :]
            column += 1
        self.lines = [line.rstrip() for line in self.lines]


@pytest.mark.parametrize("columns", [80, 160])
def test_a_training_and_a_prediction_leave_whole_lines(tmp_path: Path, columns: int) -> None:
    place = Workplace(tmp_path)
    words = ["-m", "vac_ddp.train", *place.arguments("run", "data.workers=0", "train.epochs=2")]
    status, text = on_terminal([sys.executable, *words], tmp_path, columns)
    assert status == 0, text
    screen = Screen(text)
    bars = [line for line in screen.drawn if "left" in line]
    assert any(re.match(r"epoch 2/2 .*\|.*\| \d+/21 .*clips/s, loss \d\.\d+ acc \d.* left", bar) for bar in bars)
    assert any(bar.startswith("validation") and "videos/s" in bar for bar in bars)
    assert max(map(len, bars)) <= columns
    assert not [line for line in screen.lines if "left" in line]  # every bar is gone at the end
    plain = [line for line in screen.lines if line]
    long = [line for line in plain if len(line) > columns]
    assert [line for line in long if str(tmp_path) not in line] == []  # paths and commands are not broken
    # the log file has the same words, unbroken
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    said = [line for line in plain if line.startswith((TABLE, "    1/2", "    2/2", "data:"))]
    assert len(said) == 4
    assert all(line in log for line in said)

    words = ["-m", "vac_ddp.predict", "--run", "run", "--data", str(tmp_path / "data_val"), "data.workers=0"]
    status, text = on_terminal([sys.executable, *words], tmp_path, columns)
    assert status == 0, text
    screen = Screen(text)
    assert any(line.startswith("predicting") for line in screen.drawn)
    assert not any("predicting" in line for line in screen.lines)


def test_into_a_file_no_control_characters(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    with (tmp_path / "out.txt").open("wb") as out:
        words = [sys.executable, "-m", "vac_ddp.train", *place.arguments("run", "data.workers=0", "train.epochs=1")]
        done = subprocess.run(words, cwd=tmp_path, env=environment(), stdout=out, stderr=out)
    assert done.returncode == 0
    for path in (tmp_path / "out.txt", tmp_path / "run" / "log.txt"):
        text = path.read_text(encoding="utf-8")
        assert "val loss" in text
        assert [c for c in text if c != "\n" and not c.isprintable()] == []
        assert "left" not in text


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_other_ranks_write_to_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        tracker = Tracker(tmp_path, LogSettings(), rank=3)
        tracker.say("only for rank 0")
        tracker.say("a frame is damaged", everywhere=True)
        tracker.progress("epoch 1/2", 10)
        tracker.advance(2, loss=1.0)
        tracker.write("train", 1, loss=1.0)
        tracker.close()
    assert plain.getvalue() == "rank 3: a frame is damaged\n"
    assert terminal.getvalue() == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["logs", "rank-3.txt"]
    lines = (tmp_path / "logs" / "rank-3.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  rank 3: ", line) for line in lines)
    assert lines[1].endswith("a frame is damaged")


def test_a_rank_that_cannot_write_its_log_speaks_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    (tmp_path / "logs").write_text("not a folder")
    tracker = Tracker(tmp_path, LogSettings(), rank=1)
    tracker.say("a frame is damaged", everywhere=True)
    tracker.close()
    assert terminal.getvalue() == "rank 1: a frame is damaged\n"


def test_rows_stand_under_their_heads() -> None:
    full = {"epoch": 7, "train_loss": 1.23456, "train_accuracy": 0.5, "val_loss": 12.5, "val_top1": 1.0}
    row = table_row(full, 400, 123456, 1234.5, 3725.0)
    assert row == "  7/400   123456      1.2346  0.500   12.5000  1.000     1234  1:02:05"
    assert len(row) == len(TABLE)
    assert len(row + "  best") <= 80
    ends = [match.end() for match in re.finditer(r"\S+(?: loss)?", TABLE)]
    assert [match.end() for match in re.finditer(r"\S+", row)] == ends
    assert len(table_row({"epoch": 1}, 2, 3, 0.1, 1.0)) == len(TABLE)


def test_few_rows_of_many_epochs() -> None:
    for epochs in (1, 49, 50, 51, 400):
        shown = [epoch for epoch in range(1, epochs + 1) if one_of_few(epoch, epochs)]
        assert len(shown) == min(epochs, {51: 25, 400: 50}.get(epochs, epochs))


def test_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert fitted("short") == "short"
    assert fitted("one two three four five six") == "one two three four\n  five six"
    assert fitted("a  table   row\nnext") == "a  table   row\nnext"
    assert fitted("see /a/long/path/that-is-not-broken/x") == "see\n  /a/long/path/that-is-not-broken/x"
