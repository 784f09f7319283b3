"""From settings to a model: the entry points `build_model` and `load_model`."""

from __future__ import annotations

from torch import nn

from vac_ddp.errors import UserError
from vac_ddp.models import videomae
from vac_ddp.models.weights import IMAGENET_MEAN, IMAGENET_STD, Loaded, LoadReport, generator
from vac_ddp.settings import ClipSettings, ModelSettings

# width, depth, heads, MLP ratio, patch (VideoMAE, table of Appendix A; giant from V2)
SIZES = {
    "small": (384, 12, 6, 4.0, 16),
    "base": (768, 12, 12, 4.0, 16),
    "large": (1024, 24, 16, 4.0, 16),
    "huge": (1280, 32, 16, 4.0, 16),
    "giant": (1408, 40, 16, 48 / 11, 14),
}


def load_model(settings: ModelSettings, clip: ClipSettings, classes: list[str], *, seed: int) -> Loaded:
    """Build the model that the settings name and give it its weights; `settings.weights=None` draws them from `seed`.

    Raises UserError when weights cannot be had, lack a part of the backbone, or do not fit.
    """
    if settings.name == "lsvit":
        from vac_ddp.models import lsvit

        return lsvit.load(settings, clip, classes, seed=seed)
    if settings.name == "frame_vit":
        from vac_ddp.models import frame_vit

        return frame_vit.load(settings, clip, classes, seed=seed)
    if settings.name == "hf":
        from vac_ddp.models import hf

        return hf.load(settings, clip, classes, seed=seed)
    if settings.weights is not None:
        raise UserError("model.weights: loading is not there yet")
    return _videomae_from_scratch(settings, clip, len(classes), seed)


def build_model(settings: ModelSettings, clip: ClipSettings, num_classes: int, *, seed: int = 0) -> nn.Module:
    """The model of the settings with weights drawn from `seed`, whatever `settings.weights` says."""
    return _videomae_from_scratch(settings, clip, num_classes, seed).model


def architecture_of(settings: ModelSettings, clip: ClipSettings) -> videomae.Architecture:
    """The VideoMAE that the sizes in the settings describe: by name, by numbers, or by both."""
    named = SIZES.get(settings.size or "", (None, None, None, 4.0, 16))
    asked = (settings.width, settings.depth, settings.heads, settings.mlp_ratio, settings.patch)
    width, depth, heads, ratio, patch = (
        own if own is not None else by_name for own, by_name in zip(asked, named, strict=True)
    )
    if width is None or depth is None or heads is None:
        raise UserError(
            "model.weights=null trains from nothing and needs sizes: give model.size=small (base, large, huge, giant) "
            "or model.width, model.depth and model.heads"
        )
    if width % heads or width % 2:
        raise UserError(f"model.width={width} is no even multiple of model.heads={heads}")
    return videomae.Architecture(
        width=width,
        depth=depth,
        heads=heads,
        mlp=round(width * ratio),
        patch=patch,
        tubelet=settings.tubelet,
        eps=1e-6 if settings.norm_eps is None else settings.norm_eps,
        grids=(grid_of(clip, tubelet=settings.tubelet, patch=patch),),
    )


def grid_of(clip: ClipSettings, *, tubelet: int, patch: int) -> videomae.Grid:
    """Tokens along (time, height, width) of a clip."""
    if clip.frames % tubelet:
        raise UserError(f"clip.frames={clip.frames} is no multiple of the tubelet's {tubelet} frames")
    if clip.size % patch:
        raise UserError(f"clip.size={clip.size} is no multiple of the patch's {patch} pixels")
    return clip.frames // tubelet, clip.size // patch, clip.size // patch


def _videomae_from_scratch(settings: ModelSettings, clip: ClipSettings, num_classes: int, seed: int) -> Loaded:
    arch = architecture_of(settings, clip)
    model = videomae.empty_model(arch, num_classes, drop_path=settings.drop_path, head_dropout=settings.head_dropout)
    videomae.init_weights(model, generator(seed), head_scale=settings.head_init_scale)
    mean, std = settings.mean or IMAGENET_MEAN, settings.std or IMAGENET_STD
    report = LoadReport(
        source="none", missing=list(model.state_dict()), pooling="mean of the tokens, as the paper", mean=mean, std=std
    )
    return Loaded(model=model, report=report, mean=mean, std=std)
