"""What a run writes down about itself: settings, classes, load report, best weights, the facts of its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.models import Loaded, file_state
from vac_ddp.report.tracker import Tracker
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.training import checkpoint, run_directory
from vac_ddp.training.best_weights import BestFile
from vac_ddp.training.data_setup import Data, data_hashes
from vac_ddp.training.progress import Validation
from vac_ddp.training.same_run import hash_settings
from vac_ddp.training.saving import Saver
from vac_ddp.training.step import Stepper
from vac_ddp.version import VERSION

FORMAT = 1  # of config.yaml (in its first line) and load_report.json
# Bytes a parameter takes in a checkpoint: weights and two moments in float32; an average is one more.
BYTES_A_PARAMETER = 12
METADATA = ("config.yaml", "classes.json", "split.csv", "load_report.json")


def make_saver(
    config: Config,
    run: run_directory.OpenRun | None,
    data: Data,
    loaded: Loaded,
    stepper: Stepper,
    total_steps: int,
    tracker: Tracker,
) -> Saver:
    """What writes the checkpoints and best weights of a run, and all that its checkpoints say beside the state."""
    folder, keep = Path(config.run.dir), config.checkpoint.keep
    return Saver(
        folder=folder,
        writer=checkpoint.Writer(folder / "checkpoints", keep, discarded=run.discarded) if run is not None else None,
        best=BestFile(folder / f"best_{config.model.name}.pt"),
        facts={
            **checkpoint.environment_facts(),
            "vac_ddp": VERSION,
            "device": " + ".join(sorted(set(distributed.all_gather_objects(checkpoint.device_name())))),
            "config": settings_io.to_dict(config),
            "hashes": {**data_hashes(data), "settings": hash_settings(settings_io.to_dict(config))},
            "architecture": loaded.architecture,
            "head": loaded.report.head,
            "precision": stepper.precision,
            "compile": stepper.compiled,
            "shard": config.optim.shard,
            "checkpointing": config.train.checkpointing,
            "clips_per_gpu": stepper.clips_per_gpu,
            "total_steps": total_steps,
        },
        on_failure=config.checkpoint.on_failure,
        say=tracker.say,
    )


def best_content(
    config: Config,
    data: Data,
    loaded: Loaded,
    stepper: Stepper,
    validation: Validation | None,
    keep: Callable[[Validation], None],
) -> dict[str, Any]:
    """What best_<model>.pt holds: plain types and tensors, readable with weights_only=True.

    keep: what else is done with a validation that was the best so far.
    """
    if validation is not None:
        keep(validation)
    counts = np.bincount(data.index.labels[data.split.train], minlength=len(data.classes))
    return {
        "model": file_state(stepper.eval_model),
        "classes": list(data.classes),
        "config": settings_io.to_dict(config),
        "metrics": dict(validation.figures) if validation is not None else {},
        "architecture": loaded.architecture,
        "precision": stepper.precision,
        "class_counts": counts.tolist(),
    }


def check_space(config: Config, stepper: Stepper) -> None:
    """UserError where the disk has no room for the checkpoints of a new run."""
    copies = config.checkpoint.keep + 2
    average = 4 if config.train.ema_decay is not None else 0
    size = sum(p.numel() for p in stepper.model.parameters()) * (BYTES_A_PARAMETER + average)
    run_directory.check_space(Path(config.run.dir), copies * size)


def write_metadata(config: Config, data: Data, loaded: Loaded, facts: dict[str, Any]) -> dict[str, bytes]:
    """Write the files of `METADATA` that a run directory lacks; the content of all of them. Rank 0 only.

    run.overwrite is not kept: it says how a run was started, not what it is.
    """
    folder, started = Path(config.run.dir), dataclasses.replace(config.run, overwrite=False)
    text = settings_io.to_yaml(dataclasses.replace(config, run=started))
    names = ("architecture", "precision", "device", "torch", "revision", "vac_ddp")
    report = {"format": FORMAT, **loaded.report.as_dict(), "run": {name: facts[name] for name in names}}
    made: dict[str, Callable[[Path], None]] = {
        "config.yaml": lambda path: files.write_text(path, f"# settings of a run of vac_ddp, format {FORMAT}\n{text}"),
        "classes.json": lambda path: files.write_json(path, data.classes),
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
