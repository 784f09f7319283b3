"""Loader processes, load batches, and their way to the device."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vac_ddp.data.batch import Batch, TestBatch
from vac_ddp.data.clip_sampling import window_count
from vac_ddp.data.dataset import TestViews, TrainClips, damage_line
from vac_ddp.data.loader_processes import LoaderContext, ignore_signals
from vac_ddp.data.sampler import StepSampler
from vac_ddp.data.slots import Slots, use_slots
from vac_ddp.errors import UserError
from vac_ddp.runtime.parent import signal_when_parent_dies
from vac_ddp.runtime.torch_compat import end_workers
from vac_ddp.settings import ClipSettings

NAMED = 50  # videos with damaged frames that a rank names one by one


def start_worker(worker: int, *, slots: Slots) -> None:
    """Set up a loader process: its rank decides when it ends, not a signal to the process group; one thread."""
    use_slots(slots, worker)
    signal.set_wakeup_fd(-1)  # of the rank that was forked
    ignore_signals()
    _die_with_parent()
    torch.set_num_threads(1)


def _die_with_parent() -> None:
    """Let the kernel kill this process when its rank is gone.

    Without it, one whose pipe is full of batches waits for a reader for ever: it holds the reading end itself.
    """
    signal_when_parent_dies(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it went before we asked
        os._exit(1)


def check_memory(batch_bytes: int, *, workers: int, prefetch: int, memory: int) -> None:
    """Refuse loader processes whose batches on their way are more than the `memory` bytes of the machine."""
    needed = batch_bytes * workers * prefetch
    if needed > memory:
        raise UserError(
            f"{workers} loader processes with {prefetch} batches each need {needed >> 20} MiB of memory, the machine "
            f"has {memory >> 20} MiB: lower data.workers or data.prefetch"
        )


def worker_count(setting: int | None, *, local_ranks: int) -> int:
    """Loader processes of one rank: the setting, or the cores this machine gives it, at most 16, at least 1."""
    if setting is not None:
        return setting
    return max(1, min(16, len(os.sched_getaffinity(0)) // local_ranks))


class Loader:
    """A DataLoader whose processes ignore signals, so that it must be, and is, closed before the program ends.

    `dataset.__getitems__(keys)` makes a batch of each list of keys that `batches` yields. A damaged frame is named in
    the first batch that meets it and in no other; `damaged` counts them; after `named` names one line says that the
    others are only counted. `batch_bytes` is what the clips of a batch take, `held` how many batches the rank needs
    at a time; more, or larger ones, come through the pipe, which is slower.
    """

    def __init__(
        self,
        dataset: TrainClips | TestViews,
        batches: Iterable[list[Any]],
        *,
        workers: int,
        prefetch: int,
        pin: bool,
        batch_bytes: int,
        held: int,
        named: int | None,
    ) -> None:
        extra: dict[str, Any] = {}
        if workers:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            check_memory(batch_bytes, workers=workers, prefetch=prefetch, memory=memory)
            # A process has up to `prefetch` batches under way beside those that the rank holds.
            slots = Slots(workers=workers, each=prefetch + 1 + -(-held // workers), size=batch_bytes)
            extra = {
                "prefetch_factor": prefetch,
                "persistent_workers": True,
                "worker_init_fn": functools.partial(start_worker, slots=slots),
                "multiprocessing_context": LoaderContext(),
            }
        self._loader: DataLoader[Any] = DataLoader(
            _Told(dataset), batch_sampler=batches, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin, **extra
        )
        self._running: list[Any] = []
        self._dataset = dataset
        self._met: set[str] = set()  # damaged frames
        self._videos: set[str] = set()  # of these frames
        self._named = named
        weakref.finalize(self, _shut_down, self._running).atexit = False
        atexit.register(_shut_down, self._running)  # before multiprocessing would wait for them for ever

    @property
    def damaged(self) -> int:
        """Damaged frames met so far, each counted once."""
        return len(self._met)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        self._running[:] = [batches]
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            if isinstance(batch, UserError):
                raise batch
            batch.damage = self._note(batch)
            yield batch

    def _note(self, batch: Batch | TestBatch) -> list[str]:
        """One line for each video whose first damaged frames are in `batch`, with their number."""
        new: dict[str, list[str]] = {}
        for line in batch.damage:
            if line not in self._met:
                self._met.add(line)
                new.setdefault(self._video_of(line, batch), []).append(line)
        lines = []
        for video, frames in new.items():
            if video in self._videos:
                continue
            self._videos.add(video)
            if self._named is None or len(self._videos) <= self._named:
                lines.append(damage_line(video, frames))
            elif len(self._videos) == self._named + 1:
                lines.append(
                    f"more than {self._named} videos have damaged frames: the others are only counted, "
                    "`vac audit` lists them"
                )
        return lines

    def _video_of(self, line: str, batch: Batch | TestBatch) -> str:
        names = (self._dataset.index.names[video] for video in np.unique(batch.videos.numpy()).tolist())
        return max((name for name in names if line.startswith(f"{name}/")), key=len)

    def close(self) -> None:
        """End the loader processes."""
        _shut_down(self._running)


def _shut_down(running: list[Any]) -> None:
    while running:
        end_workers(running.pop())


class _Told(Dataset[Any]):
    """A data set whose user errors are values: the DataLoader would raise them with a traceback in their text."""

    def __init__(self, dataset: TrainClips | TestViews) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, keys: list[Any]) -> Batch | TestBatch | UserError:
        try:
            return self._dataset.__getitems__(keys)
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def train_loader(dataset: TrainClips, sampler: StepSampler, *, workers: int, pin: bool) -> Loader:
    """Batches of training clips in the order of `sampler`, whose `set_epoch` decides what an iteration yields."""
    clip, repeats = dataset.settings.clip, dataset.settings.augment.repeats
    return Loader(
        dataset,
        sampler,
        workers=workers,
        prefetch=dataset.settings.data.prefetch,
        pin=pin,
        batch_bytes=min(sampler.units_per_load * 2, sampler.draws_per_step) * repeats * clip_bytes(clip),
        held=2 * sampler.loads_of_step(0),  # of a step, and of the one before until it is let go
        named=NAMED,
    )


def clip_bytes(clip: ClipSettings) -> int:
    """Bytes of one clip."""
    return clip.frames * clip.size * clip.size * 3


def views_loader(
    dataset: TestViews, places: Sequence[int], *, videos_per_batch: int, workers: int, prefetch: int, pin: bool
) -> Loader:
    """TestBatches of the videos at `places` in `dataset`, in this order, the last one may be smaller."""
    ordered = [int(place) for place in places]
    batches = [ordered[i : i + videos_per_batch] for i in range(0, len(ordered), videos_per_batch)]
    views = dataset.views
    clips = window_count(views) * views.crops * videos_per_batch
    return Loader(
        dataset,
        batches,
        workers=workers,
        prefetch=prefetch,
        pin=pin,
        batch_bytes=clips * clip_bytes(dataset.clip),
        held=16,  # clips wait for a pass to be full
        named=None,
    )


_AnyBatch = TypeVar("_AnyBatch", Batch, TestBatch)


def to_device(batches: Iterable[_AnyBatch], device: torch.device) -> Iterator[_AnyBatch]:
    """The batches on `device`.

    On CUDA they are copied on a stream of their own: the host runs ahead, so a batch travels (from pinned memory) while
    the device still computes with the one before.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device, non_blocking=True)
        working = torch.cuda.current_stream(device)
        working.wait_stream(copying)
        for tensor in moved.tensors():
            if tensor.is_cuda:
                tensor.record_stream(working)  # its memory is not given to the next copy while it is read
        yield moved
