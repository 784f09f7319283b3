"""Predict a folder of videos, or one video: from a checkpoint and data to a views file and its results."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vac_ddp.data.data_kind import kind_of
from vac_ddp.data.dataset import TestViews
from vac_ddp.data.index import Index
from vac_ddp.data.loader import Loader, views_loader, worker_count
from vac_ddp.errors import Findings, UserError
from vac_ddp.models.weight_files import Source
from vac_ddp.predicting.all_videos import Done, predict_views
from vac_ddp.predicting.inputs import lay_out, part_of, read_index
from vac_ddp.predicting.outputs import check_submission, write_results
from vac_ddp.predicting.task import Task, make_task
from vac_ddp.report.terminal import start_bar
from vac_ddp.results import averaging
from vac_ddp.results.logits_file import Views, read_views
from vac_ddp.results.metrics import top_classes
from vac_ddp.runtime import distributed
from vac_ddp.runtime.lock import RunLock
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.ranks import local_world_size, say
from vac_ddp.runtime.signals import StopRequest
from vac_ddp.scoring.scorer import Scorer, open_scorer, prepare
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
        index = read_index(request.data, config, source, out, labelled=labelled)
        for note in index.notes:
            say(note)
        sources = None
        if request.part:
            index, sources = part_of(index, source.path.parent, config, request.part)
        task = make_task(config, source, index, device, sources=sources)
        ids, classes = task.head.ids, task.head.classes
        distributed.main_first(lambda: check_submission(ids, classes, config, request.sample), lambda: None)
        scorer = open_scorer(config, source, device)
        stop.install()
        PROCESS.watch(config.health.start_timeout_s)
        try:
            done = score(request, task, scorer, index, out, stop=stop.wanted)
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
    with tempfile.TemporaryDirectory(prefix="vac_predict_") as scratch:
        views, done, faults = predict_here(request, lambda: open_scorer(config, request.source, device), Path(scratch))
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
    index = read_index(root, config, request.source, out, labelled=kind == "labelled")
    scorer = opened()
    task = make_task(config, request.source, index, scorer.device)
    done = score(request, task, scorer, index, out, stop=lambda: 0, quiet=quiet)
    return read_views(out), done, faults


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """OUT is this prediction's alone as long as it runs."""
    lock = RunLock(out)

    def take() -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {out}: {error.strerror}; give another folder with --out") from error
        lock.take()

    distributed.main_first(take, lambda: None)
    try:
        yield
    finally:
        lock.release()


def score(
    request: Request,
    task: Task,
    scorer: Scorer,
    index: Index,
    out: Path,
    *,
    stop: Callable[[], int],
    quiet: bool = False,
) -> Done:
    """Send all views of the videos of `index` through the model, and write OUT/views.npz; called by all ranks."""
    config = request.config
    prepare(scorer, config, len(index) * len(task.head.views) // distributed.world_size())
    views, reduced = config.predict.views, config.data.reduced_decode
    dataset = TestViews(index, np.arange(len(index)), config.clip, views, tolerant=True, reduced=reduced)
    local_ranks = local_world_size()

    def load(videos: list[int]) -> Loader:
        return views_loader(
            dataset,
            videos,
            videos_per_batch=1,
            workers=min(worker_count(config.data.workers, local_ranks=local_ranks), len(index)),
            prefetch=config.data.prefetch,
            pin=scorer.device.type == "cuda",
        )

    return predict_views(
        task,
        scorer,
        load,
        out,
        save_every=config.predict.save_every,
        overwrite=request.overwrite,
        stop=stop,
        progress=_bar() if distributed.is_main() and sys.stderr.isatty() and not quiet else lambda done, total: None,
    )


def _bar() -> Callable[[int, int], None]:
    """Shows how many of rank 0's videos are done, on a line of a terminal that is gone at the end."""
    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(start_bar("predicting", total, unit="videos"))
        bars[0].update(done - bars[0].n)
        if done >= total:
            bars[0].close()

    return show


def say_how(done: Done, task: Task) -> None:
    """How long it took, and what was damaged."""
    if done.computed:
        waited = 100 * done.waited / done.seconds
        say(
            f"{done.computed} videos x {len(task.head.views)} views in {done.seconds:.1f} s "
            f"({done.computed / done.seconds:.1f} videos/s; rank 0 waited {waited:.0f} % of it for frames)"
        )
    if done.reused:
        say(f"{done.reused} videos were there already")
    for line in done.damage:
        say(line)
    if done.damaged_frames > len(done.damage):
        say(f"{done.damaged_frames} damaged frames in all")
