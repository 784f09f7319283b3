"""From settings to a model: the entry points `build_model`, `load_model` and `rebuild_model`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vac_ddp.errors import UserError
from vac_ddp.models import videomae, videomae_weights, weight_files
from vac_ddp.models.load_report import Loaded, LoadReport, generator, match_classes, some
from vac_ddp.models.probe import make_probe
from vac_ddp.models.torch_file import REMEDY as _REMEDY
from vac_ddp.models.video_model import VideoModel
from vac_ddp.settings import ClipSettings, ModelSettings


def load_model(
    settings: ModelSettings,
    clip: ClipSettings,
    classes: list[str],
    *,
    seed: int,
    for_features: bool = False,
    keep_classifier: bool = False,
) -> Loaded:
    """Build the model that the settings name and give it its weights; `settings.weights=None` draws them from `seed`.

    Checkpoints of ours come back bit for bit, with the classifier if the classes are the same.
    for_features: see `load_videomae`. keep_classifier: of a model of transformers, whose `classes` these are
    (a training draws a new one).
    Raises UserError when weights cannot be had, lack a part of the backbone, or do not fit.
    """
    if settings.name == "probe":
        return _load_probe(settings, clip, classes, seed=seed)
    own = None
    if settings.weights is not None and (settings.name == "videomae" or weight_files.is_own(settings.weights)):
        own = weight_files.open_source(settings.weights, revision=settings.revision)
        _refuse_other_model(own, settings)
    if settings.name != "videomae":
        if own is not None and own.own:
            return _load_own(own, settings, clip, classes, seed=seed)
        if keep_classifier and settings.name == "hf":
            from vac_ddp.models.hf_adapter import build_hf

            return build_hf(settings, clip, len(classes), seed=seed, keep_classifier=True)
        return _build_other(settings, clip, len(classes), seed=seed)
    if own is not None:
        return videomae_weights.load_videomae(own, settings, clip, classes, seed=seed, for_features=for_features)
    model = build_model(settings, clip, len(classes), seed=seed)
    report = LoadReport(source="none", missing=list(model.state_dict()))
    report.set_normalization(settings, report.mean, report.std, report.normalisation)
    report.pooling, report.head = "mean of the tokens", f"drawn for {len(classes)} classes"
    return Loaded(model=model, report=report)


def rebuild_model(
    settings: ModelSettings,
    clip: ClipSettings,
    classes: list[str],
    architecture: dict[str, Any],
    *,
    seed: int,
    stored: int | None = None,
) -> Loaded:
    """The model of a run without weights, for those of its checkpoint: no other file and no hub is needed.

    settings: of the run; architecture: what `Loaded.architecture` gave; stored: how many parameters its file holds,
    where that is known. The weights are undefined or random.
    """
    mean, std = tuple(architecture["mean"]), tuple(architecture["std"])
    if settings.name != "videomae":
        bare = dataclasses.replace(settings, weights=None, mean=mean, std=std)
        return _build_other(bare, clip, len(classes), seed=seed, saved=architecture, stored=stored)
    try:
        arch = videomae_weights.with_positions(videomae.architecture_from(architecture), clip)
    except TypeError as error:
        raise UserError(f"the checkpoint's architecture entry is damaged ({error}); {_REMEDY}") from None
    model = videomae.empty_model(arch, len(classes), drop_path=settings.drop_path, head_dropout=settings.head_dropout)
    model.set_grid(settings.spatial_grid)
    return Loaded(model=model, report=LoadReport(source="checkpoint", mean=mean, std=std))


def build_model(settings: ModelSettings, clip: ClipSettings, num_classes: int, *, seed: int = 0) -> VideoModel:
    """The model of the settings' sizes with weights drawn from `seed`; `settings.weights` is not looked at."""
    if settings.name != "videomae":
        return _build_other(dataclasses.replace(settings, weights=None), clip, num_classes, seed=seed).model
    arch = architecture_of(settings, clip)
    model = videomae.empty_model(arch, num_classes, drop_path=settings.drop_path, head_dropout=settings.head_dropout)
    model.set_grid(settings.spatial_grid)
    videomae.init_weights(model, generator(seed), head_scale=settings.head_init_scale)
    return model


