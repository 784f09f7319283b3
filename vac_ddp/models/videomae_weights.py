"""VideoMAE from the tensors of a source: what the source is, what fits, what is missing, what is drawn anew."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models import tensor_names, videomae
from vac_ddp.models.load_report import Loaded, LoadReport, generator, match_classes, some
from vac_ddp.models.processor import normalization_of, size_notes
from vac_ddp.models.video_model import init_head
from vac_ddp.models.videomae import Architecture, VideoMAE
from vac_ddp.models.weight_files import Source
from vac_ddp.settings import ClipSettings, ModelSettings

# width, depth, heads, MLP width, patch of the published models (V1 appendix; giant: V2)
SIZES = {
    "small": (384, 12, 6, 1536, 16),
    "base": (768, 12, 12, 3072, 16),
    "large": (1024, 24, 16, 4096, 16),
    "huge": (1280, 32, 16, 5120, 16),
    "giant": (1408, 40, 16, 6144, 14),
}
MOST_TOKENS = 1 << 17  # of a clip; 64 frames of 448 pixels are 25,088
HEADS = {width: heads for width, _, heads, _, _ in SIZES.values()}

# Tensors that a fine-tuning has no use for: the pre-training's decoder; a bias on k, which cancels in the softmax.
_HARMLESS = re.compile(r"^(decoder\.|encoder_to_decoder\.|mask_token)|\.attention\.attention\.(key\.bias|k_bias)$")
_BACKBONE = re.compile(r"^(blocks\.|patch_embed\.|cls_token|videomae\.(encoder|embeddings)\.)")
_TABLES = re.compile(r"(^|\.)(pos_embed|position_embeddings)$")


def load_videomae(
    source: Source,
    settings: ModelSettings,
    clip: ClipSettings,
    classes: list[str],
    *,
    seed: int,
    for_features: bool = False,
) -> Loaded:
    """Build the encoder that the source's tensors describe, put them in, and say what became of every one of them.

    The classifier and its norm are drawn from `seed` where the source has none for these classes. Everything else
    has to come from the source: a tensor of the backbone that is missing, of another shape, not finite, or without
    a place here is a UserError that names it. for_features: a norm behind the pre-trained encoder is kept, which
    fine-tuning replaces by a new one.
    """
    state = tensor_names.clean(source.state)
    layout = _layout(source, state)
    report = LoadReport(source=source.asked, kind=source.kind, file=str(source.path), sha256=source.sha256)
    report.notes += [f"entry {name} is no tensor and was left out" for name in source.other]
    arch = _architecture(source, state, layout, settings, report)
    rows = _head_rows(source, state, layout, classes, report)
    normed = for_features and f"{tensor_names.FIRST_TOKEN_NORM[layout]}.weight" in state
    arch = _pooling(arch, state, layout, kept_head=normed or rows is not None, report=report)
    arch = with_positions(arch, clip)
    report.positions = "sine-cosine over " + ", interpolated to ".join("x".join(map(str, g)) for g in arch.grids)
    if _no_qv_biases(source):
        state = _zero_biases(state, arch)

    model = videomae.empty_model(arch, len(classes), drop_path=settings.drop_path, head_dropout=settings.head_dropout)
    model.set_grid(settings.spatial_grid)
    ours = model.state_dict()
    drawn = model.head_names() if rows is None else set()
    found, lacking, used = tensor_names.from_source(state, ours.keys() - drawn, layout, pooling=arch.pooling)
    if rows is not None:
        found |= {name: found[name][rows] for name in model.head_names() & found.keys()}
    elif arch.pooling == "mean":
        drawn = drawn | ({"fc_norm.weight", "fc_norm.bias"} & set(lacking))
    refuse_missing(source, sorted(set(lacking) - drawn))
    refuse_misfits(source, found, ours)
    report.unused = _unused(source, state, used, arch)

    _draw_new(model, drawn, seed, settings.head_init_scale)
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in found.values()} - {"float32"})
    if kinds:
        report.notes.append(f"the file's {', '.join(kinds)} became float32")
    model.load_state_dict(found, strict=False)

    report.used = len(state) - len(report.unused)
    report.missing = sorted(drawn)
    report.covered = sum(t.numel() for t in found.values()) / sum(t.numel() for t in ours.values())
    report.reshaped = ["patch_embed.weight (convolution to matrix)"]
    if layout == tensor_names.HF:
        report.reshaped.append(f"blocks.*.qkv.weight ({3 * arch.depth} of q, k, v to {arch.depth})")
    report.qv_biases = _bias_text(source, found)
    head_eps = arch.head_eps if arch.pooling == "mean" else arch.eps
    report.eps = f"{arch.eps:g} in the blocks, {head_eps:g} before the classifier"
    _set_normalization(source, settings, clip, report)
    return Loaded(model=model, report=report)


# ---------------------------------------------------------------- what the source is


def _layout(source: Source, state: dict[str, Tensor]) -> int:
    kind = (source.hf_config or {}).get("model_type", "videomae")
    if kind != "videomae":
        raise UserError(f"model.weights={source.asked} is a {kind}, no VideoMAE: set model.name=hf for it")
    layout = tensor_names.layout_of(state)
    if layout is None:
        raise UserError(
            f"{source.path} holds no VideoMAE: expected patch_embed.proj.weight (official) or "
            f"videomae.embeddings.patch_embeddings.projection.weight (Hugging Face), found {some(sorted(state), 3)}"
        )
    return layout


def _architecture(
    source: Source, state: dict[str, Tensor], layout: int, settings: ModelSettings, report: LoadReport
) -> Architecture:
    """What the tensors, the JSON beside them and, where these are silent, the published sizes say."""
    if source.architecture is not None:
        try:
            arch = videomae.architecture_from(source.architecture)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{source.path}: its architecture entry is damaged ({error})") from None
        _refuse_contradiction(source, arch, _sizes(source, state, layout))
    else:
        arch = _deduce(source, state, layout, settings, report)
    _refuse_other_sizes(source, arch, settings)
    return arch if settings.norm_eps is None else dataclasses.replace(arch, eps=settings.norm_eps)


def _refuse_contradiction(source: Source, said: Architecture, sizes: dict[str, int]) -> None:
    """A UserError where a file's architecture entry is not what its tensors show: nothing is built of other sizes."""
    for name, size in sizes.items():
        if getattr(said, name) != size:
            raise UserError(
                f"{source.path}: architecture.{name}: expected {size}, as the tensors show, found "
                f"{getattr(said, name)}; give another best_<model>.pt"
            )
    if said.width % said.heads or max(map(math.prod, said.grids), default=MOST_TOKENS + 1) > MOST_TOKENS:
        raise UserError(
            f"{source.path}: architecture: expected heads that divide the width {said.width} and grids of at most "
            f"{MOST_TOKENS} tokens, found {said.heads} heads and the grids {list(said.grids)[:3]}; give another "
            "best_<model>.pt"
        )


