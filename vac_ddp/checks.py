"""Which settings there are, and whether they can be used: bounds of numbers, then settings that depend on one another.

Nothing is opened here. What takes torch or the data to know is checked by `objective.check_settings` and the readers.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from typing import Any

from vac_ddp.errors import UserError
from vac_ddp.settings import ClipSettings, Config, ModelSettings, ViewSettings

CLIP_BYTES = 1 << 30  # of one decoded clip; 64 frames of 448 pixels take 39 MB
PREDICTION = ("data.", "clip.", "model.", "predict.")  # groups that a prediction uses
OF_A_RUN = ("predict.", "data.", "clip.", "train.precision")  # what predicting or embedding with a run can change

SHOWN = 80  # characters of a value that an error repeats


@functools.cache
def leaves(kind: type = Config, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """All settings by their dotted name, in the order of the dataclasses."""
    found: dict[str, dataclasses.Field[Any]] = {}
    hints: dict[str, type] = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        annotation = hints[field.name]
        if dataclasses.is_dataclass(annotation):
            found.update(leaves(annotation, f"{prefix}{field.name}."))
        else:
            field.type = annotation
            found[prefix + field.name] = field
    return found


def type_name(annotation: Any) -> str:
    """A type as people write it: `int | null`, `error|skip`, `(float, float)`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if origin is tuple:
        return f"({', '.join(map(type_name, arguments))})"
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    name = annotation.__name__
    return {"str": "text", "bool": "true|false"}.get(name, name)


def short(value: Any) -> str:
    """A value as an error repeats it: short text, or what sort of container it is."""
    names: dict[Any, str] = {dict: "a mapping", list: "a list", tuple: "a list", set: "a set"}
    text = "null" if value is None else names.get(type(value)) or str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def accepts(field: dataclasses.Field[Any]) -> str:
    """What a setting takes: its type and its bounds."""
    bounds = field.metadata["bounds"]
    return type_name(field.type) + (f", {bounds}" if bounds else "")


def check(config: Config, *, ranks: int | None = None) -> None:
    """Raise UserError where a training run cannot have these settings.

    ranks: how many will share a global batch; default: as torchrun says, or one.
    """
    check_bounds(config)
    check_clips(config.clip)
    for name, views in (("val", config.val), ("predict.views", config.predict.views)):
        check_views(views, name)
    _check_data(config)
    _check_model(config)
    _check_pooling(config.model)
    _check_augmentation(config)
    _check_rates(config)
    _check_tokens(config)
    world = os.environ.get("WORLD_SIZE", "1")
    ranks = ranks if ranks is not None else int(world) if world.isdecimal() else 1
    if config.train.global_batch < ranks:
        raise UserError(
            f"train.global_batch={config.train.global_batch} is below the number of ranks, {ranks}: "
            "some would have no clip in any step; raise it, or start fewer ranks"
        )


def check_prediction(config: Config) -> None:
    """Raise UserError where a prediction cannot have these settings; those of the training are not looked at."""
    check_bounds(config, PREDICTION)
    check_clips(config.clip)
    check_views(config.predict.views, "predict.views")


def check_bounds(config: Config, groups: tuple[str, ...] = ("",)) -> None:
    """Raise UserError for the first setting with a number outside of its bounds.

    groups: look at the settings whose names start with one of these only.
    """
    for name, field in leaves().items():
        bounds = field.metadata["bounds"] if name.startswith(groups) else None
        value = functools.reduce(getattr, name.split("."), config)
        numbers = value if isinstance(value, list | tuple) else [value]
        if bounds and any(n not in bounds for n in numbers if isinstance(n, int | float)):
            raise UserError(f"{name}={short(','.join(map(str, numbers)))}: expected {accepts(field)}")


def check_clips(clip: ClipSettings) -> None:
    """Raise UserError for clips that do not fit into their frames or into memory."""
    if clip.short_side is not None and clip.short_side < clip.size:
        raise UserError(
            f"clip.short_side={clip.short_side} is below clip.size={clip.size}: a crop does not fit into the frame; "
            "raise it, or set clip.short_side=null"
        )
    if clip.frames * clip.size**2 * 3 > CLIP_BYTES:
        raise UserError(
            f"clip.frames={clip.frames} and clip.size={clip.size}: one clip would take more than "
            f"{CLIP_BYTES >> 30} GiB; lower one of them"
        )


