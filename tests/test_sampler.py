"""The global batch is a fact of (seed, epoch, step): the ranks only share it out, and every draw is used once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from vac_ddp.data.sampler import Key, StepSampler, epoch_draws, load_batches, rank_units, step_units
from vac_ddp.errors import UserError

plans = st.fixed_dictionaries(
    {
        "count": st.integers(1, 90),
        "repeats": st.integers(1, 4),
        "per_step": st.integers(1, 40),
        "clips_per_gpu": st.integers(1, 20),
        "world": st.integers(1, 9),
        "epoch": st.integers(0, 3),
        "balance": st.sampled_from(["none", "class"]),
        "even": st.booleans(),
    }
)


def samplers(plan: dict, *, world: int | None = None, start_step: int = 0, seed: int = 5) -> list[StepSampler]:
    world = plan["world"] if world is None else world
    videos = 1000 + np.arange(plan["count"])
    made = [
        StepSampler(
            videos,
            seed=seed,
            global_batch=plan["per_step"] * plan["repeats"],
            clips_per_gpu=plan["clips_per_gpu"],
            rank=rank,
            world=world,
            repeats=plan["repeats"],
            balance=plan["balance"],
            labels=videos % 3,
            even=plan["even"],
        )
        for rank in range(world)
    ]
    for sampler in made:
        sampler.set_epoch(plan["epoch"], start_step=start_step)
    return made


def by_step(sampler: StepSampler, start_step: int = 0) -> list[list[list[Key]]]:
    """What a trainer reads: of every step its number of load batches, from one iteration."""
    loads = iter(sampler)
    steps = [
        [next(loads) for _ in range(sampler.loads_of_step(step))] for step in range(start_step, sampler.steps_per_epoch)
    ]
    assert next(loads, None) is None
    return steps


@settings(max_examples=200, deadline=None)
@given(plans)
def test_ranks_together_have_the_global_batch_of_one_rank(plan: dict) -> None:
    (single,) = samplers(plan, world=1)
    ranks = samplers(plan)
    expected = [sorted(key for load in step for key in load) for step in by_step(single)]
    parts = [by_step(sampler) for sampler in ranks]
    assert all(len(steps) == len(expected) for steps in parts)
    for step, whole in enumerate(expected):
        together = [key for steps in parts for load in steps[step] for key in load]
        assert sorted(together) == whole
        assert single.samples_of_step(step) == len(whole) * plan["repeats"]
        for sampler, steps in zip(ranks, parts, strict=True):
            mine = sum(len(load) for load in steps[step])
            assert sampler.samples_of_step(step) == single.samples_of_step(step)
            assert steps[step] == [[]] if mine == 0 else all(steps[step])
    draws = [key.draw for step in expected for key in step]
    assert sorted(draws) == list(range(plan["count"]))
    if plan["balance"] == "none":
        assert sorted(key.video for step in expected for key in step) == list(range(1000, 1000 + plan["count"]))


@settings(max_examples=100, deadline=None)
@given(plans)
def test_loads_are_whole_units_of_two_videos_that_fit(plan: dict) -> None:
    for sampler in samplers(plan):
        first = end = 0
        for step, loads in enumerate(by_step(sampler)):
            first, end = end, end + sampler.samples_of_step(step) // plan["repeats"]
            units = []
            for load in loads:
                assert len(load) * plan["repeats"] <= max(plan["clips_per_gpu"], 2 * plan["repeats"])
                assert all(key.epoch == plan["epoch"] for key in load)
                for a, b in zip(load[0::2], load[1::2], strict=False):
                    assert b.draw == a.draw + 1
                    assert (a.draw - first) % 2 == 0
                    assert a.video != b.video
                units += [(key.draw - first) // 2 for key in load[0::2]]
            assert all(unit % plan["world"] == sampler.rank for unit in units)
            singles = [load for load in loads if len(load) % 2]
            assert len(singles) <= 1
            assert not singles or singles[0] is loads[-1]


@settings(max_examples=100, deadline=None)
@given(plans, st.integers(0, 10**6))
def test_a_start_step_leaves_out_what_was_done_and_changes_nothing_else(plan: dict, number: int) -> None:
    start = number % (samplers(plan)[0].steps_per_epoch + 1)
    for whole, rest in zip(samplers(plan), samplers(plan, start_step=start), strict=True):
        assert by_step(rest, start) == by_step(whole)[start:]
        assert len(rest) == sum(len(step) for step in by_step(whole)[start:])


def test_resumed_with_another_world_size_the_rest_of_the_epoch_is_the_same() -> None:
    plan = {"count": 53, "repeats": 2, "per_step": 7, "clips_per_gpu": 4, "world": 3, "epoch": 2, "balance": "none"}
    plan["even"] = False
    before = [key for s in samplers(plan) for step in by_step(s)[:4] for load in step for key in load]
    after = [key for s in samplers(plan, world=5, start_step=4) for load in s for key in load]
    (single,) = samplers(plan, world=1)
    assert sorted(before + after) == sorted(key for load in single for key in load)


def test_the_plan_written_out() -> None:
    """11 draws, 5 a step, 2 ranks: units (0,1) (2,3) (4) | (5,6) (7,8) (9) | (10)."""
    assert [step_units(s, 11, 5) for s in range(3)] == [
        [(0, 1), (2, 3), (4,)],
        [(5, 6), (7, 8), (9,)],
        [(10,)],
    ]
    assert rank_units([(0, 1), (2, 3), (4,)], 0, 2) == [(0, 1), (4,)]
    assert rank_units([(0, 1), (2, 3), (4,)], 1, 2) == [(2, 3)]
    assert rank_units([(10,)], 1, 2) == []
    assert load_batches([(0, 1), (4,)], 1) == [[0, 1], [4]]
    assert load_batches([(0, 1), (4,)], 2) == [[0, 1, 4]]
    assert load_batches([], 2) == [[]]


@settings(max_examples=100, deadline=None)
@given(plans)
def test_even_steps_use_every_draw_once_and_differ_by_one(plan: dict) -> None:
    (short,) = samplers(plan | {"even": False}, world=1)
    (even,) = samplers(plan | {"even": True}, world=1)
    draws = [key.draw for step in by_step(even) for load in step for key in load]
    assert draws == list(range(plan["count"]))
    sizes = [even.samples_of_step(step) // plan["repeats"] for step in range(even.steps_per_epoch)]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= plan["per_step"]
    assert even.steps_per_epoch == short.steps_per_epoch


def test_order_depends_on_seed_and_epoch_alone() -> None:
    videos = np.arange(100)
    orders = {tuple(epoch_draws(seed, epoch, videos)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert np.array_equal(epoch_draws(1, 2, videos), epoch_draws(1, 2, videos))
    assert np.corrcoef(epoch_draws(1, 2, videos), videos)[0, 1] < 0.5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=80), st.integers(0, 1000))
def test_balanced_draws_show_every_class_equally_often(labels: list[int], seed: int) -> None:
    videos, label_of = np.arange(len(labels)) + 50, np.array(labels)
    draws = epoch_draws(seed, 1, videos, balance="class", labels=label_of)
    assert len(draws) == len(videos)
    counts = Counter(label_of[draws - 50].tolist())
    classes = len(set(labels))
    if classes == 1:
        assert sorted(draws) == sorted(videos)
        return
    assert all(len(videos) // classes <= counts[c] <= -(-len(videos) // classes) for c in set(labels))
    assert (draws[1:] != draws[:-1]).all()
    for c in set(labels):  # within a class every video is used before one is used again
        uses = Counter(draws[label_of[draws - 50] == c].tolist())
        assert max(uses.values()) - min([uses[v] for v in videos[label_of == c].tolist()]) <= 1


def test_balanced_epochs_reach_all_videos_of_a_large_class() -> None:
    labels = np.array([0] * 50 + [1] * 2)
    seen = {v for epoch in range(12) for v in epoch_draws(0, epoch, np.arange(52), balance="class", labels=labels)}
    assert seen == set(range(52))


def test_it_is_a_distributed_sampler_that_asks_no_process_group() -> None:
    sampler = StepSampler([3, 4, 5], seed=0, global_batch=2, clips_per_gpu=2, rank=1, world=2)
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.rank, sampler.num_replicas) == (1, 2)
    sampler.set_epoch(3, start_step=1)
    sampler.set_epoch(4)
    assert sampler.start_step == 0
    with pytest.raises(ValueError, match="step 3"):
        sampler.set_epoch(0, start_step=3)


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(UserError, match="repeats=2"):
        StepSampler([1, 2], seed=0, global_batch=3, clips_per_gpu=2, rank=0, world=1, repeats=2)
    with pytest.raises(UserError, match="no video"):
        StepSampler([], seed=0, global_batch=2, clips_per_gpu=2, rank=0, world=1)