def architecture_of(settings: ModelSettings, clip: ClipSettings) -> videomae.Architecture:
    """The VideoMAE that the sizes in the settings describe: by name, by numbers, or by both (numbers go first)."""
    width, depth, heads, mlp, patch = videomae_weights.SIZES.get(settings.size or "", (None, None, None, None, 16))
    width, depth, heads = settings.width or width, settings.depth or depth, settings.heads or heads
    if width is None or depth is None or heads is None:
        raise UserError(
            "model.weights=null trains from scratch and needs sizes: give model.size=small (base, large, huge, giant) "
            "or model.width, model.depth and model.heads"
        )
    if width % heads or width % 2:
        raise UserError(f"model.width={width} is no even multiple of model.heads={heads}")
    if mlp is None or settings.width is not None or settings.mlp_ratio is not None:
        mlp = round(width * (settings.mlp_ratio or 4.0))
    patch = settings.patch or patch
    return videomae.Architecture(
        width=width,
        depth=depth,
        heads=heads,
        mlp=mlp,
        patch=patch,
        tubelet=settings.tubelet,
        eps=1e-6 if settings.norm_eps is None else settings.norm_eps,
        grids=(videomae.grid_of(clip, tubelet=settings.tubelet, patch=patch),),
    )


def _build_other(
    settings: ModelSettings,
    clip: ClipSettings,
    num_classes: int,
    *,
    seed: int,
    saved: dict[str, Any] | None = None,
    stored: int | None = None,
) -> Loaded:
    """The other architectures, imported when they are asked for: each brings a heavy library.

    saved: the architecture in a checkpoint; stored: how many parameters it holds.
    """
    if settings.name == "probe":
        names = [str(i) for i in range(num_classes)]
        inside = (saved or {}).get("encoder")
        if inside is None:
            encoder = load_model(_encoder_of(settings), clip, names, seed=seed, for_features=True)
        else:
            whole = {**inside, "mean": settings.mean, "std": settings.std}
            encoder = rebuild_model(_encoder_of(settings), clip, names, whole, seed=seed, stored=stored)
        positions = (saved or {}).get("positions", True)
        return make_probe(encoder, settings, num_classes, seed=seed, positions=positions)
    if settings.name == "lsvit":
        from vac_ddp.models.lsvit import build_lsvit

        return build_lsvit(settings, clip, num_classes, seed=seed)
    if settings.name == "frame_vit":
        from vac_ddp.models.frame_vit import build_frame_vit

        return build_frame_vit(settings, clip, num_classes, seed=seed)
    if settings.name == "hf":
        from vac_ddp.models.hf_adapter import build_hf

        return build_hf(settings, clip, num_classes, seed=seed, architecture=saved, stored=stored)
    raise UserError(f"model.name={settings.name} is none of videomae, lsvit, frame_vit, hf, probe")


def _encoder_of(settings: ModelSettings) -> ModelSettings:
    """The settings of a probe's encoder by itself; its own classifier is dropped."""
    return dataclasses.replace(settings, name=settings.encoder, pooling="mean", head_dropout=0.0)


def _load_probe(settings: ModelSettings, clip: ClipSettings, classes: list[str], *, seed: int) -> Loaded:
    """A probe from a checkpoint of one, else an encoder from any weights with a new pooling and classifier."""
    if settings.weights is not None and weight_files.is_own(settings.weights):
        source = weight_files.open_source(settings.weights)
        saved = _saved_name(source)
        if saved == "probe":
            return _load_own(source, settings, clip, classes, seed=seed)
        if saved is not None and saved != settings.encoder:
            raise UserError(f"{source.path} holds a model of the kind {saved}: set model.encoder={saved}")
    return _build_other(settings, clip, len(classes), seed=seed)


def _saved_name(source: weight_files.Source) -> str | None:
    return (source.architecture or {}).get("name") or (source.config or {}).get("model", {}).get("name")


def _refuse_other_model(source: weight_files.Source, settings: ModelSettings) -> None:
    saved = _saved_name(source)
    if saved is not None and saved != settings.name:
        raise UserError(f"{source.path} holds a model of the kind {saved}: set model.name={saved}")


_ANY_FILE = 1 << 24  # parameters that a model of a file of any size may have

