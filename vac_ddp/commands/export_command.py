"""`vac export RUN OUT`: write a run's best model for others: a Hugging Face directory, and ONNX with --onnx.

What is written is loaded again by the library it is for, and its logits are compared with ours before OUT appears:
OUT is whole or absent. What Hugging Face's class cannot represent is refused with the reason; ONNX takes it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.arguments import ArgumentParser
from vac_ddp.data.augment import normalise
from vac_ddp.data.dataset import TestViews
from vac_ddp.data.index import open_index
from vac_ddp.data.pack import is_pack, read_facts
from vac_ddp.data.scan import looks_labelled
from vac_ddp.data.split import split_rows
from vac_ddp.errors import UserError
from vac_ddp.export.model_card import Card, write_card
from vac_ddp.models import file_state, load_model
from vac_ddp.models.load_report import Loaded
from vac_ddp.models.weight_files import Source, open_own
from vac_ddp.settings import Config, ViewSettings
from vac_ddp.version import VERSION

ABOUT = (
    "Write a run's best model so that others can load it: a Hugging Face directory, with --onnx an ONNX file as well."
)
# Largest difference of logits, relative to the largest of them: float32 rounding over some dozen layers.
TOLERANCE = 1e-4
REAL_VIDEOS = 4
HF_HEAD_EPS = 1e-5  # fixed in transformers' VideoMAEForVideoClassification

Probe = tuple[str, Tensor]  # what the clips are, and the clips (B, T, 3, H, W), normalised


def main(argv: list[str] | None = None) -> int:
    """Export and print what was written and compared; UserError for what cannot be."""
    parser = ArgumentParser(prog="vac export", description=ABOUT)
    parser.add_argument("run", help="run directory, or its best_<model>.pt")
    parser.add_argument("out", help="directory to write; must not exist")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx as well, or alone where HF has no class")
    parser.add_argument("--data", metavar="DIR", help="videos to compare on; default: the run's own")
    options = parser.parse_args(argv)
    for line in export(Path(options.run), Path(options.out), onnx=options.onnx, data=options.data):
        print(line)
    return 0


def export(run: Path, out: Path, *, onnx: bool = False, data: str | None = None) -> list[str]:
    """Write OUT and return lines that say what is in it and how it was compared.

    data: folder of videos for the comparison on real clips; default: the run's own, if they are still there.
    """
    if out.exists():
        raise UserError(f"{out} exists: give another directory, or remove it")
    source = open_own(run)
    config = settings_io.from_dict(source.config or {}, where=str(source.path))
    classes = list(source.classes or [])
    wanted = dataclasses.replace(config.model, weights=str(source.path))
    loaded = load_model(wanted, config.clip, classes, seed=config.seed)
    if loaded.report.missing:
        raise UserError(f"{source.path} lacks {', '.join(loaded.report.missing[:4])}: it cannot be exported")
    model = loaded.model.eval()
    reason = why_not_hf(model)
    if reason and not onnx:
        raise UserError(f"transformers cannot represent this model: {reason}; --onnx writes it as an ONNX file")
    probes, notes = _probes(config, loaded, data)
    with files.whole_folder(out) as folder:
        compared = []
        if reason is None:
            _write_hf(folder, model, config, loaded, classes)
            loaded_again = hf_logits(folder, model)
            compared += compare(_with_hf_eps(model), loaded_again, probes, what="transformers")
            compared += _eps_difference(model, loaded_again, probes)
        if onnx:
            _write_onnx(folder, model, probes[0][1], classes)
            compared += compare(model, onnx_logits(folder), probes, what="onnxruntime")
        card = _card(run, source, config, loaded, hf=reason is None, onnx=onnx, compared=compared + notes)
        files.write_text(folder / "README.md", write_card(card))
        names = sorted(path.name for path in folder.iterdir())
    lines = [f"{out}: {', '.join(names)}", *compared, *notes]
    if reason:
        lines.append(f"no Hugging Face model: {reason}")
    return lines


def why_not_hf(model: nn.Module) -> str | None:
    """Why transformers has no class for this model, or None."""
    from vac_ddp.models.videomae import VideoMAE

    if not isinstance(model, VideoMAE):
        kind = type(model).__name__
        return None if kind == "HFClassifier" else f"it has no class for {kind}"
    arch = model.arch
    if len(arch.grids) > 1:
        steps = " to ".join("x".join(map(str, grid)) for grid in arch.grids)
        return f"its VideoMAE makes the position table anew, it cannot be interpolated ({steps})"
    if arch.image[0] != arch.image[1]:
        return f"clips of {arch.image[0]} x {arch.image[1]} pixels are not square"
    return None


def _write_hf(folder: Path, model: nn.Module, config: Config, loaded: Loaded, classes: list[str]) -> None:
    """Weights, config and pre-processing, as transformers writes them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    labels = dict(enumerate(classes))
    net = _videomae_net(model, labels) if hasattr(model, "arch") else model.net
    net.config.id2label, net.config.label2id = labels, {name: i for i, name in labels.items()}
    net.save_pretrained(folder)
    for processor in _processors(net, config, loaded):
        processor.save_pretrained(folder)


