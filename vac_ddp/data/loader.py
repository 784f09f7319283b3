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
from vac_ddp.data.loader_memory import LoaderMemory
from vac_ddp.data.loader_processes import LoaderContext, ignore_signals
from vac_ddp.data.sampler import StepSampler
from vac_ddp.data.slots import Slots, use_slots
from vac_ddp.errors import UserError
from vac_ddp.runtime.host_memory import GIB, memory_limit
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


def worker_count(setting: int | None, *, local_ranks: int) -> int:
    """Loader processes of one rank: the setting, or the cores this machine gives it, at most 16, at least 1."""
    if setting is not None:
        return setting
    return max(1, min(16, len(os.sched_getaffinity(0)) // local_ranks))


class Loader:
    """A DataLoader whose processes ignore signals, so that it must be, and is, closed before the program ends.

    `dataset.__getitems__(keys)` makes a batch of each list of keys that `batches` yields. A damaged frame is named in
    the first batch that meets it and in no other; `damaged` counts them; after `named` names one line says that the
    others are only counted. `memory` says how large batches are and how many the rank holds; more, or larger ones,
    come through the pipe, which is slower. `prefetch` may become less so that they fit into the `room` bytes that the
    rank has.
    """

    def __init__(
        self,
        dataset: TrainClips | TestViews,
        batches: Iterable[list[Any]],
        *,
        memory: LoaderMemory,
        prefetch: int,
        room: int | None,
        named: int | None,
    ) -> None:
        extra: dict[str, Any] = {}
        self.workers, pin = memory.workers, memory.pin
        self.prefetch = memory.prefetch(prefetch, memory_limit() if room is None else room)
        self.host_bytes = memory.needed(self.prefetch)  # at most
        if self.workers:
            slots = Slots(workers=self.workers, each=memory.slots(self.prefetch), size=memory.batch_bytes)
            extra = {
                "prefetch_factor": self.prefetch,
                "persistent_workers": True,
                "worker_init_fn": functools.partial(start_worker, slots=slots),
                "multiprocessing_context": LoaderContext(),
            }
        self._loader: DataLoader[Any] = DataLoader(
            _Told(dataset),
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=pin,
            generator=torch.Generator(),  # that of torch is saved in checkpoints: nothing is drawn from it here
            **extra,
        )
        self._running: list[Any] = []
        self._begun: Any = None  # an iteration whose batches nobody has asked for yet
        self._dataset = dataset
        self._met: set[str] = set()  # damaged frames
        self._videos: set[str] = set()  # of these frames
        self._named = named
        if not self.workers:
            return
        weakref.finalize(self, _shut_down, self._running).atexit = False
        atexit.register(_shut_down, self._running)  # before multiprocessing would wait for them for ever

    @property
    def damaged(self) -> int:
        """Damaged frames met so far, each counted once."""
        return len(self._met)

    def __len__(self) -> int:
        return len(self._loader)

    def start(self) -> None:
        """Let the loader processes begin with the batches of the next iteration, which then takes these."""
        self._begun = iter(self._loader)
        self._running[:] = [self._begun]

    def __iter__(self) -> Iterator[Any]:
        if self._begun is None:
            self.start()
        batches, self._begun = self._begun, None
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
        self._begun = None
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


def train_loader(
    dataset: TrainClips, sampler: StepSampler, *, workers: int, pin: bool, room: int | None = None
) -> Loader:
    """Batches of training clips in the order of `sampler`, whose `set_epoch` decides what an iteration yields.

    room: bytes of memory that this rank may have; by itself all that the machine allows.
    """
    clip, repeats = dataset.settings.clip, dataset.settings.augment.repeats
    return Loader(
        dataset,
        sampler,
        memory=LoaderMemory(
            batch_bytes=min(sampler.units_per_load * 2, sampler.draws_per_step) * repeats * clip_bytes(clip),
            workers=workers,
            held=2 * sampler.loads_of_step(0),  # of a step, and of the one before until it is let go
            pin=pin,
        ),
        prefetch=dataset.settings.data.prefetch,
        room=room,
        named=NAMED,
    )


def loaders_line(loaders: Sequence[Loader]) -> str:
    """One line on the loaders of a rank, of which the first is that of training: processes, batches, memory."""
    workers, prefetch = loaders[0].workers, loaders[0].prefetch
    gib = sum(loader.host_bytes for loader in loaders) / GIB
    return (
        f"{workers} loader process{'es' if workers > 1 else ''}, up to {prefetch} load batch"
        f"{'es' if prefetch > 1 else ''} under way each; at most {gib:.2f} GiB of host memory per rank"
    )


def clip_bytes(clip: ClipSettings) -> int:
    """Bytes of one clip."""
    return clip.frames * clip.size * clip.size * 3


def views_loader(
    dataset: TestViews,
    places: Sequence[int],
    *,
    videos_per_batch: int,
    workers: int,
    prefetch: int,
    pin: bool,
    room: int | None = None,
) -> Loader:
    """TestBatches of the videos at `places` in `dataset`, in this order, the last one may be smaller.

    room: bytes of memory that this rank may have for them; by itself all that the machine allows.
    """
    ordered = [int(place) for place in places]
    batches = [ordered[i : i + videos_per_batch] for i in range(0, len(ordered), videos_per_batch)]
    views = dataset.views
    clips = window_count(views) * views.crops * videos_per_batch
    return Loader(
        dataset,
        batches,
        memory=LoaderMemory(
            batch_bytes=clips * clip_bytes(dataset.clip),
            workers=workers,
            held=max(2, 16 // videos_per_batch),  # clips wait for a pass to be full
            pin=pin,
        ),
        prefetch=prefetch,
        room=room,
        named=None,
    )


_AnyBatch = TypeVar("_AnyBatch", Batch, TestBatch)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of this process on which batches are copied to a CUDA device: one, as each keeps memory of its own."""
    return torch.cuda.Stream(device)


def to_device(batches: Iterable[_AnyBatch], device: torch.device) -> Iterator[_AnyBatch]:
    """The batches on `device`.

    On CUDA they are copied on a stream of their own: the host runs ahead, so a batch travels (from pinned memory) while
    the device still computes with the one before.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = copy_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device, non_blocking=True)
        working = torch.cuda.current_stream(device)
        working.wait_stream(copying)
        for tensor in moved.tensors():
            if tensor.is_cuda:
                tensor.record_stream(working)  # its memory is not given to the next copy while it is read
        yield moved
