"""Find and read weights: hub ids, Hugging Face directories, .pth files, run directories. No file is executed."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vac_ddp import files
from vac_ddp.errors import UserError

_PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(kw_only=True)
class Source:
    """Tensors as they are in a file, and what lies beside them. What a source does not say is None.

    path: the file with the tensors, or the index of several; sha256: of the file (of several: of their hashes).
    classes, config, architecture, metrics: of a checkpoint of ours; hf_config, processor: the JSON files of a
    Hugging Face directory; arguments: the training arguments in an official checkpoint.
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
    hf_config: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None

    @property
    def own(self) -> bool:
        """Whether this is a checkpoint that vac_ddp wrote."""
        return self.classes is not None and self.config is not None


def open_source(asked: str, *, revision: str | None = None) -> Source:
    """Read what `model.weights` names: a file, a directory, or else a hub id (downloaded, or from its local cache).

    Raises UserError, with the remedy, when there is nothing, or nothing whole, or objects beside tensors.
    """
    path = Path(asked).expanduser()
    if path.is_dir():
        return _from_directory(asked, path)
    if path.exists():
        return _from_file(asked, path)
    if path.is_absolute() or path.suffix in (".pt", ".pth", ".bin", ".safetensors") or asked.startswith((".", "~")):
        raise UserError(f"model.weights={asked}: no such file or directory")
    return _from_hub(asked, revision)


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
        hf_config=_read_object(folder / "config.json"),
        processor=None if processor is None else _read_object(processor),
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
    if isinstance(content.get("classes"), list) and isinstance(content.get("config"), dict):
        source.kind = "checkpoint of vac_ddp"
        source.classes, source.config = [str(name) for name in content["classes"]], content["config"]
        source.architecture, source.metrics = content.get("architecture"), content.get("metrics")
        source.class_counts = content.get("class_counts")
    return source


def read_torch(path: Path) -> dict[str, Any]:
    """The dictionary in a PyTorch file, read with weights_only: a file with code in it is a UserError, never run."""
    _refuse_pointer(path)
    try:
        # Official checkpoints carry their arguments as a Namespace: attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds a Python object ({found[1]}) beside tensors; loading it would run code from the file, "
                "so it is not done: where you trust the file, save its bare state dict and load that"
            ) from None
        reason = re.search(r"WeightsUnpickler error: *(\S.*)", str(error))
        said = (
            reason[1]
            if reason
            else "not what torch.save writes"
            if isinstance(error, pickle.UnpicklingError)
            else _first_line(error)
        )
        raise UserError(
            f"{path} is damaged or no PyTorch file ({said.split('. ')[0]}): fetch or copy it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _refuse_pointer(path: Path) -> None:
    """A git clone without LFS leaves text files that name the weights."""
    try:
        with path.open("rb") as stream:
            start = stream.read(40)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` there, or use `hf download`")


def _tensors_of(content: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict inside its wrappers, and the names of entries that are no tensors."""
    for wrapper in ("model", "module", "state_dict", "model_state_dict"):
        if isinstance(content.get(wrapper), dict):
            return _tensors_of(content[wrapper], path)
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors, only {', '.join(map(str, list(content)[:6])) or 'nothing'}")
    return state, [str(name) for name, value in content.items() if not isinstance(value, Tensor)]


def _read_bare(path: Path) -> tuple[dict[str, Tensor], str, list[str]]:
    if path.suffix != ".safetensors":
        state, other = _tensors_of(read_torch(path), path)
        return state, files.sha256(path), other
    _refuse_pointer(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path), files.sha256(path), []
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({_first_line(error)}): fetch or copy it again"
        ) from None


def _read_sharded(index: Path) -> tuple[dict[str, Tensor], str, list[str]]:
    places = _read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
        raise UserError(f"{index} has no usable weight_map")
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


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({_first_line(error)}): fetch or copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object")
    return value


def _from_hub(hub_id: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub import errors as hub

    remedy = (
        f"where there is a network, run `hf download {hub_id} --local-dir DIR` and give model.weights=DIR; "
        "or give model.weights=null with model.size (or width, depth, heads) to train from nothing"
    )
    listed: set[str] | None = None
    cause = ""
    try:
        info = HfApi().model_info(hub_id, revision=revision, timeout=15)
        listed, revision = {file.rfilename for file in info.siblings or []}, info.sha
    except hub.HFValidationError:
        raise UserError(f"model.weights={hub_id} is no file, no directory and no hub id; {remedy}") from None
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        missing = "revision" if isinstance(error, hub.RevisionNotFoundError) else "model"
        where = f" at model.revision={revision}" if missing == "revision" else ""
        raise UserError(
            f"model.weights={hub_id}{where} is no file or directory here, and the hub has no such {missing} "
            f"(or it is private: `hf auth login`): check the name; {remedy}"
        ) from None
    except Exception as error:  # offline in one of many ways: what is in the cache will do
        cause = _first_line(error)

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
            for name in sorted(set(_read_object(weights).get("weight_map", {}).values())):
                fetch(name)
        for name in _PROCESSORS:
            fetch(name)
    except Exception as error:  # a download can fail in many ways, and all of them are the user's to know
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.weights={hub_id} cannot be downloaded ({_first_line(error)}); {remedy}") from None
    if config is None or weights is None:
        if listed is not None:
            raise UserError(
                f"model.weights={hub_id}: the hub's copy has no {'config.json' if config is None else 'weights'}"
            )
        raise UserError(
            f"model.weights={hub_id} is no file or directory here, not in the local cache, and the hub cannot be "
            f"reached ({cause}); {remedy}"
        )
    source = _from_directory(hub_id, config.parent)
    source.kind = f"Hugging Face hub, revision {config.parent.name[:12]}"
    return source


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:200]
