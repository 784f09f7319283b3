"""Any Hugging Face video classifier (TimeSformer, ViViT, V-JEPA 2...) behind one thin adapter.

VideoMAE never goes this way: Hugging Face's class loses parts of the recipe and, in some versions, of the weights.
The models run without random layers of their own, since those draw from the global generator: all dropout and
drop path probabilities of the config are set to 0, and `noise_size` is 0.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vac_ddp.errors import UserError
from vac_ddp.models import weight_files
from vac_ddp.models.load_report import Loaded, LoadReport, some
from vac_ddp.models.timm_backbone import seeded, silence
from vac_ddp.models.torch_file import REMEDY as _REMEDY
from vac_ddp.models.torch_file import first_line
from vac_ddp.models.video_model import VideoModel, new_head
from vac_ddp.schema import fault, shown
from vac_ddp.settings import ClipSettings, ModelSettings

# What a config could have transformers fetch, import or run beside the model.
_FOREIGN = frozenset(
    ("attn_implementation", "_attn_implementation", "quantization_config", "auto_map", "transformers_weights")
)
_MOST_LAYERS, _MOST = 1000, 1 << 20  # in a config: of numbers whose name ends in "layers", of others
_ANY_FILE = 1 << 24  # parameters that a model of a file of any size may have
_LAYER = re.compile(r"^(.*?\.?)(?:layers?|blocks?|h)\.(\d+)\.")


class HFClassifier(VideoModel):
    """Clips (B, T, 3, H, W) in, logits (B, K) out, by a transformers model with a classifier for K classes.

    Parameters that the classification never reads (V-JEPA 2's predictor) are named in `unused` and take no gradient.
    """

    noise_size = 0

    net: Any  # of transformers

    def __init__(self, net: Any, *, unused: Sequence[str] = ()) -> None:
        super().__init__()
        self.net = net
        self.unused = list(unused)
        for name in unused:
            net.get_parameter(name).requires_grad_(False)
        used = [name for name, _ in net.named_parameters() if name not in set(unused)]
        depths, self.num_depths = depths_by_number(used, net.base_model_prefix)
        self._depths = depths | dict.fromkeys(unused, 0)
        self._checkpointing = 0

    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits (B, K) float32 of normalised clips; noise is not used."""
        return self.net(**{self.net.main_input_name: clips}).logits.float()

    def steps(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """Features (B, T', D) float32 of each time step: the last hidden state, averaged over space."""
        raise UserError("model.name=hf gives no features of time steps yet: give another model.name or model.encoder")

    @property
    def step_shape(self) -> tuple[int, int]:
        """(T', D) of `steps`."""
        raise UserError("model.name=hf gives no features of time steps yet: give another model.name or model.encoder")

    def keep_encoder(self) -> None:
        """Remove the classifier."""
        raise UserError("model.name=hf gives no features of time steps yet: give another model.name or model.encoder")

    def layers(self) -> list[nn.Module]:
        """The numbered layers that layer decay counts, from below."""
        found: dict[str, None] = {}
        for name in self._depths:
            match = _LAYER.match(name)
            if match and name.startswith(self.net.base_model_prefix) and name not in self.unused:
                found[match[0].rstrip(".")] = None
        return [self.net.get_submodule(name) for name in found]

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
        """Depth of a parameter by the layer number in its name, see `depths_by_number`."""
        return self._depths[name.removeprefix("net.")]

    def head_names(self) -> set[str]:
        """Names of the classifier's parameters."""
        return {f"net.{_head_path(self.net)}.{part}" for part in ("weight", "bias")}

    def architecture(self) -> dict[str, Any]:
        """What builds the model again: the transformers config, in plain types."""
        return {"name": "hf", "config": json.loads(self.net.config.to_json_string(use_diff=False))}


def depths_by_number(names: Sequence[str], base: str) -> tuple[dict[str, int], int]:
    """(depth of each parameter, number of depths), found from layer numbers in the names, in the order they come.

    base: the prefix of the model below the classifier. 0: what comes before the first numbered layer; i + 1: layer i,
    several stacks counted on; what stands between two stacks belongs to the layer below; all behind them, and what
    is not under `base`, on top.
    """
    numbered: dict[str, int] = {}
    depths = {}
    for name in names:
        match = _LAYER.match(name) if name.startswith(f"{base}.") else None
        if match:
            depths[name] = numbered.setdefault(match[0], len(numbered) + 1)
        else:
            depths[name] = len(numbered) if name.startswith(f"{base}.") else -1
    top = len(numbered) + 1
    last = max((i for i, name in enumerate(names) if depths[name] == len(numbered) and _LAYER.match(name)), default=-1)
    for i, name in enumerate(names):
        if depths[name] < 0 or (numbered and i > last):
            depths[name] = top
    return depths, top + 1


def build_hf(
    settings: ModelSettings,
    clip: ClipSettings,
    num_classes: int,
    *,
    seed: int,
    architecture: dict[str, Any] | None = None,
    stored: int | None = None,
) -> Loaded:
    """The classifier that settings.weights (hub id or directory) names, its head drawn anew from `seed`.

    architecture: what `HFClassifier.architecture` gave; the model is then built of it with random weights, for a file
    of `stored` parameters where that is known. UserError: VideoMAE, other tasks, weights without a part of the
    backbone, a config of which no model can be built, or one far larger than its file, clips of another length or size.
    """
    for name in ("drop_path", "head_dropout"):
        if getattr(settings, name) > 0:
            raise UserError(f"model.{name}={getattr(settings, name)}: model.name=hf runs without random layers; give 0")
    source = _open(settings) if architecture is None else None
    if source is not None:
        stored = sum(tensor.numel() for tensor in source.state.values())
    fields = (architecture or {}).get("config") if source is None else source.hf_config
    config = _config(fields, str(settings.weights))
    zeroed = _zero_rates(config)
    _check_clips(config, clip)
    config.num_labels = num_classes
    unused = unused_parameters(config, clip, stored=stored)
    report = LoadReport(source="none")
    with seeded(seed), _quiet():
        net = _from_config(config) if source is None else _load(source, config, report)
        _draw_classifier(net, settings.head_init_scale)
    report.head = f"drawn for {num_classes} classes"
    zeroed += silence(net)
    if zeroed:
        report.notes.append(f"runs without random layers of its own ({', '.join(zeroed)})")
    if unused:
        report.notes.append(f"{len(unused)} tensors are not read when classifying and stay frozen: {some(unused, 3)}")
    report.set_normalization(settings, *weight_files.normalization_of(source), "of the source's pre-processing")
    return Loaded(model=HFClassifier(net, unused=unused), report=report)


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


def _config(fields: dict[str, Any] | None, weights: str) -> Any:
    """The transformers config of these JSON fields; UserError for models that do not classify videos."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING

    kind = (fields or {}).get("model_type")
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING:
        raise UserError(
            f"model.weights={weights} is a {kind}, which transformers has no video classifier for: give a TimeSformer, "
            "ViViT or V-JEPA 2 (AutoModelForVideoClassification), or another model.name"
        )
    if problem := fault(fields, weight_files.HubConfig):
        raise UserError(f"model.weights={weights}: its config: {problem}; {_REMEDY}")
    fields = _bounded(fields or {}, f"model.weights={weights}: its config")
    try:
        return CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:  # transformers checks some fields, with errors of many types
        raise UserError(
            f"model.weights={weights}: transformers refuses its config ({' '.join(str(error).split())[:200]}); "
            "fetch or copy it again"
        ) from None


def _bounded(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The JSON fields of a config without `_FOREIGN`; UserError for a number far beyond that of any model."""
    kept = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            value = _bounded(value, where)
        most = _MOST_LAYERS if name.endswith("layers") else _MOST
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= most:
                raise UserError(f"{where}: {name}: expected numbers up to {most}, found {shown(number)}; {_REMEDY}")
        if name not in _FOREIGN:
            kept[name] = value
    return kept


def _from_config(config: Any) -> Any:
    from transformers import AutoModelForVideoClassification

    return AutoModelForVideoClassification.from_config(config, dtype=torch.float32)


def _load(source: weight_files.Source, config: Any, report: LoadReport) -> Any:
    """The model with the source's tensors. Only the classifier and what is above the backbone may be missing."""
    from transformers import AutoModelForVideoClassification

    source.state.clear()  # transformers reads the file again, through its own renaming of older names
    net, info = AutoModelForVideoClassification.from_pretrained(
        source.path.parent,
        config=config,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,
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
    head = {f"{_head_path(net)}.{part}" for part in ("weight", "bias")}
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


def unused_parameters(config: Any, clip: ClipSettings, *, stored: int | None = None) -> list[str]:
    """Names of parameters that no gradient reaches, found on the meta device: DDP waits in vain for such ones.

    UserError where no model can be built of the config, it has many more parameters than the `stored` ones of its
    file, or it refuses clips of this shape.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), _quiet():
            net = _from_config(config).train()
            clips = torch.empty(1, clip.frames, 3, clip.size, clip.size)
    except Exception as error:  # of any type: transformers computes with the numbers as they are
        raise UserError(
            f"no {config.model_type} can be built of its config ({type(error).__name__}: {first_line(error)}); "
            f"{_REMEDY}"
        ) from error
    needed = sum(parameter.numel() for parameter in net.parameters())
    if stored is not None and needed > 2 * stored + _ANY_FILE:
        raise UserError(
            f"the config of this {config.model_type} describes {needed} parameters, the file holds {stored}; {_REMEDY}"
        )
    try:
        net(**{net.main_input_name: clips}).logits.sum().backward()
    except Exception as error:  # as above
        raise UserError(
            f"this {config.model_type} does not take {clip.frames} frames of {clip.size} pixels "
            f"({first_line(error)}): set clip.frames and clip.size to what it was trained with"
        ) from error
    return [name for name, parameter in net.named_parameters() if parameter.grad is None]


def _check_clips(config: Any, clip: ClipSettings) -> None:
    """Refuse clips of another shape than the model's tables are made for (rotary positions take any length)."""
    frames = getattr(config, "num_frames", None)
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    size = size[0] if isinstance(size, list | tuple) else size
    if frames not in (None, clip.frames) or size not in (None, clip.size):
        wanted = f"{frames or clip.frames} frames of {size or clip.size} pixels"
        raise UserError(
            f"this {config.model_type} was made for {wanted}, clips have {clip.frames} of {clip.size}: "
            f"set clip.frames={frames or clip.frames} clip.size={size or clip.size}"
        )


def _zero_rates(config: Any) -> list[str]:
    """Set the dropout and drop path probabilities of a config to 0; returns the names of those that were not."""
    zeroed = []
    for name, value in list(vars(config).items()):
        if re.search(r"drop(out|_path)|_drop$|dropout", name) and isinstance(value, int | float) and value > 0:
            setattr(config, name, type(value)(0))
            zeroed.append(f"{name} was {value:g}")
    return zeroed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load tables out of the log: the load report says it."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
