"""What the Python API returns: predictions and features of videos, as small typed objects. numpy alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from vac_ddp.errors import UserError

if TYPE_CHECKING:
    import pandas

_Item = TypeVar("_Item")


class ClassProbability(NamedTuple):
    """A class and its probability; unpacks as the pair (label, probability)."""

    label: str
    probability: float


@dataclass(kw_only=True, repr=False, eq=False)
class Prediction:
    """The prediction for one video.

    name: of its file or folder, as in the submission. top: the most probable classes, the best first; the probabilities
    of all classes sum to 1. logits: (K,) float32, the mean over the views (predict.average=mean-probs: the logarithm of
    the mean probabilities). failed: no frame could be decoded, and the answer is how often each class was trained on.
    faults: what is wrong with the video, one line each: a file that is cut off, damaged frames.
    """

    name: str
    top: list[ClassProbability]
    logits: np.ndarray
    failed: bool = False
    faults: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.top[0].label

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return self.top[0].probability

    def __repr__(self) -> str:
        failed = ", failed=True" if self.failed else ""
        return f"Prediction(name={self.name!r}, label={self.label!r}, probability={self.probability:.4f}{failed})"

    def to_dict(self) -> dict[str, Any]:
        """All but the logits in plain types, for JSON."""
        return {
            "name": self.name,
            "label": self.label,
            "probability": self.probability,
            "top": [pair._asdict() for pair in self.top],
            "failed": self.failed,
            "faults": list(self.faults),
        }


@dataclass(kw_only=True, repr=False, eq=False)
class Embedding:
    """The encoder's features of one video.

    pooled: (n, D) float32 of its n views, the mean over time steps. steps: (n, T', D), where they were asked for.
    failed: no frame could be decoded, and the features are zeros. name, faults: as of a `Prediction`.
    """

    name: str
    pooled: np.ndarray
    steps: np.ndarray | None = None
    failed: bool = False
    faults: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        views, width = self.pooled.shape
        failed = ", failed=True" if self.failed else ""
        return f"Embedding(name={self.name!r}, {views} view{'s' * (views != 1)} of {width} features{failed})"


class _Answers(list[_Item]):
    """A list, with what is to be known about the data: files that are not frames, videos without frames."""

    def __init__(self, items: Iterable[_Item] = (), *, notes: Iterable[str] = ()) -> None:
        super().__init__(items)
        self.notes = list(notes)


class Predictions(_Answers[Prediction]):
    """Predictions in the order of the videos: a list. notes: lines about the data, as files that are not frames."""

    def to_dict(self) -> list[dict[str, Any]]:
        """All but the logits in plain types, for JSON: `Prediction.to_dict` of each."""
        return [video.to_dict() for video in self]

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame with a row per video: name, label, probability, failed. Raises UserError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise UserError(f"to_pandas needs pandas: pip install pandas ({error})") from error
        columns = ("name", "label", "probability", "failed")
        return pandas.DataFrame({column: [getattr(video, column) for video in self] for column in columns})


class Embeddings(_Answers[Embedding]):
    """Features in the order of the videos: a list. notes: lines about the data, as files that are not frames."""

    def numpy(self) -> np.ndarray:
        """The pooled features of all videos, (V, n, D) float32."""
        return np.stack([video.pooled for video in self])
