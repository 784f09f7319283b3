"""Write a run's best model for others: a Hugging Face directory, or an ONNX file, or both.

What is written is loaded again by the library it is for, and its logits are compared with ours before OUT appears:
OUT is whole or absent. What Hugging Face's class cannot represent is refused with the reason; ONNX takes it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import torch

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.data.split import split_rows
from vac_ddp.errors import UserError
from vac_ddp.export import hugging_face, onnx_file
from vac_ddp.export.comparison import compare, make_probes
from vac_ddp.export.model_card import Card, settings_to_use, write_card
from vac_ddp.models import load_model
from vac_ddp.models.load_report import Loaded
from vac_ddp.models.weight_files import Source, open_own
from vac_ddp.settings import Config
from vac_ddp.version import VERSION

SETTINGS = "vac_ddp.yaml"  # how videos become clips and views, for `vac_ddp.load` and whoever prepares clips


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
    reason = hugging_face.why_not(model)
    if reason and not onnx:
        raise UserError(f"transformers cannot represent this model: {reason}; --onnx writes it as an ONNX file")
    probes, notes = make_probes(config, loaded, data)
    with files.whole_folder(out) as folder:
        compared = []
        if reason is None:
            hugging_face.write_model(folder, model, config, loaded, classes)
            loaded_again = hugging_face.logits_of(folder, model)
            compared += compare(hugging_face.with_hf_eps(model), loaded_again, probes, what="transformers")
            compared += hugging_face.eps_difference(model, loaded_again, probes)
        if onnx:
            onnx_file.write_model(folder, model, probes[0][1], classes)
            compared += compare(model, onnx_file.logits_of(folder), probes, what="onnxruntime")
        card = _card(run, source, config, loaded, hf=reason is None, onnx=onnx, compared=compared + notes)
        files.write_text(folder / SETTINGS, settings_to_use(config))
        files.write_text(folder / "README.md", write_card(card))
        names = sorted(path.name for path in folder.iterdir())
    lines = [f"{out}: {', '.join(names)}", *compared, *notes]
    if reason:
        lines.append(f"no Hugging Face model: {reason}")
    return lines


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