def check_views(views: ViewSettings, name: str) -> None:
    """Raise UserError for views that are none; `name` is that of their group of settings."""
    if views.crops not in (1, 3):
        raise UserError(f"{name}.crops={views.crops}: must be 1 or 3")
    if views.windows == "offsets" and not views.offsets:
        raise UserError(f"{name}.offsets is empty: give the first frame of at least one clip, as {name}.offsets=0")


def _check_data(config: Config) -> None:
    if config.data.fold and config.data.val:
        raise UserError("data.fold and data.val exclude each other: set one of them to null")


def _check_model(config: Config) -> None:
    model = config.model
    if model.size is not None and model.weights is not None:
        raise UserError("model.size is for training from scratch: add model.weights=null, or leave model.size out")
    if model.size is not None and model.family != "videomae":
        raise UserError(f"model.size={model.size} is of videomae, not of model.name={model.name}: leave it out")
    if model.size is not None and model.width is not None:
        raise UserError(
            f"model.size={model.size} and model.width={model.width} both say how wide the model is: "
            "set one of them to null (model.size also gives depth and heads)"
        )


def _check_pooling(model: ModelSettings) -> None:
    """Refuse ways of pooling that the architecture does not have, so that none is ignored silently."""
    pools = model.name in ("frame_vit", "probe")
    for name, new in (
        ("pooling", model.pooling in ("statistics", "attentive")),
        ("spatial_grid", model.spatial_grid > 1),
    ):
        if new and not pools:
            raise UserError(
                f"model.{name}={getattr(model, name)} is not of model.name={model.name}: "
                f"set model.name=probe model.encoder={model.name}, or leave it out"
            )
    if model.name == "probe" and model.pooling == "transformer":
        raise UserError("model.pooling=transformer is of model.name=frame_vit; a probe takes attentive for the order")
    if not model.statistics or len(set(model.statistics)) < len(model.statistics):
        shown = ",".join(model.statistics)
        raise UserError(f"model.statistics={shown}: give some of mean, std, difference, each once")
    if model.batch_norm == "batch" and model.family == "videomae":
        raise UserError("model.batch_norm=batch: videomae has no BatchNorm; leave it out")


def _check_augmentation(config: Config) -> None:
    batch, augment = config.train.global_batch, config.augment
    for name, (low, high) in (("crop_scale", augment.crop_scale), ("crop_ratio", augment.crop_ratio)):
        if low > high:
            raise UserError(f"augment.{name}={low},{high}: the first must not be above the second")
    if batch % augment.repeats:
        raise UserError(f"train.global_batch={batch} must be a multiple of augment.repeats={augment.repeats}")


def _check_tokens(config: Config) -> None:
    train = config.train
    if train.keep_tokens < 1 and config.model.name != "videomae":
        raise UserError(
            f"train.keep_tokens={train.keep_tokens}: only VideoMAE can leave tokens out; set train.keep_tokens=1 for "
            f"model.name={config.model.name}"
        )
    if train.keep_tokens < 1 and train.full_token_epochs >= train.epochs and train.max_steps is None:
        raise UserError(
            f"train.full_token_epochs={train.full_token_epochs} leaves none of train.epochs={train.epochs} with "
            f"train.keep_tokens={train.keep_tokens}: lower it, or set train.keep_tokens=1"
        )


def _check_rates(config: Config) -> None:
    optim = config.optim
    if (optim.lr is None) == (optim.base_lr is None):
        raise UserError(
            "give exactly one of optim.lr (the peak as used) and optim.base_lr (per 256 clips); "
            f"now optim.lr={optim.lr} and optim.base_lr={optim.base_lr}; the other one is set off by =null"
        )
    name, peak = ("lr", optim.lr) if optim.lr is not None else ("base_lr", optim.base_lr)
    for other, value in (("min_lr", optim.min_lr), ("warmup_lr", optim.warmup_lr)):
        if peak is not None and value > peak:
            raise UserError(f"optim.{other}={value} is above the peak, optim.{name}={peak}: lower it")
