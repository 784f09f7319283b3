"""Loader processes, load batches, and their way to the device."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vac_ddp.data.augment import draw_parameters
from vac_ddp.data.dataset import TestViews, TrainClips
from vac_ddp.data.mixing import draw_mixing
from vac_ddp.data.sampler import StepSampler
from vac_ddp.data.sampling import MIX, generator
from vac_ddp.errors import UserError
from vac_ddp.settings import Config

NAMED = 50  # damaged frames that a rank names one by one
IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(kw_only=True)
class Batch:
    """The clips of one load batch of one rank: B clips, B >= 0.

    Rows stand in units: the two clips of a pair (clip r of draw a, clip r of draw b) are neighbours, so an even number
    of rows from an even start is whole pairs; a clip without a partner is among the last R rows.

    clips : (B, T, S, S, 3) uint8
    labels : (B,) int64
    samples : (B,) int64, sample numbers of the epoch
    videos : (B,) int64, numbers in the index
    noise : (B, n) float32 in [0, 1)
    params : name -> (B, ...): parameters of `augment_clips`; `partner` (B,) int64, the row a clip is mixed with or its
        own; and the parameters of `mix`
    units : (U, 2) int64, the rows of every pair, -1 for none
    damage : one line for every damaged frame that was met and replaced; a `Loader` names each once
    """

    clips: Tensor
    labels: Tensor
    samples: Tensor
    videos: Tensor
    noise: Tensor
    params: dict[str, Tensor]
    units: Tensor
    damage: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """What the step computes with on `device`; the parameters of `augment_clips` stay in host memory."""
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in ("clips", "labels", "noise")}
        params = {
            name: value.to(device, non_blocking=non_blocking) if _mixing(name) else value
            for name, value in self.params.items()
        }
        return replace(self, params=params, **moved)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory (called by the DataLoader's pinning thread)."""
        pinned = {n: getattr(self, n).pin_memory() for n in ("clips", "labels", "samples", "noise")}
        return replace(self, params={name: value.pin_memory() for name, value in self.params.items()}, **pinned)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors."""
        yield from (value for value in vars(self).values() if isinstance(value, Tensor))
        yield from self.params.values()

    def __getstate__(self) -> dict[str, Any]:
        """Only the clips travel through shared memory: every shared tensor costs a file descriptor."""
        state = {**vars(self), "params": {name: value.numpy() for name, value in self.params.items()}}
        return {name: v.numpy() if isinstance(v, Tensor) and name != "clips" else v for name, v in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["params"] = {name: torch.from_numpy(value) for name, value in state["params"].items()}
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


def _mixing(name: str) -> bool:
    return name == "partner" or name.startswith("mix_")


@dataclass(kw_only=True)
class TestBatch:
    """The views of N scored videos.

    clips : (N, K * crops, T, S, S, 3) uint8, window k and crop c at k * crops + c
    places : (N,) int64, places in the data set (`TestViews.videos[place]` is the number in the index)
    videos : (N,) int64, numbers in the index
    labels : (N,) int64, -1 where there is none
    decoded : (N,) bool, False: no frame of the video could be decoded, its clips are zero
    damage : one line for every damaged frame that was met; a `Loader` names each once
    """

    __test__ = False

    clips: Tensor
    places: Tensor
    videos: Tensor
    labels: Tensor
    decoded: Tensor
    damage: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> TestBatch:
        """The clips on `device`, the rest stays in host memory."""
        return replace(self, clips=self.clips.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TestBatch:
        """The same with the clips in page-locked memory."""
        return replace(self, clips=self.clips.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors."""
        yield from (value for value in vars(self).values() if isinstance(value, Tensor))


@dataclass(frozen=True, kw_only=True)
class CollateTrain:
    """Items of `TrainClips`, in units of two (the last may be one), to a Batch; no items make an empty one."""

    settings: Config
    seed: int
    noise_size: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> Batch:
        """Put the clips of a load batch together."""
        clip, augment = self.settings.clip, self.settings.augment
        if not items:
            return self._empty()
        rows: list[tuple[int, int]] = []  # item, clip of the item
        units: list[tuple[int, int]] = []
        mixing: list[dict[str, np.ndarray]] = []
        for first in range(0, len(items), 2):
            members = range(first, min(first + 2, len(items)))
            start = int(items[first]["samples"][0])
            drawn = draw_mixing(generator(self.seed, items[first]["epoch"], start, MIX), augment, size=clip.size)
            for r in range(augment.repeats):
                units.append((len(rows), len(rows) + 1 if len(members) == 2 else -1))
                rows.extend((i, r) for i in members)
                mixing.extend(drawn for _ in members)
        partner = np.arange(len(rows))
        for a, b in units:
            if b >= 0:
                partner[[a, b]] = b, a

        def gather(name: str) -> Tensor:
            return torch.stack([items[i][name][r] for i, r in rows])

        params = {name: torch.stack([items[i]["params"][name][r] for i, r in rows]) for name in items[0]["params"]}
        params |= {name: torch.from_numpy(np.stack([m[name] for m in mixing])) for name in mixing[0]}
        return Batch(
            clips=default_collate([items[i]["clips"][r] for i, r in rows]),  # in a loader process: into shared memory
            labels=gather("labels"),
            samples=gather("samples"),
            videos=torch.tensor([items[i]["video"] for i, _ in rows], dtype=torch.int64),
            noise=gather("noise"),
            params=params | {"partner": torch.from_numpy(partner)},
            units=torch.tensor(units, dtype=torch.int64),
            damage=[line for item in items for line in item["damage"]],
        )

    def _empty(self) -> Batch:
        clip, augment = self.settings.clip, self.settings.augment
        rng = generator(0, 0, 0)
        drawn = draw_parameters(rng, augment, frames=clip.frames, size=clip.size)
        drawn |= draw_mixing(rng, augment, size=clip.size)
        none = torch.empty(0, dtype=torch.int64)
        return Batch(
            clips=torch.empty((0, clip.frames, clip.size, clip.size, 3), dtype=torch.uint8),
            labels=none,
            samples=none.clone(),
            videos=none.clone(),
            noise=torch.empty((0, self.noise_size), dtype=torch.float32),
            params={name: torch.from_numpy(value[None][:0].copy()) for name, value in drawn.items()}
            | {"partner": none.clone()},
            units=torch.empty((0, 2), dtype=torch.int64),
        )


