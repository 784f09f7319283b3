"""Find and read weights: hub ids, Hugging Face directories, .pth files, run directories. No file is executed."""

from __future__ import annotations

import argparse  # noqa: TID251 - checkpoints hold its Namespace
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from torch import Tensor

from vac_ddp import files
from vac_ddp.errors import UserError
from vac_ddp.models.torch_file import REMEDY, check_tensors, first_line, read_torch, refuse_pointer
from vac_ddp.schema import Count, FileName, Finite, Within, check, mismatch, read_json, shown
from vac_ddp.text import printable

_PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_WRAPPERS = 4  # dictionaries around a state dict

Size = Annotated[int, Within(low=1, high=1 << 20)]
Depth = Annotated[int, Within(low=1, high=1000)]
Epsilon = Annotated[float, Within(low=0, high=1)]
Three = tuple[Finite, Finite, Finite]
Deviation = Annotated[float, Within(low=1e-6, high=1e6)]
Deviations = tuple[Deviation, Deviation, Deviation]


class Architecture(TypedDict):
    """`architecture` in a best file: what a model says of itself, its mean and std."""

    name: NotRequired[str]
    mean: NotRequired[Three | None]
    std: NotRequired[Deviations | None]
    encoder: NotRequired[Architecture]
    positions: NotRequired[bool]
    config: NotRequired[dict[str, Any]]
    batch_norm: NotRequired[Literal["stored", "batch"]]
    width: NotRequired[Size]
    depth: NotRequired[Depth]
    heads: NotRequired[Size]
    mlp: NotRequired[Size]
    patch: NotRequired[Size]
    tubelet: NotRequired[Size]
    eps: NotRequired[Epsilon]
    head_eps: NotRequired[Epsilon]
    pooling: NotRequired[Literal["mean", "first"]]
    grids: NotRequired[list[tuple[Size, Size, Size]]]


class SavedModel(TypedDict):
    """The group `model` of the settings in a best file, as far as it describes the architecture."""

    name: NotRequired[str]
    weights: NotRequired[str | None]
    backbone: NotRequired[str]
    width: NotRequired[Size | None]
    depth: NotRequired[Depth | None]
    heads: NotRequired[Size | None]
    mlp_ratio: NotRequired[Annotated[float, Within(low=0, high=1000)] | None]
    patch: NotRequired[Size | None]
    encoder: NotRequired[Literal["videomae", "lsvit", "frame_vit", "hf"]]
    pooling: NotRequired[Literal["mean", "statistics", "attention", "attentive", "transformer"]]
    statistics: NotRequired[list[Literal["mean", "std", "difference"]]]
    queries: NotRequired[Annotated[int, Within(low=1, high=64)]]
    spatial_grid: NotRequired[Annotated[int, Within(low=1, high=16)]]
    batch_norm: NotRequired[Literal["stored", "batch"]]
    smif: NotRequired[bool]
    lmi: NotRequired[bool]
    mean: NotRequired[Three | None]
    std: NotRequired[Deviations | None]


class SavedSettings(TypedDict):
    """The settings in a best file: those that are read without building a `Config`."""

    model: NotRequired[SavedModel]
    clip: NotRequired[dict[str, Any]]


class Best(TypedDict):
    """The content of best_<model>.pt."""

    model: dict[str, Any]
    classes: list[str]
    config: SavedSettings
    metrics: NotRequired[dict[str, float | None] | None]
    architecture: NotRequired[Architecture | None]
    precision: NotRequired[str]
    class_counts: NotRequired[list[Count] | None]


class HubConfig(TypedDict):
    """What is read of a config.json from the hub."""

    model_type: NotRequired[str]
    architectures: NotRequired[list[str] | None]
    architecture: NotRequired[str]
    pretrained_cfg: NotRequired[dict[str, Any]]
    num_frames: NotRequired[Size]
    image_size: NotRequired[Size | tuple[Size, Size]]
    num_attention_heads: NotRequired[Size]
    num_hidden_layers: NotRequired[Depth]
    hidden_size: NotRequired[Size]
    layer_norm_eps: NotRequired[Epsilon]
    classifier_norm_eps: NotRequired[Epsilon]  # of an exported run; transformers' class has 1e-5
    id2label: NotRequired[dict[str, str] | None]
    num_labels: NotRequired[Size]
    qv_bias: NotRequired[bool]
    qkv_bias: NotRequired[bool]


