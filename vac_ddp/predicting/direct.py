"""Videos to what the model gives for their views, in memory: no file is written, no other rank is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vac_ddp.data.batch import TestBatch
from vac_ddp.data.dataset import TestViews
from vac_ddp.data.given import Given
from vac_ddp.data.loader import views_loader
from vac_ddp.scoring.engine import scored_videos
from vac_ddp.scoring.scorer import Scorer
from vac_ddp.settings import Config


@dataclass(kw_only=True)
class Answer:
    """What the model gives for one video.

    outputs: (n, ...) float32, logits (n, K) or features (n, T', D) of its views; None where no frame decodes or values
    are not finite. faults: what is wrong with its frames, one line each.
    """

    name: str
    outputs: np.ndarray | None
    faults: list[str]


def answers(given: Given, scorer: Scorer, config: Config, *, workers: int = 0) -> Iterator[Answer]:
    """The answer for every video, in their order, by the views of `config.predict`; safe from many threads."""
    videos, views = given.videos, config.predict.views
    count = len(videos)
    dataset = TestViews(videos, np.arange(count), config.clip, views, tolerant=True, reduced=config.data.reduced_decode)
    loader = views_loader(
        dataset,
        range(count),
        videos_per_batch=1,
        workers=min(workers, count),
        prefetch=config.data.prefetch,
        pin=scorer.device.type == "cuda",
    )
    damage: dict[str, list[str]] = {}  # by name: the loader names a damaged frame once, also of a video given twice

    def noted() -> Iterator[TestBatch]:
        for batch in loader:
            damage.setdefault(videos.names[int(batch.videos)], []).extend(batch.damage)
            yield batch

    try:
        for video in scored_videos(scorer, noted()):
            name, outputs = videos.names[video.video], video.outputs
            faults = [*given.faults.get(video.video, []), *damage[name]]
            if outputs is not None and not np.isfinite(outputs).all():
                outputs = None
                faults.append(f"{name}: what the model gives is not finite; try train.precision=fp32")
            yield Answer(name=name, outputs=outputs, faults=faults)
    finally:
        loader.close()