def collate_test(items: Sequence[dict[str, Any]]) -> TestBatch:
    """Items of `TestViews` to a TestBatch."""
    return TestBatch(
        clips=default_collate([item["clips"] for item in items]),
        places=torch.tensor([item["place"] for item in items], dtype=torch.int64),
        videos=torch.tensor([item["video"] for item in items], dtype=torch.int64),
        labels=torch.tensor([item["label"] for item in items], dtype=torch.int64),
        decoded=torch.tensor([item["decoded"] for item in items], dtype=torch.bool),
        damage=[line for item in items for line in item["damage"]],
    )


def start_worker(_: int) -> None:
    """Set up a loader process: the rank decides when it ends, not a signal to the process group; one thread."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def worker_count(setting: int | None, *, local_ranks: int) -> int:
    """Loader processes of one rank: the setting, or the cores this machine gives it, at most 16, at least 1."""
    if setting is not None:
        return setting
    return max(1, min(16, len(os.sched_getaffinity(0)) // local_ranks))


class Loader:
    """A DataLoader whose processes ignore signals, so that it must be, and is, closed before the program ends.

    A damaged frame is named in the first batch that meets it and in no other; `damaged` counts them. After
    `NAMED` names one line says that the others are only counted.
    """

    def __init__(self, dataset: Dataset, *, workers: int, prefetch: int, pin: bool, **options: Any) -> None:
        extra: dict[str, Any] = {}
        if workers:
            extra = {
                "prefetch_factor": prefetch,
                "persistent_workers": True,
                "worker_init_fn": start_worker,
                "multiprocessing_context": multiprocessing.get_context("fork"),
            }
        self._loader = DataLoader(dataset, num_workers=workers, pin_memory=pin, **options, **extra)
        self._iterator: Any = None
        self._met: set[str] = set()
        reference = weakref.ref(self)
        atexit.register(lambda: (alive := reference()) and alive.close())

    @property
    def damaged(self) -> int:
        """Damaged frames met so far, each counted once."""
        return len(self._met)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._iterator = iter(self._loader)
        while True:
            try:
                batch = next(self._iterator)
            except StopIteration:
                return
            except UserError as error:
                raise UserError(_one_line(error)) from None
            batch.damage = [line for name in batch.damage for line in self._note(name)]
            yield batch

    def _note(self, name: str) -> list[str]:
        if name in self._met:
            return []
        self._met.add(name)
        if len(self._met) == NAMED + 1:
            return [f"more than {NAMED} damaged frames: from here on they are only counted, `vac audit` lists them"]
        return [f"damaged frame {name}"] if len(self._met) <= NAMED else []

    def close(self) -> None:
        """End the loader processes."""
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
        self._iterator = None


def _one_line(error: UserError) -> str:
    """The message of an error that a loader process wrapped into its traceback."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")


def train_loader(dataset: TrainClips, sampler: StepSampler, *, workers: int, pin: bool = False) -> Loader:
    """Batches of training clips in the order of `sampler`, whose `set_epoch` decides what an iteration yields."""
    settings = dataset.settings
    collate = CollateTrain(settings=settings, seed=dataset.seed, noise_size=dataset.noise_size)
    return Loader(
        dataset,
        workers=workers,
        prefetch=settings.data.prefetch,
        pin=pin,
        batch_sampler=sampler,
        collate_fn=collate,
    )


def test_loader(
    dataset: TestViews, places: Sequence[int], *, videos_per_batch: int, workers: int, prefetch: int, pin: bool
) -> Loader:
    """TestBatches of the videos at `places` in `dataset`, in this order, the last one may be smaller."""
    ordered = [int(place) for place in places]
    batches = [ordered[i : i + videos_per_batch] for i in range(0, len(ordered), videos_per_batch)]
    return Loader(dataset, workers=workers, prefetch=prefetch, pin=pin, batch_sampler=batches, collate_fn=collate_test)


test_loader.__test__ = False  # pytest takes imported functions of this name for tests


_AnyBatch = TypeVar("_AnyBatch", Batch, TestBatch)


def to_device(batches: Iterable[_AnyBatch], device: torch.device) -> Iterator[_AnyBatch]:
    """The batches on `device`. On CUDA the next one is copied on a stream of its own while this one is worked on."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)
    ahead: tuple[_AnyBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device, non_blocking=True)
            done = copying.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = (moved, done)
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: _AnyBatch, done: torch.cuda.Event, device: torch.device) -> _AnyBatch:
    working = torch.cuda.current_stream(device)
    working.wait_event(done)
    for tensor in batch.tensors():
        if tensor.is_cuda:
            tensor.record_stream(working)  # its memory is not given to the next copy while it is read
    return batch
