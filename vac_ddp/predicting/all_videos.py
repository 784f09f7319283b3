"""All videos through the model: whole videos on every rank, saved in parts as they are done, joined by rank 0."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vac_ddp.data.batch import TestBatch
from vac_ddp.data.loader import Loader
from vac_ddp.errors import Interrupted, UserError
from vac_ddp.predicting import part_files
from vac_ddp.predicting.task import Task
from vac_ddp.runtime import distributed
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.ranks import say
from vac_ddp.scoring.engine import Scored, scored_videos
from vac_ddp.scoring.scorer import Scorer
from vac_ddp.scoring.views import deal

NAMED = 20  # damaged frames that are named one by one


@dataclass(kw_only=True)
class Done:
    """How it went, on rank 0; counts are of all ranks, times of this one."""

    path: Path
    computed: int = 0
    reused: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    damaged_frames: int = 0
    damage: list[str] = field(default_factory=list)


def run_task(
    task: Task,
    scorer: Scorer,
    load: Callable[[list[int]], Loader],
    out: Path,
    *,
    save_every: int,
    overwrite: bool = False,
    stop: Callable[[], int] = lambda: 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Done:
    """Send every video of the task through the model and write its file to OUT; called by all ranks.

    load: batches of one video each, of the videos with these numbers. What an earlier, killed run of any world size
    left in OUT/parts is not computed again; a complete file is kept as it is. Raises UserError where OUT holds
    another one, and Interrupted, with what is finished saved, where `stop()` says so. `progress` is told how
    many of this rank's videos are done.
    """
    kind = part_files.record_type(task.missing)
    found = _open_together(task, out, kind, overwrite=overwrite)
    result = Done(path=out / task.output.name, reused=len(found.done))
    if found.complete:
        part_files.drop_parts(out)
        return result
    todo = np.setdiff1d(np.arange(len(task.head.ids)), found.done)
    own = todo[deal(task.costs[todo], distributed.world_size())[distributed.rank()]].tolist()
    share, meeting = _Share(task, out, kind, save_every, result), Meeting()
    error: BaseException | None = None
    start = time.perf_counter()
    try:
        share.score(scorer, load(own), lambda: meeting.ended(bool(stop())), lambda done: progress(done, len(own)))
    except OSError as caught:
        error = UserError(f"cannot save to {out}: {caught.strerror}; what is saved is kept, start it again")
    except Exception as caught:
        error = caught
    stopped = meeting.wait(error, stop)
    distributed.raise_together(error)
    if stopped:
        raise Interrupted("stopped; the videos that are finished are saved, start it again to go on")
    result.seconds = time.perf_counter() - start
    _gather_notes(result)
    _write_together(task, out, kind, found.parts, share.names)
    part_files.drop_parts(out)
    return result


@dataclass(kw_only=True)
class _Finished:
    """A video whose arrays are there, or None where nothing of it could be read."""

    video: int
    damaged: int
    arrays: dict[str, np.ndarray] | None


class _Share:
    """The videos of one rank: scored, and saved in parts whose `names` are kept; `result` counts."""

    def __init__(self, task: Task, out: Path, kind: np.dtype[Any], save_every: int, result: Done) -> None:
        self.task, self.out, self.kind, self.save_every, self.result = task, out, kind, save_every, result
        self.names: list[str] = []
        self._waiting: list[_Finished] = []
        self._damaged: dict[int, int] = {}  # damaged frames of videos that are on their way

    def score(self, scorer: Scorer, loader: Loader, ended: Callable[[], bool], progress: Callable[[int], None]) -> None:
        """Score the videos of `loader` and save them, until `ended`; it closes the loader."""
        try:
            for video in scored_videos(scorer, self._batches(loader)):
                damaged = self._damaged.pop(video.video)
                self._waiting.append(_Finished(video=video.video, damaged=damaged, arrays=self._arrays(video)))
                self.result.computed += 1
                progress(self.result.computed)
                if len(self._waiting) >= self.save_every:
                    self._save()
                PROCESS.progress()
                if ended():
                    break
        finally:
            loader.close()
            self._save()

    def _batches(self, loader: Loader) -> Iterator[TestBatch]:
        """The batches of one video, whose damaged frames are counted, and named in the result."""
        result, batches = self.result, iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            result.waited += time.perf_counter() - asked
            if batch is None:
                return
            self._damaged[int(batch.videos)] = loader.damaged - result.damaged_frames
            result.damaged_frames = loader.damaged
            result.damage += batch.damage[: NAMED - len(result.damage)]
            yield batch

    def _arrays(self, video: Scored) -> dict[str, np.ndarray] | None:
        """What to keep of a video; None, and a line that names it, where a value is not finite."""
        if video.outputs is None:
            return None
        arrays = self.task.arrays(video.outputs)
        if all(np.isfinite(array).all() for array in arrays.values()):
            return arrays
        if len(self.result.damage) < NAMED:
            self.result.damage.append(f"{self.task.head.ids[video.video]}: {self.task.output.not_finite}")
        return None

    def _save(self) -> None:
        """Write a part of the videos that wait; one of which nothing could be decoded gets the task's `missing`."""
        if not self._waiting:
            return
        records = np.zeros(len(self._waiting), self.kind)
        for record, video in zip(records, self._waiting, strict=True):
            record["video"], record["damaged"], record["failed"] = video.video, video.damaged, video.arrays is None
            for name, array in (video.arrays or self.task.missing).items():
                record[name] = array
        self.names.append(part_files.save_part(self.out, records))
        self._waiting.clear()


