"""Memory between loader processes and rank: used again and again, never written while somebody holds it."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.frame_data import MemoryVideos, jpeg
from tests.test_dataset import children_of, config
from vac_ddp.data import slots as slots_module
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.loader import Loader, train_loader
from vac_ddp.data.sampler import StepSampler
from vac_ddp.data.slots import Slots

VIDEOS = MemoryVideos([[jpeg(48, 64, 7 * video + frame) for frame in range(5)] for video in range(48)])


def loader_of(workers: int) -> Loader:
    sampler = StepSampler(np.arange(48), seed=0, global_batch=2, clips_per_gpu=2, rank=0, world=1)
    return train_loader(TrainClips(VIDEOS, np.arange(48), config(), 3, 0), sampler, workers=workers, pin=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_the_rank_keeps_are_not_written_again(workers: int) -> None:
    """All 24 batches of two epochs at once, more than there are slots: the bytes of a loader without processes."""
    expected = [batch.clips.clone() for batch in loader_of(0)] * 2
    loader = loader_of(workers)
    kept = [batch.clips for _ in range(2) for batch in loader]
    assert len(kept) == 48
    assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
    loader.close()


def test_batches_that_are_let_go_lie_in_few_slots_and_in_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    real = slots_module.unpacked
    monkeypatch.setattr(slots_module, "unpacked", lambda what: (sent.append(what), real(what))[1])
    loader = loader_of(2)
    assert all(len(batch) == 2 for batch in loader)
    assert len(sent) == 24
    assert all(isinstance(what, tuple) for what in sent), "a batch came through the pipe"
    assert len({slot for _, slot, _ in sent}) < 12
    for process in (os.getpid(), *children_of(os.getpid())):
        assert "/dev/shm/torch" not in Path(f"/proc/{process}/maps").read_text()
    loader.close()


def test_a_slot_is_free_again_when_the_last_tensor_on_it_is_gone() -> None:
    slots = Slots(workers=2, each=2, size=100)
    first, second = slots.take(1, 100), slots.take(1, 7)
    assert first is not None
    assert second is not None
    assert slots.take(1, 1) is None
    assert slots.take(0, slots.size + 1) is None
    assert (slots.slot_of(first), slots.slot_of(second), slots.slot_of(torch.zeros(3))) == (2, 3, None)
    second[:] = torch.arange(7, dtype=torch.uint8)
    received = slots.received(3, 7)
    part = received.view(7, 1)[2:4]
    del received
    gc.collect()
    assert slots.take(1, 1) is None
    assert part.flatten().tolist() == [2, 3]
    del part
    gc.collect()
    again = slots.take(1, 7)
    assert again is not None
    assert slots.slot_of(again) == 3


def test_what_lies_in_no_slot_goes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(workers=1, each=1, size=64)
    monkeypatch.setattr(slots_module, "_own", (slots, 0))
    taken = slots_module.buffer(6).view(2, 3)
    taken[:] = 5
    assert slots_module.packed(taken) == (slots.number, 0, (2, 3))
    assert torch.equal(slots_module.unpacked(slots_module.packed(taken)), taken)
    other = torch.ones(2, 3, dtype=torch.uint8)
    assert isinstance(slots_module.packed(other), np.ndarray)
    assert torch.equal(slots_module.unpacked(slots_module.packed(other)), other)
    empty = slots_module.buffer(0).view(0, 4)
    assert slots_module.unpacked(slots_module.packed(empty)).shape == (0, 4)


def test_a_forked_process_gives_no_slot_of_the_rank_back() -> None:
    slots = Slots(workers=1, each=1, size=64)
    assert slots.take(0, 4) is not None
    held = slots.received(0, 4)
    child = os.fork()
    if child == 0:
        del held
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert slots.take(0, 4) is None
    del held
    assert slots.take(0, 4) is not None
