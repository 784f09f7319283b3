"""One task on the videos of a folder: its lock, the loader, a progress bar, and how it went."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vac_ddp.data.dataset import TestViews, Videos
from vac_ddp.data.loader import Loader, views_loader, worker_count
from vac_ddp.errors import UserError
from vac_ddp.predicting.all_videos import Done, run_task
from vac_ddp.predicting.task import Task
from vac_ddp.report.terminal import start_bar
from vac_ddp.runtime import distributed
from vac_ddp.runtime.host_memory import memory_limit
from vac_ddp.runtime.lock import RunLock
from vac_ddp.runtime.ranks import local_world_size, say
from vac_ddp.scoring.scorer import Scorer, prepare
from vac_ddp.settings import Config


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of OUT, on rank 0: no other process writes to it."""
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


def execute(
    config: Config,
    task: Task,
    scorer: Scorer,
    index: Videos,
    out: Path,
    *,
    overwrite: bool,
    stop: Callable[[], int] = lambda: 0,
) -> Done:
    """Send all views of the videos of `index` through the model, and write the task's file; called by all ranks."""
    prepare(scorer, config, len(index) * len(task.head.views) // distributed.world_size())
    views, reduced = config.predict.views, config.data.reduced_decode
    dataset = TestViews(index, np.arange(len(index)), config.clip, views, tolerant=True, reduced=reduced)
    local_ranks = local_world_size()
    shown = distributed.is_main() and sys.stderr.isatty()

    def load(videos: list[int]) -> Loader:
        return views_loader(
            dataset,
            videos,
            videos_per_batch=1,
            workers=min(worker_count(config.data.workers, local_ranks=local_ranks), len(index)),
            prefetch=config.data.prefetch,
            pin=scorer.device.type == "cuda",
            room=memory_limit() // local_ranks,
        )

    return run_task(
        task,
        scorer,
        load,
        out,
        save_every=config.predict.save_every,
        overwrite=overwrite,
        stop=stop,
        progress=_bar(task.output.doing) if shown else lambda done, total: None,
    )


def _bar(title: str) -> Callable[[int, int], None]:
    """Shows how many of rank 0's videos are done, on a line of a terminal that is gone at the end."""
    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(start_bar(title, total, unit="videos"))
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
