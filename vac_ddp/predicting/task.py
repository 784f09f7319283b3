"""What a prediction computes, and the fingerprint under which its finished parts count."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from vac_ddp.data.clip_sampling import view_windows, window_count
from vac_ddp.data.index import Index
from vac_ddp.models.precision import precision_of
from vac_ddp.models.weight_files import Source
from vac_ddp.predicting.fingerprint import fingerprint
from vac_ddp.predicting.inputs import sources_by_name
from vac_ddp.results.logits_file import ViewsHead, log_prior
from vac_ddp.runtime import distributed
from vac_ddp.scoring.views import video_costs, view_table
from vac_ddp.settings import Config
from vac_ddp.version import VERSION


@dataclass(kw_only=True)
class Task:
    """What is predicted, the same on every rank: `head` but for its damage, the cost of each video, the class prior.

    fingerprint: what must be the same for finished parts to count, as short texts by name.
    prior: (K,) float32, logarithm of the class prior, for videos of which nothing can be decoded.
    """

    head: ViewsHead
    costs: np.ndarray
    fingerprint: dict[str, str]
    prior: np.ndarray


def make_task(
    config: Config, source: Source, index: Index, device: torch.device, *, sources: list[str] | None = None
) -> Task:
    """The task of predicting all videos of `index` with the weights of `source`.

    sources: where each video was cut from; without them it is inferred from the names of labelled videos.
    """
    views, classes, names = config.predict.views, list(source.classes or []), list(index.names)
    precision = precision_of(config, device)
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
    return Task(
        head=ViewsHead(
            ids=names,
            classes=classes,
            views=view_table(views, window_count(views)),
            labels=np.asarray(index.labels, np.int64),
            sources=sources_by_name(config, index) if sources is None else sources,
            damaged=np.zeros(len(names), np.int64),
            failed=np.zeros(len(names), bool),
            about={
                "weights": source.sha256,
                "settings": settings,
                "average": config.predict.average,
                "fingerprint": marks,
                "versions": {"vac_ddp": VERSION, "torch": torch.__version__},
            },
        ),
        costs=video_costs(
            index.frame_counts, lambda n: view_windows(n, config.clip, views), views.crops * (2 if views.flip else 1)
        ),
        fingerprint=marks,
        prior=log_prior(source.class_counts, len(classes)),
    )