class Processor(TypedDict):
    """What is read of a preprocessor_config.json, and of the parts that processor_config.json has."""

    image_mean: NotRequired[Any]  # see `processor.normalization_of`
    image_std: NotRequired[Any]
    do_normalize: NotRequired[bool | None]
    do_rescale: NotRequired[bool | None]
    rescale_factor: NotRequired[Annotated[float, Within(low=1e-6, high=1e6)] | None]
    offset: NotRequired[bool | None]
    do_center_crop: NotRequired[bool | None]
    size: NotRequired[int | dict[str, Any] | None]
    crop_size: NotRequired[int | dict[str, Any] | None]
    video_processor: NotRequired[Processor]
    image_processor: NotRequired[Processor]


class ShardIndex(TypedDict):
    """An index of weights in several files beside it."""

    weight_map: dict[str, FileName]


@dataclass(kw_only=True)
class Source:
    """Tensors as they are in a file, and what lies beside them. What a source does not say is None.

    path: the file with the tensors, or the index of several; sha256: of the file (of several: of their hashes).
    classes, config, architecture, metrics, precision: of a checkpoint of ours; hf_config, processor: the JSON files of
    a Hugging Face directory; arguments: the training arguments in an official checkpoint.
    """

    asked: str
    kind: str
    path: Path
    sha256: str
    state: dict[str, Tensor]
    other: list[str] = field(default_factory=list)
    classes: list[str] | None = None
    config: dict[str, Any] | None = None
    architecture: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    class_counts: list[int] | None = None
    precision: str | None = None
    hf_config: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None

    @property
    def own(self) -> bool:
        """Whether this is a checkpoint that vac_ddp wrote."""
        return self.classes is not None and self.config is not None


def open_source(asked: str, *, revision: str | None = None, setting: str = "model.weights=") -> Source:
    """Read what `model.weights` names: a file, a directory, or else a hub id (downloaded, or from its local cache).

    setting: what an error about a hub id has before it; "" where none was set.

    Raises UserError, with the remedy, when there is nothing, or nothing whole, or objects beside tensors.
    """
    path = Path(asked).expanduser()
    if path.is_dir():
        return _from_directory(asked, path)
    if path.exists():
        return _from_file(asked, path)
    if path.is_absolute() or path.suffix in (".pt", ".pth", ".bin", ".safetensors") or asked.startswith((".", "~")):
        raise UserError(f"model.weights={asked}: no such file or directory")
    return _from_hub(asked, revision, setting)


def open_own(path: str | Path) -> Source:
    """Read a checkpoint of ours, best_<model>.pt or the run directory that holds it; anything else is a UserError."""
    if not Path(path).expanduser().exists():
        raise UserError(f"{path}: no such file or directory; expected a run directory or its best_<model>.pt")
    source = open_source(str(path))
    if not source.own:
        raise UserError(f"{path} is no checkpoint of vac_ddp ({source.kind}): it names no classes and no config")
    return source


def is_own(asked: str) -> bool:
    """Whether `asked` is a run directory or a .pt file, without reading it."""
    path = Path(asked).expanduser()
    return path.suffix == ".pt" if path.is_file() else path.is_dir() and any(path.glob("best_*.pt"))


def _from_directory(asked: str, folder: Path) -> Source:
    best = sorted(folder.glob("best_*.pt"))
    if len(best) > 1:
        raise UserError(f"model.weights={asked} holds {', '.join(p.name for p in best)}: name one of them")
    if best:
        return _from_file(asked, best[0])
    if not (folder / "config.json").exists():
        raise UserError(
            f"model.weights={asked} is neither a run (no best_<model>.pt) nor a Hugging Face directory (no config.json)"
        )
    weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise UserError(f"model.weights={asked} has a config.json but none of {', '.join(_WEIGHTS)}")
    state, sha256, other = _read_sharded(weights) if weights.suffix == ".json" else _read_bare(weights)
    processor = next((folder / name for name in _PROCESSORS if (folder / name).exists()), None)
    return Source(
        asked=asked,
        kind="Hugging Face directory",
        path=weights,
        sha256=sha256,
        state=state,
        other=other,
        hf_config=_read_object(folder / "config.json", HubConfig),
        processor=None if processor is None else _read_object(processor, Processor),
    )


def _from_file(asked: str, path: Path) -> Source:
    if path.suffix == ".safetensors":
        if (path.parent / "config.json").exists():
            source = _from_directory(asked, path.parent)
            if source.path.name == path.name:
                return source
        state, sha256, _ = _read_bare(path)
        return Source(asked=asked, kind="safetensors file", path=path, sha256=sha256, state=state)
    content = read_torch(path)
    state, other = _tensors_of(content, path)
    source = Source(asked=asked, kind="checkpoint", path=path, sha256=files.sha256(path), state=state, other=other)
    if isinstance(content.get("args"), argparse.Namespace):
        source.arguments = vars(content["args"])
    if "classes" in content and "config" in content:
        check(content, Best, file=path, remedy="give another best_<model>.pt, or save its bare state dict to load that")
        if not content["classes"] or len(set(content["classes"])) < len(content["classes"]):
            raise mismatch(path, "classes", "different class names", shown(content["classes"]), REMEDY)
        source.kind = "checkpoint of vac_ddp"
        source.classes, source.config = [printable(name) for name in content["classes"]], content["config"]
        source.architecture, source.metrics = content.get("architecture"), content.get("metrics")
        source.class_counts, source.precision = content.get("class_counts"), content.get("precision")
    return source


