"""Configs of transformers' video classifiers: read from JSON, bounded, checked on the meta device before memory is
allocated.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch

from vac_ddp.errors import UserError
from vac_ddp.models import weight_files
from vac_ddp.models.hf_families import FAMILIES
from vac_ddp.models.torch_file import REMEDY as _REMEDY
from vac_ddp.models.torch_file import first_line
from vac_ddp.schema import fault, shown
from vac_ddp.settings import ClipSettings

# What a config could have transformers fetch, import or run beside the model.
_FOREIGN = frozenset(
    ("attn_implementation", "_attn_implementation", "quantization_config", "auto_map", "transformers_weights")
)
_MOST_LAYERS, _MOST = 1000, 1 << 20  # in a config: of numbers whose name ends in "layers", of others
_ANY_FILE = 1 << 24  # parameters that a model of a file of any size may have


def read_config(fields: dict[str, Any] | None, weights: str) -> Any:
    """The transformers config of these JSON fields; UserError for models that do not classify videos."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING

    kind = (fields or {}).get("model_type")
    known = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING
    if not known or kind not in FAMILIES:
        lacking = "whose layers are not known here" if known else "which transformers has no video classifier for"
        raise UserError(
            f"model.weights={weights} is a {kind}, {lacking}: give a TimeSformer, ViViT, V-JEPA 2 or VideoPrism vision "
            "model, or another model.name"
        )
    if problem := fault(fields, weight_files.HubConfig):
        raise UserError(f"model.weights={weights}: its config: {problem}; {_REMEDY}")
    fields = _bounded(fields or {}, f"model.weights={weights}: its config")
    try:
        return CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:  # transformers checks some fields, with errors of many types
        raise UserError(
            f"model.weights={weights}: transformers refuses its config ({' '.join(str(error).split())[:200]}); "
            "fetch or copy it again"
        ) from None


def _bounded(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The JSON fields of a config without `_FOREIGN`; UserError for a number far beyond that of any model."""
    kept = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            value = _bounded(value, where)
        most = _MOST_LAYERS if name.endswith("layers") else _MOST
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= most:
                raise UserError(f"{where}: {name}: expected numbers up to {most}, found {shown(number)}; {_REMEDY}")
        if name not in _FOREIGN:
            kept[name] = value
    return kept


def from_config(config: Any) -> Any:
    """The classifier of a config with random weights."""
    from transformers import AutoModelForVideoClassification

    return AutoModelForVideoClassification.from_config(
        config, dtype=torch.float32, attn_implementation=attention(config)
    )


def attention(config: Any) -> str:
    """PyTorch's scaled_dot_product_attention where the class computes the same with it, else "eager"."""
    from transformers import MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING

    return "sdpa" if MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING[type(config)]._supports_sdpa else "eager"


def unused_parameters(config: Any, clip: ClipSettings, *, stored: int | None = None) -> list[str]:
    """Names of parameters that no gradient reaches, found on the meta device: DDP waits in vain for such ones.

    UserError where no model can be built of the config, it has many more parameters than the `stored` ones of its
    file, or it refuses clips of this shape.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), quiet():
            net = from_config(config).train()
            clips = torch.empty(1, clip.frames, 3, clip.size, clip.size)
    except Exception as error:  # of any type: transformers computes with the numbers as they are
        raise UserError(
            f"no {config.model_type} can be built of its config ({type(error).__name__}: {first_line(error)}); "
            f"{_REMEDY}"
        ) from error
    needed = sum(parameter.numel() for parameter in net.parameters())
    if stored is not None and needed > 2 * stored + _ANY_FILE:
        raise UserError(
            f"the config of this {config.model_type} describes {needed} parameters, the file holds {stored}; {_REMEDY}"
        )
    try:
        logits = net(**{net.main_input_name: clips}).logits
        logits.view(1, config.num_labels).sum().backward()
    except Exception as error:  # as above
        raise UserError(
            f"this {config.model_type} does not take {clip.frames} frames of {clip.size} pixels "
            f"({first_line(error)}): set clip.frames and clip.size to what it was trained with"
        ) from error
    return [name for name, parameter in net.named_parameters() if parameter.grad is None]


def check_clips(config: Any, clip: ClipSettings) -> None:
    """Refuse clips of another shape than the model's tables are made for (rotary positions take any length)."""
    frames = getattr(config, "num_frames", None)
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    size = size[0] if isinstance(size, list | tuple) else size
    if frames not in (None, clip.frames) or size not in (None, clip.size):
        wanted = f"{frames or clip.frames} frames of {size or clip.size} pixels"
        raise UserError(
            f"this {config.model_type} was made for {wanted}, clips have {clip.frames} of {clip.size}: "
            f"set clip.frames={frames or clip.frames} clip.size={size or clip.size}"
        )


def zero_rates(config: Any) -> list[str]:
    """Set the dropout and drop path probabilities of a config to 0; returns the names of those that were not."""
    zeroed = []
    for name, value in list(vars(config).items()):
        if re.search(r"drop(out|_path)|_drop$|dropout", name) and isinstance(value, int | float) and value > 0:
            setattr(config, name, type(value)(0))
            zeroed.append(f"{name} was {value:g}")
    return zeroed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load tables out of the log: the load report says it."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
