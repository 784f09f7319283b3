"""Predict a folder of videos, or one video: from a checkpoint and data to a views file and its results."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vac_ddp.data.data_kind import kind_of
from vac_ddp.errors import Findings, UserError
from vac_ddp.models.weight_files import Source
from vac_ddp.predicting.all_videos import Done
from vac_ddp.predicting.execution import execute, locked, say_how
from vac_ddp.predicting.inputs import lay_out, part_of, read_index
from vac_ddp.predicting.outputs import check_submission, write_results
from vac_ddp.predicting.task import make_task
from vac_ddp.results import averaging
from vac_ddp.results.logits_file import Views, read_views
from vac_ddp.results.metrics import top_classes
from vac_ddp.runtime import distributed
from vac_ddp.runtime.gpus import gpu_of
from vac_ddp.runtime.host_memory import keep_freed_memory
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.ranks import say
from vac_ddp.runtime.signals import StopRequest
from vac_ddp.scoring.scorer import Scorer, open_scorer
from vac_ddp.settings import Config
from vac_ddp.text import listed

NAMED = 5
TOP = 5


@dataclass(kw_only=True)
class Request:
    """What to predict: the data with the settings `config` and the weights `source`, and where results go.

    part: the run's own "train" or "val" videos, by its split.csv. out: None is a folder that is named after the data;
    one video leaves no files then. sample: a sample_submission.csv that submission.csv follows.
    """

    data: Path
    config: Config
    source: Source
    part: str | None = None
    out: Path | None = None
    sample: str | None = None
    overwrite: bool = False


def predict_folder(request: Request, device: torch.device, *, labelled: bool, stop: StopRequest) -> None:
    """Predict a folder of videos: views file, submission, scores, and the evaluation where there are labels.

    Called by all ranks. Raises Findings, with everything written, where videos got the class prior.
    """
    config, source = request.config, request.source
    name = request.part or request.data.resolve().name
    out = request.out or source.path.parent / "predictions" / name
    with locked(out):
        index = read_index(request.data, config, source.classes, out, labelled=labelled)
        for note in index.notes:
            say(note)
        sources = None
        if request.part:
            index, sources = part_of(index, source.path.parent, config, request.part)
        task = make_task(config, source, index, device, sources=sources)
        ids, classes = task.head.ids, task.head.classes
        distributed.main_first(lambda: check_submission(ids, classes, config, request.sample), lambda: None)
        scorer = open_scorer(config, source, device, distributed.weakest_gpu(device))
        if device.type == "cpu":
            keep_freed_memory()
        stop.install()
        PROCESS.watch(config.health.start_timeout_s)
        try:
            done = execute(config, task, scorer, index, out, overwrite=request.overwrite, stop=stop.wanted)
        finally:
            stop.restore()
        say_how(done, task)
        failed = distributed.main_first(lambda: write_results(out, config, request.sample), list)
    failed = distributed.broadcast_object(failed)
    if failed:
        raise Findings(
            f"{len(failed)} of {len(index)} videos have no frame that can be decoded, or no finite logits, and got the "
            f"class prior: {listed(failed, NAMED)}"
        )


def predict_one(request: Request, device: torch.device) -> None:
    """Predict one video: print its best classes, and write files only where `out` is given.

    Raises UserError where nothing of it decodes, and Findings where a part of it does not.
    """
    data, config = request.data, request.config
    if distributed.world_size() > 1:
        raise UserError(f"{data} is one video: start `vac predict` without torchrun")
    config.data.workers = 0

    def opened() -> Scorer:
        return open_scorer(config, request.source, device, gpu_of(device))

    with tempfile.TemporaryDirectory(prefix="vac_predict_") as scratch:
        views, done, faults = predict_here(request, opened, Path(scratch))
        if views.failed[0]:
            raise UserError(f"{data}: {done.damage[0] if done.damage else 'no frame of it can be decoded'}")
        if request.out:
            write_results(request.out, config, request.sample)
    scores = averaging.average_views(views.logits, method=config.predict.average)
    numbers, probabilities = top_classes(scores, TOP)
    for number, probability in zip(numbers[0].tolist(), probabilities[0].tolist(), strict=True):
        print(f"{probability:.4f}  {views.classes[number]}")
    if faults:
        raise Findings(f"{data}: {'; '.join(faults)}; predicted from the frames that decode")


def predict_here(
    request: Request, opened: Callable[[], Scorer], scratch: Path, *, quiet: bool = False
) -> tuple[Views, Done, list[str]]:
    """Predict any data in this process, with all files but `request.out` in `scratch`; the settings are changed.

    opened: gives the model, once the data is known to be good. Returns the views, how it went, and what is wrong with
    a video file of which some frames decode.
    """
    root, config, kind, faults = request.data, request.config, kind_of(request.data), []
    if kind in ("video file", "frames"):
        root = scratch / "data"
        faults = lay_out(request.data, kind, root, short_side=2 * config.clip.size)
    config.data.cache = str(scratch)
    out = request.out or scratch / "out"
    index = read_index(root, config, request.source.classes, out, labelled=kind == "labelled")
    scorer = opened()
    task = make_task(config, request.source, index, scorer.device)
    done = execute(config, task, scorer, index, out, overwrite=request.overwrite, quiet=quiet)
    return read_views(out), done, faults
