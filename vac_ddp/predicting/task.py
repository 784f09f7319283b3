"""What is computed for the videos of a data set, and the fingerprint under which its finished parts count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vac_ddp.data.clip_sampling import view_windows, window_count
from vac_ddp.data.dataset import Videos
from vac_ddp.models.precision import precision_of
from vac_ddp.models.weight_files import Source
from vac_ddp.predicting.fingerprint import fingerprint
from vac_ddp.predicting.part_files import Output
from vac_ddp.results.features_file import FeaturesHead
from vac_ddp.results.logits_file import NAME, ViewsHead, log_prior, read_views, write_views
from vac_ddp.runtime import distributed
from vac_ddp.scoring.views import video_costs, view_table
from vac_ddp.settings import Config
from vac_ddp.version import VERSION

VIEWS = Output(
    name=NAME,
    beside=("submission.csv", "scores.csv", "metrics.json", "per_class.csv", "confusion.csv"),
    noun="prediction",
    doing="predicting",
    not_finite="its logits are not finite; try train.precision=fp32",
    fingerprint=lambda path: read_views(path).about.get("fingerprint", {}),
    write=lambda path, head, blocks: write_views(path, head, blocks["logits"]),
)


@dataclass(kw_only=True)
class Task:
    """What is computed, the same on every rank: the `head` of the file but for its damage, the cost of each video.

    fingerprint: what must be the same for finished parts to count, as short texts by name.
    arrays: takes what the model gave for the views of a video, (n, ...) float32, and gives the arrays to keep, by name.
    missing: these arrays for a video of which nothing can be decoded; dtypes and shapes are those of all videos.
    """

    head: ViewsHead | FeaturesHead
    costs: np.ndarray
    fingerprint: dict[str, str]
    arrays: Callable[[np.ndarray], dict[str, np.ndarray]]
    missing: dict[str, np.ndarray]
    output: Output


def make_task(
    config: Config, source: Source, index: Videos, device: torch.device, *, sources: list[str] | None = None
) -> Task:
    """The task of predicting all videos of `index` with the weights of `source`.

    A video of which nothing can be decoded gets the logarithm of the class prior. sources: where each video was cut
    from; without them it is not known.
    """
    views, classes, names = config.predict.views, list(source.classes or []), list(index.names)
    precision = precision_of(config, distributed.weakest_gpu(device), source.precision)
    settings = {
        "clip": dataclasses.asdict(config.clip),
        "views": dataclasses.asdict(views),
        "precision": precision,
        "model": config.model.name,
    }
    marks = fingerprint(
        config,
        index,
        weights=source.sha256,
        precision=precision,
        device=device.type,
        version=VERSION,
        frames=distributed.is_main(),
    )
    head = ViewsHead(
        ids=names,
        classes=classes,
        views=view_table(views, window_count(views)),
        labels=np.asarray(index.labels, np.int64),
        sources=[""] * len(names) if sources is None else sources,
        damaged=np.zeros(len(names), np.int64),
        failed=np.zeros(len(names), bool),
        about={
            "weights": source.sha256,
            "settings": settings,
            "average": config.predict.average,
            "fingerprint": marks,
            "versions": {"vac_ddp": VERSION, "torch": torch.__version__},
        },
    )
    return Task(
        head=head,
        costs=costs_of(config, index),
        fingerprint=marks,
        arrays=lambda logits: {"logits": logits},
        missing={"logits": np.tile(log_prior(source.class_counts, len(classes)), (len(head.views), 1))},
        output=VIEWS,
    )


def costs_of(config: Config, index: Videos) -> np.ndarray:
    """Relative cost of the views of each video, (V,) int64."""
    views = config.predict.views
    per_window = views.crops * (2 if views.flip else 1)
    return video_costs(index.frame_counts, lambda n: view_windows(n, config.clip, views), per_window)
