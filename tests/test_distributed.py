"""Gathering and agreeing over real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import torchrun

pytestmark = pytest.mark.distributed

PROGRAM = """
import os, torch
from vac_ddp.runtime import distributed as d
from vac_ddp.errors import UserError

d.start(torch.device("cpu"), timeout_s=60)
world, rank = d.world_size(), d.rank()
for total in (0, 1, 2, 5, 31):
    mine = torch.tensor([i for i in range(total) if i * i % world == rank], dtype=torch.int64)
    out = d.gather_rows(mine, mine[:, None] * torch.tensor([1.0, 10.0]), total=total)
    if rank == 0:
        expected = torch.arange(total, dtype=torch.float32)[:, None] * torch.tensor([1.0, 10.0])
        assert out.shape == (total, 2) and torch.equal(out, expected), out
    else:
        assert out is None
try:
    d.gather_rows(torch.tensor([0]), torch.zeros(1, 2), total=2)
    assert rank != 0, "0 came from every rank and 1 from none"
except RuntimeError as error:
    assert "1 of 2 missing" in str(error) and "1 present twice" in str(error)
counts = torch.tensor([1, rank])
d.sum_in_place(counts)
assert counts.tolist() == [world, world * (world - 1) // 2]
try:
    d.raise_together(UserError("mine") if rank == 2 else None)
    raise AssertionError("nothing was raised")
except UserError as error:
    assert str(error) == "mine"
try:
    d.main_first(lambda: 1, lambda: 1 // (rank - 1))
    raise AssertionError("nothing was raised")
except RuntimeError as error:
    assert "rank 1 failed: ZeroDivisionError" in str(error), error
except ZeroDivisionError:
    assert rank == 1
os.write(1, b"good\\n")  # one write: lines of ranks that print at once stay whole
d.end(0)
"""


ALL_REDUCE = """
import os, torch
from benchmarks.common import our_training, settings_for
from tests.frame_data import random_batch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from vac_ddp.runtime import distributed as d

d.start(torch.device("cpu"), timeout_s=60)
torch.set_num_threads(1)
sizes, found = {"width": 32, "depth": 2, "heads": 2}, []
for accumulation in (1, 4):
    config = settings_for(sizes, frames=4, size=32, clips=2, compile=False)
    config.train.global_batch = 2 * d.world_size() * accumulation
    ours, reduced = our_training(config, torch.device("cpu")), [0]

    def hook(_, bucket):
        reduced[0] += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(torch.distributed.group.WORLD, bucket)

    ours.stepper.network.register_comm_hook(None, hook)
    batch = random_batch(config, ours.stepper.model.noise_size, 2 * accumulation)
    ours.stepper.run([batch], step=0, samples=config.train.global_batch, lr=1e-6, began=0.0)
    found.append(reduced[0])
assert found == 2 * [4 * sum(p.numel() for p in ours.stepper.model.parameters() if p.requires_grad)], found
os.write(1, b"good\\n")
d.end(0)
"""


def test_gradients_are_reduced_once_a_step_however_many_micro_batches(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(ALL_REDUCE, encoding="utf-8")
    done = torchrun(2, program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["good"] * 2


def test_rows_counts_and_errors_reach_everyone(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    done = torchrun(3, program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["good"] * 3
