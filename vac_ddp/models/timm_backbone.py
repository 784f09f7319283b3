"""What LS-ViT and Frame ViT share: a timm image model run on the frames of clips.

timm draws drop path and dropout masks from the global generator. Here its random layers are switched off, and
the masks of drop path are made from the numbers that come with each clip: all frames of a clip share them.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from vac_ddp.errors import UserError
from vac_ddp.models import weight_files
from vac_ddp.models.efficientnet_names import is_efficientnet_pytorch, to_timm
from vac_ddp.models.feature_map import freeze_above_map
from vac_ddp.models.load_report import Loaded, LoadReport
from vac_ddp.models.video_model import VideoModel, add_branch, classify, drop_rates, new_head, run_blocks
from vac_ddp.models.weight_files import Source
from vac_ddp.schema import fault
from vac_ddp.settings import ModelSettings
from vac_ddp.text import listed

if TYPE_CHECKING:
    from timm.models import vision_transformer as timm_vit


class Block(nn.Module):
    """A timm ViT block, its parts taken over under their own names, with drop path from outside."""

    def __init__(self, source: timm_vit.Block) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = source.norm1, source.attn, source.ls1
        self.norm2, self.mlp, self.ls2 = source.norm2, source.mlp, source.ls2

    def forward(self, x: Tensor, keep_attention: Tensor | None = None, keep_mlp: Tensor | None = None) -> Tensor:
        """From x (N, P, C) to (N, P, C); the factors (N, 1, 1) scale what the two branches add (None: by 1)."""
        x = add_branch(x, self.ls1(self.attn(self.norm1(x))), keep_attention)
        return add_branch(x, self.ls2(self.mlp(self.norm2(x))), keep_mlp)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave the CPU generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def create_backbone(settings: ModelSettings, *, size: int) -> tuple[Any, LoadReport]:
    """The timm model `settings.backbone` without a classifier, for frames of size x size pixels, with its weights.

    settings.weights: null (random), a file or directory with timm's tensor names, a timm name (architecture.tag) or
    hf-hub:ID. They are read as tensors only, nothing in them is executed. A plain ViT (`is_plain_vit`) gets blocks
    of ours. UserError: unknown names, another architecture, missing tensors, no network.
    """
    import timm

    name = settings.backbone
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"near: {', '.join(near)}" if near else "timm.list_models() names them"
        raise UserError(f"model.backbone={name}: timm has no such model; {hint}")
    options: dict[str, Any] = {"num_classes": 0, "drop_rate": 0.0} | _sizes(settings)
    if timm.get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = size
    try:
        model = timm.create_model(name, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"model.backbone={name} cannot be built for {size} pixels ({options}): {error}") from error
    if is_plain_vit(model) and size % model.patch_embed.patch_size[0]:
        raise UserError(f"clip.size={size} is no multiple of the patch's {model.patch_embed.patch_size[0]} pixels")
    cfg, quiet = model.pretrained_cfg, silence(model)
    if settings.weights is None:
        report = LoadReport(source="none", missing=list(model.state_dict()))
    else:
        source = _find(settings)
        cfg = _configuration(source, cfg, name)
        report = load_tensors(model, source)
    report.notes += quiet
    if settings.spatial_grid > 1:
        frozen = freeze_above_map(model, size=size, grid=settings.spatial_grid)
        report.notes += [f"not used by the feature map, and frozen: {listed(frozen, 4)}"] if frozen else []
    report.mean, report.std = tuple(settings.mean or cfg["mean"]), tuple(settings.std or cfg["std"])
    report.normalisation = "as set" if settings.mean or settings.std else "timm's for these weights"
    if is_plain_vit(model):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Block(block)
    else:
        model.to(memory_format=torch.channels_last)  # convolutions on a CPU: half of the time for EfficientNet-Lite0
    return model, report


def _sizes(settings: ModelSettings) -> dict[str, Any]:
    """The arguments of timm for a ViT whose sizes are given by number."""
    numbers = (settings.width, settings.depth, settings.heads)
    if settings.size is not None:
        raise UserError(
            f"model.size={settings.size} is of videomae; {settings.name} takes its size from model.backbone"
        )
    if numbers == (None, None, None):
        return {}
    if None in numbers or settings.weights is not None:
        raise UserError("model.width, depth and heads are given together, with model.weights=null, or not at all")
    given = {
        "embed_dim": settings.width,
        "depth": settings.depth,
        "num_heads": settings.heads,
        "mlp_ratio": settings.mlp_ratio,
        "patch_size": settings.patch,
    }
    return {name: value for name, value in given.items() if value is not None}


def is_plain_vit(model: Any) -> TypeGuard[timm_vit.VisionTransformer]:
    """Whether the blocks of this timm model can be run here: a VisionTransformer of pre-norm blocks, as most are."""
    from timm.models import vision_transformer as timm_vit

    return type(model) is timm_vit.VisionTransformer and all(type(b) in (timm_vit.Block, Block) for b in model.blocks)


def silence(model: nn.Module) -> list[str]:
    """Switch random layers off that the architecture brings along; returns a line that names them, if any."""
    quiet = []
    for name, module in model.named_modules():
        for rate in ("p", "prob", "drop_prob") if "drop" in type(module).__name__.lower() else ():
            if getattr(module, rate, None):
                setattr(module, rate, 0.0)
                quiet.append(name)
    return [f"random layers switched off: {', '.join(quiet)}"] if quiet else []


def _find(settings: ModelSettings) -> Source:
    """The tensors that settings.weights names, read or fetched."""
    import timm

    weights, name = str(settings.weights), settings.backbone
    if Path(weights).expanduser().exists():
        return weight_files.open_source(weights)
    asked = weights.removeprefix("hf-hub:")
    stem = asked.removeprefix("timm/")
    if timm.is_model(stem):
        if stem.split(".")[0] != name.split(".")[0]:
            raise UserError(f"model.weights={weights} is of another architecture than model.backbone={name}")
        cfg = timm.get_pretrained_cfg(stem)
        if cfg is None or not cfg.hf_hub_id:
            raise UserError(f"model.weights={weights}: timm has no hub weights of that name; give a file, or null")
        return weight_files.open_source(cfg.hf_hub_id, revision=settings.revision)
    if not weights.startswith(("hf-hub:", "timm/")):
        raise UserError(
            f"model.weights={weights} is neither a file nor a timm name: for model.backbone={name} give a file or "
            f"directory with timm's tensor names, {_example(name)}, hf-hub:ID, or null for random weights"
        )
    return weight_files.open_source(asked, revision=settings.revision)


def _example(name: str) -> str:
    import timm

    cfg = timm.get_pretrained_cfg(name)
    return f"{cfg.architecture}.{cfg.tag}" if cfg is not None and cfg.tag else name


def _configuration(source: Source, cfg: dict[str, Any], name: str) -> dict[str, Any]:
    """What timm says of these weights: their own configuration, else that of the backbone."""
    beside = source.hf_config or {}
    theirs = beside.get("architecture")
    if theirs is not None and str(theirs).split(".")[0] != name.split(".")[0]:
        raise UserError(f"model.weights={source.asked} is a {theirs}: give model.backbone={theirs} to use it")
    found = {**cfg, **beside.get("pretrained_cfg", {})}
    for field, kind in (("mean", weight_files.Three), ("std", weight_files.Deviations)):
        if problem := fault(list(found[field]) if isinstance(found[field], tuple) else found[field], kind):
            raise UserError(f"{source.path.parent / 'config.json'}: pretrained_cfg.{field}: {problem}; correct it")
    return found


def load_tensors(model: nn.Module, source: Source) -> LoadReport:
    """Load the tensors into a timm model without classifier, through timm's own renaming and resizing.

    A tensor of the model that is missing or of another shape is a UserError. The old classifier is left.
    """
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    given = {name.removeprefix("module."): value for name, value in source.state.items()}
    if is_efficientnet_pytorch(given):
        given = to_timm(given, model.state_dict())
    before = {name: tuple(value.shape) for name, value in given.items()}
    try:
        state = adapt(dict(given), model) if adapt else given
    except Exception as error:
        raise UserError(f"{source.asked}: not the weights of {type(model).__name__} ({error})") from error
    own = model.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - state.keys() - counters)
    other = [name for name in own if name in state and state[name].shape != own[name].shape]
    for names, what in ((missing, "lacks"), (other, "has in another shape")):
        if names:
            shown = listed(names, 4)
            raise UserError(f"{source.asked} {what} {len(names)} of {len(own)} tensors of the backbone: {shown}")
    used = {name: value for name, value in state.items() if name in own}
    model.load_state_dict(used, strict=False)
    return LoadReport(
        source=source.asked,
        kind=source.kind,
        file=str(source.path),
        sha256=source.sha256,
        used=len(used),
        covered=1.0,
        unused=sorted(state.keys() - own.keys()),
        reshaped=[
            f"{name} {before[name]} to {tuple(value.shape)}"
            for name, value in own.items()
            if name in before and before[name] != tuple(value.shape)
        ],
    )


def backbone_depths(backbone: Any) -> tuple[dict[str, int], int]:
    """(name to depth, number of depths) of a backbone's parameters; the last depth is left to the head.

    ViT: 0 embedding, i + 1 block i, the final norm beside the head. Others: timm's own order of layers.
    """
    if is_plain_vit(backbone):
        top = len(backbone.blocks) + 1
        depths = {}
        for name, _ in backbone.named_parameters():
            part, _, rest = name.partition(".")
            final = part in ("norm", "fc_norm", "attn_pool")
            depths[name] = int(rest.partition(".")[0]) + 1 if part == "blocks" else top if final else 0
        return depths, top + 1
    from timm.models import group_parameters

    depths = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    return depths, max(depths.values()) + 2


def encode_tokens(
    vit: timm_vit.VisionTransformer,
    frames: Tensor,
    *,
    keep: Sequence[Tensor] | None = None,
    checkpointing: int = 0,
    after_block: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Tokens (N, P, C) of frames (N, 3, H, W) by a plain ViT, as its own `forward_features` makes them.

    keep, checkpointing, after_block: as in `run_blocks`.
    """
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(frames))))
    x = run_blocks(vit.blocks, x, keep=keep, checkpointing=checkpointing, after_block=after_block)
    return vit.norm(x)


