"""Each of the private or renamed things of torch does what the code relies on; run with the oldest and newest torch."""

from __future__ import annotations

import copy
import datetime
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import vac_ddp
from vac_ddp.runtime import torch_compat


def test_only_the_compatibility_file_uses_private_names_of_torch():
    private = re.compile(
        r"\b(torch|dist|nn)(\.\w+)*\._(?!_)|from torch[.\w]* import _|from torch[.\w]*\._|\._(compiled_call_impl|"
        r"shutdown_workers|get_backend|device_types|set_default_timeout|get_default_store)\b|found_inf, \w+\.grad_scale"
    )
    package = Path(vac_ddp.__file__).parent
    users = {
        f"{path.relative_to(package)}: {found[0]}"
        for path in package.rglob("*.py")
        if path.name != "torch_compat.py" and (found := private.search(path.read_text(encoding="utf-8")))
    }
    assert not users


@pytest.mark.parametrize("share", [0.25, torch.tensor(0.25)])
def test_move_towards(share):
    values = [torch.tensor([0.0, 4.0]), torch.tensor([[8.0]])]
    targets = [torch.tensor([4.0, 0.0]), torch.tensor([[8.0]])]
    torch_compat.move_towards(values, targets, share)
    assert [v.tolist() for v in values] == [[1.0, 3.0], [[8.0]]]
    assert [t.tolist() for t in targets] == [[4.0, 0.0], [[8.0]]]


def test_a_fused_step_is_skipped_by_a_tensor():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for found, moves in ((1.0, False), (0.0, True)):
        before = copy.deepcopy(layer.state_dict())
        layer(torch.ones(1, 3)).sum().backward()
        torch_compat.skip_where(optimizer, torch.tensor(found))
        optimizer.step()
        assert torch.equal(before["weight"], layer.weight) is not moves


def test_uncompile():
    layer = nn.Sequential(nn.Linear(2, 2))
    calls = []
    layer[0].compile(backend=lambda graph, _: calls.append(graph) or graph.forward)
    torch_compat.uncompile(layer)
    layer(torch.ones(1, 2))
    assert not calls


def test_resize_into_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((12, 10), Image.Resampling.BILINEAR)).astype(int)
    out = torch.zeros(1, 10, 12, 3, dtype=torch.uint8)
    torch_compat.resize_into(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2), out.permute(0, 3, 1, 2))
    assert abs(out[0].numpy().astype(int) - expected).max() <= 1


def test_end_workers():
    batches = iter(DataLoader(list(range(8)), num_workers=1))
    next(batches)
    workers = batches._workers
    torch_compat.end_workers(batches)
    assert not any(worker.is_alive() for worker in workers)
    torch_compat.end_workers(iter(DataLoader(list(range(8)))))


def test_the_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        found = torch_compat.backends(dist.group.WORLD)
        assert found
        for backend in found:
            torch_compat.set_backend_timeout(backend, datetime.timedelta(seconds=77))
            assert backend.options._timeout == datetime.timedelta(seconds=77)
        store = torch_compat.default_store()
        store.set("a", "b")
        assert store.get("a") == b"b"
        network = nn.parallel.DistributedDataParallel(nn.BatchNorm1d(2), **torch_compat.no_buffer_broadcast())
        assert not network.will_sync_module_buffers()
    finally:
        dist.destroy_process_group()
