"""The mean of the weights of several runs of one model ("model soup", Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vac_ddp.errors import UserError
from vac_ddp.models.weight_files import Source

SAME_CLIP = ("frames", "size", "stride", "sampling")


def soup(sources: Sequence[Source]) -> tuple[dict[str, Any], list[str]]:
    """The content of a best_<model>.pt with the mean weights of checkpoints of one model, and what to know of it.

    UserError names the first thing that is not the same: classes, architecture, clip, names or shapes of tensors.
    """
    first = sources[0]
    for other in sources[1:]:
        _check_same(first, other)
    counts = [source.class_counts for source in sources if source.class_counts]
    made = {
        "model": mean_state([source.state for source in sources], [str(source.path) for source in sources]),
        "classes": first.classes,
        "config": first.config,
        "metrics": {},
        "architecture": first.architecture,
        "class_counts": [sum(column) for column in zip(*counts, strict=True)] if counts else None,
        "soup": [{"file": str(s.path), "sha256": s.sha256, "metrics": s.metrics or {}} for s in sources],
    }
    starts = {_setting(source, "model", "weights") for source in sources}
    notes = []
    if len(starts) > 1 or starts == {None}:
        shown = ", ".join(sorted(str(start) for start in starts)).replace("None", "from scratch")
        notes.append(f"note: the runs began at different weights ({shown}): check that the mean is any good")
    return made, notes


def mean_state(states: Sequence[dict[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """The mean of state dicts of equal names and shapes, summed in float64; what is no float must be equal."""
    mixed = {}
    for key, tensor in states[0].items():
        for state, name in zip(states[1:], names[1:], strict=True):
            if key not in state or state[key].shape != tensor.shape:
                found = tuple(state[key].shape) if key in state else "missing"
                raise UserError(f"{key} is {found} in {name} and {tuple(tensor.shape)} in {names[0]}: other models")
            if not tensor.is_floating_point() and not torch.equal(state[key], tensor):
                raise UserError(f"{key} differs between {names[0]} and {name} and has no mean")
        if tensor.is_floating_point():
            total = tensor.double()
            for state in states[1:]:
                total = total + state[key].double()
            mixed[key] = (total / len(states)).to(tensor.dtype)
        else:
            mixed[key] = tensor.clone()
    for state, name in zip(states, names, strict=True):
        if extra := sorted(state.keys() - mixed.keys()):
            raise UserError(f"{name} has {extra[0]}, which {names[0]} lacks: other models")
    return mixed


def _setting(source: Source, group: str, name: str) -> Any:
    return (source.config or {}).get(group, {}).get(name)


def _check_same(first: Source, other: Source) -> None:
    if first.classes != other.classes:
        odd = sorted(set(first.classes or []) ^ set(other.classes or []))
        what = f"the class {odd[0]} is in one of them only" if odd else "their order differs"
        raise UserError(f"{first.path} and {other.path} have other classes ({what})")
    pairs = [("model", "name"), *(("clip", name) for name in SAME_CLIP)]
    if _setting(first, "model", "pooling") == "statistics":  # of another order they have the same shapes
        pairs += [("model", "pooling"), ("model", "statistics")]
    for group, name in pairs:
        a, b = _setting(first, group, name), _setting(other, group, name)
        if a != b:
            raise UserError(f"{group}.{name} is {a} in {first.path} and {b} in {other.path}: not runs of one model")
    for name in sorted((first.architecture or {}).keys() | (other.architecture or {}).keys()):
        a, b = (first.architecture or {}).get(name), (other.architecture or {}).get(name)
        if a != b:
            raise UserError(f"{name} is {a} in {first.path} and {b} in {other.path}: not runs of one model")
