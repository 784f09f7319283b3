"""What a load did (the report), and the state that goes to files and comes back from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vac_ddp.errors import UserError
from vac_ddp.models import tensor_names
from vac_ddp.models.video_model import VideoModel
from vac_ddp.models.videomae import VideoMAE
from vac_ddp.settings import ModelSettings
from vac_ddp.text import listed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(kw_only=True)
class LoadReport:
    """Where a model's weights came from and what became of every part. Nothing is dropped in silence.

    missing: parameters of ours that the source did not have and that were drawn anew (never one of the backbone).
    unused: tensors of the source without a place here. covered: share of our parameters that were loaded, 0 to 1.
    """

    source: str
    kind: str = "from scratch"
    file: str | None = None
    sha256: str | None = None
    used: int = 0
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    covered: float = 0.0
    qv_biases: str = ""
    head: str = "drawn"
    pooling: str = ""
    positions: str = ""
    eps: str = ""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    normalisation: str = "ImageNet's"
    notes: list[str] = field(default_factory=list)

    def set_normalization(self, settings: ModelSettings, mean: Any, std: Any, origin: str) -> None:
        """Mean and std of the settings where they give any, else those of `origin`, else (None) ImageNet's."""
        if mean is None or std is None:
            mean, std, origin = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's; the source does not say"
        if settings.mean is not None or settings.std is not None:
            mean, std, origin = settings.mean or mean, settings.std or std, "of the settings"
        self.mean, self.std, self.normalisation = tuple(mean), tuple(std), origin

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def lines(self) -> list[str]:
        """The report for the log, one fact a line."""
        rows = [("weights", f"{self.source} ({self.kind})")]
        if self.file:
            rows.append(("file", f"{self.file}  sha256 {(self.sha256 or '')[:16]}"))
        if self.used:
            rows.append(("loaded", f"{self.used} tensors, {100 * self.covered:.2f} % of the parameters"))
        for title, items in (("drawn anew", self.missing), ("not used", self.unused), ("reshaped", self.reshaped)):
            if items and self.used:
                rows.append((title, some(items)))
        for title in ("qv_biases", "head", "pooling", "positions", "eps"):
            if value := getattr(self, title):
                rows.append((title.replace("qv_biases", "q, v biases"), value))
        numbers = " / ".join(" ".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        rows.append(("mean/std", f"{numbers} ({self.normalisation})"))
        rows += [("note", note) for note in self.notes]
        return [f"{title:<12} {text}" for title, text in rows]


def some(items: list[str], limit: int = 6) -> str:
    """A count and the first few of many names."""
    return f"{len(items)}: {listed(items, limit)}"


@dataclass(kw_only=True)
class Loaded:
    """A model ready to train or predict, and what its load did.

    architecture: plain types; saved beside the weights it lets `rebuild_model` build the same model again.
    replaced: settings of the model that a checkpoint says otherwise: name to (as given, as in the checkpoint).
    """

    model: VideoModel
    report: LoadReport
    replaced: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that pixels are normalized with, as a fraction of 255."""
        return self.report.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Std of each channel that pixels are normalized with, as a fraction of 255."""
        return self.report.std

    @property
    def architecture(self) -> dict[str, Any]:
        """What the checkpoint needs beside the tensors: what the model says of itself, mean and std."""
        return {**self.model.architecture(), "mean": list(self.mean), "std": list(self.std)}


def match_classes(labels: list[str] | None, count: int, classes: list[str], report: LoadReport) -> list[int] | None:
    """For each of our classes its row in a classifier of `count` classes (named `labels` if known); None: new head."""
    if labels is None:
        if count != len(classes):
            report.head = f"drawn for {len(classes)} classes: the source's has {count}"
            return None
        report.head = f"kept, {count} classes; the source does not name them, so their order is taken to be ours"
        return list(range(count))
    ours, theirs = list(classes), list(labels)
    if set(ours) != set(theirs):
        ours, theirs = [_plain(c) for c in classes], [_plain(c) for c in labels]
    if len(set(theirs)) != len(theirs) or set(ours) != set(theirs):
        same = len(set(ours) & set(theirs))
        report.head = f"drawn for {len(classes)} classes: the source's {count} are others ({same} in common)"
        return None
    report.head = f"kept, {count} classes" + ("" if ours == theirs else ", rows put into our order")
    return [theirs.index(c) for c in ours]


def _plain(label: str) -> str:
    return label.strip().lower().replace("_", " ")


def file_state(model: VideoModel) -> dict[str, Tensor]:
    """The state under the names that go to best_<model>.pt, on the CPU, sharing no memory with the model.

    VideoMAE takes the names that Hugging Face's VideoMAEForVideoClassification has in memory, so that its
    `load_state_dict` takes the file as it is; other models keep their own.
    """
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    return tensor_names.to_hf(state, model.arch) if isinstance(model, VideoMAE) else state


def load_file_state(model: VideoModel, state: dict[str, Tensor]) -> None:
    """Put the state that `file_state` gave back, bit for bit; a name or shape that does not fit is a UserError."""
    if isinstance(model, VideoMAE):
        state, lacking, _ = tensor_names.from_source(
            state, model.state_dict(), tensor_names.HF, pooling=model.arch.pooling
        )
        if lacking:
            raise UserError(f"the saved weights lack {some(lacking)}: they are of another model")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"the saved weights are of another model: {first}") from None


def generator(seed: int) -> torch.Generator:
    """The generator that new weights are drawn with; the global one is left alone."""
    return torch.Generator().manual_seed(seed)
