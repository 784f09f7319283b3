"""For programs and notebooks: a trained classifier, and its predictions for videos in any form.

>>> import vac_ddp
>>> model = vac_ddp.load("runs/hmdb51")
>>> for video in model.predict("clip.mp4"):
...     print(video.label, video.probability)
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vac_ddp import config as settings_io
from vac_ddp.checks import OF_A_RUN, check_prediction
from vac_ddp.data.clip_sampling import window_count
from vac_ddp.data.given import Given, open_given
from vac_ddp.errors import UserError, plain
from vac_ddp.models import VideoModel
from vac_ddp.models.foreign import HUB_ID, SETTINGS, open_foreign
from vac_ddp.models.weight_files import Source, open_own
from vac_ddp.predicting.direct import Answer, answers
from vac_ddp.results import averaging
from vac_ddp.results.answers import ClassProbability, Embedding, Embeddings, Prediction, Predictions
from vac_ddp.results.logits_file import log_prior
from vac_ddp.results.metrics import top_classes
from vac_ddp.runtime import distributed
from vac_ddp.runtime.gpus import check_kernels, gpu_of
from vac_ddp.scoring.scorer import Scorer, open_scorer
from vac_ddp.scoring.views import set_views, view_table
from vac_ddp.settings import Config
from vac_ddp.text import printable

__all__ = ["ClassProbability", "Classifier", "Embedding", "Embeddings", "Prediction", "Predictions", "load"]

Video: TypeAlias = "str | os.PathLike[str] | np.ndarray | Tensor | Sequence[Image.Image]"


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Raise the UserError that an error of the system stands for, as a name that no file can have."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise plain(error) from None


@dataclass(kw_only=True, repr=False)
class Classifier:
    """A trained model on its device, made by `vac_ddp.load`. Several threads may use it at once.

    classes: names in the order of the logits. config: settings of the run; `config.clip` says what a clip is,
    `config.predict` which views of a video are averaged.
    """

    classes: list[str]
    config: Config
    source: Source
    scorer: Scorer

    def __repr__(self) -> str:
        clip, model = self.config.clip, self.config.model
        name = model.name if model.name != "probe" else f"probe on {model.encoder}"
        return (
            f"<Classifier {self.source.asked!r}: {name}, {len(self.classes)} classes, clips of {clip.frames} x "
            f"{clip.size} x {clip.size}, on {self.device}>"
        )

    @property
    def model(self) -> VideoModel:
        """The network (a torch module), in evaluation mode."""
        return self.scorer.model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.scorer.device

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that clips are normalized with, as a fraction of 255."""
        return self.scorer.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that clips are normalized with, as a fraction of 255."""
        return self.scorer.std

    @_user_errors()
    def __call__(self, clips: Tensor) -> Tensor:
        """Logits (B, K) float32 of normalized clips (B, T, 3, H, W), which are (pixel / 255 - mean) / std.

        On the model's device; no gradients, in the precision of a prediction; `model(clips)` is the bare network.
        """
        clip = self.config.clip
        wanted = (clip.frames, 3, clip.size, clip.size)
        if not isinstance(clips, Tensor) or not clips.is_floating_point():
            kind = str(clips.dtype) if isinstance(clips, Tensor) else type(clips).__name__
            raise UserError(f"clips are {kind}: expected normalized floats in a torch tensor (pixels go to `predict`)")
        if clips.ndim != 5 or clips.shape[1:] != wanted:
            raise UserError(
                f"clips have shape {tuple(clips.shape)}: expected (B, T, C, H, W) = (B, {', '.join(map(str, wanted))})"
            )
        return self.scorer.pass_of(clips.to(self.device, torch.float32))

    @_user_errors()
    def predict(
        self, x: Video | Sequence[Video], top: int = 5, views: str | None = None, *, workers: int = 0
    ) -> Predictions:
        """Predict the class of one or more videos: one `Prediction` each, in a list.

        x: a video file, a folder of frames, a numpy array (T, H, W, 3) uint8, a torch tensor (T, 3, H, W) uint8, a list
        of PIL images, or a list of these; a folder of videos, a packed set or a CSV stands for all its videos.
        top: how many classes each prediction names. views: "5x3" for 5 windows and 3 crops, "+flip" behind it for
        mirrored ones as well; default: as the run was set to. workers: loader processes; a few help with many videos.
        Writes no file. Raises `vac_ddp.errors.UserError`, in one line, where `x` is none of these.
        """
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise UserError(f"top={top}: expected a number of classes from 1")
        config, scorer, given = self._ready(x, views)
        prior = log_prior(self.source.class_counts, len(self.classes))[None]
        return Predictions(
            [
                self._prediction(answer, prior if answer.outputs is None else answer.outputs, config, top)
                for answer in answers(given, scorer, config, workers=workers)
            ],
            notes=given.notes,
        )

    @_user_errors()
    def embed(
        self, x: Video | Sequence[Video], views: str | None = None, *, steps: bool = False, workers: int = 0
    ) -> Embeddings:
        """Compute the features of one or more videos: one `Embedding` each, in a list.

        They are those of the encoder below the classifier, as `vac embed` writes them. x, views, workers: as for
        `predict`. steps: those of each time step as well, not only their mean. The list's `numpy()` has all in one
        array.
        """
        if self.model.eval_tokens is not None:
            raise UserError(
                f"predict.keep_tokens={self.config.predict.keep_tokens}: features are of all tokens; load the model "
                "with predict.keep_tokens=1"
            )
        config, scorer, given = self._ready(x, views)
        scorer.steps = True
        shape = (len(view_table(config.predict.views, window_count(config.predict.views))), *self.model.step_shape)
        found = []
        for answer in answers(given, scorer, config, workers=workers):
            features = np.zeros(shape, np.float32) if answer.outputs is None else answer.outputs
            found.append(
                Embedding(
                    name=answer.name,
                    pooled=features.mean(axis=1),
                    steps=features if steps else None,
                    failed=answer.outputs is None,
                    faults=answer.faults,
                )
            )
        return Embeddings(found, notes=given.notes)

    def _ready(self, x: Any, views: str | None) -> tuple[Config, Scorer, Given]:
        """Settings and scorer of one call, which other threads do not see, and the videos of `x`."""
        config, scorer = copy.deepcopy(self.config), copy.copy(self.scorer)
        if views is not None:
            set_views(config.predict.views, str(views))
        check_prediction(config)
        scorer.flip = config.predict.views.flip
        return config, scorer, open_given(x, config, self.classes)

    def _prediction(self, answer: Answer, logits: np.ndarray, config: Config, top: int) -> Prediction:
        scores = averaging.average_views(logits[None], method=config.predict.average)
        numbers, probabilities = (rows[0].tolist() for rows in top_classes(scores, top))
        return Prediction(
            name=answer.name,
            top=[ClassProbability(self.classes[n], p) for n, p in zip(numbers, probabilities, strict=True)],
            logits=scores[0].astype(np.float32),
            failed=answer.outputs is None,
            faults=answer.faults,
        )


@_user_errors()
def load(run: str | os.PathLike[str], *settings: str, device: str | torch.device | None = None) -> Classifier:
    """Load a trained classifier, ready to predict.

    run: a run directory (its best weights) or a best_<model>.pt; a directory that `vac export` wrote; or the id of a
    video classifier on the Hugging Face hub (weights as safetensors), such as
    "MCG-NJU/videomae-base-finetuned-kinetics", which is downloaded, or taken from the local cache where there is no
    network. settings: changes as `vac predict` takes them, such as "clip.stride=4". device: where to compute; default:
    the GPU if there is one. Raises `vac_ddp.errors.UserError`, in one line, where there is no such run, or it has no
    best weights yet.
    """
    source, config = _open(run)
    for text in settings:
        settings_io.override(config, text)
        if not text.startswith(OF_A_RUN):
            raise UserError(
                f"{text}: a model that is loaded has its own setting; this can change {', '.join(OF_A_RUN)}"
            )
    check_prediction(config)
    where = torch.device(device) if device else distributed.pick_device()
    if where.type == "cuda":
        check_kernels(where)
    scorer = open_scorer(config, source, where, gpu_of(where))  # other ranks of the caller's program are not asked
    source.state = {}  # the model has them
    return Classifier(
        classes=[printable(name) for name in source.classes or []], config=config, source=source, scorer=scorer
    )


def _open(run: str | os.PathLike[str]) -> tuple[Source, Config]:
    """Weights, classes and settings of what `load` takes."""
    path = Path(run).expanduser()
    own = path.is_dir() and any(path.glob("best_*.pt"))
    hub = isinstance(run, str) and not path.exists() and HUB_ID.fullmatch(run)
    if hub or (not own and (path / "config.json").is_file()):
        return open_foreign(str(run))
    if path.is_dir() and not own:
        if (path / SETTINGS).exists():
            raise UserError(f"{path} has an ONNX model alone (no config.json): load the run that it was exported from")
        raise UserError(f"{path} has no best_<model>.pt: give a run that has been validated, or that file")
    source = open_own(path)
    return source, settings_io.from_dict(source.config or {}, where=str(source.path))
