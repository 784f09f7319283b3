"""train.max_minutes by a clock of the test's own: what is decided, that it is kept, and what a resumed run ends in."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import Workplace, assert_same_end
from vac_ddp.arguments import parse_settings
from vac_ddp.errors import Interrupted, UserError
from vac_ddp.training import time_limit
from vac_ddp.training.early_stopping import Stopping
from vac_ddp.training.lr_schedule import count_warmup_steps, learning_rate
from vac_ddp.training.progress import Position
from vac_ddp.training.time_limit import Plan
from vac_ddp.training.trainer import open_trainer

STEPS = 7  # an epoch: 21 videos, 3 a step
BOUND = 100  # epochs
WORDS = ["data.workers=0", "train.global_batch=3", f"train.epochs={BOUND}", "checkpoint.every_steps=null"]
LIMIT = [*WORDS, "train.max_minutes=10"]
# 2 steps are skipped, 20 measured, the first validation was measured: decided after step 22. Spent: 470 s to start, 22
# of steps, 3 ends of epochs. Left: 600 - 498 - 30 (5 %) - 5 (report) = 67 s, less what writing takes. To step 70 it is
# 48 s of steps and 7 ends; 72 take 2 s and one end more, 73 would take 67 s.
DECIDED, TOTAL = 22, 72


class Clock:
    """Seconds of a start: `start` to begin with, `step` per step and `end` per validation."""

    def __init__(self, start: float, step: float = 1.0, end: float = 2.0) -> None:
        self.now, self.step, self.end = start, step, end


def train(
    place: Workplace, run: str, *words: str, clock: Clock, stop: int | None = None, slower: tuple[int, float] = (0, 0)
) -> int:
    """Train in this process by `clock`; the number of steps that were made by then.

    stop: SIGTERM comes in this step, and is answered one step later. slower: (step, seconds) from which on steps take
    longer.
    """
    settings = parse_settings(place.arguments(run, *words)).config
    with pytest.MonkeyPatch.context() as patched, open_trainer(settings, torch.device("cpu")) as trainer:
        patched.setattr(time_limit, "process_seconds", lambda: clock.now)
        run_step = trainer.stepper.run

        def stepped(batches: list[Any], **named: Any) -> None:
            if named["step"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            run_step(batches, **named)
            clock.now += slower[1] if slower[1] and named["step"] >= slower[0] else clock.step

        trainer.stepper.run = stepped  # type: ignore[method-assign]
        if trainer.validator is not None:
            validate = trainer.validator.run

            def validated(asked: Any) -> Any:
                clock.now += clock.end
                return validate(asked)

            trainer.validator.run = validated  # type: ignore[method-assign]
        try:
            trainer.run()
        except Interrupted:
            assert stop is not None
        else:
            assert trainer.saver.best.intact()
        return trainer.position.step


def companion(place: Workplace, run: str) -> dict[str, Any]:
    """The facts of the newest checkpoint."""
    return json.loads(max((place.folder / run / "checkpoints").glob("step-*.json")).read_text(encoding="utf-8"))


def log(place: Workplace, run: str) -> str:
    return (place.folder / run / "log.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace with the run `whole`, which was not interrupted."""
    made = Workplace(tmp_path_factory.mktemp("limit"))
    assert train(made, "whole", *LIMIT, clock=Clock(470)) == TOTAL
    return made


def test_the_number_of_steps_is_what_the_measured_seconds_allow(place: Workplace) -> None:
    facts = companion(place, "whole")
    assert (facts["total_steps"], facts["step_bound"]) == (TOTAL, STEPS * BOUND)
    lines = re.findall(r"time limit .*", log(place, "whole"))
    assert lines == [
        "time limit    10 min: 72 total steps (10.3 epochs; upper bound 700) at 1 s per step; 498 s spent, "
        "16 s for validation and checkpoints, 35 s reserved"
    ]
    epochs = place.lines("whole", "epoch")
    assert [line["step"] for line in epochs] == [*range(STEPS, TOTAL, STEPS), TOTAL]
    assert all("val_top1" in line for line in epochs)  # the cut last epoch as well


def test_the_learning_rate_is_that_of_the_bound_until_then_and_of_the_total_from_there(place: Workplace) -> None:
    bound = STEPS * BOUND
    for line in place.lines("whole", "train"):
        total = bound if line["step"] <= DECIDED else TOTAL
        warm = count_warmup_steps(1, epochs=BOUND, total_steps=total)
        rate = learning_rate(
            line["step"] - 1, total_steps=total, warmup_steps=warm, peak=0.003, minimum=1e-6, warmup_start=0.0
        )
        assert line["lr"] == pytest.approx(rate, rel=1e-6), line["step"]


@pytest.mark.parametrize("stops", [[DECIDED - 1, 60], [DECIDED, 47, TOTAL - 2]])
def test_interrupted_and_resumed_it_ends_in_the_same_weights(place: Workplace, stops: list[int]) -> None:
    """Saved one step after the signal's: at the decision, right after it, within an epoch, at the last step."""
    run = f"stopped{stops[0]}"
    for number, stop in enumerate([*stops, None]):
        words = ["run.resume=auto"] if number else []
        train(place, run, *LIMIT, *words, clock=Clock(8 if number else 470), stop=stop)
    assert_same_end(place, "whole", run)
    assert log(place, run).count("total steps (") == 1  # decided once