def _tensors_of(content: dict[str, Any], path: Path, depth: int = 0) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict inside its wrappers, and the names of entries that are no tensors."""
    for wrapper in ("model", "module", "state_dict", "model_state_dict"):
        if isinstance(content.get(wrapper), dict) and depth < _WRAPPERS:
            return _tensors_of(content[wrapper], path, depth + 1)
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors, only {', '.join(map(str, list(content)[:6])) or 'nothing'}")
    return state, [str(name) for name, value in content.items() if not isinstance(value, Tensor)]


def _read_bare(path: Path) -> tuple[dict[str, Tensor], str, list[str]]:
    if path.suffix != ".safetensors":
        state, other = _tensors_of(read_torch(path), path)
        return state, files.sha256(path), other
    refuse_pointer(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        check_tensors(state, path)
        return state, files.sha256(path), []
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({first_line(error)}): fetch or copy it again"
        ) from None


def _read_sharded(index: Path) -> tuple[dict[str, Tensor], str, list[str]]:
    places = _read_object(index, ShardIndex)["weight_map"]
    state: dict[str, Tensor] = {}
    other: list[str] = []
    digest = hashlib.sha256()
    for name in sorted(set(places.values())):
        if not (index.parent / name).exists():
            raise UserError(f"{index} names {name}, which is not there: fetch or copy it again")
        part, sha256, rest = _read_bare(index.parent / name)
        state.update(part)
        other += rest
        digest.update(sha256.encode())
    return state, digest.hexdigest(), other


def _read_object(path: Path, kind: Any) -> Any:
    try:
        return read_json(path, kind, remedy=REMEDY)
    except FileNotFoundError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _from_hub(hub_id: str, revision: str | None, setting: str) -> Source:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub import errors as hub

    remedy = f"where there is a network, run `hf download {hub_id} --local-dir DIR` and give {setting}DIR"
    if setting:
        remedy += "; or give model.weights=null with model.size (or width, depth, heads) to train from scratch"
    named = f"{setting}{hub_id}"
    listed: set[str] | None = None
    cause = ""
    try:
        info = HfApi().model_info(hub_id, revision=revision, timeout=15)
        listed, revision = {file.rfilename for file in info.siblings or []}, info.sha
    except hub.HFValidationError:
        raise UserError(f"{named} is no file, no directory and no hub id; {remedy}") from None
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        missing = "revision" if isinstance(error, hub.RevisionNotFoundError) else "model"
        where = f" at model.revision={revision}" if missing == "revision" else ""
        raise UserError(
            f"{named}{where} is no file or directory here, and the hub has no such {missing} "
            f"(or it is private: `hf auth login`): check the name; {remedy}"
        ) from None
    except Exception as error:  # offline in one of many ways: what is in the cache will do
        cause = first_line(error)

    def fetch(name: str) -> Path | None:
        if listed is not None and name not in listed:
            return None
        try:
            return Path(hf_hub_download(hub_id, name, revision=revision, local_files_only=listed is None))
        except hub.LocalEntryNotFoundError:
            return None

    try:
        config = fetch("config.json")
        weights = next((path for name in _WEIGHTS if (path := fetch(name))), None)
        if weights is not None and weights.suffix == ".json":
            for name in sorted(set(_read_object(weights, ShardIndex)["weight_map"].values())):
                fetch(name)
        for name in _PROCESSORS:
            fetch(name)
    except Exception as error:  # a download can fail in many ways, and all of them are the user's to know
        if isinstance(error, UserError):
            raise
        raise UserError(f"{named} cannot be downloaded ({first_line(error)}); {remedy}") from None
    if config is None or weights is None:
        if listed is not None:
            raise UserError(f"{named}: the hub's copy has no {'config.json' if config is None else 'weights'}")
        raise UserError(
            f"{named} is no file or directory here, not in the local cache, and the hub cannot be "
            f"reached ({cause}); {remedy}"
        )
    source = _from_directory(hub_id, config.parent)
    source.kind = f"Hugging Face hub, revision {config.parent.name[:12]}"
    return source
