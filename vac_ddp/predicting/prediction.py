"""From a checkpoint and a data folder to a views file and its results: the rooms of a prediction, tied together."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vac_ddp.data.clip_sampling import test_windows
from vac_ddp.data.dataset import TestViews
from vac_ddp.data.grouping import find_sources
from vac_ddp.data.index import Index, cache_name, open_index
from vac_ddp.data.loader import worker_count
from vac_ddp.data.split import read_split
from vac_ddp.data.video_reader import DamagedVideo, VideoFile, need_av, write_frames
from vac_ddp.errors import UserError
from vac_ddp.files import write_text
from vac_ddp.models import load_model
from vac_ddp.models.compilation import compile_if_it_works
from vac_ddp.models.precision import AUTOCAST, precision_of
from vac_ddp.models.weight_files import Source
from vac_ddp.predicting.all_videos import Done, Task, predict_views
from vac_ddp.predicting.fingerprint import fingerprint
from vac_ddp.predicting.part_files import FOLDER
from vac_ddp.report.terminal import start_bar
from vac_ddp.results import averaging, evaluation, submission
from vac_ddp.results.logits_file import ViewsHead, read_views
from vac_ddp.runtime import distributed
from vac_ddp.runtime.lock import RunLock
from vac_ddp.scoring.forward import AUTO_CLIPS, Scorer, first_pass, pass_size
from vac_ddp.scoring.views import video_costs, view_table
from vac_ddp.settings import Config
from vac_ddp.version import VERSION

NAMED = 5
WORTH_TRYING = 2000  # clips of a rank: half a minute of compiling and trying sizes is a small part of their time


def say(text: str) -> None:
    """One line for people, from rank 0."""
    if distributed.is_main():
        print(text, flush=True)


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


def read_index(root: Path, config: Config, source: Source, out: Path, *, labelled: bool) -> Index:
    """Rank 0 scans, or reads the cached index; the others read what it left in OUT/parts."""

    def read() -> Index:
        return open_index(
            root,
            labelled=labelled,
            settings=config.data,
            classes=source.classes if labelled else None,
            scan=distributed.is_main(),
            cache_file=out / FOLDER / cache_name(root, labelled=labelled, settings=config.data),
        )

    return distributed.main_first(read, read)


def part_of(index: Index, run: Path, config: Config, part: str) -> tuple[Index, list[str]]:
    """The videos of the run's training or validation part, and the source of each, by its split.csv."""
    if part == "val" and config.data.val:
        return index, _sources(config, index, list(index.names))
    split = read_split(run / "split.csv", index)
    videos = split.train if part == "train" else split.val
    if not len(videos):
        raise UserError(f"{run / 'split.csv'} has no {part} part: give --data DIR")
    return index.take(videos), [split.groups[video] for video in videos.tolist()]


def make_task(
    config: Config, source: Source, index: Index, device: torch.device, *, sources: list[str] | None = None
) -> Task:
    """What is predicted, and the fingerprint under which finished parts of it count.

    sources: where each video was cut from; without them labelled videos are asked for it by their names.
    """
    views, classes, names = config.predict.views, list(source.classes or []), list(index.names)
    precision = precision_of(config, device)
    settings = {
        "clip": dataclasses.asdict(config.clip),
        "views": dataclasses.asdict(views),
        "precision": precision,
        "model": config.model.name,
    }
    marks = fingerprint(
        config,
        index,
        weights=source.sha256,
        precision=precision,
        device=device.type,
        version=VERSION,
        frames=distributed.is_main(),
    )
    return Task(
        head=ViewsHead(
            ids=names,
            classes=classes,
            views=view_table(views, len(test_windows(1, config.clip, views))),
            labels=np.asarray(index.labels, np.int64),
            sources=_sources(config, index, names) if sources is None else sources,
            damaged=np.zeros(len(names), np.int64),
            failed=np.zeros(len(names), bool),
            about={
                "weights": source.sha256,
                "settings": settings,
                "average": config.predict.average,
                "fingerprint": marks,
                "versions": {"vac_ddp": VERSION, "torch": torch.__version__},
            },
        ),
        costs=video_costs(
            index.frame_counts, lambda n: test_windows(n, config.clip, views), views.crops * (2 if views.flip else 1)
        ),
        fingerprint=marks,
        prior=log_prior(source.class_counts, len(classes)),
    )


def log_prior(counts: list[int] | None, classes: int) -> np.ndarray:
    """Logarithm of the class prior (K,) float32: the shares in the training part, or equal ones where not known.

    A class that was never trained on counts as half a video, so that its logarithm is a number.
    """
    if counts is None or len(counts) != classes or sum(counts) <= 0:
        return np.full(classes, -math.log(classes), np.float32)
    shares = np.maximum(np.asarray(counts, np.float64), 0.5)
    return np.log(shares / shares.sum()).astype(np.float32)


