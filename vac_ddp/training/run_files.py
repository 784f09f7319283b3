"""What a run writes down about itself: settings, classes, load report, best weights, the facts of its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.models import LoadReport, VideoModel, file_state
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.training import checkpoint, run_directory
from vac_ddp.training.best_weights import BestFile
from vac_ddp.training.data_setup import Data, data_hashes
from vac_ddp.training.micro_batch_fit import device_memory
from vac_ddp.training.objective import Classification
from vac_ddp.training.resuming import copy_report
from vac_ddp.training.same_run import hash_settings
from vac_ddp.training.saving import Saver
from vac_ddp.training.session import Session
from vac_ddp.training.step import Stepper
from vac_ddp.version import VERSION

FORMAT = 1  # of config.yaml (in its first line) and load_report.json
# Bytes a parameter takes in a checkpoint: weights and two moments in float32; an average is one more.
BYTES_A_PARAMETER = 12
# The logits of the best weights for every validation video, as a views file.
VALIDATION = "validation.npz"
METADATA = ("config.yaml", "classes.json", "split.csv", "load_report.json")


def make_saver(
    config: Config, session: Session, objective: Classification, stepper: Stepper, total_steps: int
) -> Saver:
    """What writes the checkpoints and best weights of a run, and all that its checkpoints say beside the state."""
    folder, run, settings = session.folder, session.run, settings_io.to_dict(config)
    writer = None
    if run is not None:
        writer = checkpoint.Writer(folder / "checkpoints", config.checkpoint.keep, discarded=run.discarded)
    return Saver(
        folder=folder,
        writer=writer,
        best=BestFile(folder / f"best_{config.model.name}.pt"),
        facts={
            **checkpoint.environment_facts(),
            "vac_ddp": VERSION,
            "device": " + ".join(sorted(set(distributed.all_gather_objects(checkpoint.device_name())))),
            "device_memory": device_memory(),
            "config": settings,
            "hashes": {**data_hashes(objective.data), "settings": hash_settings(settings)},
            "architecture": objective.loaded.architecture,
            "head": objective.loaded.report.head,
            "replaced": {name: given for name, (given, _) in objective.loaded.replaced.items()},
            "precision": stepper.precision,
            "compile": stepper.compiled,
            "shard": config.optim.shard,
            "checkpointing": config.train.checkpointing,
            "clips_per_gpu": stepper.clips_per_gpu,
            "total_steps": total_steps,
            **({"step_bound": total_steps} if config.train.max_minutes is not None else {}),
        },
        on_failure=config.checkpoint.on_failure,
        say=session.tracker.say,
    )


def best_content(
    config: Config,
    data: Data,
    model: VideoModel,
    figures: dict[str, float],
    *,
    architecture: dict[str, Any],
    precision: str,
) -> dict[str, Any]:
    """What best_<model>.pt holds: plain types and tensors, readable with weights_only=True. figures: of validation."""
    counts = np.bincount(data.index.labels[data.split.train], minlength=len(data.classes))
    return {
        "model": file_state(model),
        "classes": list(data.classes),
        "config": settings_io.to_dict(config),
        "metrics": dict(figures),
        "architecture": architecture,
        "precision": precision,
        "class_counts": counts.tolist(),
    }


def check_space(config: Config, stepper: Stepper) -> None:
    """UserError where the disk has no room for the checkpoints of a new run."""
    copies = config.checkpoint.keep + 2
    average = 4 if config.train.ema_decay is not None else 0
    size = sum(p.numel() for p in stepper.model.parameters()) * (BYTES_A_PARAMETER + average)
    run_directory.check_space(Path(config.run.dir), copies * size)


def write_metadata(
    config: Config, load: LoadReport, classes: list[str], facts: dict[str, Any], source: Path | None
) -> dict[str, bytes]:
    """Write the files of `METADATA` that a run directory lacks; the content of all of them. Rank 0 only.

    source: the checkpoint that is resumed. run.overwrite is not kept: it says how a run was started, not what it is.
    """
    folder, started = Path(config.run.dir), dataclasses.replace(config.run, overwrite=False)
    if source is not None:
        copy_report(source, folder)
    text = settings_io.to_yaml(dataclasses.replace(config, run=started))
    names = ("architecture", "precision", "device", "torch", "revision", "vac_ddp")
    report = {"format": FORMAT, **load.as_dict(), "run": {name: facts[name] for name in names}}
    made: dict[str, Callable[[Path], None]] = {
        "config.yaml": lambda path: files.write_text(path, f"# settings of a run of vac_ddp, format {FORMAT}\n{text}"),
        "classes.json": lambda path: files.write_json(path, classes),
        "load_report.json": lambda path: files.write_json(path, report),
    }
    for name, write in made.items():
        if not (folder / name).exists():
            write(folder / name)
    return {name: (folder / name).read_bytes() for name in METADATA if (folder / name).exists()}


def write_again(folder: Path, content: dict[str, bytes], say: Callable[[str], None]) -> None:
    """Write what somebody removed from a run directory while the run went on."""
    for name, data in content.items():
        if not (folder / name).exists():
            files.write_bytes(folder / name, data)
            say(f"{folder / name} was removed during training: written again")