def _deduce(
    source: Source, state: dict[str, Tensor], layout: int, settings: ModelSettings, report: LoadReport
) -> Architecture:
    sizes = _sizes(source, state, layout)
    width, patch, tubelet = sizes["width"], sizes["patch"], sizes["tubelet"]
    config = source.hf_config or {}
    saved = (source.config or {}).get("model", {})
    frames, image = _trained_clip(source, report)
    height, across = image if isinstance(image, list | tuple) else (image, image)
    is_hf = layout == tensor_names.HF
    return Architecture(
        width=width,
        depth=sizes["depth"],
        mlp=sizes["mlp"],
        patch=patch,
        tubelet=tubelet,
        heads=_heads(source, width, settings, saved, report),
        eps=config.get("layer_norm_eps", 1e-12) if is_hf else 1e-6,
        head_eps=config.get("classifier_norm_eps", 1e-5) if is_hf else 1e-6,
        grids=((frames // tubelet, height // patch, across // patch),),
    )


def _trained_clip(source: Source, report: LoadReport) -> tuple[int, Any]:
    """Frames and pixels (side, or height and width) of the clips that the weights were trained on.

    From a Hugging Face config, or the arguments in an official checkpoint, whose model takes
    num_frames * num_segments frames of input_size pixels; the published 16 x 224 where neither says.
    """
    if source.hf_config:
        return source.hf_config.get("num_frames", 16), source.hf_config.get("image_size", 224)
    said = {name: value for name, value in (source.arguments or {}).items() if type(value) is int and value > 0}
    frames = said.get("num_frames", 16) * said.get("num_segments", 1)
    size = said.get("input_size", 224)
    unknown = [
        text
        for name, text in (("num_frames", f"{frames} frames"), ("input_size", f"{size} pixels"))
        if name not in said
    ]
    if unknown:
        report.notes.append(f"the file does not say for which clips it was trained; assumed: {' of '.join(unknown)}")
    return frames, size


def _sizes(source: Source, state: dict[str, Tensor], layout: int) -> dict[str, int]:
    """The sizes of an `Architecture` that the shapes of the tensors show."""
    kernel = state.get(tensor_names.source_names("patch_embed.weight", layout)[0][0], torch.empty(0))
    inside = re.compile(r"^(?:blocks|videomae\.encoder\.layer)\.(\d+)\.")
    blocks = [int(match[1]) for name in state if (match := inside.match(name))]
    fc1 = state.get(tensor_names.source_names("blocks.0.fc1.weight", layout)[0][0])
    if (
        kernel.ndim != 5
        or kernel.shape[1] != 3
        or kernel.shape[3] != kernel.shape[4]
        or len(set(blocks)) <= max(blocks, default=0)
        or fc1 is None
        or fc1.ndim != 2
    ):
        raise UserError(
            f"{source.path} holds no whole VideoMAE: {len(set(blocks))} blocks, patch embedding {tuple(kernel.shape)}"
        )
    width, _, tubelet, patch, _ = kernel.shape
    return {"width": width, "depth": max(blocks) + 1, "mlp": fc1.shape[0], "patch": patch, "tubelet": tubelet}


def _heads(source: Source, width: int, settings: ModelSettings, saved: dict[str, Any], report: LoadReport) -> int:
    """Heads: no shape shows them."""
    config = source.hf_config or {}
    heads = settings.heads or config.get("num_attention_heads") or saved.get("heads")
    if settings.heads is None and width == 384 and heads == 16:
        raw = config.get("architectures") == ["VideoMAEForPreTraining"] or source.asked.startswith("MCG-NJU/")
        if raw:
            report.notes.append(
                "the config's 16 heads are a slip of the conversion; ViT-S was trained with 6, used here"
            )
            return 6
        report.notes.append("16 heads at width 384, as the config says; the official ViT-S has 6: model.heads=6")
    if heads is None:
        heads = HEADS.get(width) or (width // 64 if width % 64 == 0 else None)
        if heads is None:
            raise UserError(f"{source.path} does not say how many heads it has: give model.heads (width {width})")
        report.notes.append(f"{heads} heads, as published models of width {width} have; the file does not say")
    if width % heads:
        raise UserError(f"{source.path}: width {width} is no multiple of {heads} heads")
    return heads


def _refuse_other_sizes(source: Source, arch: Architecture, settings: ModelSettings) -> None:
    """Sizes in the settings may repeat what the file is, not contradict it."""
    named = SIZES.get(settings.size or "", (None,) * 5)
    own_heads = settings.heads if source.architecture is not None else None
    asked = {
        "width": settings.width or named[0],
        "depth": settings.depth or named[1],
        "heads": own_heads,
        "mlp": None if settings.mlp_ratio is None else round(arch.width * settings.mlp_ratio),
        "patch": settings.patch,
    }
    for name, value in asked.items():
        if value is not None and value != getattr(arch, name):
            raise UserError(
                f"the settings ask for {name} {value}, {source.path} has {getattr(arch, name)}: "
                "leave model.size, width, depth, heads, mlp_ratio and patch to the weights, or set model.weights=null"
            )


# ---------------------------------------------------------------- head, pooling, positions


def _head_rows(
    source: Source, state: dict[str, Tensor], layout: int, classes: list[str], report: LoadReport
) -> list[int] | None:
    """Which row of the source's classifier is which class of ours; None: a new one is drawn."""
    name = tensor_names.source_names("head.weight", layout)[0][0]
    if name not in state:
        report.head = f"drawn for {len(classes)} classes: the source has none"
        return None
    return match_classes(_labels(source, len(state[name])), len(state[name]), classes, report)


def _labels(source: Source, count: int) -> list[str] | None:
    if source.classes is not None:
        return source.classes if len(source.classes) == count else None
    labels = (source.hf_config or {}).get("id2label")
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(count)}:
        return None
    listed = [str(labels[str(i)]) for i in range(count)]
    return None if all(re.fullmatch(r"LABEL_\d+", label) for label in listed) else listed


def _pooling(
    arch: Architecture, state: dict[str, Tensor], layout: int, *, kept_head: bool, report: LoadReport
) -> Architecture:
    """Mean of the tokens, but where a classifier that was trained on the first token is kept."""
    has_norm = "fc_norm.weight" in state
    if kept_head and not has_norm:
        report.pooling = "the first token, as this classifier was trained (no fc_norm in the source)"
        return dataclasses.replace(arch, pooling="first")
    final = tensor_names.FIRST_TOKEN_NORM[layout]
    if has_norm:
        report.pooling = "mean of the tokens and the source's fc_norm"
    elif f"{final}.weight" in state:
        report.pooling = f"mean of the tokens and a new norm, as official fine-tuning; {final} is not used"
    else:
        report.pooling = "mean of the tokens and a new norm"
    return dataclasses.replace(arch, pooling="mean")


def with_positions(arch: Architecture, clip: ClipSettings) -> Architecture:
    """The architecture for such clips: its position table is interpolated where they have another grid."""
    grid = videomae.grid_of(clip, tubelet=arch.tubelet, patch=arch.patch)
    grids = arch.grids if grid == arch.grids[-1] else (*arch.grids, grid)
    return dataclasses.replace(arch, grids=grids)


# ---------------------------------------------------------------- what fits and what does not


def _no_qv_biases(source: Source) -> bool:
    config = source.hf_config or {}
    return config.get("qv_bias", config.get("qkv_bias", True)) is False


def _zero_biases(state: dict[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    start = "videomae.encoder.layer"
    return state | {
        f"{start}.{i}.attention.attention.{part}.bias": torch.zeros(arch.width)
        for i in range(arch.depth)
        for part in ("query", "value")
    }


def _bias_text(source: Source, found: dict[str, Tensor]) -> str:
    biases = [tensor for name, tensor in found.items() if name.endswith((".q_bias", ".v_bias"))]
    if _no_qv_biases(source):
        return "none in the source, by its config; they start at 0"
    zero = sum(not bool(tensor.any()) for tensor in biases)
    return f"arrived, {len(biases)}" + (f", of which {zero} are all zero" if zero else "")


def refuse_missing(source: Source, missing: list[str]) -> None:
    """A UserError that names what the source lacks."""
    if not missing:
        return
    why = ""
    if all(name.endswith(("q_bias", "v_bias")) for name in missing):
        why = (
            "; some versions of transformers (5.8 to 5.17) drop these biases when they load and save: get the original"
        )
    raise UserError(f"{source.path} lacks {some(missing)}{why}")


def refuse_misfits(source: Source, found: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """A UserError for a tensor of another shape, or one that holds no finite numbers."""
    for name, tensor in found.items():
        if tensor.shape != ours[name].shape:
            raise UserError(
                f"{source.path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(ours[name].shape)}"
            )
        if tensor.is_floating_point() != ours[name].is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(f"{source.path}: {name} holds values that are not finite numbers: the file is damaged")


def _unused(source: Source, state: dict[str, Tensor], used: set[str], arch: Architecture) -> list[str]:
    """Tensors of the source that went nowhere; one that would change the backbone's result is an error."""
    left = sorted(set(state) - used)
    for name in left:
        if _TABLES.search(name) and not name.startswith("decoder"):
            table = state[name].reshape(-1, state[name].shape[-1]).float()
            if table.shape[1] != arch.width or not torch.allclose(
                table, videomae.sincos_table(*table.shape), atol=1e-3
            ):
                raise UserError(f"{source.path}: {name} is a learnt position table, which this encoder has not")
        elif _BACKBONE.match(name) and not _HARMLESS.search(name):
            others = [n for n in left if _BACKBONE.match(n) and not _HARMLESS.search(n)]
            raise UserError(f"{source.path} is another architecture: VideoMAE has no place for {some(others)}")
    return left


def _draw_new(model: VideoMAE, drawn: set[str], seed: int, head_scale: float) -> None:
    if "fc_norm.weight" in drawn:
        nn.init.ones_(model.fc_norm.weight)
        nn.init.zeros_(model.fc_norm.bias)
    if "head.weight" in drawn:
        init_head(model.head, scale=head_scale, generator=generator(seed))


def _set_normalization(source: Source, settings: ModelSettings, clip: ClipSettings, report: LoadReport) -> None:
    """Mean and std by settings, else by the source, else ImageNet's, which the official models were trained with."""
    (mean, std), origin = normalization_of(source), "of the source's pre-processing"
    if source.architecture is not None:
        mean, std, origin = source.architecture.get("mean"), source.architecture.get("std"), "of the run"
    report.set_normalization(settings, mean, std, origin)
    report.notes += size_notes(source, clip)
