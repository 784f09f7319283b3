"""For programs and notebooks: a trained classifier from a run directory, and what it says about videos.

>>> from vac_ddp import load, predict
>>> model = load("runs/hmdb51")
>>> for video in predict(model, "clip.mp4"):
...     for name, share in video.top:
...         print(f"{share:.3f}  {name}")
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
from vac_ddp.results.logits_file import read_views
from vac_ddp.results.metrics import log_softmax
from vac_ddp.runtime import distributed
from vac_ddp.scoring.forward import Scorer
from vac_ddp.settings import Config


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Raise the UserError that an error of the system stands for, as a name that no file can have."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise plain(error) from None


@dataclass(kw_only=True)
class Classifier:
    """A trained model on its device. `model` takes normalised clips (B, T, 3, H, W) and gives logits (B, K)."""

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


@dataclass(kw_only=True)
class Prediction:
    """What a classifier says about one video.

    top: (class, share), the likeliest first, shares of all classes summing to 1; logits: (K,) float32, the
    mean over the views (predict.average=mean-probs: the logarithm of the mean probabilities); failed: no frame could be
    decoded, and the answer is how often each class was trained on; faults: what is wrong with a video file of which
    some frames decode, as one that is cut off.
    """

    name: str
    top: list[tuple[str, float]]
    logits: np.ndarray
    failed: bool
    faults: list[str] = field(default_factory=list)


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
    scorer = prediction.open_scorer(config, source, torch.device(device) if device else distributed.pick_device())
    source.state = {}  # the model has them
    return Classifier(classes=list(source.classes or []), config=config, source=source, scorer=scorer)


@_user_errors()
def predict(
    model: Classifier, data: str | Path, *, top: int = 5, views: str | None = None, workers: int = 0
) -> list[Prediction]:
    """What `model` says about `data`: a video file or a folder of frames (one answer), or a folder of such folders.

    top: how many classes each answer names. views: "5x3" for 5 windows and 3 crops, "+flip" behind it for mirrored
    ones as well; default: as the run was set to. workers: loader processes; a few help with many videos. Writes no
    file. Raises `vac_ddp.errors.UserError`, in one line, where `data` is not of that kind.
    """
    from vac_ddp.predict import kind_of, set_views

    path = Path(data).expanduser()
    kind = kind_of(path)
    config = copy.deepcopy(model.config)
    if views is not None:
        set_views(config, views)
    check_prediction(config)
    scorer = copy.copy(model.scorer)
    scorer.flip = config.predict.views.flip
    with tempfile.TemporaryDirectory(prefix="vac_predict_") as scratch, contextlib.redirect_stdout(io.StringIO()):
        out, root, faults = Path(scratch) / "out", path, []
        config.data.cache, config.data.workers = scratch, workers
        if kind in ("video file", "frames"):
            root = Path(scratch) / "data"
            faults = prediction.lay_out(path, kind, root, short_side=2 * config.clip.size)
        out.mkdir()
        index = prediction.read_index(root, config, model.source, out, labelled=kind == "labelled")
        task = prediction.make_task(config, model.source, index, model.device)
        prediction.score(task, config, scorer, index, out, overwrite=False, stop=lambda: 0, quiet=True)
        found = read_views(out)
    scores = averaging.average_views(found.logits, method=config.predict.average)
    shares = np.exp(log_softmax(scores))
    order = np.argsort(-shares, axis=1, kind="stable")[:, :top]
    return [
        Prediction(
            name=name,
            top=[(model.classes[i], float(shares[video, i])) for i in order[video].tolist()],
            logits=scores[video],
            failed=bool(found.failed[video]),
            faults=list(faults),
        )
        for video, name in enumerate(found.ids)
    ]
