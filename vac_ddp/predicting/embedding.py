"""Embed a folder of videos: what a frozen encoder gives for their views, as a features file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vac_ddp.data.clip_sampling import window_count
from vac_ddp.data.grouping import find_sources, known_sources
from vac_ddp.data.index import Index
from vac_ddp.errors import UserError
from vac_ddp.models import LoadReport, VideoModel
from vac_ddp.models.precision import precision_of
from vac_ddp.predicting.execution import execute, locked, say_how
from vac_ddp.predicting.fingerprint import differences, fingerprint
from vac_ddp.predicting.inputs import read_index
from vac_ddp.predicting.part_files import Output
from vac_ddp.predicting.task import Task, costs_of
from vac_ddp.results.features_file import NAME, Features, FeaturesHead, read_features, write_features
from vac_ddp.runtime import distributed
from vac_ddp.runtime.host_memory import keep_freed_memory
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.ranks import say
from vac_ddp.runtime.signals import StopRequest
from vac_ddp.scoring.scorer import Scorer, open_encoder
from vac_ddp.scoring.views import view_table
from vac_ddp.settings import Config
from vac_ddp.version import VERSION

# Settings of a model that change its features and that its tensors do not show.
ENCODER_SETTINGS = (
    "backbone", "width", "depth", "heads", "mlp_ratio", "size", "patch", "tubelet", "norm_eps", "spatial_grid",
    "lsvit_version", "smif", "lmi",
)  # fmt: skip

# What of a fingerprint changes features by rounding alone, or says what a file keeps of them.
ROUNDING = ("device", "precision", "versions", "predict.compile", "steps", "dtype")


@dataclass(kw_only=True)
class Request:
    """What to embed: the videos of `data` with the encoder of `config.model`, and where features.npz goes.

    steps: keep the features of each time step as well; dtype: "float32" or "float16"; remedy: what to give where
    `out` holds other features.
    """

    data: Path
    config: Config
    out: Path
    steps: bool = False
    dtype: str = "float32"
    overwrite: bool = False
    remedy: str = Output.remedy


def embed_folder(request: Request, device: torch.device, *, labelled: bool, stop: StopRequest) -> list[str]:
    """Write the features file of a folder of videos, or keep the one that is there already; called by all ranks.

    Resumes what an earlier call left unfinished. Returns the names of the videos without features (rows of zeros).
    Raises UserError where the folder `out` holds features of something else.
    """
    config, out = request.config, request.out
    with locked(out):
        index = read_index(request.data, config, None, out, labelled=labelled)
        for note in index.notes:
            say(note)
        scorer, report = open_encoder(config, device)
        if device.type == "cpu":
            keep_freed_memory()
        task = make_task(request, index, scorer, report)
        shape = " x ".join(map(str, scorer.model.step_shape))
        say(f"encoder      {task.fingerprint['encoder']}, {shape} features; weights {report.source} ({report.kind})")
        stop.install()
        PROCESS.watch(config.health.start_timeout_s)
        try:
            done = execute(config, task, scorer, index, out, overwrite=request.overwrite, stop=stop.wanted)
        finally:
            stop.restore()
        say_how(done, task)
        failed = distributed.main_first(lambda: _failed(read_features(out)), list)
    return list(distributed.broadcast_object(failed))


def _failed(features: Features) -> list[str]:
    arrays = ["pooled", *(["steps"] if features.steps is not None else [])]
    shapes = ", ".join(f"{name} {' x '.join(map(str, getattr(features, name).shape))}" for name in arrays)
    say(f"features     {features.path} ({shapes}, {features.pooled.dtype})")
    return [name for name, failed in zip(features.ids, features.failed.tolist(), strict=True) if failed]


def make_task(request: Request, index: Index, scorer: Scorer, report: LoadReport) -> Task:
    """The task of embedding all videos of `index` with an encoder that was opened for the request."""
    config, names = request.config, list(index.names)
    steps, width = scorer.model.step_shape
    weights = report.sha256 or _state_hash(scorer.model)
    marks = _fingerprint(request, index, scorer, weights)
    head = FeaturesHead(
        ids=names,
        labels=np.asarray(index.labels, np.int64),
        groups=groups_of(config, index),
        damaged=np.zeros(len(names), np.int64),
        failed=np.zeros(len(names), bool),
        views=view_table(config.predict.views, window_count(config.predict.views)),
        classes=list(index.classes),
        about={
            "weights": weights,
            "settings": {
                "clip": dataclasses.asdict(config.clip),
                "views": dataclasses.asdict(config.predict.views),
                "model": dataclasses.asdict(config.model) | {"mean": list(scorer.mean), "std": list(scorer.std)},
                "precision": marks["precision"],
            },
            "fingerprint": marks,
            "versions": {"vac_ddp": VERSION, "torch": torch.__version__},
        },
    )
    shapes = {"pooled": (len(head.views), width), "steps": (len(head.views), steps, width)}
    kept = ("pooled", "steps") if request.steps else ("pooled",)

    def arrays(rows: np.ndarray) -> dict[str, np.ndarray]:
        found = {"pooled": rows.mean(axis=1), "steps": rows}
        with np.errstate(over="ignore"):  # what float16 cannot hold is not finite, which is noticed
            return {name: found[name].astype(request.dtype) for name in kept}

    return Task(
        head=head,
        costs=costs_of(config, index),
        fingerprint=marks,
        arrays=arrays,
        missing={name: np.zeros(shapes[name], request.dtype) for name in kept},
        output=_output(request, width, steps if request.steps else None),
    )


def groups_of(config: Config, index: Index) -> list[str]:
    """The group of every video as the split of a training infers it; without labels empty where names do not tell."""
    names, labels = list(index.names), index.labels.tolist()
    if not labels or min(labels) < 0:
        return known_sources(names, [""] * len(names), config.data, say)
    found = find_sources(names, [index.classes[label] for label in labels], config.data)
    for note in found.notes:
        say(note)
    return found.groups


def check_features(features: Features, request: Request, index: Index, device: torch.device) -> None:
    """Raise UserError, which names the differences, where a file has not the request's features of the `index`.

    Called by all ranks. What changes features by rounding alone (type of device, precision, versions) may differ, and
    whether there are steps.
    """
    task = make_task(request, index, *open_encoder(request.config, device))
    stored, now = dict(features.about.get("fingerprint", {})), task.fingerprint
    stored |= {name: now[name] for name in ROUNDING if name in stored}

    def compare() -> None:
        changed, _ = differences(stored, now)
        if (features.ids, features.classes) != (task.head.ids, task.head.classes):
            changed.append("names or classes of the videos")
        if changed:
            raise UserError(
                f"{features.path} has other features than these settings give: {', '.join(changed)} changed; run "
                "`vac embed` with these settings, or leave probe.features out"
            )

    distributed.main_first(compare, lambda: None)


def _output(request: Request, width: int, steps: int | None) -> Output:
    def write(path: Path, head: Any, blocks: Mapping[str, Iterable[np.ndarray]]) -> None:
        write_features(path, head, blocks, dtype=request.dtype, width=width, steps=steps)

    return Output(
        name=NAME,
        beside=(),
        noun="embedding",
        doing="embedding",
        not_finite="its features are not finite; try train.precision=fp32, and --dtype float32",
        fingerprint=lambda path: read_features(path).about.get("fingerprint", {}),
        write=write,
        remedy=request.remedy,
    )


def _fingerprint(request: Request, index: Index, scorer: Scorer, weights: str) -> dict[str, str]:
    """What features depend on: as a prediction's logits, the encoder's settings, and what is kept of them."""
    config, model = request.config, request.config.model
    marks = fingerprint(
        config,
        index,
        weights=weights,
        precision=precision_of(config, distributed.weakest_gpu(scorer.device)),
        device=scorer.device.type,
        version=VERSION,
        frames=distributed.is_main(),
    )
    return {
        **marks,
        "encoder": model.encoder if model.name == "probe" else model.name,
        **{f"model.{name}": str(getattr(model, name)) for name in ENCODER_SETTINGS},
        "model.mean": " ".join(f"{value:g}" for value in scorer.mean),
        "model.std": " ".join(f"{value:g}" for value in scorer.std),
        "steps": "yes" if request.steps else "no",
        "dtype": request.dtype,
    }


def _state_hash(model: VideoModel) -> str:
    """SHA-256 over a model's names and tensors, for weights that were drawn and are in no file."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
