"""Host memory of loaders: slots and pinned copies of all local ranks, within what the machine allows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.frame_data import MemoryVideos
from vac_ddp.data import loader as loader_module
from vac_ddp.data.dataset import TestViews, TrainClips
from vac_ddp.data.loader import Loader, train_loader, views_loader, worker_count
from vac_ddp.data.sampler import StepSampler
from vac_ddp.data.slots import Slots
from vac_ddp.errors import UserError
from vac_ddp.runtime import host_memory
from vac_ddp.runtime.host_memory import control_group_limits, memory_limit
from vac_ddp.settings import Config

VIDEOS = MemoryVideos([[] for _ in range(1024)])
# 64 clips of 16 frames of 224x224 RGB: 64 * 16 * 224 * 224 * 3 bytes, whole pages; pinned: 2^28 bytes.
BATCH, PINNED = 154_140_672, 268_435_456
GIB = 1 << 30

# local ranks, cores, GiB of memory: processes and batches under way of a rank's loader; bytes of its slots, of its
# pinned copies (those under way and two that the rank holds), of both loaders (training, validation) of all ranks.
TABLE = [
    # 16 processes, 1 batch each. Slots: 16 * 2 * BATCH. Pinned: 18 * PINNED.
    (1, 16, 128, 16, 16, 4_932_501_504, 4_831_838_208, 19_528_679_424),
    # 8 processes, 2 batches each. Slots: 8 * 3 * BATCH. Pinned: 18 * PINNED.
    (4, 32, 256, 8, 16, 3_699_376_128, 4_831_838_208, 68_249_714_688),
    # 3 processes, 4 batches each as set. Slots: 3 * 5 * BATCH. Pinned: 14 * PINNED.
    (4, 12, 256, 3, 12, 2_312_110_080, 3_758_096_384, 48_561_651_712),
    # 8 processes, 2 batches each would be 8.5 of the 12 GB of a rank for training alone: 1 each. Slots: 8 * 2 * BATCH.
    # Pinned: 10 * PINNED.
    (8, 64, 96, 8, 8, 2_466_250_752, 2_684_354_560, 82_409_684_992),
    # The same with 24 processes for each of 8 ranks: never more than 16 of them by themselves.
    (8, 192, 512, 16, 16, 4_932_501_504, 4_831_838_208, 156_229_435_392),
]


@pytest.mark.parametrize(("ranks", "cores", "gib", "workers", "under_way", "shared", "pinned", "machine"), TABLE)
def test_slots_and_pinned_copies_of_all_local_ranks(
    ranks: int,
    cores: int,
    gib: int,
    workers: int,
    under_way: int,
    shared: int,
    pinned: int,
    machine: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    made: list[Slots] = []
    monkeypatch.setattr(loader_module, "Slots", lambda **sizes: made.append(Slots(**sizes)) or made[-1])
    train, val = both_loaders(worker_count(None, local_ranks=ranks), room=gib * GIB // ranks)
    for loader, slots in zip((train, val), made, strict=True):
        assert loader._loader.num_workers == workers
        assert workers * loader._loader.prefetch_factor == under_way
        assert slots._bytes.nbytes == shared  # what is mapped, not what was planned
        assert loader.host_bytes == shared + pinned
    assert ranks * (train.host_bytes + val.host_bytes) == machine < gib * GIB


def both_loaders(workers: int, *, room: int, pin: bool = True) -> tuple[Loader, Loader]:
    """The loaders of a rank of a run with 64 clips a pass, made as `build_trainer` and `Validator` make them."""
    config = Config()
    config.clip.frames, config.clip.size = 16, 224
    sampler = StepSampler(np.arange(1024), seed=0, global_batch=64, clips_per_gpu=64, rank=0, world=1)
    train = train_loader(
        TrainClips(VIDEOS, np.arange(1024), config, 3, 0), sampler, workers=workers, pin=pin, room=room
    )
    views = TestViews(VIDEOS, np.arange(1024), config.clip, config.val, tolerant=False)
    per_video = config.val.count * config.val.crops
    val = views_loader(
        views, range(1024), videos_per_batch=64 // per_video, workers=workers, prefetch=4, pin=pin,
        room=room - train.host_bytes,
    )  # fmt: skip
    return train, val


def test_without_a_gpu_there_are_slots_alone_also_for_what_the_rank_holds() -> None:
    train, val = both_loaders(2, room=64 * GIB, pin=False)
    # 2 processes: 4 under way each, 1 in the making, 1 of the 2 that the rank holds.
    assert train.host_bytes == val.host_bytes == 2 * 6 * BATCH


def test_batches_that_do_not_fit_into_memory_are_refused() -> None:
    # 2 slots for each of 8 processes, and 10 pinned copies: 5,150,605,312 bytes for each loader.
    both_loaders(8, room=2 * 5_150_605_312)
    with pytest.raises(UserError, match=r"8 loader processes with 1 batches each need 4912 MiB of memory, .* 4911 MiB"):
        both_loaders(8, room=2 * 5_150_605_312 - 1)


def groups(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_control_groups(tmp_path: Path) -> None:
    slurm = groups(
        tmp_path / "v2",
        {
            "slurm/job_7/memory.max": f"{32 * GIB}\n",
            "slurm/job_7/step_0/memory.max": "max\n",
            "slurm/job_8/memory.max": f"{GIB}\n",  # of somebody else
        },
    )
    assert control_group_limits("0::/slurm/job_7/step_0\n", slurm) == [32 * GIB]
    old = groups(
        tmp_path / "v1",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/docker/memory.limit_in_bytes": f"{8 * GIB}\n",
            "memory/docker/abc/memory.limit_in_bytes": f"{4 * GIB}\n",
            "cpu/docker/abc/memory.limit_in_bytes": "1\n",
        },
    )
    lines = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n"
    assert min(control_group_limits(lines, old)) == 4 * GIB
    # A container that has a path of its host: only its own top folder is there.
    container = groups(tmp_path / "container", {"memory/memory.limit_in_bytes": f"{2 * GIB}\n"})
    assert control_group_limits("4:memory:/kubepods/pod1/abc\n", container) == [2 * GIB]
    assert control_group_limits("0::/\n", groups(tmp_path / "own", {"memory.max": f"{GIB}\n"})) == [GIB]
    assert control_group_limits("", tmp_path) == []


def test_the_limit_of_this_machine_is_that_of_its_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_limit() <= installed
    for limits, expected in (([3 * 4096, 5 * 4096], 3 * 4096), ([9223372036854771712], installed), ([], installed)):
        monkeypatch.setattr(host_memory, "control_group_limits", lambda *_, limits=limits: limits)
        assert memory_limit() == expected