# ---------------------------------------------------------------- the ranks together


class Meeting:
    """Where ranks that are done wait for the others, for as long as it takes, and learn that one failed or is to stop.

    Over the store, not a collective: no timeout has to be guessed, and a signal is answered while waiting. As in
    training a wish of one rank to stop is one of all: they stop after the video they are at.
    """

    LOOK_S = 0.5
    _numbers = itertools.count()  # one prediction after the other in a process: each has keys of its own

    def __init__(self) -> None:
        self._store = distributed.side_store(f"predict/{next(self._numbers)}")
        self._looked = time.monotonic()
        self._stopping = False

    def ended(self, stop: bool) -> bool:
        """Whether this rank is to stop, or another one stops or has failed; asks those at most twice a second."""
        if stop:
            self._stop()
            return True
        if self._store is None or time.monotonic() - self._looked < self.LOOK_S:
            return False
        self._looked = time.monotonic()
        return bool(self._store.check(["ended"]))

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            if self._store is not None:
                self._store.set("stopped", "1")
                self._store.set("ended", "1")

    def wait(self, error: BaseException | None, stop: Callable[[], int] = lambda: 0) -> bool:
        """Tell the others how it went and wait for all of them; whether any of them was to stop."""
        if self._store is None:
            return self._stopping
        if error is not None:
            self._store.set("ended", "1")
        self._store.set(f"done/{distributed.rank()}", "1")
        names = [f"done/{rank}" for rank in range(distributed.world_size())]
        while not self._store.check(names):
            PROCESS.progress()  # waiting is not being stuck
            if stop():
                self._stop()
            time.sleep(0.02)
        distributed.barrier()  # a wish that came while others waited is seen by all
        return bool(self._store.check(["stopped"]))


def _open_together(task: Task, out: Path, kind: np.dtype[Any], *, overwrite: bool) -> part_files.Found:
    """Rank 0 looks at OUT and keeps the old parts; the others learn which videos are done."""
    marks, videos = task.fingerprint, len(task.head.ids)
    found = distributed.main_first(
        lambda: part_files.open_out(out, task.output, marks, kind, videos, overwrite=overwrite, say=say), lambda: None
    )
    complete, done = distributed.broadcast_object((found.complete, found.done) if found is not None else None)
    return found if found is not None else part_files.Found(complete=complete, parts=[], done=done)


def _gather_notes(result: Done) -> None:
    """Counts of all ranks, and the first damaged frames by name."""
    told = distributed.all_gather_objects((result.computed, result.damaged_frames, result.damage))
    result.computed = sum(computed for computed, _, _ in told)
    result.damaged_frames = sum(frames for _, frames, _ in told)
    result.damage = sorted(line for _, _, lines in told for line in lines)[:NAMED]


def _write_together(task: Task, out: Path, kind: np.dtype[Any], parts: list[part_files.Part], names: list[str]) -> None:
    """Write the whole file, on rank 0, from `parts` and the part files with the `names` of all ranks."""
    written = itertools.chain.from_iterable(distributed.all_gather_objects(names))
    path, meeting = out / task.output.name, Meeting()
    error: BaseException | None = None
    if distributed.is_main():
        try:
            parts = [*parts, *(part_files.read_part(out, name, kind) for name in written)]
            head, blocks = part_files.joined(parts, task.head, kind)
            task.output.write(path, head, blocks)
        except OSError as caught:
            error = UserError(f"cannot write {path}: {caught.strerror}; the parts beside it are kept, start it again")
            error.__cause__ = caught
        except Exception as caught:
            error = caught
    meeting.wait(error)  # rank 0 writes for as long as it takes
    distributed.raise_together(error)
