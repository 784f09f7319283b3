"""What is where in transformers' video classifiers: layers and their depths, tokens, ends of residual branches."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models.load_report import some
from vac_ddp.settings import ClipSettings


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of modules in the classes of one config type, as in `named_modules()`.

    encoder: gives the last hidden state. embeddings: what comes before the layers. stacks: lists of numbered layers,
    from below. between: what comes after the first stack and before the second. top: final norm, pooler, classifier.
    unused: not read when classifying. above: those of `top` and `unused` that `encoder` does not need. branches: the
    last linear layers of a layer's residual branches. What a version of transformers does not have is left out.
    class_tokens: tokens before those of patches. time_last: whether a patch's tokens of all times are neighbours, else
    a time's tokens of all patches are.
    """

    encoder: str
    embeddings: tuple[str, ...]
    stacks: tuple[str, ...]
    between: tuple[str, ...] = ()
    top: tuple[str, ...]
    unused: tuple[str, ...] = ()
    above: tuple[str, ...]
    branches: tuple[str, ...]
    class_tokens: int = 0
    time_last: bool = False

    def layers(self, net: nn.Module) -> list[nn.Module]:
        """The numbered layers of all stacks, from below."""
        modules = dict(net.named_modules())
        return [layer for stack in self.stacks for layer in modules.get(stack, nn.ModuleList()).children()]

    def depths(self, names: Iterable[str], kind: str) -> tuple[dict[str, int], int]:
        """(depth of each parameter of `names`, number of depths). UserError: a name that belongs to no known part.

        0: embeddings, and what is unused; i + 1: layer i, counted through the stacks; what is between two stacks
        belongs to the layer below it; the last depth: `top`.
        """
        names = list(names)
        firsts, layers = [], 0
        for stack in self.stacks:
            firsts.append(layers + 1)
            numbers = {int(match[1]) for name in names if (match := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))}
            layers += len(numbers)
        between = firsts[1] - 1 if self.between else 0
        parts = [(self.embeddings + self.unused, 0), (self.between, between), (self.top, layers + 1)]
        fixed = {part: depth for group, depth in parts for part in group}
        depths, strange = {}, []
        for name in names:
            inside = [part for part in (*fixed, *self.stacks) if name.startswith(f"{part}.")]
            if not inside:
                strange.append(name)
            elif inside[0] in fixed:
                depths[name] = fixed[inside[0]]
            else:
                number = name.removeprefix(f"{inside[0]}.").partition(".")[0]
                depths[name] = firsts[self.stacks.index(inside[0])] + int(number)
        if strange:
            raise UserError(
                f"the {kind} of this transformers has parameters whose place is not known here ({some(strange, 3)}): "
                "install the version of transformers that vac_ddp was released with"
            )
        return depths, layers + 2

    def by_time(self, tokens: Tensor, steps: int) -> Tensor:
        """From tokens (B, N, C) of the last layer to (B, steps, patches, C), patches row by row."""
        tokens = tokens[:, self.class_tokens :]
        return tokens.unflatten(1, (-1, steps)).transpose(1, 2) if self.time_last else tokens.unflatten(1, (steps, -1))


# transformers 5.0 to 5.24; where names changed, the older ones follow.
FAMILIES = {
    "timesformer": Family(
        encoder="timesformer",
        embeddings=("timesformer.embeddings",),
        stacks=("timesformer.encoder.layer",),
        top=("timesformer.layernorm", "classifier"),
        above=("classifier",),
        branches=("temporal_attention.output.dense", "attention.output.dense", "output.dense"),
        class_tokens=1,
        time_last=True,
    ),
    "vivit": Family(
        encoder="vivit",
        embeddings=("vivit.embeddings",),
        stacks=("vivit.layers", "vivit.encoder.layer"),
        top=("vivit.layernorm", "classifier"),
        above=("classifier",),
        branches=("attention.o_proj", "mlp.fc2", "attention.output.dense", "output.dense"),
        class_tokens=1,
    ),
    "vjepa2": Family(
        encoder="vjepa2.encoder",
        embeddings=("vjepa2.encoder.embeddings",),
        stacks=("vjepa2.encoder.layer",),
        top=("vjepa2.encoder.layernorm", "pooler", "classifier"),
        unused=("vjepa2.predictor",),
        above=("vjepa2.predictor", "pooler", "classifier"),
        branches=("attention.proj", "mlp.fc2"),
    ),
    "videoprism_vision_model": Family(
        encoder="vision_model",
        embeddings=("vision_model.spatial_embeddings",),
        stacks=("vision_model.spatial_layers", "vision_model.temporal_layers"),
        between=("vision_model.layernorm1", "vision_model.temporal_embeddings"),
        top=("vision_model.layernorm2", "head", "head_layernorm", "classifier"),
        above=("head", "head_layernorm", "classifier"),
        branches=("attention.o_proj", "mlp.fc2"),
    ),
}


def token_grid(config: Any, clip: ClipSettings) -> tuple[int, int]:
    """(time steps, patches a side) that a transformers model of this config makes of a clip."""
    frames, patch = _tubelet(config)
    return max(1, clip.frames // frames), clip.size // patch


def unread_frames(config: Any, clip: ClipSettings) -> int:
    """Frames at the end of a clip that fill no tubelet: the model does not see them."""
    frames, _ = _tubelet(config)
    return clip.frames % frames if clip.frames > frames else 0


def _tubelet(config: Any) -> tuple[int, int]:
    """Frames and height of a tubelet, or of a patch."""
    size = getattr(config, "tubelet_size", 1)
    if isinstance(size, list | tuple):  # frames, height, width
        return size[0], size[1]
    patch = config.patch_size
    return size, patch[0] if isinstance(patch, list | tuple) else patch
