"""The selected probe as a model: the encoder with its weights, and the fitted pooling and classifier on top."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn

from vac_ddp.models import Loaded, VideoModel, load_model
from vac_ddp.models.pooling import AttentivePool, make_pool, pooling_text
from vac_ddp.models.probe import Probe
from vac_ddp.probing.head import Head
from vac_ddp.results.features_file import Features
from vac_ddp.settings import Config, ModelSettings

_ROWS = 256  # videos classified at a time


def pooling_settings(head: Head, settings: ModelSettings) -> ModelSettings:
    """The settings of the model that holds `head`."""
    if head.query is not None:
        return dataclasses.replace(settings, pooling="attentive", queries=len(head.query))
    return dataclasses.replace(settings, pooling="statistics", statistics=head.statistics)


def make_model(config: Config, head: Head, classes: list[str], about: str) -> Loaded:
    """A probe with the encoder of `config.model`, and `head` as its pooling and classifier, on the CPU.

    about: how the head was fitted, for the load report.
    """
    settings = pooling_settings(head, config.model)
    encoder = dataclasses.replace(settings, pooling="mean")
    loaded = load_model(encoder, config.clip, classes, seed=config.seed)
    model, report = loaded.model, loaded.report
    assert isinstance(model, Probe), "model.name is probe"
    model.pool = pool = make_pool(settings, *model.step_shape, positions=head.position is not None)
    model.head = nn.Linear(pool.out_width, len(classes))
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(head.weight))
        model.head.bias.copy_(torch.from_numpy(head.bias))
        if isinstance(pool, AttentivePool):
            assert head.query is not None, "attentive"
            pool.query.copy_(torch.from_numpy(head.query))
            if head.position is not None:
                pool.bias.copy_(torch.from_numpy(head.position))
    report.notes = [note for note in report.notes if not note.startswith("new: ")]
    report.missing = [name for name in report.missing if name.startswith("encoder.")]
    report.pooling, report.head = pooling_text(settings, model.step_shape[0]), about
    return loaded


@torch.no_grad()
def view_logits(model: VideoModel, features: Features, videos: np.ndarray) -> np.ndarray:
    """Logits (v, n, K) float32 of some videos of a features file, by the model's pooling and classifier."""
    assert isinstance(model, Probe), "model.name is probe"
    # A file without steps has their mean: one step, of which a probe takes the mean.
    steps = features.pooled[:, :, None] if features.steps is None else features.steps
    rows = [np.zeros((0, steps.shape[1], model.head.out_features), np.float32)]
    for start in range(0, len(videos), _ROWS):
        some = torch.from_numpy(np.asarray(steps[videos[start : start + _ROWS]], np.float32))
        rows.append(model.classify(some.flatten(0, 1)).unflatten(0, some.shape[:2]).numpy())
    return np.concatenate(rows)