def _videomae_net(model: nn.Module, labels: dict[int, str]) -> nn.Module:
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
    net = VideoMAEForVideoClassification(settings)
    net.load_state_dict(file_state(model))
    return net


def _processors(net: nn.Module, config: Config, loaded: Loaded) -> Iterator[Any]:
    """What makes pixels into input: an image processor and, for newer versions, a video processor."""
    import transformers

    size = config.clip.size
    values = {
        "size": {"shortest_edge": config.clip.short_side or size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(loaded.mean),
        "image_std": list(loaded.std),
        "resample": 2,  # bilinear
    }
    if net.main_input_name == "pixel_values_videos":
        # This class derives the short side from the crop and takes no other one.
        yield transformers.VJEPA2VideoProcessor(**values)
        return
    yield transformers.VideoMAEImageProcessor(**values)
    if hasattr(transformers, "VideoMAEVideoProcessor"):
        yield transformers.VideoMAEVideoProcessor(**values)


def _write_onnx(folder: Path, model: nn.Module, clips: Tensor, classes: list[str]) -> None:
    """model.onnx with the input `clips` (N, T, 3, H, W) and the output `logits` (N, K), any N."""
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it, and says so only in a traceback
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: pip install 'vac_ddp[export]'") from error
    torch.onnx.export(
        model,
        (clips[:2],),
        folder / "model.onnx",
        input_names=["clips"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    files.write_json(folder / "classes.json", classes)


# ---------------------------------------------------------------- comparing


def hf_logits(folder: Path, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from clips to the logits of what transformers loads from `folder`; its weights must be ours, bit
    for bit.
    """
    from transformers import AutoModelForVideoClassification

    net = AutoModelForVideoClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ours = file_state(model) if hasattr(model, "arch") else model.net.state_dict()
    theirs = net.state_dict()
    other = [name for name in ours.keys() | theirs.keys() if name not in ours or name not in theirs]
    other += [name for name in ours if name in theirs and not torch.equal(ours[name], theirs[name])]
    if other:
        raise RuntimeError(f"transformers reads other weights than were written: {', '.join(sorted(other)[:4])}")
    return lambda clips: net(**{net.main_input_name: clips}).logits


def onnx_logits(folder: Path) -> Callable[[Tensor], Tensor]:
    """A function from clips to the logits of model.onnx in `folder`, by onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: pip install 'vac_ddp[export]'") from error
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])


@torch.no_grad()
def compare(model: nn.Module, other: Callable[[Tensor], Tensor], probes: list[Probe], *, what: str) -> list[str]:
    """One line a probe with the largest difference of logits; RuntimeError above `TOLERANCE`."""
    lines = []
    for name, clips in probes:
        ours, theirs = model(clips), other(clips)
        limit = TOLERANCE * max(0.01, float(ours.abs().max()))
        difference = float((ours - theirs).abs().max())
        if not difference <= limit:
            raise RuntimeError(f"{what}'s logits differ by {difference:.3g} on {name}, at most {limit:.3g} is rounding")
        lines.append(f"{what}: logits within {difference:.1e} of ours on {name}")
    return lines


def _other_eps(model: nn.Module) -> bool:
    arch = getattr(model, "arch", None)
    return arch is not None and arch.pooling == "mean" and arch.head_eps != HF_HEAD_EPS


def _with_hf_eps(model: nn.Module) -> nn.Module:
    """The model with the epsilon that transformers' class has before the classifier, and no setting for."""
    if not _other_eps(model):
        return model
    twin = copy.deepcopy(model)
    twin.fc_norm.eps = HF_HEAD_EPS
    return twin


@torch.no_grad()
def _eps_difference(model: nn.Module, other: Callable[[Tensor], Tensor], probes: list[Probe]) -> list[str]:
    """What that epsilon changes: the largest difference of logits, one line a probe; none where it is the model's."""
    if not _other_eps(model):
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


def _probes(config: Config, loaded: Loaded, data: str | None) -> tuple[list[Probe], list[str]]:
    """Random clips, and clips of some videos where there are any; and what to say where there are none."""
    clip = config.clip
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, clip.frames, 3, clip.size, clip.size, generator=generator)
    probes = [("2 random clips", random)]
    root = Path(data or config.data.val or config.data.train)
    if data is not None and not root.exists():
        raise UserError(f"--data {data}: no such directory")
    try:
        clips = _real_clips(root, config)
    except UserError as error:
        if data is not None:
            raise
        return probes, [f"not compared on real clips: {error}"]
    mean, std = tuple(loaded.mean), tuple(loaded.std)
    probes.append((f"{len(clips)} real clips", normalise(clips, mean, std, torch.float32)))
    return probes, []


def _real_clips(root: Path, config: Config) -> Tensor:
    """Clips (N, T, S, S, 3) uint8 of up to REAL_VIDEOS videos, spread over the index of `root`."""
    if not root.exists():
        raise UserError(f"{root.name} is not here (--data DIR names another)")
    labelled = bool(read_facts(root)["labelled"]) if is_pack(root) else looks_labelled(root)
    index = open_index(root, labelled=labelled, settings=config.data)
    good = np.flatnonzero(index.frame_counts > 0)
    if not len(good):
        raise UserError(f"{root.name} has no video with frames")
    videos = good[np.linspace(0, len(good) - 1, min(REAL_VIDEOS, len(good))).astype(int)]
    views = TestViews(index, videos, config.clip, ViewSettings(windows="spread", count=1), tolerant=True)
    batch = views.__getitems__(range(len(videos)))
    return batch.clips.flatten(0, 1)


# ---------------------------------------------------------------- files


def _card(
    run: Path, source: Source, config: Config, loaded: Loaded, *, hf: bool, onnx: bool, compared: list[str]
) -> Card:
    split = (run if run.is_dir() else source.path.parent) / "split.csv"
    parts: Counter[str] = Counter()
    if split.exists():
        parts.update(part for *_, part in split_rows(split))
    versions = {"vac_ddp": VERSION, "torch": torch.__version__}
    for name in ("transformers",) * hf + ("onnxruntime",) * onnx:
        versions[name] = __import__(name).__version__
    return Card(
        config=config,
        classes=list(source.classes or []),
        metrics=source.metrics or {},
        parts={part: parts[part] for part in ("train", "val", "unused")} if parts else {},
        mean=loaded.mean,
        std=loaded.std,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        hf=hf,
        onnx=onnx,
        compared=compared,
        versions=versions,
    )
