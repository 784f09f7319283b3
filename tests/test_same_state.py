"""Ranks have the same state: checksums of weights against integers of Python, an optimizer's state sent by tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import torchrun
from vac_ddp.runtime import distributed
from vac_ddp.runtime.data_parallel import load_optimizer_state, optimizer_state
from vac_ddp.training import health
from vac_ddp.training.health import check_same_weights, checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_checksums_are_sums_of_whole_numbers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(health, "PIECE", 16)
    tensors = [torch.randn(5, 7).to(dtype), torch.randn(()).to(dtype), torch.full((3,), torch.nan, dtype=dtype)]
    kind = {2: np.int16, 4: np.int32, 8: np.int64}[tensors[0].element_size()]
    words = [t.flatten().view(torch.uint8).numpy().view(kind).astype(object) for t in tensors]
    plain = placed = 0
    pieces = [piece for word in words for piece in np.array_split(word, range(16, len(word), 16))]
    for number, piece in enumerate(pieces):
        plain += (2 * number + 1) * sum(piece)
        placed += (2 * number + 1) * sum(int(word) * (2 * place + 1) for place, word in enumerate(piece))
    assert [value % 2**64 for value in checksums(tensors)] == [plain % 2**64, placed % 2**64]
    assert checksums([t.clone() for t in tensors]) == checksums(tensors)


def changed(weights: torch.Tensor, how: str) -> torch.Tensor:
    other = weights.clone()
    flat = other.view(-1)
    if how == "swapped":
        flat[3], flat[900] = weights.view(-1)[900], weights.view(-1)[3]
    elif how == "one bit up, one down":
        flat[3] = torch.nextafter(flat[3], torch.tensor(9.0))
        flat[4] = torch.nextafter(flat[4], torch.tensor(-9.0))
    elif how == "sign of zero":
        flat[7] = -0.0
    return other


@pytest.mark.parametrize("how", ["same", "swapped", "one bit up, one down", "sign of zero"])
def test_weights_that_differ_in_a_bit_are_found(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    layer, other = nn.Linear(40, 50), nn.Linear(40, 50)
    with torch.no_grad():
        layer.weight[3, 3] = torch.nan  # the same on both: not a difference between ranks
        layer.weight.view(-1)[7] = 0.0
        other.weight.copy_(changed(layer.weight, how))
        other.bias.copy_(layer.bias)
    monkeypatch.setattr(distributed, "all_gather_objects", lambda sums: [sums, checksums(other.parameters())])
    if how == "same":
        check_same_weights(layer, 5)
    else:
        with pytest.raises(RuntimeError, match="the weights of ranks 1 differ from rank 0's at step 5"):
            check_same_weights(layer, 5)


def test_the_layout_of_a_tensor_does_not_change_its_checksum() -> None:
    kernel = torch.randn(8, 4, 3, 3)
    assert checksums([kernel.to(memory_format=torch.channels_last)]) == checksums([kernel])


def test_a_sharded_state_is_read_once_its_copies_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Sharded:
        def consolidate_state_dict(self, to: int) -> None:
            done.append(f"copies to {to}")

        def state_dict(self) -> dict[str, Any]:
            done.append("read")
            return {}

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronized"))
    optimizer_state(Sharded())
    assert done == ["copies to 0", "synchronized", "read"]


def test_a_state_is_loaded_and_left_alone() -> None:
    layer = nn.Conv2d(4, 3, 3)
    first, second = (torch.optim.AdamW(layer.parameters(), lr=0.1) for _ in range(2))
    layer(torch.ones(1, 4, 5, 5)).sum().backward()
    first.step()
    saved = first.state_dict()
    load_optimizer_state(second, saved)
    before = saved["state"][0]["exp_avg"].clone()
    second.step()
    assert torch.equal(saved["state"][0]["exp_avg"], before)
    assert second.state_dict()["state"][0]["step"] == 2


RANKS = """
import os, pickle
import torch
import torch.distributed as dist
from torch import nn
from vac_ddp.runtime import distributed as d
from vac_ddp.runtime.data_parallel import load_optimizer_state, optimizer_state, sharded_adamw

d.start(torch.device("cpu"), timeout_s=60)
torch.manual_seed(0)
layers = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 10))
layers[0].weight.data = layers[0].weight.data.t().contiguous().t()  # another layout
parts = lambda: [{"params": list(layer.parameters()), "lr_scale": 0.5, "lr": 0.01} for layer in layers]
alone = torch.optim.AdamW(parts())
for _ in range(2):
    layers(torch.ones(2, 300)).square().sum().backward()
    alone.step()
saved = alone.state_dict()
pickled, real = [], dist.broadcast_object_list

def counted(box, *arguments, **more):
    real(box, *arguments, **more)
    pickled.append(len(pickle.dumps(box)))

dist.broadcast_object_list = counted

def same(a, b):
    return all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in ("step", "exp_avg", "exp_avg_sq"))

for make in (lambda: torch.optim.AdamW(parts()), lambda: sharded_adamw(parts(), lr=0.3)):
    optimizer, given = make(), set()
    load = optimizer.load_state_dict
    optimizer.load_state_dict = lambda state: (given.update({n for n, e in state["state"].items() if e}), load(state))
    load_optimizer_state(optimizer, saved if d.is_main() else None)
    shard = getattr(optimizer, "optim", optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.01]
    numbers = {id(p): n for n, p in enumerate(layers.parameters())}
    held = [numbers[id(p)] for g in shard.param_groups for p in g["params"]]
    assert all(same(shard.state[p], saved["state"][numbers[id(p)]]) for g in shard.param_groups for p in g["params"])
    assert given == set(held), given  # nothing else stays in memory
    if shard is not optimizer:
        assert 0 < len(held) < 4 and len(shard.state) == len(held), held
    whole = optimizer_state(optimizer)
    if d.is_main():
        assert all(same(whole["state"][n], saved["state"][n]) for n in range(4))
assert len(pickled) == 2 and max(pickled) < 10_000, pickled  # the tensors have 484 kB
os.write(1, b"good\\n")
d.end(0)
"""


@pytest.mark.distributed
def test_an_optimizer_s_state_is_sent_by_tensors_each_to_who_keeps_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(RANKS, encoding="utf-8")
    done = torchrun(2, program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["good"] * 2
