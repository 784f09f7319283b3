"""Every numeric setting at values that nobody should give: refused in one line, or a run of one step."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.runs import make_videos
from vac_ddp import checks
from vac_ddp.arguments import parse_settings
from vac_ddp.errors import UserError
from vac_ddp.settings import Config
from vac_ddp.training.objective import check_settings
from vac_ddp.training.trainer import open_trainer

VALUES = ("-1", "0", "1", "1e30", "nan", "inf", "")
TINY = (
    "model.weights=null", "model.width=8", "model.depth=1", "model.heads=1", "model.patch=8", "model.tubelet=1",
    "clip.frames=2", "clip.size=8", "clip.stride=1", "data.group_by=none", "data.workers=0",
    "augment.mixup=0.8", "augment.cutmix=1", "augment.erase=0.5",
    "train.epochs=1", "train.max_steps=1", "train.global_batch=4", "train.clips_per_gpu=2", "optim.warmup_epochs=0",
    "val.windows=offsets", "health.timeout_s=60",
)  # fmt: skip


@dataclass
class Outcomes:
    """How the words ended: the line with which they were refused, or the steps that their run took."""

    refused: dict[str, str] = field(default_factory=dict)
    ran: dict[str, int] = field(default_factory=dict)


def numeric_settings() -> list[str]:
    """The settings with a number in them, found by their types."""
    return [name for name, f in checks.leaves().items() if {"int", "float"} & _words(checks.type_name(f.type))]


def sweep_words() -> list[str]:
    """`name=value` for every numeric setting and value; a pair or triple gets the value in all its places."""
    words = []
    for name in numeric_settings():
        kind = checks.type_name(checks.leaves()[name].type).removesuffix(" | null")
        places = kind.count(",") + 1 if kind.startswith("(") else 1
        words += [f"{name}={','.join([value] * places)}" for value in VALUES]
    return words


def _words(text: str) -> set[str]:
    return set("".join(c if c.isalpha() else " " for c in text).split())


def place(folder: Path) -> list[str]:
    """The words of a run of one step on a few small videos, which are made in `folder`."""
    make_videos(folder / "data", classes=2, videos=4, frames=3, size=12)
    make_videos(folder / "val", classes=2, videos=1, frames=3, size=12)
    return [*TINY, f"data.train={folder / 'data'}", f"data.val={folder / 'val'}", f"data.cache={folder / 'cache'}"]


def settings_of(words: list[str]) -> Config:
    """The settings, checked as `vac train` checks them before it opens anything."""
    config_ = parse_settings(words).config
    check_settings(config_)
    return config_


def run_once(words: list[str], folder: Path) -> int:
    """Train and validate as `vac train` does, but for the report; the steps taken. UserError where it is refused."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        settings = settings_of([*words, f"run.dir={run}"])
        with open_trainer(settings, torch.device("cpu")) as trainer:
            trainer.run()
            assert (run / f"best_{settings.model.name}.pt").exists()
            return trainer.position.step


def sweep_alone(words: list[str], folder: Path) -> Outcomes:
    """Each word in a run of its own."""
    base, outcomes = place(folder), Outcomes()
    for word in words:
        try:
            outcomes.ran[word] = run_once([*base, word], folder)
        except UserError as error:
            outcomes.refused[word] = str(error)
    return outcomes


def sweep_together(words: list[str], folder: Path) -> Outcomes:
    """As `sweep_alone`, with as many of the accepted words in a run as are accepted together: a few runs."""
    base, outcomes = place(folder), Outcomes()
    bins: list[list[str]] = []
    for word in words:
        try:
            settings_of([*base, word])
        except UserError as error:
            outcomes.refused[word] = str(error)
            continue
        for together in [*bins, []]:
            if any(other.partition("=")[0] == word.partition("=")[0] for other in together):
                continue
            with contextlib.suppress(UserError):
                settings_of([*base, *together, word])
                if not together:
                    bins.append(together)
                together.append(word)
                break
    for together in bins:
        steps = run_once([*base, *together], folder)
        outcomes.ran |= dict.fromkeys(together, steps)
    return outcomes
