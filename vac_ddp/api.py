"""For programs and notebooks: a trained classifier from a run directory, and its predictions for videos.

>>> import vac_ddp
>>> model = vac_ddp.load("runs/hmdb51")
>>> for video in model.predict("clip.mp4"):
...     for name, probability in video.top:
...         print(f"{probability:.3f}  {name}")
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vac_ddp import config as settings_io
from vac_ddp.checks import check_prediction
from vac_ddp.errors import UserError, plain
from vac_ddp.models import VideoModel
from vac_ddp.models.weight_files import Source, open_own
from vac_ddp.predicting import prediction
from vac_ddp.results import averaging
from vac_ddp.results.metrics import top_classes
from vac_ddp.runtime import distributed
from vac_ddp.runtime.gpus import check_kernels, gpu_of
from vac_ddp.scoring.scorer import Scorer, open_scorer
from vac_ddp.scoring.views import set_views
from vac_ddp.settings import Config


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Raise the UserError that an error of the system stands for, as a name that no file can have."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise plain(error) from None


@dataclass(kw_only=True)
class Prediction:
    """The prediction for one video.

    top: (class, probability), the likeliest first, probabilities of all classes summing to 1; logits: (K,) float64, the
    mean over the views (predict.average=mean-probs: the logarithm of the mean probabilities); failed: no frame could be
    decoded, and the answer is how often each class was trained on; faults: what is wrong with a video file of which
    some frames decode, as one that is cut off.
    """

    name: str
    top: list[tuple[str, float]]
    logits: np.ndarray
    failed: bool
    faults: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Classifier:
    """A trained model on its device. `model` takes normalized clips (B, T, 3, H, W) and gives logits (B, K)."""

    classes: list[str]
    config: Config
    source: Source
    scorer: Scorer

    @property
    def model(self) -> VideoModel:
        """The network, in evaluation mode."""
        return self.scorer.model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.scorer.device

    @_user_errors()
    def predict(self, x: str | Path, top: int = 5, views: str | None = None, *, workers: int = 0) -> list[Prediction]:
        """Predictions for `x`: a video file or a folder of frames (one prediction), or a folder of such folders.

        top: how many classes each prediction names. views: "5x3" for 5 windows and 3 crops, "+flip" behind it for
        mirrored ones as well; default: as the run was set to. workers: loader processes; a few help with many videos.
        Writes no file. Raises `vac_ddp.errors.UserError`, in one line, where `x` is not of that kind.
        """
        config, scorer = copy.deepcopy(self.config), copy.copy(self.scorer)
        if views is not None:
            set_views(config.predict.views, views)
        check_prediction(config)
        scorer.flip, config.data.workers = config.predict.views.flip, workers
        request = prediction.Request(data=Path(x).expanduser(), config=config, source=self.source)
        with tempfile.TemporaryDirectory(prefix="vac_predict_") as scratch, contextlib.redirect_stdout(io.StringIO()):
            found, _, faults = prediction.predict_here(request, lambda: scorer, Path(scratch), quiet=True)
        scores = averaging.average_views(found.logits, method=config.predict.average)
        numbers, probabilities = top_classes(scores, top)
        return [
            Prediction(
                name=name,
                top=[
                    (self.classes[number], probability)
                    for number, probability in zip(numbers[video].tolist(), probabilities[video].tolist(), strict=True)
                ],
                logits=scores[video],
                failed=bool(found.failed[video]),
                faults=list(faults),
            )
            for video, name in enumerate(found.ids)
        ]


@_user_errors()
def load(run: str | Path, *, device: str | torch.device | None = None) -> Classifier:
    """The best weights of a run directory (or a best_<model>.pt), ready to predict.

    device: where to compute; default: the GPU if there is one. Raises `vac_ddp.errors.UserError`, in one line, where
    there is no such run or it has no best weights yet.
    """
    path = Path(run).expanduser()
    if path.is_dir() and not any(path.glob("best_*.pt")):
        raise UserError(f"{path} has no best_<model>.pt: give a run that has been validated, or that file")
    source = open_own(path)
    config = settings_io.from_dict(source.config or {}, where=str(source.path))
    where = torch.device(device) if device else distributed.pick_device()
    if where.type == "cuda":
        check_kernels(where)
    scorer = open_scorer(config, source, where, gpu_of(where))  # other ranks of the caller's program are not asked
    source.state = {}  # the model has them
    return Classifier(classes=list(source.classes or []), config=config, source=source, scorer=scorer)
