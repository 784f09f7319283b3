"""Classifiers that are not runs: a Hugging Face directory, as `vac export` writes one, or a hub id."""

from __future__ import annotations

import re
from typing import Any

from vac_ddp import config as settings_io
from vac_ddp.errors import UserError
from vac_ddp.models.processor import crop_of
from vac_ddp.models.weight_files import Source, open_source
from vac_ddp.settings import ClipSettings, Config, ViewSettings

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SETTINGS = "vac_ddp.yaml"  # beside exported weights: how videos become clips and views, and the model's settings


def open_foreign(asked: str) -> tuple[Source, Config]:
    """The weights, with their class names, and the settings of a Hugging Face directory or hub id.

    Raises UserError, in one line, where it cannot be had, its weights are not safetensors, or it is not a classifier.
    """
    source = open_source(asked, setting="")
    if ".safetensors" not in source.path.name:  # model.safetensors, or the index of several
        raise UserError(
            f"{asked} has its weights as {source.path.name}, not as safetensors: save it by transformers "
            "(save_pretrained) and load that directory"
        )
    source.classes = _classes_of(source)
    return source, _settings_of(source)


def _classes_of(source: Source) -> list[str]:
    """The class names in config.json, in the order of the logits. UserError where it does not name them."""
    labels = (source.hf_config or {}).get("id2label") or {}
    names = [labels.get(str(number)) for number in range(len(labels))]
    known = [name for name in names if isinstance(name, str)]
    if not known or len(set(known)) < len(names):
        raise UserError(
            f"{source.asked} names no classes (id2label in its config.json): it is no classifier; fine-tune it first, "
            "with model.weights"
        )
    return known


def _settings_of(source: Source) -> Config:
    """The settings to predict with: of vac_ddp.yaml beside the weights, else as config.json and pre-processing say.

    What neither says is chosen: the stride of frames is the default of `clip.stride`, and views are 5 windows over the
    video.
    """
    folder = source.path.parent
    if (folder / SETTINGS).exists():
        config = settings_io.read_yaml(folder / SETTINGS)
    else:
        config = Config(clip=_clip_of(source))
        config.model.name = "videomae" if (source.hf_config or {}).get("model_type") == "videomae" else "hf"
        config.predict.views = ViewSettings(windows="spread", count=5)
    model = config.model
    model.weights, model.revision, model.size, model.patch, model.mlp_ratio = str(folder), None, None, None, None
    model.width = model.depth = model.heads = None
    model.head_dropout = model.drop_path = 0.0
    return config


def _clip_of(source: Source) -> ClipSettings:
    said: dict[str, Any] = source.hf_config or {}
    crop, short_side = crop_of(source)
    size = said.get("image_size") or said.get("crop_size") or crop or ClipSettings().size
    size = size[0] if isinstance(size, list | tuple) else size
    frames = said.get("num_frames") or said.get("frames_per_clip") or ClipSettings().frames
    if not all(isinstance(number, int) and 0 < number <= 4096 for number in (size, frames)):
        raise UserError(f"{source.asked}: its config.json has clips of {frames} frames of {size} pixels: no such clips")
    return ClipSettings(frames=frames, size=size, short_side=short_side if short_side and short_side > size else None)
