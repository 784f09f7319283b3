"""Whether a checkpoint belongs to the run that would resume from it, and what of its numbers is then promised."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vac_ddp.config import flat, was_removed
from vac_ddp.errors import UserError
from vac_ddp.settings import Config

# What may be another at a resume, by group or by exact name: it changes no sample and no schedule. The data may have
# moved; that it is the same is compared by hash.
CHANGEABLE_GROUPS = frozenset({"run", "log", "checkpoint", "health", "predict"})
CHANGEABLE = frozenset(
    {
        "data.workers",
        "data.prefetch",
        "data.cache",
        "data.rescan",
        "data.train",
        "data.val",
        "train.clips_per_gpu",
        "train.compile",
        "train.checkpointing",
        "train.patience",
        "optim.shard",
    }
)
# What a resumed run does not read: weights, mean, std and architecture are in the checkpoint.
NOT_READ = frozenset({"model.weights", "model.revision", "model.lsvit_version"})

# What changes the rounding of sums or the decoded pixels, beside the settings.
COMPARED = (
    *("torch", "numpy", "simplejpeg", "pillow", "timm", "transformers", "cuda", "cpu", "threads", "device"),
    *("world_size", "clips_per_gpu", "compile", "shard", "checkpointing", "revision"),
)
HASHED = {
    "classes": "the classes are others",
    "split": "a video was added, removed or moved between training and validation (split.csv, data.train, data.val)",
    "frames": "videos have another number of frames",
}


def hash_settings(values: dict[str, Any]) -> str:
    """SHA-256 of settings as nested dicts, in whatever order they are."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_settings(facts: Mapping[str, Any], given: dict[str, Any], path: Path) -> list[str]:
    """UserError where a setting differs from those in the facts of checkpoint `path` and must not.

    A setting that the checkpoint does not know counts as its default. Returns lines about settings that are not read.
    """
    saved = facts.get("config", {})
    if "hashes" in facts and facts["hashes"].get("settings") != hash_settings(saved):
        raise UserError(f"checkpoint {path}: the settings in {path.stem}.json are not those that were saved")
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))  # tuples as lists, as they are saved
    before, now = flat(defaults) | flat(saved), flat(given)
    for name, value in facts.get("replaced", {}).items():  # the same start gives them again
        if now.get(f"model.{name}") == value:
            now[f"model.{name}"] = before[f"model.{name}"]
    for name, value in before.items():
        was_removed(name, value, f"{path}: ")
    notes = []
    for name in sorted(now):
        if before[name] == now[name] or name in CHANGEABLE or name.partition(".")[0] in CHANGEABLE_GROUPS:
            continue
        if name not in NOT_READ:
            raise UserError(
                f"{name} is {now[name]} and was {before[name]} when {path} was saved: "
                "set it back to resume, or start a new run.dir"
            )
        if "architecture" in facts:
            notes.append(f"{name}={now[name]} is not read: a resumed run has its model from the checkpoint")
    return notes


def check_data(facts: Mapping[str, Any], hashes: Mapping[str, str], path: Path) -> None:
    """UserError that names what of the data is not as it was when checkpoint `path` was saved."""
    saved = facts.get("hashes", {})
    for name, meaning in HASHED.items():
        if name in saved and saved[name] != hashes[name]:
            raise UserError(
                f"{path} cannot be resumed with this data: {name}: {meaning}; bring the data back as it was, or start "
                "a new run.dir"
            )


def unsaid(facts: Mapping[str, Any]) -> list[str]:
    """What a checkpoint of an earlier version does not say."""
    wanted = ("architecture", "precision", "hashes", "best", *COMPARED)
    return [name for name in wanted if name not in facts]


def promise(facts: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What holds for the rest of a run that resumes from a checkpoint with these facts."""
    other = [f"{name} {facts[name]} -> {now[name]}" for name in COMPARED if name in facts and facts[name] != now[name]]
    if other:
        return f"the same batches, the loss to 1e-5 ({'; '.join(other)})"
    if now["device"] == "cpu":
        return "bit for bit the run that was not interrupted"
    return "the same batches, the loss to 1e-5 (a GPU's sums may come in another order)"
