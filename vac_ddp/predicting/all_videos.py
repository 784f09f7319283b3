"""All views of all videos through the model: whole videos on every rank, saved as they are done, gathered by number."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vac_ddp.data.dataset import TestViews
from vac_ddp.data.loader import Loader, TestBatch, test_loader
from vac_ddp.errors import Interrupted, UserError
from vac_ddp.predicting import part_files
from vac_ddp.predicting.task import Task
from vac_ddp.results.logits_file import NAME, write_views
from vac_ddp.runtime import distributed
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.scoring.forward import Scored, Scorer, scored_videos
from vac_ddp.scoring.views import deal

CHUNK_BYTES = 64 << 20  # logits that rank 0 holds at a time while it writes the views file
NAMED = 20  # damaged frames that are named one by one


@dataclass(kw_only=True)
class Done:
    """How a prediction went, on rank 0; counts are of all ranks, times of this one."""

    path: Path
    computed: int = 0
    reused: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    damaged_frames: int = 0
    damage: list[str] = field(default_factory=list)


def predict_views(
    task: Task,
    scorer: Scorer,
    dataset: TestViews,
    out: Path,
    *,
    workers: int,
    prefetch: int,
    save_every: int,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Done:
    """Score every video of `dataset` (item i is video i of the task) and write OUT/views.npz; called by all ranks.

    What an earlier, killed run of any world size left in OUT/parts is not computed again; a complete views file is kept
    as it is. Raises UserError where OUT holds another prediction, and Interrupted, with what is finished saved, where
    `stop()` says so. `progress` is told how many of this rank's videos are done.
    """
    kind = part_files.record_type(len(task.head.views), len(task.head.classes))
    found = _open_together(task, out, kind, overwrite=overwrite, say=say)
    result = Done(path=out / NAME, reused=len(found.done))
    if found.complete:
        part_files.drop_parts(out)
        return result
    todo = np.setdiff1d(np.arange(len(task.head.ids)), found.done)
    own = todo[deal(task.costs[todo], distributed.world_size())[distributed.rank()]]
    finished = found.parts
    meeting = Meeting()
    loader = test_loader(
        dataset,
        own.tolist(),
        videos_per_batch=1,
        workers=workers,
        prefetch=prefetch,
        pin=scorer.device.type == "cuda",
    )
    waiting: list[Scored] = []
    clock = Clock()

    def save() -> None:
        if waiting:
            finished.append(part_files.save_part(out, _records(waiting, kind, task.prior)))
            waiting.clear()

    error: BaseException | None = None
    try:
        try:
            for video in scored_videos(scorer, _videos(loader, clock, result)):
                waiting.append(_finite(video, task.head.ids, result))
                result.computed += 1
                progress(result.computed, len(own))
                if len(waiting) >= save_every:
                    save()
                PROCESS.progress()
                if meeting.ended(stop()):
                    break
        finally:
            loader.close()
            save()
    except OSError as caught:
        error = UserError(f"cannot save to {out}: {caught.strerror}; what is saved is kept, start it again")
    except Exception as caught:
        error = caught
    stopped = meeting.wait(error, stop)
    distributed.raise_together(error)
    if stopped:
        raise Interrupted("stopped; the videos that are finished are saved, start it again to go on")
    result.seconds, result.waited = clock.seconds(), clock.waited
    _gather_notes(result)
    _write_together(task, finished, kind, result.path)
    finished.clear()
    distributed.barrier()
    part_files.drop_parts(out)
    return result


def _videos(loader: Loader, clock: Clock, result: Done) -> Iterator[tuple[TestBatch, int]]:
    """Batches of one video with the number of its damaged frames, which are named in `result`."""
    for batch in clock.waiting_for(loader):
        damaged = loader.damaged - result.damaged_frames
        result.damaged_frames = loader.damaged
        result.damage += batch.damage[: NAMED - len(result.damage)]
        yield batch, damaged


# ---------------------------------------------------------------- the ranks together


class Clock:
    """Seconds since the first item was asked for, and how many of them went into waiting for items."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._start = time.perf_counter()

    def waiting_for(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, with the time until each of them counted."""
        source = iter(items)
        while True:
            asked = time.perf_counter()
            item = next(source, None)
            self.waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


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
        return self._store.check(["ended"])

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            if self._store is not None:
                self._store.set("stopped", "1")
                self._store.set("ended", "1")

    def wait(self, error: BaseException | None, stop: Callable[[], bool]) -> bool:
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
        return self._store.check(["stopped"])


def _open_together(
    task: Task, out: Path, kind: np.dtype[Any], *, overwrite: bool, say: Callable[[str], None]
) -> part_files.Found:
    """Rank 0 looks at OUT and keeps the old parts; the others learn which videos are done."""
    found, error = None, None
    if distributed.is_main():
        try:
            found = part_files.open_out(out, task.fingerprint, kind, len(task.head.ids), overwrite=overwrite, say=say)
        except Exception as caught:
            error = caught
    distributed.raise_together(error)
    complete, done = distributed.broadcast_object((found.complete, found.done) if found is not None else None)
    return found if found is not None else part_files.Found(complete=complete, parts=[], done=done)


def _finite(video: Scored, ids: list[str], result: Done) -> Scored:
    """The video, without its logits where one of them is not finite: that is named, and the class prior answers."""
    if video.logits is None or np.isfinite(video.logits).all():
        return video
    if len(result.damage) < NAMED:
        result.damage.append(f"{ids[video.video]}: its logits are not finite; try train.precision=fp32")
    return replace(video, logits=None)


def _records(videos: list[Scored], kind: np.dtype[Any], prior: np.ndarray) -> np.ndarray:
    """Scored videos as records; where nothing could be decoded every view says the class prior."""
    records = np.zeros(len(videos), kind)
    for record, video in zip(records, videos, strict=True):
        record["video"] = video.video
        record["damaged"] = video.damaged
        record["failed"] = video.logits is None
        record["logits"] = prior if video.logits is None else video.logits
    return records


def _gather_notes(result: Done) -> None:
    """Counts of all ranks, and the first damaged frames by name."""
    told = distributed.all_gather_objects((result.computed, result.damaged_frames, result.damage))
    result.computed = sum(computed for computed, _, _ in told)
    result.damaged_frames = sum(frames for _, frames, _ in told)
    result.damage = sorted(line for _, _, lines in told for line in lines)[:NAMED]


def _write_together(task: Task, finished: list[np.ndarray], kind: np.dtype[Any], path: Path) -> None:
    """Gather chunk by chunk and write the views file on rank 0. An error there ends all ranks, at the next chunk."""
    videos = np.concatenate([np.asarray(p["video"]) for p in finished] or [np.zeros(0, np.int64)])
    notes = np.concatenate(
        [np.stack([p["damaged"], p["failed"]], axis=1) for p in finished] or [np.zeros((0, 2), np.int64)]
    )
    gathered = distributed.gather_rows(torch.from_numpy(videos), torch.from_numpy(notes), total=len(task.head.ids))
    chunks = _chunks(task, finished, videos, kind)
    error: BaseException | None = None
    if gathered is not None:
        task.head.damaged, task.head.failed = gathered[:, 0].numpy(), gathered[:, 1].numpy().astype(bool)
        try:
            write_views(path, task.head, chunks)
        except OSError as caught:
            error = UserError(f"cannot write {path}: {caught.strerror}; the parts beside it are kept, start it again")
            error.__cause__ = caught
        except Exception as caught:
            error = caught
    else:
        for _ in chunks:
            pass
    distributed.raise_together(error)


def _chunks(task: Task, finished: list[np.ndarray], videos: np.ndarray, kind: np.dtype[Any]) -> Iterator[np.ndarray]:
    """Logits (c, n, K) of the videos in order, on rank 0; on other ranks the same collectives and empty chunks."""
    total = len(task.head.ids)
    step = max(1, CHUNK_BYTES // kind.itemsize)
    order = np.argsort(videos, kind="stable")
    ranked = videos[order]
    part_of = np.repeat(np.arange(len(finished)), [len(p) for p in finished])[order]
    row_of = np.concatenate([np.arange(len(p)) for p in finished] or [np.zeros(0, np.int64)])[order]
    for start in range(0, total, step):
        end = min(total, start + step)
        inside = slice(*np.searchsorted(ranked, [start, end]).tolist())
        rows = np.zeros((inside.stop - inside.start, *kind["logits"].shape), np.float32)
        for part in np.unique(part_of[inside]).tolist():
            mine = part_of[inside] == part
            rows[mine] = finished[part]["logits"][row_of[inside][mine]]
        distributed.raise_together(None)  # answers rank 0, should it have failed to write
        places = torch.from_numpy(ranked[inside] - start)
        chunk = distributed.gather_rows(places, torch.from_numpy(rows), total=end - start)
        yield rows[:0] if chunk is None else chunk.numpy()
