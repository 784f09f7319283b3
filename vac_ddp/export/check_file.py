"""check.json: hashes of an exported directory's files, and logits that its models must give again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from vac_ddp import files
from vac_ddp.errors import Findings, UserError
from vac_ddp.export import hugging_face, onnx_file
from vac_ddp.export.comparison import random_clips
from vac_ddp.schema import Count, FileName, Finite, Matching, Within, read_json

NAME = "check.json"
CARD = "README.md"  # its reader's to edit: neither hashed nor counted
_REMEDY = "give a directory that `vac export` wrote, or export the run again"
_LARGEST = 1 << 28  # values of the random clips

Hash = Annotated[str, Matching(pattern="[0-9a-f]{64}", meaning="a SHA-256")]
Logits = list[list[Finite]]


class Reference(TypedDict):
    """What a model gave for the random clips: logits (N, K), and how far from them they may be."""

    logits: Logits
    tolerance: Annotated[float, Within(low=0, high=1e6)]


class Check(TypedDict):
    """The content of check.json; shape: of the random clips that the logits are of (`comparison.random_clips`)."""

    files: dict[FileName, Hash]
    shape: tuple[Count, Count, Count, Count, Count]
    transformers: NotRequired[Reference]
    onnxruntime: NotRequired[Reference]


def write_check(folder: Path, shape: tuple[int, ...], references: dict[str, tuple[Tensor, float]]) -> None:
    """Write check.json. references: logits (N, K) of `random_clips(shape)` and their tolerance, by library."""
    hashes = {path.name: files.sha256(path) for path in sorted(folder.iterdir()) if path.name != CARD}
    made = {
        library: {"logits": logits.double().tolist(), "tolerance": tolerance}
        for library, (logits, tolerance) in references.items()
    }
    files.write_json(folder / NAME, {"files": hashes, "shape": list(shape), **made})


def check_directory(folder: Path) -> list[str]:
    """Lines that say what was checked: every file against its hash, every model against its logits when exported.

    Runs no code of the directory. Raises UserError where there is no check.json, and Findings where something differs.
    """
    if not (folder / NAME).is_file():
        raise UserError(f"{folder} has no {NAME}: {_REMEDY}")
    content: Check = read_json(folder / NAME, Check, remedy=_REMEDY)
    wrong = []
    for name, wanted in content["files"].items():
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif files.sha256(folder / name) != wanted:
            wrong.append(f"{name} differs from what was exported")
    if wrong:
        raise Findings(f"{folder}: {'; '.join(wrong)}; {_REMEDY}")
    lines = [f"{len(content['files'])} files are as exported"]
    if np.prod(content["shape"], dtype=np.float64) > _LARGEST:
        raise Findings(f"{folder / NAME}: clips of {content['shape']} are too large to be checked; {_REMEDY}")
    clips = random_clips(content["shape"])
    loaders: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {
        "transformers": hugging_face.load_exported,
        "onnxruntime": onnx_file.logits_of,
    }
    for library, load in loaders.items():
        if library not in content:
            continue
        reference: Reference = content[library]  # type: ignore[literal-required]
        with torch.no_grad():
            logits = load(folder)(clips)
        wanted_logits = torch.tensor(reference["logits"])
        if logits.shape != wanted_logits.shape:
            raise Findings(f"{folder}: {library} gives logits {tuple(logits.shape)}, not {tuple(wanted_logits.shape)}")
        difference = float((logits - wanted_logits).abs().max())
        if not difference <= reference["tolerance"]:
            limit = f"at most {reference['tolerance']:.2g} is rounding"
            raise Findings(
                f"{folder}: {library}'s logits differ by {difference:.2g} from those when exported ({limit})"
            )
        lines.append(f"{library}: logits of {len(clips)} random clips within {difference:.1e} of those when exported")
    return lines
