"""Which videos make the batch of a step, and which of them this rank loads.

An epoch is a list of draws; step s takes V of them; consecutive draws of a step are a unit; unit u goes to rank
u % W. The planning functions are pure: the global batch depends on (seed, epoch, step) alone, the ranks only share
it out. Nothing is padded and nothing dropped: the last step of an epoch may be short (or all of them a
little, if asked for), a rank may get nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from vac_ddp.data.clip_sampling import ORDER, generator
from vac_ddp.errors import UserError


class Key(NamedTuple):
    """What a loader process needs to make the clips of one draw."""

    epoch: int
    draw: int
    video: int


def epoch_draws(
    seed: int, epoch: int, videos: np.ndarray, *, balance: str = "none", labels: np.ndarray | None = None
) -> np.ndarray:
    """The video of every draw of an epoch, (D,) int64; D is the number of training videos, balanced or not.

    balance="none": a permutation of `videos` (V,).
    balance="class": every class equally often (to one draw), by `labels` (V,), the class of each of `videos`. The
    classes come in random rounds, within a class its videos in random rounds: videos of a small class come several
    times, of a large class a random part comes, another one in the next epoch.
    Neighbouring draws are always different videos, so the two of a unit are.
    """
    videos = np.asarray(videos, dtype=np.int64)
    rng = generator(seed, epoch, 0, ORDER)
    if balance == "none":
        return rng.permutation(videos)
    if labels is None or len(labels) != len(videos):
        raise ValueError("balance=class needs the label of every video")
    classes = np.unique(labels)
    if len(classes) < 2:
        return rng.permutation(videos)
    rounds = -(-len(videos) // len(classes))
    order = _rounds(classes, rounds * len(classes), rng)[: len(videos)]
    draws = np.empty(len(videos), dtype=np.int64)
    for label in classes:
        places = np.flatnonzero(order == label)
        draws[places] = _rounds(videos[labels == label], len(places), rng)
    return draws


def _rounds(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` values in random rounds of all of them; neighbours differ where there are two values or more."""
    parts: list[np.ndarray] = []
    for _ in range(-(-count // len(values))):
        part = rng.permutation(values)
        if parts and len(part) > 1 and part[0] == parts[-1][-1]:
            part[[0, -1]] = part[[-1, 0]]
        parts.append(part)
    return np.concatenate(parts)[:count] if parts else values[:0]


def steps_of_epoch(draws: int, draws_per_step: int) -> int:
    """Optimizer steps of an epoch of `draws` draws; the last one takes what is left."""
    return -(-draws // draws_per_step)


def step_range(step: int, draws: int, draws_per_step: int, *, even: bool = False) -> tuple[int, int]:
    """The first draw number of a step and that of the next; `even`: steps differ by one draw, none is short."""
    if even:
        steps = steps_of_epoch(draws, draws_per_step)
        return step * draws // steps, (step + 1) * draws // steps
    return step * draws_per_step, min((step + 1) * draws_per_step, draws)


def step_units(step: int, draws: int, draws_per_step: int, *, even: bool = False) -> list[tuple[int, ...]]:
    """The units of one step: pairs of consecutive draw numbers, the last may be a single one."""
    first, end = step_range(step, draws, draws_per_step, even=even)
    return [tuple(range(d, min(d + 2, end))) for d in range(first, end, 2)]


def rank_units(units: Sequence[tuple[int, ...]], rank: int, world: int) -> list[tuple[int, ...]]:
    """The units that rank `rank` of `world` takes: unit u goes to rank u % W."""
    return list(units[rank::world])


def load_batches(units: Sequence[tuple[int, ...]], units_per_load: int) -> list[list[int]]:
    """Draw numbers of one rank and step in load batches of whole units; no units make one empty load batch.

    As few batches as hold them at `units_per_load` units each, which then differ by one unit at most.
    """
    if not units:
        return [[]]
    count = -(-len(units) // units_per_load)
    ends = [len(units) * i // count for i in range(count + 1)]
    return [[draw for unit in units[a:b] for draw in unit] for a, b in itertools.pairwise(ends)]


def clips_of_rank(draws: int, repeats: int, world: int) -> int:
    """Clips of a step of `draws` draws that the rank with most of them gets: whole units of two draws."""
    units = -(-draws // 2)
    single = draws % 2 == 1 and (units - 1) % world == 0  # the last unit, of one draw, goes to the rank with most units
    return (2 * -(-units // world) - single) * repeats


def equal_pieces(clips: int, fit: int, repeats: int) -> int:
    """Clips of each piece where `clips` clips of a rank go through the model in as few pieces as fit, nearly equal.

    The largest of them: pieces are whole units of 2 x `repeats` clips, dealt by `load_batches`. Where not even one unit
    fits, equal parts of it.
    """
    unit = 2 * repeats
    if fit < unit:
        return -(-unit // -(-unit // fit))
    units = -(-clips // unit)
    pieces = -(-units // (fit // unit))
    return -(-units // pieces) * unit


class StepSampler(DistributedSampler):
    """Batch sampler of the load batches (lists of :class:`Key`) that this rank needs, step after step.

    For `DataLoader(batch_sampler=...)`. Rank and world size are given, no process group is asked. `set_epoch(epoch,
    start_step=s)` before every epoch; a resumed run names the step of the epoch that comes next. Of step s the next
    `loads_of_step(s)` load batches are; a rank without a sample in a step gets exactly one, an empty one.

    Parameters
    ----------
    videos : (V,) integers
        Video numbers of the training part.
    labels : (V,) integers, optional
        Their classes, for balance="class".
    global_batch : int
        Clips of one step over all ranks, repeats counted; a multiple of `repeats`.
    clips_per_gpu : int
        Clips of one micro-batch; a load batch holds as many whole units as fit into it, at least one.
    repeats : int
        Clips made of every draw.
    even : bool
        Spread the draws of an epoch evenly over its steps, where the last step would be short otherwise.

    """

    def __init__(
        self,
        videos: Sequence[int] | np.ndarray,
        *,
        seed: int,
        global_batch: int,
        clips_per_gpu: int,
        rank: int,
        world: int,
        repeats: int = 1,
        balance: str = "none",
        labels: Sequence[int] | np.ndarray | None = None,
        even: bool = False,
    ) -> None:
        self.videos = np.asarray(videos, dtype=np.int64)
        everything: Any = self.videos  # the base class takes its length
        super().__init__(everything, num_replicas=world, rank=rank, shuffle=True, seed=seed, drop_last=False)
        if not len(self.videos):
            raise UserError("the training part holds no video: check data.train and data.val_fraction")
        if global_batch < repeats or global_batch % repeats:
            raise UserError(
                f"train.global_batch={global_batch} is no multiple of augment.repeats={repeats}: change one of them"
            )
        self.repeats = repeats
        self.balance = balance
        self.even = even
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.draws_per_step = global_batch // repeats
        self.units_per_load = max(1, clips_per_gpu // (2 * repeats))
        self.start_step = 0
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def draws_per_epoch(self) -> int:
        """Draws of an epoch: as many as there are training videos."""
        return len(self.videos)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, on every rank."""
        return steps_of_epoch(self.draws_per_epoch, self.draws_per_step)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Make the next iteration that of `epoch`, from its step `start_step` on."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"step {start_step} is not one of the {self.steps_per_epoch} of an epoch")
        super().set_epoch(epoch)
        self.start_step = start_step

    def samples_of_step(self, step: int) -> int:
        """Clips of the global batch of a step of the epoch, over all ranks."""
        first, end = step_range(step, self.draws_per_epoch, self.draws_per_step, even=self.even)
        return (end - first) * self.repeats

    def loads_of_step(self, step: int) -> int:
        """Load batches that this rank gets for a step of the epoch, at least one."""
        return max(1, -(-len(self._units(step)) // self.units_per_load))

    def step_loads(self, step: int) -> list[list[Key]]:
        """The load batches of this rank for one step of the epoch that is set."""
        order = self._draws()
        return [
            [Key(self.epoch, draw, int(order[draw])) for draw in load]
            for load in load_batches(self._units(step), self.units_per_load)
        ]

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start_step, self.steps_per_epoch):
            yield from self.step_loads(step)

    def __len__(self) -> int:
        return sum(self.loads_of_step(step) for step in range(self.start_step, self.steps_per_epoch))

    def _units(self, step: int) -> list[tuple[int, ...]]:
        units = step_units(step, self.draws_per_epoch, self.draws_per_step, even=self.even)
        return rank_units(units, self.rank, self.num_replicas)

    def _draws(self) -> np.ndarray:
        if self._order is None or self._order[0] != self.epoch:
            draws = epoch_draws(self.seed, self.epoch, self.videos, balance=self.balance, labels=self.labels)
            self._order = (self.epoch, draws)
        return self._order[1]
