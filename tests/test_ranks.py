"""All ranks end together, soon, with the first cause on top: real torchrun launches in which one rank goes wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.runs import Workplace, no_orphans
from tests.support import torchrun
from vac_ddp.results.logits_file import read_views

pytestmark = [pytest.mark.fault, pytest.mark.distributed]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A workplace where nothing is left running in the end."""
    made = Workplace(tmp_path_factory.mktemp("ranks"))
    yield made
    assert no_orphans(made) == []


def told(stderr: str) -> list[str]:
    """The lines of the program among those of torchrun."""
    return [line for line in stderr.splitlines() if line.startswith("vac: ")]


def test_an_error_of_one_rank_in_setup_is_the_line_and_the_status_of_all(place: Workplace) -> None:
    done = place.train("setup", fault="raise at=setup rank=1")
    assert place.status("setup")["status"] == 2, done.stderr
    assert place.status("setup")["message"] == "rank 1: a fault of this rank alone"
    assert told(done.stderr) == ["vac: rank 1: a fault of this rank alone"]


@pytest.mark.parametrize(("library", "rank"), [("CDLL", 1), ("PyDLL", 1), ("PyDLL", 0)])
def test_a_rank_that_is_stuck_in_native_code_ends_all(place: Workplace, library: str, rank: int) -> None:
    """By themselves: not by the SIGKILL that torchrun sends 30 s after SIGTERM."""
    run = f"{library}_{rank}"
    done = place.train(run, "health.timeout_s=6", fault=f"block:{library} step=5 rank={rank}", timeout=120)
    assert done.returncode != 0
    assert "-9" not in done.stderr and "SIGKILL" not in done.stderr
    status = place.status(run)
    assert status["status"] == 1
    if library == "CDLL":
        said = re.match(
            r"rank (\d): no progress for (\d+) s after step 5; its main thread is in block \(", status["message"]
        )
        assert said is not None and int(said[1]) == rank, status["message"]
        assert 6 <= int(said[2]) <= 60  # a busy machine may look later than after the limit
    else:
        assert f"rank {rank} does not answer" in status["message"]
    assert told(done.stderr)[0] == f"vac: {status['message']}"


ONE_IS_STOPPED = """
import os, signal, sys
from vac_ddp.predict import main
from vac_ddp.predicting import all_videos

real = all_videos.scored_videos

def stopped(scorer, videos):
    for number, video in enumerate(real(scorer, videos)):
        if number == 1:
            signal.raise_signal(signal.SIGUSR1)
        yield video

if os.environ["RANK"] == "1" and not os.environ.get("UNDISTURBED"):
    all_videos.scored_videos = stopped
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_to_one_rank_of_a_prediction_stops_all(place: Workplace) -> None:
    """With VAC_STATUS_ONLY a rank that stops is a success for torchrun, which leaves the others alone."""
    assert place.alone("model", "train.max_steps=1").returncode == 0
    program, status = place.folder / "stopped.py", place.folder / "predict.status.json"
    program.write_text(ONE_IS_STOPPED)
    words = [
        "--",
        "--run",
        place.folder / "model",
        "--data",
        place.folder / "data_train",
        "--out",
        place.folder / "out",
    ]
    words += ["predict.save_every=1", "data.workers=0"]
    told = {"VAC_STATUS_FILE": str(status), "VAC_STATUS_ONLY": "1"}
    done = torchrun(2, program, *words, cwd=place.folder, timeout=120, **told)
    assert done.returncode == 0, done.stderr
    assert json.loads(status.read_text())["status"] == 75
    again = torchrun(2, program, *words, cwd=place.folder, timeout=120, UNDISTURBED="1", **told)
    assert "videos were there already" in again.stdout, again.stderr
    assert json.loads(status.read_text())["status"] == 0
    assert len(read_views(place.folder / "out").ids) == 21
