"""Faults of resuming that other frameworks have had: what a step trains on is a function of (seed, epoch, step)."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.frame_data import MemoryVideos, jpeg
from tests.runs import Workplace, assert_same_end, differences
from tests.test_dataset import children_of
from tests.test_dataset import config as small_config
from vac_ddp.arguments import parse_settings
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.loader import train_loader
from vac_ddp.data.sampler import StepSampler, epoch_draws
from vac_ddp.errors import Interrupted
from vac_ddp.training.early_stopping import Stopping
from vac_ddp.training.trainer import open_trainer

VIDEOS, PER_STEP, EPOCHS = 21, 3, 3  # of runs.Workplace: 7 steps an epoch, of two batches of a loader process each
STEPS = VIDEOS // PER_STEP
WORKERS = 2
WORDS = [f"data.workers={WORKERS}", f"train.global_batch={PER_STEP}", f"train.epochs={EPOCHS}"]


@dataclass
class Part:
    """What one process trained on: the videos of each (epoch, step of the epoch), and its children at that time.

    left: children when the training had ended, the run was still open.
    """

    videos: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    children: list[set[int]] = field(default_factory=list)
    left: set[int] = field(default_factory=set)
    interrupted: bool = False


def train(place: Workplace, run: str, *words: str, stop: int | None = None, validation: int | None = None) -> Part:
    """Train in this process. SIGTERM comes in step `stop`; the ranks agree one step later, after which it is saved.

    validation: it comes in the validation after so many epochs instead, and all is saved at once.
    """
    words = (*WORDS, "checkpoint.every_steps=null", "log.every_steps=1", *words)
    settings = parse_settings(place.arguments(run, *words)).config
    part, others = Part(), set(children_of(os.getpid()))  # of tests before this one
    with open_trainer(settings, torch.device("cpu")) as trainer:
        where, run_step = trainer.position, trainer.stepper.run

        def watched(batches: list[Any], **named: Any) -> None:
            if named["step"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            part.videos[where.epoch, where.step_in_epoch] = [v for batch in batches for v in batch.videos.tolist()]
            part.children.append(set(children_of(os.getpid())) - others)
            run_step(batches, **named)

        assert trainer.validator is not None
        validate = trainer.validator.run

        def watched_validation(asked: Any) -> Any:
            if where.epoch == validation:
                os.kill(os.getpid(), signal.SIGTERM)
            return validate(asked)

        trainer.stepper.run = watched  # type: ignore[method-assign]
        trainer.validator.run = watched_validation  # type: ignore[method-assign]
        try:
            trainer.run()
        except Interrupted as error:
            expected = stop + 2 if stop is not None else (validation or 0) * STEPS
            part.interrupted = error.step == where.step == expected
        part.left = set(children_of(os.getpid())) - others
    assert not (part.left | part.children[0]) & set(children_of(os.getpid())), "a loader process is left"
    return part


def planned(epoch: int, step: int) -> list[int]:
    """The videos of a step, by the order of its epoch."""
    return epoch_draws(0, epoch, np.arange(VIDEOS))[step * PER_STEP : (step + 1) * PER_STEP].tolist()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace with the undisturbed run `whole`."""
    made = Workplace(tmp_path_factory.mktemp("resume"))
    whole = train(made, "whole", stop=None)
    assert whole.videos == {(e, s): planned(e, s) for e in range(EPOCHS) for s in range(STEPS)}
    return made


# A stop in step n is saved at n + 2. Two steps before the end of an epoch are four batches left, one step is two: both
# are on their way in the loader processes when the state is saved.
STOPS = {
    "saved_at_2_4_6_of_epoch_0_and_3_of_epoch_1": [0, 2, 4, 8],
    "saved_at_5_and_7_of_epoch_0_and_6_of_epoch_1": [3, 5, 11],
}


@pytest.mark.parametrize("run", STOPS)
def test_every_step_has_its_videos_once(place: Workplace, run: str) -> None:
    """Resumed twice within an epoch, near its end, at its end: the plan's videos in all steps, and the same end."""
    parts = []
    for stop in [*STOPS[run], None]:
        parts.append(train(place, run, *(["run.resume=auto"] if parts else []), stop=stop))
        assert parts[-1].interrupted == (stop is not None)
    steps = [(place, videos) for part in parts for place, videos in part.videos.items()]
    assert steps == [((e, s), planned(e, s)) for e in range(EPOCHS) for s in range(STEPS)]
    for part in parts:  # the loader processes of its first step serve all later ones, over the ends of epochs
        assert len(part.children[0]) >= WORKERS
        assert all(part.children[0] <= later for later in part.children)
    assert_same_end(place, "whole", run)


def test_stopped_while_the_model_is_validated(place: Workplace) -> None:
    """The next epoch's loader is under way then; it is closed, and the resumed run begins with the same batches."""
    first = train(place, "validated", validation=1)
    second = train(place, "validated", "run.resume=auto", validation=2)
    last = train(place, "validated", "run.resume=auto")
    assert [part.interrupted for part in (first, second, last)] == [True, True, False]
    steps = [(place, videos) for part in (first, second, last) for place, videos in part.videos.items()]
    assert steps == [((e, s), planned(e, s)) for e in range(EPOCHS) for s in range(STEPS)]
    assert_same_end(place, "whole", "validated")
    assert torch.equal(place.state("whole")["random"], place.state("validated")["random"])


def test_resumed_from_the_checkpoint_that_follows_a_validation(place: Workplace) -> None:
    """It was saved while batches of the next epoch were on their way; all of that epoch is trained on, once."""
    whole = place.state("whole")
    for epoch in (1, 2):
        saved = place.folder / "whole" / "checkpoints" / f"step-{epoch * STEPS:08d}.pt"
        rest = train(place, f"from{epoch}", f"run.resume={saved}")
        assert rest.videos == {(e, s): planned(e, s) for e in range(epoch, EPOCHS) for s in range(STEPS)}
        end = place.state(f"from{epoch}")
        assert [differences(end[part], whole[part], part) for part in ("model", "optimizer", "random")] == [[]] * 3


def test_early_stopping_ends_the_loader_that_was_started(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopping, "update", lambda self, accuracy, epoch: (epoch == 1, epoch == 2))
    early = train(place, "early", "train.patience=1")
    assert list(early.videos) == [(e, s) for e in range(2) for s in range(STEPS)]
    assert len(early.children[0]) >= WORKERS
    assert not early.children[0] & early.left


def test_an_iterator_made_before_the_position_is_restored(tmp_path: Path) -> None:
    """One that was only made starts at the position restored later; what a begun one has fetched ahead is left out."""
    videos = MemoryVideos([[jpeg(48, 64, video)] * 4 for video in range(VIDEOS)])
    sampler = StepSampler(np.arange(VIDEOS), seed=0, global_batch=PER_STEP, clips_per_gpu=4, rank=0, world=1)
    loader = train_loader(TrainClips(videos, np.arange(VIDEOS), small_config(), 3, 0), sampler, workers=2, pin=False)
    made, begun = iter(loader), iter(loader)
    assert next(begun).videos.tolist() == planned(0, 0)
    rest = [planned(1, step) for step in range(2, STEPS)]
    sampler.set_epoch(1, start_step=2)
    assert [batch.videos.tolist() for batch in loader] == rest
    assert [batch.videos.tolist() for batch in made] == rest
    loader.close()
