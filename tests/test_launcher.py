"""run_training(): the same run as `vac train`, its lines, its errors, and the stop button of a notebook."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import vac_ddp
from tests.runs import Workplace, assert_same_end, no_orphans
from tests.support import environment
from vac_ddp.errors import Interrupted, UserError

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("launcher"))


@pytest.fixture(scope="module")
def whole(place: Workplace) -> str:
    """The run that the command makes of these settings."""
    assert place.train("whole", "augment.crop_scale=0.6,1").returncode == 0
    return "whole"


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def settings(place: Workplace, run: str) -> dict[str, Any]:
    """Those of `Workplace.arguments` as a dict."""
    pairs = (word.partition("=") for word in place.arguments(run)[1:])
    return {name: value for name, _, value in pairs}


@pytest.mark.fault
def test_it_is_the_run_of_the_command(place: Workplace, whole: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Nested and dotted names, lists, null and numbers as such, over a YAML file; the result is what the files say."""
    given = settings(place, "notebook") | {"train": {"epochs": 3, "patience": None}, "augment.crop_scale": (0.6, 1)}
    result = vac_ddp.run_training(place.folder / "tiny.yaml", given, nproc=2)
    assert_same_end(place, whole, "notebook")
    out, err = capfd.readouterr()
    assert err == "" and "\r" not in out and "\x1b" not in out
    assert f"best weights  {result.weights}" in out.splitlines()
    best = max(place.lines(whole, "epoch"), key=lambda line: (line["val_top1"], -line["epoch"]))
    assert (result.run, result.step, result.status) == (place.folder / "notebook", 12, 0)
    assert result.best_epoch == best["epoch"] and result.metrics["top1"] == best["val_top1"]
    assert result.weights.name == "best_videomae.pt" and result.weights.is_file()


def test_what_cannot_be_used_is_a_user_error(place: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"unknown setting train\.epoch: did you"):
        vac_ddp.run_training({"train": {"epoch": 3}})
    nothing = str(place.folder / "nothing")
    with pytest.raises(UserError, match=nothing):
        vac_ddp.run_training(place.folder / "tiny.yaml", settings(place, "none") | {"data.train": nothing}, nproc=1)
    assert nothing in capfd.readouterr().out
    with pytest.raises(UserError, match=r"presets: .*hmdb51"):
        vac_ddp.run_training("no_such_preset", nproc=1)


@pytest.mark.fault
def test_the_stop_button_saves_and_a_copy_of_the_run_resumes(
    place: Workplace, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the first epoch; the ranks are gone when KeyboardInterrupt comes."""
    said = builtins.print

    def press(*words: Any, **options: Any) -> None:
        said(*words, **options)
        if str(words[0]).lstrip().startswith("1/3 "):
            monkeypatch.setattr(builtins, "print", said)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(builtins, "print", press)
    given = settings(place, "stopped") | {"augment": {"crop_scale": [0.6, 1.0]}}
    with pytest.raises(KeyboardInterrupt):
        vac_ddp.run_training(place.folder / "tiny.yaml", given, nproc=2)
    assert no_orphans(place) == []
    step = json.loads((place.folder / "stopped" / "interrupted.json").read_text())["step"]
    assert 4 <= step < 12
    shutil.copytree(place.folder / "stopped", place.folder / "copied")  # as from an earlier session's output
    again = {"run.resume": "auto", "run.dir": place.folder / "copied"}
    assert vac_ddp.run_training(place.folder / "tiny.yaml", given | again, nproc=2).step == 12
    assert_same_end(place, whole, "copied")


@pytest.mark.fault
def test_ranks_do_not_outlive_the_notebook(place: Workplace) -> None:
    """Killed after the first epoch: the ranks save and end."""
    run = "killed"
    given = settings(place, run) | {"train.epochs": 10000}
    code = f"import vac_ddp; vac_ddp.run_training({str(place.folder / 'tiny.yaml')!r}, {given!r}, nproc=2)"
    script = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=place.folder
    )
    assert script.stdout is not None
    for line in script.stdout:
        if "1/10000" in line:
            break
    script.kill()
    script.wait()
    until = time.monotonic() + 120
    while no_orphans(place) and time.monotonic() < until:
        time.sleep(0.2)
    assert no_orphans(place) == []
    assert (place.folder / run / "interrupted.json").exists()


@pytest.mark.fault
def test_interrupted_by_a_signal_from_elsewhere(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM or a service stops the ranks, not the script: an exception that says where to resume."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time())))
    with pytest.raises(Interrupted, match=r"run\.resume=auto") as caught:
        vac_ddp.run_training(place.folder / "tiny.yaml", settings(place, "ended"), nproc=1)
    assert Path(caught.value.run or "") == place.folder / "ended"