# What a checkpoint's config says of its architecture; the rest (drop path, dropout...) is the new run's to choose.
OF_ARCHITECTURE = (
    "encoder",
    "backbone",
    "width",
    "depth",
    "heads",
    "mlp_ratio",
    "patch",
    "pooling",
    "statistics",
    "queries",
    "spatial_grid",
    "smif",
    "lmi",
    "lsvit_version",
)


def _load_own(
    source: weight_files.Source, settings: ModelSettings, clip: ClipSettings, classes: list[str], *, seed: int
) -> Loaded:
    """A checkpoint of a model that keeps its own names: all of it fits, but perhaps the classifier."""
    saved, facts = (source.config or {}).get("model", {}), source.architecture or {}
    same = {name: saved[name] for name in OF_ARCHITECTURE if name in saved}
    if "lsvit" in (settings.name, same.get("encoder")):
        same.setdefault("lsvit_version", 1)  # runs from before there was a second one
    given = dataclasses.asdict(settings)
    replaced = {name: (given[name], value) for name, value in same.items() if value != given[name]}
    mean, std = facts.get("mean") or saved.get("mean"), facts.get("std") or saved.get("std")
    settings = dataclasses.replace(settings, **same, weights=None, mean=settings.mean or mean, std=settings.std or std)
    stored = sum(tensor.numel() for tensor in source.state.values())
    _refuse_larger(source, stored)
    loaded = _build_other(settings, clip, len(classes), seed=seed, saved=source.architecture, stored=stored)
    report = put_own(loaded.model, source, classes)
    report.mean, report.std, report.normalisation = loaded.mean, loaded.std, "of the run"
    report.pooling = loaded.report.pooling
    texts = {name: ",".join(value) if isinstance(value, list) else value for name, (_, value) in replaced.items()}
    if texts:
        report.notes.append("as in the checkpoint: " + " ".join(f"model.{name}={text}" for name, text in texts.items()))
    return Loaded(model=loaded.model, report=report, replaced=replaced)


def _refuse_larger(source: weight_files.Source, stored: int) -> None:
    """A UserError where a checkpoint's sizes are of a model far larger than its `stored` parameters, or of none."""
    encoder = (source.architecture or {}).get("encoder") or {}
    for sizes in ((source.config or {}).get("model", {}), encoder):
        width, depth, heads = (sizes.get(name) or 0 for name in ("width", "depth", "heads"))
        mlp = sizes.get("mlp") or width * (sizes.get("mlp_ratio") or 4)
        patch = 3 * (sizes.get("tubelet") or 1) * (sizes.get("patch") or 16) ** 2
        if width * (depth * (4 * width + 2 * mlp) + patch) > 2 * stored + _ANY_FILE:
            raise UserError(
                f"{source.path}: width {width} and depth {depth} are not of a file with {stored} parameters; {_REMEDY}"
            )
    tokens = max(map(math.prod, encoder.get("grids") or [[0]]))
    if tokens > videomae_weights.MOST_TOKENS or (heads and width % heads):
        raise UserError(f"{source.path}: no encoder has {tokens} tokens, {heads} heads and width {width}; {_REMEDY}")


def put_own(model: VideoModel, source: weight_files.Source, classes: list[str]) -> LoadReport:
    """Put a checkpoint's tensors into a freshly built model, bit for bit, and say what became of the classifier."""
    report = LoadReport(source=source.asked, kind=source.kind, file=str(source.path), sha256=source.sha256)
    ours, head = model.state_dict(), model.head_names()
    rows = match_classes(source.classes, len(source.classes or []), classes, report)
    kept = {name: tensor for name, tensor in source.state.items() if rows is not None or name not in head}
    if rows is not None:
        kept |= {name: kept[name][rows] for name in head & kept.keys()}
    drawn = head if rows is None else set()
    videomae_weights.refuse_missing(source, sorted(ours.keys() - kept.keys() - drawn))
    if strange := sorted(kept.keys() - ours.keys()):
        raise UserError(f"{source.path} is another architecture: there is no place for {some(strange)}")
    videomae_weights.refuse_misfits(source, kept, ours)
    model.load_state_dict(kept, strict=False)
    report.used, report.missing, report.unused = len(kept), sorted(drawn), sorted(source.state.keys() - kept.keys())
    report.covered = sum(t.numel() for t in kept.values()) / sum(t.numel() for t in ours.values())
    return report
