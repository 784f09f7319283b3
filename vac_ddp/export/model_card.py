"""The README.md of an exported model, filled from the run. Pure text, nothing is read or written here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vac_ddp import config as settings_io
from vac_ddp.errors import UserError
from vac_ddp.export.card_code import card_code
from vac_ddp.models.foreign import HUB_ID
from vac_ddp.settings import Config
from vac_ddp.text import listed

UNKNOWN = "unknown"  # the hub's name of a licence that is not stated
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_FIGURES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_class": "mean accuracy over classes",
    "loss": "cross-entropy",
    "calibration_error": "calibration error",
}
_RECIPE = ("clip", "augment", "model", "optim", "train", "val")
_USE = ("clip", "model", "predict")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card says: facts of the run, and what the export wrote and compared.

    parts: videos by part of the split ("train", "val", "unused"); empty where the split is not known. hf_input: which
    argument of transformers' class takes the clips; None: there is no such class. repo: hub id that the code loads
    from; None: the card's folder. compared: one line per comparison of logits. versions: name to version.
    """

    config: Config
    classes: list[str]
    metrics: dict[str, float]
    parts: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parameters: int
    hf_input: str | None
    onnx: bool
    license: str = UNKNOWN
    repo: str | None = None
    compared: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def check_license(name: str) -> None:
    """UserError for what cannot be an identifier of a licence on the hub."""
    if not _LICENSE.fullmatch(name):
        raise UserError(
            f"--license {name}: expected an identifier of the hub, such as apache-2.0, cc-by-nc-4.0 or other"
        )


def write_card(card: Card) -> str:
    """The model card as Markdown with the YAML head that the hub reads."""
    sections = [_head(card), _summary(card), _results(card), _data(card), _recipe(card), _use(card), _compared(card)]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _head(card: Card) -> str:
    model = card.config.model
    lines = ["---", f"license: {card.license}", "pipeline_tag: video-classification"]
    if card.hf_input:
        lines.append("library_name: transformers")
    lines += ["tags:", "- video-classification", f"- {model.name}", "- vac_ddp"]
    if model.weights and HUB_ID.fullmatch(model.weights) and not Path(model.weights).exists():
        lines.append(f"base_model: {model.weights}")
    return "\n".join([*lines, "metrics:", "- accuracy", "---"])


def _summary(card: Card) -> str:
    config = card.config
    name = f"{config.model.name} for {len(card.classes)} classes of videos"
    began = _origin(config.model.weights)
    return (
        f"# {name}\n\n"
        f"A {config.model.name} with {card.parameters:,} parameters that predicts the class of a video "
        f"from {config.clip.frames} of its frames at {config.clip.size} x {config.clip.size} pixels. {began} "
        "Trained with vac_ddp."
    )


def _origin(weights: str | None) -> str:
    if weights is None:
        return "It was trained from scratch."
    if HUB_ID.fullmatch(weights) and not Path(weights).exists():
        return f"It was fine-tuned from `{weights}`, whose licence applies to it as well."
    return f"It was fine-tuned from weights in `{Path(weights).name}`."


def _results(card: Card) -> str:
    if not card.metrics:
        return "## Results\n\nThe run had no validation part: nothing was measured."
    count = f"{card.parts['val']} validation videos" if card.parts.get("val") else "the validation videos"
    rows = [
        f"| {_FIGURES.get(name, name)} | {value:.4f} |"
        for name, value in card.metrics.items()
        if isinstance(value, int | float)
    ]
    views = card.config.val
    how = (
        f"{views.count} clip{'s' * (views.count != 1)} a video"
        if views.windows != "offsets"
        else "clips at " + ", ".join(str(offset) for offset in views.offsets)
    )
    crops = f", {views.crops} crops" if views.crops > 1 else ""
    return "\n".join(
        ["## Results", "", f"On {count}, each scored once ({how}{crops}):", "", "| | |", "|---|---|", *rows]
    )


def _data(card: Card) -> str:
    data = card.config.data
    counts = ", ".join(f"{count} {part}" for part, count in card.parts.items() if count)
    if data.official_lists:
        split = f"the official lists, split {data.official_split}"
    elif data.val:
        split = f"validation on `{Path(data.val).name}`"
    elif data.fold:
        split = f"fold {data.fold}, videos of one source on one side (sources by {data.group_by})"
    elif data.val_fraction == 0:
        split = "none, all videos train"
    else:
        split = f"{data.val_fraction:.0%} held out, videos of one source on one side (sources by {data.group_by})"
    lines = ["## Data", "", f"- Videos: `{Path(data.train).name}`" + (f" ({counts})" if counts else "")]
    lines += [
        f"- Split: {split}, seed {card.config.seed}",
        f"- Classes ({len(card.classes)}): {listed([f'`{name}`' for name in card.classes], 120)}",
    ]
    return "\n".join(lines)


def _recipe(card: Card) -> str:
    text = _as_yaml({"seed": card.config.seed} | _groups(card.config, _RECIPE))
    return f"## Recipe\n\nAll settings that shape the weights:\n\n```yaml\n{text}```"


def settings_to_use(config: Config) -> str:
    """The settings that turn a video into the model's answer, as YAML: clips, model, views; without paths."""
    data = {name: getattr(config.data, name) for name in ("reduced_decode", "cache_format", "video_short_side")}
    return _as_yaml(_groups(config, _USE) | {"data": data, "train": {"precision": config.train.precision}})


def _groups(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Groups of settings as plain values; of the path of weights the last part."""
    values = settings_io.to_dict(config)
    groups = {name: values[name] for name in names}
    weights = groups["model"]["weights"]
    if weights and not HUB_ID.fullmatch(weights):
        groups["model"]["weights"] = Path(weights).name
    return groups


def _as_yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _use(card: Card) -> str:
    clip = card.config.clip
    short = clip.short_side or clip.size
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (card.mean, card.std))
    step = f"every {clip.stride}. frame" if clip.sampling == "dense" and clip.stride > 1 else "neighbouring frames"
    frames = step if clip.sampling == "dense" else "one frame of each of as many equal segments of the video"
    text = [
        "## Use",
        f"Input: {clip.frames} frames ({frames}), resized to a short side of {short} pixels (bilinear, antialiased), "
        f"the middle {clip.size} x {clip.size} of it, divided by 255, normalized with mean {mean} and std {std}.",
        "The code below chooses and prepares frames as the run did, averages over its views, and prints the most "
        "probable classes of video files and of folders of frames. Save it in the folder of this card as `classify.py`:"
        "\n\n    python classify.py clip.mp4 folder_of_frames",
    ]
    normalization = (card.mean, card.std)
    for library in ["torch transformers"] * bool(card.hf_input) + ["onnxruntime"] * card.onnx:
        argument = None if library == "onnxruntime" else card.hf_input
        code = card_code(clip, card.config.predict, normalization, argument=argument, repo=card.repo)
        needs = f"pip install numpy pillow {library}{' huggingface_hub' * bool(card.repo)}"
        text.append(f"By {library.split()[-1]} (`{needs}`, and `av` for video files):\n\n```python\n{code}\n```")
    return "\n\n".join(text)


def _compared(card: Card) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    lines = ["## Checked when exported", "", *(f"- {line}" for line in card.compared), f"- Versions: {versions}"]
    return "\n".join(lines)