class FrameModel(VideoModel):
    """A model that runs a timm backbone on every frame of a clip.

    The masks of drop path and of the head's dropout are made from `noise_size` numbers a clip: two a block if
    drop_path > 0 (all frames of a clip share them), then `width` if head_dropout > 0.
    """

    backbone: Any  # a VisionTransformer with blocks of ours where `is_plain_vit`, else any model of timm
    frames: int  # of a clip
    head: nn.Linear
    rates: Tensor

    @abstractmethod
    def frame_features(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features (B, T, D) of the frames of clips (B, T, 3, H, W), as the backbone pools them or over regions."""

    def steps(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features (B, T, D) float32 of every frame: as timm pools them, or the means of regions of its map."""
        return self.frame_features(clips, noise).float()

    @property
    def step_shape(self) -> tuple[int, int]:
        """(T, D) of `steps`."""
        grid, backbone = self.spatial_grid, self.backbone
        return self.frames, backbone.head_hidden_size if grid == 1 else grid**2 * backbone.num_features

    def keep_encoder(self) -> None:
        """Remove the classifier."""
        del self.head
        self.head_dropout = 0.0

    def add_classifier(self, width: int, num_classes: int, settings: ModelSettings) -> None:
        """Draw the head for features of `width` numbers, and set up what depends on the backbone: to be called last."""
        self.head = new_head(width, num_classes, scale=settings.head_init_scale)
        self.head_dropout = settings.head_dropout
        blocks = len(self.backbone.blocks) if settings.drop_path > 0 else 0
        self.register_buffer("rates", drop_rates(settings.drop_path, blocks), persistent=False)
        self._depths, self.num_depths = backbone_depths(self.backbone)

    @property
    def noise_size(self) -> int:
        """Random numbers in [0, 1) that a clip brings."""
        return len(self.rates) + (self.head.in_features if self.head_dropout > 0 else 0)

    def depth_of(self, name: str) -> int:
        """Depth of a parameter: 0 embedding or stem, then the backbone's layers; all that is new on top."""
        part, _, rest = name.partition(".")
        return self._depths[rest] if part == "backbone" else self.num_depths - 1

    def classify(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """Logits (B, K) float32 of features (B, C)."""
        return classify(self.head, features, None if noise is None else noise[:, len(self.rates) :], self.head_dropout)


def finish(model: FrameModel, report: LoadReport, new: str) -> Loaded:
    """The loaded model with its report brought up to date: what is `new`, and the share of parameters it had."""
    total = sum(parameter.numel() for parameter in model.parameters())
    old = sum(parameter.numel() for parameter in model.backbone.parameters()) if report.used else 0
    report.covered = old / total
    report.missing = [n for n, _ in model.named_parameters() if not (report.used and n.startswith("backbone."))]
    report.notes.append(f"new: {new}")
    return Loaded(model=model, report=report)
