"""Write a run's best model for others: a Hugging Face directory, or an ONNX file, or both.

What is written is loaded again by the library it is for, and its logits are compared with ours before OUT appears:
OUT is whole or absent. What Hugging Face's class cannot represent is refused with the reason; ONNX takes it.
"""

from __future__ import annotations

import dataclasses
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.data.split import split_rows
from vac_ddp.errors import UserError
from vac_ddp.export import hugging_face, onnx_file
from vac_ddp.export.check_file import CARD, write_check
from vac_ddp.export.comparison import HALF_TOLERANCE, TOLERANCE, Probe, compare, limit_of, make_probes
from vac_ddp.export.model_card import UNKNOWN, Card, check_license, settings_to_use, write_card
from vac_ddp.models import load_model
from vac_ddp.models.foreign import SETTINGS
from vac_ddp.models.load_report import Loaded
from vac_ddp.models.weight_files import Source, open_own
from vac_ddp.settings import Config
from vac_ddp.version import VERSION


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is written beside the Hugging Face model, and what the card says.

    onnx: model.onnx as well, or alone where transformers has no class; half: with float16 inside. data: folder of
    videos for the comparison on real clips; default: the run's own, if they are still there. license: identifier of
    the hub, such as apache-2.0. repo: the hub's id that the card's code loads from; default: its own folder.
    """

    onnx: bool = False
    half: bool = False
    data: str | None = None
    license: str = UNKNOWN
    repo: str | None = None


def export(run: Path, out: Path, options: Options | None = None) -> list[str]:
    """Write OUT and return lines that say what is in it and how it was compared."""
    options = options or Options()
    check_license(options.license)
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
    reason = hugging_face.why_not(model)
    if reason and not options.onnx:
        raise UserError(f"transformers cannot represent this model: {reason}; --onnx writes it as an ONNX file")
    probes, notes = make_probes(config, loaded, options.data)
    with files.whole_folder(out) as folder:
        compared, references = [], {}
        if reason is None:
            hugging_face.write_model(folder, model, config, loaded, classes)
            again = hugging_face.logits_of(folder, model)
            twin = hugging_face.with_hf_eps(model)
            compared += compare(twin, again, probes, what="transformers")
            compared += hugging_face.eps_difference(model, again, probes)
            references["transformers"] = _reference(twin, probes, TOLERANCE)
        if options.onnx:
            notes += onnx_file.write_model(folder, model, probes[0][1], classes, half=options.half)
            tolerance = HALF_TOLERANCE if options.half else TOLERANCE
            compared += compare(model, onnx_file.logits_of(folder), probes, what="onnxruntime", tolerance=tolerance)
            references["onnxruntime"] = _reference(model, probes, tolerance)
        card = _card(run, source, config, loaded, options, compared + notes)
        files.write_text(folder / SETTINGS, settings_to_use(config))
        write_check(folder, tuple(probes[0][1].shape), references)
        files.write_text(folder / CARD, write_card(card))
        _make_readable(folder)
        names = sorted(path.name for path in folder.iterdir())
    lines = [f"{out}: {', '.join(names)}", *compared, *notes]
    if reason:
        lines.append(f"no Hugging Face model: {reason}")
    if options.license == UNKNOWN:
        lines.append("the card states no licence: --license ID, such as apache-2.0")
    return lines


@torch.no_grad()
def _reference(model: nn.Module, probes: list[Probe], tolerance: float) -> tuple[Tensor, float]:
    """Logits of the random clips, and how far from them a later version may be."""
    logits = model(probes[0][1])
    return logits, limit_of(logits, tolerance)


def _make_readable(folder: Path) -> None:
    """Give all files the mode that the user's umask gives a new file: some libraries write for the owner alone."""
    mode = stat.S_IMODE((folder / CARD).stat().st_mode)
    for path in folder.iterdir():
        path.chmod(mode)


def _card(run: Path, source: Source, config: Config, loaded: Loaded, options: Options, compared: list[str]) -> Card:
    model = loaded.model
    hf = hugging_face.why_not(model) is None
    split = (run if run.is_dir() else source.path.parent) / "split.csv"
    parts: Counter[str] = Counter()
    if split.exists():
        parts.update(part for *_, part in split_rows(split))
    versions = {"vac_ddp": VERSION, "torch": torch.__version__}
    for name in ("transformers",) * hf + ("onnxruntime",) * options.onnx:
        versions[name] = __import__(name).__version__
    return Card(
        config=config,
        classes=list(source.classes or []),
        metrics=source.metrics or {},
        parts={part: parts[part] for part in ("train", "val", "unused")} if parts else {},
        mean=loaded.mean,
        std=loaded.std,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        hf_input=hugging_face.input_name(model) if hf else None,
        onnx=options.onnx,
        license=options.license,
        repo=options.repo,
        compared=compared,
        versions=versions,
    )