def test_minutes_before_an_interruption_count(place: Workplace) -> None:
    """Stopped before anything is decided: the rest is measured again, and has what is left."""
    assert train(place, "early", *LIMIT, clock=Clock(470), stop=9) == 11
    saved = place.state("early")["time_limit"]
    assert (saved["seconds"], saved["total_steps"]) == (470 + 11 + 2, None)
    end = train(place, "early", *LIMIT, "run.resume=auto", clock=Clock(37))
    # 483 + 37 s; 22 steps from there on are made at step 33, with ends of epochs at 14, 21, 28: 548 s spent, 17 left.
    assert f"{end} total steps" in log(place, "early") and "548 s spent" in log(place, "early")
    rest = {total: total - 33 + 2 * (-(-total // STEPS) - 4) for total in (end, end + 1)}
    assert rest[end] < 17 <= rest[end + 1]


def test_steps_that_become_slower_cut_the_run_short(place: Workplace) -> None:
    """At the limit it ends, validated, with best weights; resumed, there is nothing more to train."""
    end = train(place, "slow", *LIMIT, clock=Clock(470), slower=(40, 20.0))
    # 40 steps and 5 ends: 520 s. 4 more steps and an end: 602 s, too late, on which the ranks agree in step 45.
    assert end == 45
    assert f"10 min are used up: ends at step {end} of {TOTAL}" in log(place, "slow")
    assert place.lines("slow", "epoch")[-1]["step"] == end == companion(place, "slow")["total_steps"]
    before = place.state("slow")
    assert train(place, "slow", *LIMIT, "run.resume=auto", clock=Clock(8)) == end
    assert torch.equal(before["model"]["head.weight"], place.state("slow")["model"]["head.weight"])


def test_where_not_even_an_epoch_fits(place: Workplace) -> None:
    """A tenth of a minute is over before the first step: a step and the one that agrees are made, and validated."""
    end = train(place, "tiny", *WORDS, "train.max_minutes=0.1", clock=Clock(30))
    assert end <= 2
    assert [line["step"] for line in place.lines("tiny", "epoch")] == [end]
    assert (place.folder / "tiny" / "best_videomae.pt").exists()
    # Steps of 30 s in 4 minutes: two are a quarter of it, 63 s spent. 15 + 5 s are reserved, the validation of 6 clips
    # is estimated as 2 steps: of the other 97 s 3 steps take 90.
    end = train(place, "few", *WORDS, "train.max_minutes=4", clock=Clock(3, step=30.0))
    assert end == 5 and "5 total steps" in log(place, "few")
    assert [line["step"] for line in place.lines("few", "epoch")] == [end]


@pytest.mark.fault
@pytest.mark.distributed
def test_two_ranks_end_together(place: Workplace) -> None:
    """On a real clock, whatever it says: both take over rank 0's decision, and the last epoch is ended."""
    done = place.train("ranks", *WORDS[:-1], "train.max_minutes=0.3")
    assert done.returncode == 0, done.stderr
    facts, epochs = companion(place, "ranks"), place.lines("ranks", "epoch")
    assert facts["step"] == facts["total_steps"] == epochs[-1]["step"] < facts["step_bound"]
    assert "val_top1" in epochs[-1] and (place.folder / "ranks" / "best_videomae.pt").exists()
    assert "time limit" in done.stdout


def test_settings_stay_an_upper_bound_and_early_stopping_ends_before(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train.max_minutes=10", *WORDS, "train.max_steps=30"]
    assert train(place, "bound", *words, clock=Clock(10)) == 30
    assert companion(place, "bound")["total_steps"] == 30
    monkeypatch.setattr(Stopping, "update", lambda self, accuracy, epoch: (epoch == 1, epoch == 2))
    assert train(place, "patient", *LIMIT, "train.patience=1", clock=Clock(10)) == 2 * STEPS
    with pytest.raises(UserError, match=r"train\.max_minutes is 11\.0 and was 10\.0"):
        train(place, "bound", *words, "train.max_minutes=11", "run.resume=auto", clock=Clock(10))


def simulated(plan: Plan, where: Position, total: int, step_s: float, ends: dict[bool, float]) -> float:
    """Seconds of the rest of a run, step by step."""
    made, epoch, took = where.step, where.epoch, 0.0
    while made < total or epoch * plan.steps_per_epoch < made:
        while made < min(total, (epoch + 1) * plan.steps_per_epoch):
            made, took = made + 1, took + step_s
        epoch += 1
        took += ends[made >= total or epoch % plan.val_every == 0]
    return took


def test_the_plan_is_the_longest_that_a_simulation_finds() -> None:
    """Against steps and ends of epochs that are counted one by one."""
    draw = random.Random(3)
    for _ in range(200):
        steps, every, full = draw.randint(1, 9), draw.randint(1, 4), draw.randint(0, 2)
        plan = Plan(bound=draw.randint(40, 90), steps_per_epoch=steps, val_every=every)
        step = draw.randint(1, 30)
        where = Position(step=step, epoch=step // steps, step_in_epoch=step % steps)
        if not where.step_in_epoch:  # the plan is made before the end of the epoch of this step
            where = Position(step=step, epoch=where.epoch - 1, step_in_epoch=steps)
        step_s, ends = draw.uniform(0.5, 2), {False: draw.uniform(0, 1), True: draw.uniform(1, 5)}
        left = draw.uniform(0, 80)
        fitting = [
            total for total in range(step, plan.bound + 1) if simulated(plan, where, total, step_s, ends) <= left
        ]
        assert plan.fitting_steps(left, where, step_s, ends) == max(fitting, default=step)
        tokens = Plan(**{**plan.__dict__, "full_epochs": full, "full_factor": 2.0})
        assert tokens.fitting_steps(left, where, step_s, ends) <= max(fitting, default=step)


def test_the_clock_counts_from_the_start_of_the_process() -> None:
    """As /proc says, to its resolution."""
    own = time_limit.process_seconds()
    up = float(Path("/proc/uptime").read_text().split()[0])
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    assert own == pytest.approx(up - began, abs=1.0)
