"""Any Hugging Face video classifier (TimeSformer, ViViT, V-JEPA 2, VideoPrism) behind one thin adapter.

VideoMAE never goes this way: Hugging Face's class loses parts of the recipe and, in some versions, of the weights.
The models run without random layers of their own, since those draw from the global generator: all dropout and
drop path probabilities of the config are set to 0. Drop path is applied here, by masks made from `noise`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vac_ddp.errors import UserError
from vac_ddp.models import weight_files
from vac_ddp.models.frame_vit import batch_norms
from vac_ddp.models.hf_config import (
    attention,
    check_clips,
    from_config,
    quiet,
    read_config,
    unused_parameters,
    zero_rates,
)
from vac_ddp.models.hf_families import FAMILIES, token_grid, unread_frames
from vac_ddp.models.load_report import Loaded, LoadReport, some
from vac_ddp.models.processor import normalization_of, size_notes
from vac_ddp.models.timm_backbone import seeded, silence
from vac_ddp.models.video_model import VideoModel, check_grid, keep_factors, new_head, region_means
from vac_ddp.settings import ClipSettings, ModelSettings


class BranchEnd(nn.Module):
    """The last linear layer of a residual branch, its output scaled by `keep` (B, 1, 1) where that is set.

    The layer runs on (B x n, tokens, width) with a clip's n rows side by side: all of them share the clip's factor.
    """

    keep: Tensor | None = None

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor) -> Tensor:
        """From x (N, P, C) to (N, P, C')."""
        x = F.linear(x, self.weight, self.bias)
        if self.keep is None:
            return x
        return (x * self.keep.repeat_interleave(len(x) // len(self.keep), dim=0)).to(x.dtype)


class HFClassifier(VideoModel):
    """Clips (B, T, 3, H, W) in, logits (B, K) out, by a transformers model with a classifier for K classes.

    Parameters that the classification never reads (V-JEPA 2's predictor) are named in `unused` and take no gradient.
    Drop path reaches its rate in the last layer's residual branches, rising linearly from 0 in the first.
    """

    net: Any  # of transformers
    rates: Tensor

    def __init__(self, net: Any, settings: ModelSettings, clip: ClipSettings, *, unused: Sequence[str] = ()) -> None:
        super().__init__()
        self.net = net
        self.time_steps, self.side = token_grid(net.config, clip)
        check_grid(settings.spatial_grid, self.side, self.side)
        self.spatial_grid, self.batch_norm = settings.spatial_grid, settings.batch_norm
        self.family = FAMILIES[net.config.model_type]
        self.unused = list(unused)
        for name in unused:
            net.get_parameter(name).requires_grad_(False)
        self._depths, self.num_depths = self._find_depths()
        self._checkpointing = 0
        self._ends, rates = _branch_ends(self.layers(), self.family.branches, settings.drop_path)
        self.register_buffer("rates", torch.tensor(rates, device="cpu"), persistent=False)
        self.train(self.training)

    def train(self, mode: bool = True) -> HFClassifier:
        """Training or evaluation mode; BatchNorm on stored statistics stays in the latter."""
        super().train(mode)
        if self.batch_norm == "stored":
            for module in batch_norms(self):
                module.eval()
        return self

    @property
    def noise_size(self) -> int:
        """Random numbers in [0, 1) that a clip brings: one per residual branch where drop path is on."""
        return len(self.rates)

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of clips (B, T, 3, H, W), normalized floats; noise (B, noise_size) in [0, 1)."""
        self._set_masks(noise)
        logits: Tensor = self.net(**{self.net.main_input_name: clips}).logits
        return logits.flatten(1).float()  # VideoPrism has one row of them per query of its pooling

    def _set_masks(self, noise: Tensor | None) -> None:
        # The layers' arguments are transformers' own. The backward pass reads the masks again where activations are
        # recomputed: they stay until the next forward pass.
        factors: Sequence[Tensor | None] = keep_factors(noise, self.rates) or [None] * len(self._ends)
        for end, keep in zip(self._ends, factors, strict=True):
            end.keep = keep

    def steps(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features (B, T', D) float32 of each time step: the last hidden state, averaged over space."""
        self._set_masks(noise)
        tokens = self.net.get_submodule(self.family.encoder)(clips).last_hidden_state
        maps = self.family.by_time(tokens, self.time_steps).unflatten(2, (self.side, self.side))
        return region_means(maps.flatten(0, 1), self.spatial_grid).unflatten(0, maps.shape[:2])

    @property
    def step_shape(self) -> tuple[int, int]:
        """(T', D) of `steps`: a step is a tubelet, or a frame where there are none."""
        return self.time_steps, self.spatial_grid**2 * self.net.config.hidden_size

    def keep_encoder(self) -> None:
        """Remove pooler and classifier, and V-JEPA 2's predictor."""
        for name in self.family.above:
            path, _, last = name.rpartition(".")
            delattr(self.net.get_submodule(path), last)
        self.unused = []
        self._depths, self.num_depths = self._find_depths()

    def layers(self) -> list[nn.Module]:
        """The numbered layers that layer decay counts, from below."""
        return self.family.layers(self.net)

    def compiled_modules(self) -> list[nn.Module]:
        """Every layer."""
        return self.layers()

    @property
    def checkpointing(self) -> int:
        """Layers from below whose activations are recomputed in the backward pass."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, count: int) -> None:
        self._checkpointing = count
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        layers: list[Any] = self.layers()
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = i < count, again

    def depth_of(self, name: str) -> int:
        """Depth of a parameter, see `Family.depths`."""
        return self._depths[name.removeprefix("net.")]

    def _find_depths(self) -> tuple[dict[str, int], int]:
        names = [name for name, _ in self.net.named_parameters()]
        return self.family.depths(names, self.net.config.model_type)

    def head_names(self) -> set[str]:
        """Names of the classifier's parameters."""
        return {f"net.{_head_path(self.net)}.{part}" for part in ("weight", "bias")}

    def architecture(self) -> dict[str, Any]:
        """What builds the model again: the transformers config, in plain types."""
        config = json.loads(self.net.config.to_json_string(use_diff=False))
        return {"name": "hf", "config": config, "batch_norm": self.batch_norm}


def _branch_ends(
    layers: Sequence[nn.Module], branches: Sequence[str], drop_path: float
) -> tuple[list[BranchEnd], list[float]]:
    """Put a `BranchEnd` at the end of the layers' residual branches if drop_path > 0; (those, their rates)."""
    ends: list[BranchEnd] = []
    rates: list[float] = []
    for i, layer in enumerate(layers if drop_path > 0 else ()):
        modules = dict(layer.named_modules())
        for name in branches:
            if (linear := modules.get(name)) is None:
                continue
            path, _, last = name.rpartition(".")
            assert isinstance(linear, nn.Linear)
            ends.append(BranchEnd(linear))
            setattr(modules[path], last, ends[-1])
            rates.append(drop_path * i / max(1, len(layers) - 1))
    return ends, rates


def build_hf(
    settings: ModelSettings,
    clip: ClipSettings,
    num_classes: int,
    *,
    seed: int,
    architecture: dict[str, Any] | None = None,
    stored: int | None = None,
    keep_classifier: bool = False,
) -> Loaded:
    """The model that settings.weights (hub id or directory) names, its classifier kept or drawn anew from `seed`.

    architecture: what `HFClassifier.architecture` gave; the model is then built of it with random weights, for a file
    of `stored` parameters where that is known. UserError: VideoMAE, other tasks, weights without a part of the
    backbone, a config of which no model can be built, or one far larger than its file, clips of another length or size.
    """
    if settings.head_dropout > 0:
        raise UserError(
            f"model.head_dropout={settings.head_dropout}: model.name=hf has no dropout before the classifier; give 0"
        )
    source = _open(settings) if architecture is None else None
    if source is not None:
        stored = sum(tensor.numel() for tensor in source.state.values())
    fields = (architecture or {}).get("config") if source is None else source.hf_config
    config = read_config(fields, str(settings.weights))
    zeroed = zero_rates(config)
    check_clips(config, clip)
    config.num_labels = num_classes
    unused = unused_parameters(config, clip, stored=stored)
    report = LoadReport(source="none")
    with seeded(seed), quiet():
        net = from_config(config) if source is None else _load(source, config, report, keep_classifier=keep_classifier)
        if not keep_classifier:
            _draw_classifier(net, settings.head_init_scale)
    report.head = f"{'kept,' if keep_classifier else 'drawn for'} {num_classes} classes"
    zeroed += silence(net)
    if zeroed:
        report.notes.append(f"runs without random layers of its own ({', '.join(zeroed)})")
    if unused:
        report.notes.append(f"{len(unused)} tensors are not read when classifying and stay frozen: {some(unused, 3)}")
    if attention(config) == "eager":
        report.notes.append("attention without scaled_dot_product_attention: the class of transformers has none")
    if lost := unread_frames(config, clip):
        report.notes.append(f"the last {lost} of {clip.frames} frames fill no tubelet: the model does not see them")
    whose = "source" if source is not None and source.processor else "class"
    report.set_normalization(settings, *normalization_of(source), f"of the {whose}'s pre-processing")
    report.notes += size_notes(source, clip) if source is not None else []
    if architecture is not None and "batch_norm" not in architecture:  # of a run from before there was this setting
        settings = dataclasses.replace(settings, batch_norm="batch")
    return Loaded(model=HFClassifier(net, settings, clip, unused=unused), report=report)


def _open(settings: ModelSettings) -> weight_files.Source:
    weights = settings.weights
    remedy = "VideoMAE is loaded better, and checked, with model.name=videomae"
    if weights is None:
        raise UserError("model.name=hf needs model.weights: a hub id or a directory with config.json")
    if "videomae" in weights.lower() and not weight_files.Path(weights).expanduser().exists():
        raise UserError(f"model.weights={weights}: {remedy}")
    source = weight_files.open_source(weights, revision=settings.revision)
    if source.hf_config is None:
        raise UserError(f"model.weights={weights} has no config.json beside it: give a hub id or a HF directory")
    if source.hf_config.get("model_type") == "videomae":
        raise UserError(f"model.weights={weights}: {remedy}")
    return source


def _load(source: weight_files.Source, config: Any, report: LoadReport, *, keep_classifier: bool) -> Any:
    """The model with the source's tensors. Only the classifier and what is above the backbone may be missing.

    The report counts the classifier as drawn anew unless keep_classifier and the source has it.
    """
    from transformers import AutoModelForVideoClassification

    source.state.clear()  # transformers reads the file again, through its own renaming of older names
    net, info = AutoModelForVideoClassification.from_pretrained(
        source.path.parent,
        config=config,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation=attention(config),
        local_files_only=True,
    )
    for parameter in net.parameters():
        # Tensors mapped from a file lie at odd addresses, where some kernels round otherwise than after a restart.
        parameter.data = parameter.data.clone()
    base = f"{net.base_model_prefix}."
    drawn = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    lost = sorted(name for name in drawn if name.startswith(base))
    if lost:
        raise UserError(f"{source.path} lacks {some(lost)} of the backbone, or has them in another shape")
    total = sum(parameter.numel() for parameter in net.parameters())
    head = set() if keep_classifier else {f"{_head_path(net)}.{part}" for part in ("weight", "bias")}
    new = {name: parameter.numel() for name, parameter in net.named_parameters() if name in drawn | head}
    report.source, report.kind, report.file, report.sha256 = source.asked, source.kind, str(source.path), source.sha256
    report.used = len(net.state_dict()) - len(new)
    report.missing = [f"net.{name}" for name in new]
    report.unused = sorted(info["unexpected_keys"])
    report.covered = 1 - sum(new.values()) / total
    return net


def _head_path(net: Any) -> str:
    """Where the classifier is in a transformers model: its last linear layer with as many outputs as labels."""
    fits = [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == net.config.num_labels
    ]
    outside = [name for name in fits if not name.startswith(f"{net.base_model_prefix}.")]
    if not outside:
        raise UserError(f"{type(net).__name__} has no linear classifier that could be replaced")
    return outside[-1]


def _draw_classifier(net: Any, scale: float) -> None:
    old = net.get_submodule(_head_path(net))
    new = new_head(old.in_features, old.out_features, scale=scale)
    with torch.no_grad():
        old.weight.copy_(new.weight)
        old.bias.copy_(new.bias)
