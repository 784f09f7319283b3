"""Predict a folder of videos, or one video: from a checkpoint and data to a logits file and its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vac_ddp.data.given import open_given
from vac_ddp.errors import Findings, UserError
from vac_ddp.models.weight_files import Source
from vac_ddp.predicting.direct import answers
from vac_ddp.predicting.execution import execute, locked, say_how
from vac_ddp.predicting.inputs import part_of, read_index, sources_by_name
from vac_ddp.predicting.outputs import check_submission, write_results
from vac_ddp.predicting.task import make_task
from vac_ddp.results import averaging
from vac_ddp.results.logits_file import read_views
from vac_ddp.results.metrics import top_classes
from vac_ddp.runtime import distributed
from vac_ddp.runtime.gpus import gpu_of
from vac_ddp.runtime.host_memory import keep_freed_memory
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.ranks import say
from vac_ddp.runtime.signals import StopRequest
from vac_ddp.scoring.scorer import open_scorer
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
        if request.part:
            index, sources = part_of(index, source.path.parent, config, request.part)
        else:
            sources = sources_by_name(config, index)
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
    data, config, source = request.data, request.config, request.source
    if distributed.world_size() > 1:
        raise UserError(f"{data} is one video: start `vac predict` without torchrun")
    config.data.workers = 0
    given = open_given(data, config, list(source.classes or []))
    scorer = open_scorer(config, source, device, gpu_of(device))
    if request.out:
        task = make_task(config, source, given.videos, device)
        done = execute(config, task, scorer, given.videos, request.out, overwrite=request.overwrite)
        views = read_views(request.out)
        logits, damage = None if views.failed[0] else views.logits[0], done.damage
    else:
        (answer,) = answers(given, scorer, config)
        logits, damage = answer.outputs, answer.faults
    if logits is None:
        raise UserError(f"{data}: {damage[0] if damage else 'no frame of it can be decoded'}")
    for line in [] if given.faults else damage:
        say(line)
    if request.out:
        write_results(request.out, config, request.sample)
    scores = averaging.average_views(logits[None], method=config.predict.average)
    numbers, probabilities = top_classes(scores, TOP)
    for number, probability in zip(numbers[0].tolist(), probabilities[0].tolist(), strict=True):
        print(f"{probability:.4f}  {(source.classes or [])[number]}")
    if given.faults:
        raise Findings(f"{data}: {'; '.join(given.faults[0])}; predicted from the frames that decode")
