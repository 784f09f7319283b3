"""Names of VideoMAE's tensors: ours, the official code's, and those of Hugging Face's classes.

A map is a function from our name to the source's names; several source tensors stand for one of ours when they
are stacked along the first axis (q, k, v). Only the patch embedding changes its shape: a convolution's kernel
(D, 3, t, p, p) is our matrix (D, 3 t p p).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from vac_ddp.models.videomae import Architecture

# ours: (official, Hugging Face), inside a block
_IN_BLOCK = {
    "norm1": ("norm1", "layernorm_before"),
    "norm2": ("norm2", "layernorm_after"),
    "proj": ("attn.proj", "attention.output.dense"),
    "fc1": ("mlp.fc1", "intermediate.dense"),
    "fc2": ("mlp.fc2", "output.dense"),
}
_OUTSIDE = {
    "patch_embed": ("patch_embed.proj", "videomae.embeddings.patch_embeddings.projection"),
    "fc_norm": ("fc_norm", "fc_norm"),
    "head": ("head", "classifier"),
}
# Where the final norm is when the first token is read instead of the mean.
FIRST_TOKEN_NORM = ("norm", "videomae.layernorm")

OFFICIAL, HF = 0, 1


def source_names(name: str, layout: int, *, pooling: str = "mean") -> list[tuple[str, ...]]:
    """Where a tensor of ours may be found: alternatives, each a tuple of names to be stacked."""
    parts = name.split(".")
    if parts[0] != "blocks":
        where = FIRST_TOKEN_NORM if parts[0] == "fc_norm" and pooling == "first" else _OUTSIDE[parts[0]]
        return [(f"{where[layout]}.{parts[1]}",)]
    inside, leaf = parts[2], parts[-1]
    if layout == OFFICIAL:
        start = f"blocks.{parts[1]}."
        special = {"qkv": "attn.qkv.weight", "q_bias": "attn.q_bias", "v_bias": "attn.v_bias"}
        return [(start + special[inside],)] if inside in special else [(f"{start}{_IN_BLOCK[inside][0]}.{leaf}",)]
    start = f"videomae.encoder.layer.{parts[1]}."
    attention = f"{start}attention.attention."
    if inside == "qkv":
        return [tuple(f"{attention}{part}.weight" for part in ("query", "key", "value"))]
    if inside in ("q_bias", "v_bias"):
        part = {"q_bias": "query", "v_bias": "value"}[inside]
        return [(f"{attention}{part}.bias",), (f"{attention}{inside}",)]
    return [(f"{start}{_IN_BLOCK[inside][1]}.{leaf}",)]


def to_hf(state: dict[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """Our state under the names that Hugging Face's VideoMAEForVideoClassification has in memory, bit for bit."""
    out = {}
    for name, tensor in state.items():
        targets = source_names(name, HF, pooling=arch.pooling)[0]
        if name == "patch_embed.weight":
            tensor = tensor.view(-1, 3, arch.tubelet, arch.patch, arch.patch)
        for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            out[target] = part.clone()
    return out


def from_source(
    state: dict[str, Tensor], ours: Iterable[str], layout: int, *, pooling: str = "mean"
) -> tuple[dict[str, Tensor], list[str], set[str]]:
    """A source's tensors under our names, the names of ours that it has none for, and the names that were used."""
    found, lacking = {}, []
    used: set[str] = set()
    for name in ours:
        choice = next((c for c in source_names(name, layout, pooling=pooling) if all(n in state for n in c)), None)
        if choice is None:
            lacking.append(name)
            continue
        tensor = state[choice[0]] if len(choice) == 1 else torch.cat([state[part] for part in choice])
        found[name] = tensor.flatten(1) if name == "patch_embed.weight" else tensor
        used.update(choice)
    return found, lacking, used


def layout_of(state: dict[str, Tensor]) -> int | None:
    """Which code the (cleaned) names of a state are from; None: neither."""
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state):
        return HF
    if "patch_embed.proj.weight" in state:
        return OFFICIAL
    return None


def clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put in front: DDP, torch.compile, `backbone.`, the pre-training's `encoder.`."""
    wrappers = re.compile(r"^(?:(?:module|_orig_mod|backbone|model)\.)+")
    state = {wrappers.sub("", name).replace("._orig_mod.", "."): tensor for name, tensor in state.items()}
    if "encoder.patch_embed.proj.weight" in state:
        state = {re.sub(r"^encoder\.", "", name): tensor for name, tensor in state.items()}
    if "embeddings.patch_embeddings.projection.weight" in state:
        bare = ("embeddings.", "encoder.layer.", "layernorm.")
        state = {f"videomae.{name}" if name.startswith(bare) else name: t for name, t in state.items()}
    return state