def _sources(config: Config, index: Index, names: list[str]) -> list[str]:
    """The source of every labelled video, for the interval; empty where names do not tell."""
    labels = index.labels.tolist()
    if not labels or min(labels) < 0:
        return [""] * len(names)
    try:
        found = find_sources(names, [index.classes[label] for label in labels], config.data)
    except UserError as error:
        say(f"every video counts as its own source: {error}")
        return [""] * len(names)
    return list(found.groups) if found.grammar != "none" else [""] * len(names)


def open_scorer(config: Config, source: Source, device: torch.device) -> Scorer:
    """The model of a checkpoint on its device, with what its views need."""
    wanted = dataclasses.replace(config.model, weights=str(source.path))
    loaded = load_model(wanted, config.clip, list(source.classes or []), seed=config.seed)
    if loaded.report.missing:
        raise UserError(f"{source.path} lacks {', '.join(loaded.report.missing[:NAMED])}: it cannot predict")
    return Scorer(
        model=loaded.model.to(device).eval(),
        device=device,
        autocast=AUTOCAST[precision_of(config, device)],
        mean=tuple(loaded.mean),
        std=tuple(loaded.std),
        flip=config.predict.views.flip,
        clips_per_gpu=config.predict.clips_per_gpu,
    )


def score(
    task: Task,
    config: Config,
    scorer: Scorer,
    index: Index,
    out: Path,
    *,
    overwrite: bool,
    stop: Callable[[], int],
    quiet: bool = False,
) -> Done:
    """Send all views through the model."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    prepare(scorer, config, len(index) * len(task.head.views) // distributed.world_size())
    return predict_views(
        task,
        scorer,
        TestViews(
            index,
            np.arange(len(index)),
            config.clip,
            config.predict.views,
            tolerant=True,
            reduced=config.data.reduced_decode,
        ),
        out,
        workers=min(worker_count(config.data.workers, local_ranks=local_ranks), len(index)),
        prefetch=config.data.prefetch,
        save_every=config.predict.save_every,
        overwrite=overwrite,
        stop=lambda: bool(stop()),
        say=say,
        progress=_bar() if distributed.is_main() and sys.stderr.isatty() and not quiet else lambda done, total: None,
    )


def prepare(scorer: Scorer, config: Config, clips: int) -> None:
    """Compile the model and find the size of a pass, where so many `clips` of this rank are worth it."""
    most = clips if clips >= WORTH_TRYING else 0
    scorer.clips_per_gpu = pass_size(scorer, config.clip, most=most) if most else scorer.clips_per_gpu
    size = scorer.clips_per_gpu if isinstance(scorer.clips_per_gpu, int) else AUTO_CLIPS[scorer.device.type]
    scorer.pad = compile_if_it_works(
        scorer.model,
        lambda: first_pass(scorer, config.clip, size),
        setting="predict.compile",
        wanted=config.predict.compile,
        default=scorer.device.type == "cuda" and clips >= WORTH_TRYING,
        gather=distributed.all_gather_objects,
        say=say,
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


def gate(ids: list[str], classes: list[str], config: Config, sample: str | None) -> None:
    """Raise UserError, before anything is computed, where these videos cannot make a right submission."""
    answers = [""] * len(ids)
    if sample is None:
        submission.submission_text(ids, answers)
        return
    text = submission.read_sample(sample)
    submission.submission_after(text, ids, answers, where=sample, classes=classes)
    note = submission.sample_note(text, classes, sample) if config.predict.answer == "name" else None
    if note:
        say(note)


def finish(out: Path, config: Config, sample: str | None) -> list[str]:
    """From the views file to the results, on rank 0; returns the names of the videos that got the class prior."""
    views = read_views(out)
    scores = averaging.average_views(views.logits, method=config.predict.average)
    numbers = scores.argmax(axis=1).tolist()
    index = config.predict.answer == "index"
    answers = [str(number) if index else views.classes[number] for number in numbers]
    submission.write_submission(
        out / "submission.csv", views.ids, answers, sample=sample, scores=scores, classes=views.classes
    )
    write_text(out / "scores.csv", submission.scores_text(views.ids, scores, views.classes))
    if views.labelled:
        found = evaluation.evaluate(scores, views.labels, views.classes, views.sources)
        evaluation.write_evaluation(out, found)
        for line in evaluation.lines(found):
            say(line)
    say(f"submission   {out / 'submission.csv'}")
    say(f"views        {views.path} (vac score reads it)")
    return [name for name, failed in zip(views.ids, views.failed.tolist(), strict=True) if failed]


def lay_out(data: Path, kind: str, root: Path, *, short_side: int) -> list[str]:
    """Make `root` a data set of the one video `data`: a folder of frames, or a "video file", which is unpacked.

    Returns what is wrong with a file that has frames. UserError where it has none.
    """
    root.mkdir()
    if kind == "frames":
        (root / data.resolve().name).symlink_to(data.resolve(), target_is_directory=True)
        return []
    need_av()
    folder = root / (data.stem.lstrip(".") or "video")  # hidden folders are not read
    folder.mkdir()
    video = VideoFile(path=data)
    try:
        write_frames(video, folder, short_side=short_side, quality=95, subsampling="444")
    except DamagedVideo as error:
        raise UserError(f"{data} cannot be read as a video: {error}") from None
    return video.faults
