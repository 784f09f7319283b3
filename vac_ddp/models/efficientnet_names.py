"""Names of EfficientNet's tensors: those of the package EfficientNet-PyTorch and its offspring, and timm's."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# Inside a block; the first stage has blocks without expansion.
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
}
_PLAIN = _EXPANDED | {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_NAME = re.compile(r"(?:_blocks\.(\d+)\.)?(_[a-z0-9_]+)\.(\w+)$")


def is_efficientnet_pytorch(names: Iterable[str]) -> bool:
    """Whether tensors have the names of EfficientNet-PyTorch."""
    return {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= set(names)


def to_timm(state: dict[str, Tensor], timm_names: Iterable[str]) -> dict[str, Tensor]:
    """A state under timm's names. EfficientNet-PyTorch numbers all blocks, timm those of each stage.

    timm_names: of the timm model, in its order. A name that fits nowhere stays as it is.
    """
    inside = re.compile(r"blocks\.\d+\.\d+\.")
    places = list(dict.fromkeys(match[0] for name in timm_names if (match := inside.match(name))))
    renamed = {}
    for name, tensor in state.items():
        match = _NAME.match(name)
        new = None
        if match and match[1] is None:
            new = _OUTSIDE.get(match[2])
        elif match and int(match[1]) < len(places):
            expanded = f"_blocks.{match[1]}._expand_conv.weight" in state
            part = (_EXPANDED if expanded else _PLAIN).get(match[2])
            new = part and places[int(match[1])] + part
        renamed[f"{new}.{match[3]}" if match and new else name] = tensor
    return renamed
