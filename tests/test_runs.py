"""`vac runs` and `vac plot`: what several run directories say side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vac_ddp import cli, config
from vac_ddp.commands import plot_command
from vac_ddp.report import run_reader
from vac_ddp.runtime.lock import RunLock
from vac_ddp.settings import Config


def make_run(folder: Path, *words: str, accuracies: tuple[float, ...] = (), ended: bool = True, total: int = 8) -> Path:
    """A run directory as a training leaves it, without the weights."""
    settings = Config()
    for word in words:
        config.override(settings, word)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(settings), encoding="utf-8")
    (folder / "log.txt").write_text("")
    lines = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        lines.append({"kind": "train", "step": 4 * epoch, "epoch": epoch - 1, "loss": 1.0, "lr": 0.1, "clips_per_s": 9})
        entry = {"epoch": epoch, "train_loss": 2 / epoch, "train_accuracy": 0.5, "val_loss": 1 / epoch}
        lines.append({"kind": "epoch", "step": 4 * epoch, **entry, "val_top1": accuracy})
    if ended:
        lines.append({"kind": "speed", "step": 4 * len(accuracies)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / "step-00000004.json").write_text(json.dumps({"total_steps": total}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_run(tmp_path / "a", "optim.lr=0.001", "seed=1", "run.dir=x", accuracies=(0.25, 0.75))
    make_run(tmp_path / "deep" / "b", "optim.lr=0.002", "seed=1", "run.dir=y", accuracies=(0.5,), ended=False)
    (make_run(tmp_path / "c", "seed=1", ended=False) / "interrupted.json").write_text("{}")
    (tmp_path / "no_run").mkdir()
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def rows(text: str) -> dict[str, list[str]]:
    return {words[0]: words[1:] for line in text.splitlines() if not line.startswith(" ") and (words := line.split())}


def test_table_has_state_best_and_what_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(folder)]) == 0
    text = capsys.readouterr().out
    found = rows(text)
    assert found.keys() == {"run", "a", "deep/b", "c"}
    assert found["a"][:5] == ["done", "8/8", "0.7500", "0.5000", "2"]
    assert found["deep/b"][:6] == ["broke", "off", "4/8", "0.5000", "1.0000", "1"]
    assert found["c"][:2] == ["stopped", "0/8"]
    assert "    optim.lr=0.001" in text
    assert "    optim.lr=null" in text
    assert "seed=" not in text  # the same in all
    assert "run.dir" not in text


def test_a_run_that_is_held_is_running(folder: Path) -> None:
    lock = RunLock(folder / "a")
    lock.take()
    assert run_reader.read_run(folder / "a", "a").state == "running"
    lock.release()
    assert run_reader.read_run(folder / "a", "a").state == "done"
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    dead = {"host": os.uname().nodename, "pid": gone.pid, "started": "1"}
    (folder / "a" / "run.lock").write_text(json.dumps(dead))
    assert run_reader.read_run(folder / "a", "a").state == "done"
    assert (folder / "a" / "run.lock").exists()  # looking changes nothing


def test_a_single_run_and_a_folder_without_any(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(folder / "a")]) == 0
    assert rows(capsys.readouterr().out)["a"][0] == "done"
    assert cli.main(["runs", str(folder / "no_run")]) == 2
    assert cli.main(["runs", str(folder / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_picture_has_a_curve_of_every_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for names in (["a"], ["deep/b"], ["a", "deep/b"]):
        out = folder / "curves.png"
        assert cli.main(["plot", *[str(folder / name) for name in names], "--out", str(out)]) == 0
        with Image.open(out) as image:
            pictures.append(np.asarray(image.convert("RGB")).reshape(-1, 3))
    first, second = (31, 119, 180), (255, 127, 14)  # matplotlib's first colours

    def share(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
        return int((np.abs(picture.astype(int) - colour).max(axis=1) < 12).sum())

    assert [share(picture, first) > 100 for picture in pictures] == [True, True, True]
    assert [share(picture, second) > 30 for picture in pictures] == [False, False, True]


def test_names_are_as_short_as_they_differ() -> None:
    assert list(plot_command.named(["x/a", "x/b/"])) == ["a", "b"]
    assert list(plot_command.named(["x/1/run", "x/2/run", "x/2/run"])) == ["1/run", "2/run"]


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(folder / "no_run")]) == 2
    assert cli.main(["plot", str(folder / "a"), "--out", str(folder / "x.pdf")]) == 2
    (folder / "c" / "metrics.jsonl").write_text("")
    assert cli.main(["plot", str(folder / "c")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
