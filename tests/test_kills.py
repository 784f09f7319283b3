"""Ten random kills: the short form of tests/long/kills.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.long.kills import Training, parents, processes, run_all, until
from tests.runs import Workplace, no_orphans

SEED = int(os.environ.get("VAC_SEED", "13"))


@pytest.mark.fault
@pytest.mark.distributed
def test_ten_random_kills_end_as_the_undisturbed_run(tmp_path: Path) -> None:
    """Each training that was disturbed is compared in `run_all`; VAC_SEED makes others."""
    place = Workplace(tmp_path)
    trainings, _, last = run_all(place, 10, SEED, ["checkpoint.every_steps=2", "train.epochs=5"], each=10)
    kills = [kill for training in trainings for kill in training.kills]
    assert len(kills) == 10
    assert last == 20
    assert all(kill.saved <= kill.reached <= last for kill in kills)
    assert no_orphans(place) == []


@pytest.mark.fault
@pytest.mark.distributed
@pytest.mark.parametrize("when", ["start", "training"])
def test_ranks_whose_agent_is_killed_end(tmp_path: Path, when: str) -> None:
    """Nobody else would end them: those that start wait for the agent's store, others train on and hold the lock."""
    training = Training(Workplace(tmp_path), "run", ["train.epochs=1000", "checkpoint.every_steps=null"])
    training.start(restarts=0)
    begun = training.reached if when == "training" else lambda: len(processes(training.pid())["ranks"]) == 2
    until(lambda: bool(begun()), when)
    ranks = processes(training.pid())["ranks"]
    os.kill(training.pid(), signal.SIGKILL)
    until(lambda: not parents().keys() & set(ranks), f"the ranks end, see {training.log}")
    said = training.log.read_text()
    if when == "start":
        assert "vac: no torchrun at localhost:" in said
        assert "Traceback" not in said
    else:
        assert 0 < training.reached() == training.saved() < 4000
        assert "SIGTERM: saving" in said
