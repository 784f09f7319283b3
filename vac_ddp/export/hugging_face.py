"""A model as a Hugging Face directory, and what transformers computes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from vac_ddp.export.comparison import Probe
from vac_ddp.models import VideoModel, file_state
from vac_ddp.models.hf_adapter import HFClassifier
from vac_ddp.models.load_report import Loaded
from vac_ddp.models.probe import Probe as Classifier
from vac_ddp.models.videomae import VideoMAE
from vac_ddp.settings import Config

HF_HEAD_EPS = 1e-5  # fixed in transformers' VideoMAEForVideoClassification


def why_not(model: VideoModel) -> str | None:
    """Why transformers has no class for this model, or None."""
    if isinstance(model, HFClassifier):
        return None
    if isinstance(model, Classifier):
        return "its classes cannot pool features over time as a probe does"
    if not isinstance(model, VideoMAE):
        return f"it has no class for {type(model).__name__}"
    arch = model.arch
    if len(arch.grids) > 1:
        steps = " to ".join("x".join(map(str, grid)) for grid in arch.grids)
        return f"its VideoMAE makes the position table anew, it cannot be interpolated ({steps})"
    if arch.image[0] != arch.image[1]:
        return f"clips of {arch.image[0]} x {arch.image[1]} pixels are not square"
    return None


def write_model(folder: Path, model: VideoModel, config: Config, loaded: Loaded, classes: list[str]) -> None:
    """Weights, config and pre-processing, as transformers writes them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    labels = dict(enumerate(classes))
    net = _videomae_net(model, labels) if isinstance(model, VideoMAE) else _net_of(model)
    net.config.id2label, net.config.label2id = labels, {name: i for i, name in labels.items()}
    net.save_pretrained(folder)
    for processor in _processors(net, config, loaded):
        processor.save_pretrained(folder)


def _net_of(model: VideoModel) -> Any:
    """The transformers model inside a model that `why_not` let pass."""
    assert isinstance(model, HFClassifier)
    return model.net


def _videomae_net(model: VideoMAE, labels: dict[int, str]) -> Any:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    arch = model.arch
    settings = VideoMAEConfig(
        image_size=arch.image[0],
        patch_size=arch.patch,
        num_frames=arch.frames,
        tubelet_size=arch.tubelet,
        hidden_size=arch.width,
        num_hidden_layers=arch.depth,
        num_attention_heads=arch.heads,
        intermediate_size=arch.mlp,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=arch.eps,
        qkv_bias=True,
        use_mean_pooling=arch.pooling == "mean",
        num_labels=len(labels),
    )
    if arch.head_eps != HF_HEAD_EPS:
        settings.classifier_norm_eps = arch.head_eps  # not read by transformers, but by vac_ddp
    net = VideoMAEForVideoClassification(settings)
    net.load_state_dict(file_state(model))
    return net


def _processors(net: Any, config: Config, loaded: Loaded) -> Iterator[Any]:
    """What makes pixels into input: an image processor and, for newer versions, a video processor."""
    import transformers

    size = config.clip.size
    values: dict[str, Any] = {
        "size": {"shortest_edge": config.clip.short_side or size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(loaded.mean),
        "image_std": list(loaded.std),
        "resample": 2,  # bilinear
    }
    if net.config.model_type == "vjepa2":
        # This class derives the short side from the crop and takes no other one.
        yield transformers.VJEPA2VideoProcessor(**values)
        return
    if net.main_input_name == "pixel_values_videos":  # VideoPrism, which has no class of its own
        yield transformers.LlavaOnevisionVideoProcessor(**values, do_center_crop=True)
        return
    yield transformers.VideoMAEImageProcessor(**values)
    if hasattr(transformers, "VideoMAEVideoProcessor"):
        yield transformers.VideoMAEVideoProcessor(**values)


def logits_of(folder: Path, model: VideoModel) -> Callable[[Tensor], Tensor]:
    """A function from clips to the logits of what transformers loads from `folder`; its weights must be ours, bit
    for bit.
    """
    net = _load(folder)
    ours = file_state(model) if isinstance(model, VideoMAE) else _net_of(model).state_dict()
    theirs = net.state_dict()
    other = [name for name in ours.keys() | theirs.keys() if name not in ours or name not in theirs]
    other += [name for name in ours if name in theirs and not torch.equal(ours[name], theirs[name])]
    if other:
        raise RuntimeError(f"transformers reads other weights than were written: {', '.join(sorted(other)[:4])}")
    return _forward(net)


def load_exported(folder: Path) -> Callable[[Tensor], Tensor]:
    """A function from clips to the logits of what transformers loads from `folder`, whatever its weights are."""
    return _forward(_load(folder))


def _forward(net: Any) -> Callable[[Tensor], Tensor]:
    return lambda clips: net(**{net.main_input_name: clips}).logits.flatten(1)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForVideoClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForVideoClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()


def input_name(model: VideoModel) -> str:
    """The argument that takes the clips in the forward pass of transformers' class for this model."""
    return str(_net_of(model).main_input_name) if isinstance(model, HFClassifier) else "pixel_values"


def with_hf_eps(model: VideoModel) -> VideoModel:
    """The model with the epsilon that transformers' class has before the classifier, and no setting for."""
    if not _has_other_eps(model):
        return model
    twin = copy.deepcopy(model)
    twin.fc_norm.eps = HF_HEAD_EPS
    return twin


def _has_other_eps(model: VideoModel) -> TypeGuard[VideoMAE]:
    return isinstance(model, VideoMAE) and model.arch.pooling == "mean" and model.arch.head_eps != HF_HEAD_EPS


@torch.no_grad()
def eps_difference(model: VideoModel, other: Callable[[Tensor], Tensor], probes: list[Probe]) -> list[str]:
    """What that epsilon changes: the largest difference of logits, one line a probe; none where it is the model's."""
    if not _has_other_eps(model):
        return []
    lines = []
    for name, clips in probes:
        ours = model(clips)
        difference, largest = float((ours - other(clips)).abs().max()), float(ours.abs().max())
        lines.append(
            f"transformers has LayerNorm eps {HF_HEAD_EPS:g} before the classifier, the run {model.arch.head_eps:g}: "
            f"logits differ by up to {difference:.1e} (largest logit {largest:.3g}) on {name}"
        )
    return lines
