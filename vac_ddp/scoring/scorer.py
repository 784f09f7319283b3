"""A model on its device with all that a forward pass over clips needs: opened from weights, compiled, sized."""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vac_ddp.data.normalization import normalize
from vac_ddp.errors import UserError
from vac_ddp.models import Loaded, LoadReport, load_model
from vac_ddp.models.compilation import compile_if_it_works
from vac_ddp.models.kept_tokens import kept_tokens
from vac_ddp.models.precision import AUTOCAST, autocast, precision_of
from vac_ddp.models.video_model import VideoModel
from vac_ddp.models.weight_files import Source
from vac_ddp.runtime import distributed
from vac_ddp.runtime.gpus import Gpu
from vac_ddp.runtime.ranks import say
from vac_ddp.settings import ClipSettings, Config

AUTO_CLIPS = {"cpu": 8, "cuda": 64}  # a GPU that cannot hold them gets half as many until it can
NAMED = 5
WORTH_DOUBLING = 0.98  # of the time a clip takes: a larger pass must bring at least that
WORTH_TRYING = 2000  # clips of a rank: half a minute of compiling and trying sizes is a small part of their time


@dataclass(kw_only=True)
class Scorer:
    """The model and how clips go through it.

    clips_per_gpu: the clips of a pass as `setting` gives them, or "auto"; found: what `pass_size` made of auto.
    pad: fill the last, short pass with zeros, because a compiled model would be compiled again for its size.
    steps: give the features of time steps, not logits. lock: one pass at a time, also from several threads: together
    they would need the memory of several passes, and would be no faster on a device that one pass fills.
    """

    model: VideoModel
    device: torch.device
    autocast: torch.dtype | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    clips_per_gpu: int | str
    found: int | None = None
    pad: bool = False
    steps: bool = False
    setting: str = "predict.clips_per_gpu"
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def clips_per_pass(self) -> int:
        """The clips of a pass to begin with."""
        usual = self.found or AUTO_CLIPS[self.device.type]
        return self.clips_per_gpu if isinstance(self.clips_per_gpu, int) else usual

    @torch.no_grad()
    def outputs(self, clips: Tensor) -> Tensor:
        """Logits (B, K), or features (B, T', D), of clips (B, T, S, S, 3) uint8 in one pass, float32 on the device."""
        return self.pass_of(normalize(clips, self.mean, self.std, torch.float32))

    @torch.no_grad()
    def pass_of(self, pixels: Tensor) -> Tensor:
        """The same of normalized clips (B, T, 3, S, S)."""
        with self.lock, autocast(self.device, self.autocast):
            outputs: Tensor = self.model.steps(pixels) if self.steps else self.model(pixels)
            return outputs.float()


def open_scorer(config: Config, source: Source, device: torch.device, gpu: Gpu | None) -> Scorer:
    """The model of a checkpoint, or of a foreign classifier, on its device, with what its views need.

    gpu: the weakest of the ranks that predict together, by which the precision is chosen; None: a CPU.
    """
    foreign = not source.own
    wanted = dataclasses.replace(config.model, weights=str(source.path.parent if foreign else source.path))
    classes = list(source.classes or [])
    loaded = load_model(wanted, config.clip, classes, seed=config.seed, keep_classifier=foreign)
    if loaded.report.missing:
        raise UserError(f"{source.path} lacks {', '.join(loaded.report.missing[:NAMED])}: it cannot predict")
    loaded.model.eval_tokens = kept_tokens(
        loaded.model, config.predict.keep_tokens, "motion", setting="predict.keep_tokens"
    )
    return _scorer(loaded, config, device, precision_of(config, gpu, source.precision))


def open_encoder(config: Config, device: torch.device) -> tuple[Scorer, LoadReport]:
    """The encoder of `config.model` with its weights, on its device, and how they were loaded; called by all ranks.

    Classifier and pooling are removed: the scorer gives the features of time steps.
    """

    def load() -> Loaded:
        return load_model(config.model, config.clip, ["removed", "with the classifier"], seed=config.seed)

    if config.predict.keep_tokens < 1:
        raise UserError(
            f"predict.keep_tokens={config.predict.keep_tokens}: features are of all tokens; set predict.keep_tokens=1"
        )
    loaded = distributed.main_first(load, load)  # rank 0 downloads
    loaded.model.keep_encoder()
    scorer = _scorer(loaded, config, device, precision_of(config, distributed.weakest_gpu(device)))
    scorer.steps = True
    return scorer, loaded.report


def _scorer(loaded: Loaded, config: Config, device: torch.device, precision: str) -> Scorer:
    model = loaded.model.to(device).eval()
    return Scorer(
        model=model,
        device=next(model.parameters()).device,  # that of "cuda" has a number, whatever becomes the current one later
        autocast=AUTOCAST[precision],
        mean=tuple(loaded.mean),
        std=tuple(loaded.std),
        flip=config.predict.views.flip,
        clips_per_gpu=config.predict.clips_per_gpu,
    )


def prepare(scorer: Scorer, config: Config, clips: int) -> None:
    """Compile the model and find the size of a pass, where so many `clips` of this rank are worth it."""
    if clips >= WORTH_TRYING or config.predict.compile:
        scorer.found = pass_size(scorer, config.clip, most=clips)
    scorer.pad = compile_if_it_works(
        scorer.model,
        lambda: zeros_pass(scorer, config.clip, scorer.clips_per_pass),
        setting="predict.compile",
        wanted=config.predict.compile,
        default=scorer.device.type == "cuda" and clips >= WORTH_TRYING,
        gather=distributed.all_gather_objects,
        say=say,
    )


def pass_size(scorer: Scorer, clip: ClipSettings, *, most: int) -> int:
    """The clips of a pass: as set, or on a GPU as many as fit, up to `most`, while more of them take less time each.

    Halved from the usual size until it fits, or doubled; each size is run twice with clips of zeros, and the second run
    counts. UserError where not even one clip fits.
    """
    size = scorer.clips_per_pass
    if scorer.clips_per_gpu != "auto" or scorer.device.type != "cuda":
        return size
    before = _pass_seconds(scorer, clip, size)
    if before is None:
        while size > 1:
            size //= 2
            if _pass_seconds(scorer, clip, size) is not None:
                return size
        raise UserError(too_small(scorer, 1))
    while 2 * size <= most:
        seconds = _pass_seconds(scorer, clip, 2 * size)
        if seconds is None or seconds / 2 > WORTH_DOUBLING * before:
            break
        before, size = seconds, 2 * size
    return size


def too_small(scorer: Scorer, size: int) -> str:
    """The line for a GPU that is too small for a pass of `size` clips."""
    if scorer.clips_per_gpu != "auto" and size > 1:
        return f"CUDA out of memory with {size} clips in a pass: lower {scorer.setting}"
    return "CUDA out of memory with 1 clip in a pass: end other programs on the GPU, or take one with more memory"


def zeros_pass(scorer: Scorer, clip: ClipSettings, size: int) -> None:
    """One pass of clips of zeros."""
    shape = (size, clip.frames, clip.size, clip.size, 3)
    scorer.outputs(torch.zeros(shape, dtype=torch.uint8, device=scorer.device))


def _pass_seconds(scorer: Scorer, clip: ClipSettings, size: int) -> float | None:
    """Seconds of a pass of `size` clips; None where the GPU is too small for it."""
    seconds = 0.0
    try:
        for _ in range(2):
            torch.cuda.synchronize(scorer.device)
            start = time.perf_counter()
            zeros_pass(scorer, clip, size)
            torch.cuda.synchronize(scorer.device)
            seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    return seconds
