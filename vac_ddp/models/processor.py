"""The pre-processing beside Hugging Face weights, in our terms: mean and std of pixels, sizes of frames."""

from __future__ import annotations

from typing import Any

from vac_ddp.errors import UserError
from vac_ddp.models.weight_files import Deviations, Source, Three
from vac_ddp.schema import fault
from vac_ddp.settings import ClipSettings

_HALF = (0.5, 0.5, 0.5)


def video_processor(source: Source) -> dict[str, Any]:
    """The part of the pre-processing beside the weights that is for videos or images."""
    said = source.processor or {}
    return said.get("video_processor") or said.get("image_processor") or said


def normalization_of(source: Source | None) -> tuple[Any, Any]:
    """(mean, std) that make `(pixel / 255 - mean) / std` what the source's pre-processing makes of a pixel.

    It computes `(pixel x rescale_factor - offset - image_mean) / image_std`, each part where it is switched on. None
    twice where it does not say enough. UserError where its mean and std are not three numbers each, or no numbers.
    """
    if source is None:
        return None, None
    said, family = video_processor(source), (source.hf_config or {}).get("model_type") or ""
    vivit = _class_name(said).startswith("Vivit") if _class_name(said) else family == "vivit"
    mean, std = said.get("image_mean"), said.get("image_std")
    if vivit:  # what transformers' class adds to a file that does not say it
        mean, std = mean or _HALF, std or _HALF
    if not _flag(said, "do_normalize", not family.startswith("videoprism")):  # VideoPrism takes 0 to 1
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean is None or std is None:
        return None, None
    rescale = _flag(said, "do_rescale", True)
    factor = float(said.get("rescale_factor") or (1 / 127.5 if vivit else 1 / 255)) if rescale else 1.0
    offset = 1.0 if vivit and rescale and _flag(said, "offset", True) else 0.0
    for values, kind in ((mean, Three), (std, Deviations)):
        if problem := fault(values, kind):
            raise UserError(f"{source.path}: mean/std {mean} / {std} are not three numbers each ({problem}): "
                            "correct the preprocessor's JSON beside it")  # fmt: skip
    if abs(255 * factor - 1) > 1e-6 or offset:
        mean = [(value + offset) / (255 * factor) for value in mean]
        std = [value / (255 * factor) for value in std]
    return tuple(mean), tuple(std)


def crop_of(source: Source) -> tuple[int | None, int | None]:
    """(side of the crop, short side of the frame before it) that the source's pre-processing makes; None: not said."""
    said = video_processor(source)
    size = _side(said.get("size"))
    crop = _side(said.get("crop_size")) if _flag(said, "do_center_crop", True) else None
    return crop or size, size


def size_notes(source: Source, clip: ClipSettings) -> list[str]:
    """Lines for the load report where the source's pre-processing makes frames of another size or shape than `clip`."""
    said = video_processor(source)
    crop, size = said.get("crop_size") if _flag(said, "do_center_crop", True) else None, said.get("size")
    trained = _side(crop or size)
    if trained is None:
        return []
    if trained != clip.size:
        return [f"the source's pre-processing makes {trained} pixels, clips here have {clip.size}"]
    if crop is None and isinstance(size, dict) and "height" in size:
        return ["the source's pre-processing changes the aspect ratio of frames, here they are cropped to a square"]
    short = _side(size)
    if crop is not None and short is not None and short >= trained and short != (clip.short_side or clip.size):
        return [
            f"the source's pre-processing crops {trained} pixels of a short side of {short}: for the same in "
            f"validation and prediction set clip.short_side={short}"
        ]
    return []


def _class_name(said: dict[str, Any]) -> str:
    names = ("video_processor_type", "image_processor_type", "feature_extractor_type")
    return next((str(said[name]) for name in names if said.get(name)), "")


def _flag(said: dict[str, Any], name: str, default: bool) -> bool:
    return default if said.get(name) is None else bool(said[name])


def _side(size: Any) -> int | None:
    """The side that a size of transformers gives to a frame's short side."""
    side = size.get("shortest_edge") or size.get("height") if isinstance(size, dict) else size
    return side if isinstance(side, int) else None
