"""Many short runs in one torchrun launch: `repeats.py WHAT OUT arguments...`; rank 0 writes JSON lines to OUT."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vac_ddp.arguments import parse_settings
from vac_ddp.runtime import distributed
from vac_ddp.runtime.exit_status import run_entry_point
from vac_ddp.settings import Config
from vac_ddp.training.progress import Validation
from vac_ddp.training.step import Stepper
from vac_ddp.training.trainer import Trainer, open_trainer

VALIDATION_VIDEOS = 6  # of runs.Workplace


def run(settings: Config, prepare: Callable[[Trainer], None] | None = None) -> Trainer:
    """One training, from opening to closing."""
    with open_trainer(settings, torch.device("cpu")) as trainer:
        if prepare is not None:
            prepare(trainer)
        trainer.run()
        return trainer


def variant(settings: Config, **changes: Any) -> Config:
    """A copy with other run settings."""
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, **changes))


def resumes(settings: Config, say: Callable[..., None]) -> None:
    """Resume the run `whole` beside run.dir at each of its steps, and compare its last checkpoint bit by bit."""
    whole = Path(settings.run.dir).with_name("whole") / "checkpoints"
    paths = sorted(whole.glob("step-*.pt"))
    last = torch.load(paths[-1], weights_only=True)
    for path in paths[:-1]:
        folder = Path(f"{settings.run.dir}-{path.stem}")
        run(variant(settings, dir=str(folder), resume=str(path)))
        if distributed.is_main():
            end = torch.load(folder / "checkpoints" / paths[-1].name, weights_only=True)
            same = all(torch.equal(end["model"][k], v) for k, v in last["model"].items())
            same &= all(torch.equal(end["ema"][k], v) for k, v in last["ema"].items())
            say(step=path.stem, same=same)
            shutil.rmtree(folder)


def stops(settings: Config, say: Callable[..., None]) -> None:
    """20 runs in which every rank sees validation figures of its own: where does each rank stop?"""
    for number in range(20):

        def disagree(trainer: Trainer, number: int = number) -> None:
            draw = random.Random(1000 * number + distributed.rank())
            logits = torch.zeros(VALIDATION_VIDEOS, 3)
            trainer.validator.run = lambda stop: Validation(
                top1=draw.random(), loss=1.0, figures={"top1": 0.5}, logits=logits
            )

        ended = run(variant(settings, dir=f"{settings.run.dir}-{number}"), disagree)
        steps = distributed.all_gather_objects(ended.position.step)
        say(steps=steps, early=ended.position.stopped_early)
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(f"{settings.run.dir}-{number}")


def validations(settings: Config, say: Callable[..., None]) -> None:
    """Validation figures for validation parts of several sizes."""
    for size in (1, 2, 3, 5, 7):
        changed = dataclasses.replace(settings, data=dataclasses.replace(settings.data))
        changed.data.val = f"{settings.data.val}-{size}"
        seen: list[Validation] = []

        def watch(trainer: Trainer, seen: list[Validation] = seen) -> None:
            validate = trainer.validator.run
            trainer.validator.run = lambda stop: seen.append(validate(stop)) or seen[-1]

        run(variant(changed, dir=f"{settings.run.dir}-{size}"), watch)
        say(size=size, **seen[-1].figures)


def gradients(settings: Config, say: Callable[..., None]) -> None:
    """The gradient of every step before clipping, with the weights left as they are, into OUT.pt."""
    kept: list[dict[str, torch.Tensor]] = []

    def keep(self: Stepper, record: Any) -> None:
        record.norm, record.found_inf = torch.zeros(()), torch.zeros(())
        kept.append({n: p.grad.clone() for n, p in self.model.named_parameters()})
        self.optimizer.zero_grad(set_to_none=True)

    Stepper._update = keep
    for clips in (32, 16, 8, 3):
        kept.clear()
        changed = dataclasses.replace(settings, train=dataclasses.replace(settings.train, clips_per_gpu=clips))
        run(variant(changed, dir=f"{settings.run.dir}-{clips}"))
        if distributed.is_main():
            torch.save(list(kept), f"{sys.argv[2]}.{clips}.pt")


def main(argv: list[str]) -> None:
    what, out, *words = argv
    settings = parse_settings(words).config
    distributed.start(torch.device("cpu"), timeout_s=120)

    def say(**facts: Any) -> None:
        if distributed.is_main():
            with Path(out).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(facts) + "\n")

    {"resumes": resumes, "stops": stops, "validations": validations, "gradients": gradients}[what](settings, say)


if __name__ == "__main__":
    sys.exit(run_entry_point(main, sys.argv[1:]))
