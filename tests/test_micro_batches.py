"""Equal pieces of a step, what a GPU must hold beside a pass, and passes of a prediction on a GPU that is too small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import settings_for
from vac_ddp.data.sampler import StepSampler, clips_of_rank, equal_pieces
from vac_ddp.errors import UserError
from vac_ddp.models import load_model
from vac_ddp.runtime import distributed
from vac_ddp.scoring import scorer as scorer_module
from vac_ddp.scoring.scorer import Scorer, pass_size
from vac_ddp.settings import ClipSettings
from vac_ddp.training import micro_batch_fit
from vac_ddp.training.micro_batch_fit import auto_clips_per_gpu, fit_clips, reserved_bytes

CUDA = torch.device("cuda", 0)
SIZES = {"width": 32, "depth": 2, "heads": 2}


@pytest.mark.parametrize(
    ("clips", "fit", "repeats", "piece"),
    [(64, 61, 1, 32), (64, 64, 1, 64), (66, 40, 1, 34), (7, 6, 1, 4), (64, 30, 2, 24), (8, 5, 4, 4), (1, 8, 1, 2)],
)
def test_equal_pieces(clips: int, fit: int, repeats: int, piece: int) -> None:
    assert equal_pieces(clips, fit, repeats) == piece


def test_pieces_are_few_and_equal_on_every_rank_and_in_every_step() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        world, repeats, videos = int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.integers(2, 80))
        batch = repeats * int(rng.integers(world, 70))
        most = clips_of_rank(min(batch // repeats, videos), repeats, world)
        fit = int(rng.integers(2 * repeats, 2 * repeats + 40))
        piece = equal_pieces(most, fit, repeats)
        largest = 0
        for rank in range(world):
            sampler = StepSampler(
                range(videos), seed=0, global_batch=batch, clips_per_gpu=piece, rank=rank, world=world, repeats=repeats
            )
            clips = [len(load) * repeats for load in sampler.step_loads(0)]
            largest = max(largest, sum(clips))
            assert max(clips) <= min(piece, fit)
            assert max(clips) - min(clips) <= 2 * repeats
            if sum(clips) == most:
                assert len(clips) == -(-most // (fit // (2 * repeats) * 2 * repeats)), (
                    "as few as with the largest that fit"
                )
        assert largest == most


def test_what_is_reserved_beside_a_pass() -> None:
    config = settings_for(SIZES, frames=4, size=32, clips=2)
    model = load_model(config.model, config.clip, ["a", "b"], seed=0).model
    parameters = 4 * sum(p.numel() for p in model.parameters())
    clip = 4 * 32 * 32 * 3
    assert reserved_bytes(config, model, clips=10, world=2) == 2 * parameters + 20 * clip
    config.train.ema_decay, config.train.bf16_reduce = 0.9, True
    buffers = 4 * sum(b.numel() for b in model.buffers())
    expected = 2 * parameters + parameters // 2 + parameters + buffers + 20 * clip
    assert reserved_bytes(config, model, clips=10, world=2) == expected
    config.optim.shard = True
    assert reserved_bytes(config, model, clips=10, world=2) == expected - parameters


class Memory:
    """A GPU of so many bytes, of which every clip of a pass takes some; stands for torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, total: int, clip: int) -> None:
        self.total, self.clip, self.held, self.peak, self.tried = total, clip, 0, 0, []
        empty = torch.empty

        def reserve(size: int, *, dtype: torch.dtype, device: torch.device) -> Any:
            assert (dtype, device) == (torch.uint8, CUDA)
            self.held = size
            return empty(0)

        for name, value in (
            ("mem_get_info", lambda device: (self.total, self.total)), ("memory_reserved", lambda device: 0),
            ("reset_peak_memory_stats", lambda device: None), ("max_memory_reserved", lambda device: self.peak),
            ("empty_cache", lambda: None),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", reserve)
        monkeypatch.setattr(micro_batch_fit, "train_pass", self.run)

    def run(self, model: Any, clip: Any, size: int, device: Any, dtype: Any) -> None:
        self.tried.append(size)
        self.peak = self.held + size * self.clip
        if self.peak > self.total:
            raise torch.OutOfMemoryError


@pytest.mark.parametrize(("reserved", "fits"), [(0, 90), (290, 61), (880, 2), (895, 0)])
def test_what_fits_beside_what_is_reserved(monkeypatch: pytest.MonkeyPatch, reserved: int, fits: int) -> None:
    model = torch.nn.Linear(1, 1)
    memory = Memory(monkeypatch, total=1000, clip=10)  # 0.9 of it is used
    ask = {"autocast": None, "most": 200, "reserved": reserved, "device": CUDA}
    if not fits:
        with pytest.raises(UserError, match="CUDA out of memory with a single clip"):
            fit_clips(model, ClipSettings(), **ask)
        return
    largest = max(n for n in range(1, 100) if reserved + 10 * n < 900)
    assert fit_clips(model, ClipSettings(), **ask) == largest
    assert abs(largest - fits) <= 1
    assert len(memory.tried) <= 16


def test_a_run_that_resumes_elsewhere_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings_for(SIZES, frames=4, size=32, clips=2)
    config.train.global_batch = 64
    monkeypatch.setattr(micro_batch_fit, "fit_clips", lambda *_, **__: 61)
    monkeypatch.setattr(micro_batch_fit, "device_name", lambda: "NVIDIA T4")
    model = load_model(config.model, config.clip, ["a", "b"], seed=0).model
    ask: dict[str, Any] = {"precision": "fp16", "videos": 1000}
    assert auto_clips_per_gpu(config, model, CUDA, None, **ask) == 32
    monkeypatch.setattr(micro_batch_fit, "device_memory", lambda: 15360)
    here = {
        "clips_per_gpu": 20,
        "device": "NVIDIA T4",
        "device_memory": 15360,
        "world_size": 1,
        "checkpointing": 0,
        "shard": False,
    }
    assert auto_clips_per_gpu(config, model, CUDA, here, **ask) == 20
    for other in (
        {"device": "NVIDIA H100"},
        {"device_memory": 7680},
        {"world_size": 2},
        {"checkpointing": 3},
        {"shard": True},
    ):
        assert auto_clips_per_gpu(config, model, CUDA, here | other, **ask) == 32
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert auto_clips_per_gpu(config, model, CUDA, None, **ask) == 16
    config.train.even_steps = True
    assert (
        auto_clips_per_gpu(config, model, torch.device("cpu"), None, precision="fp32", videos=65) == 6
    )  # 33: 10 a rank


@pytest.mark.parametrize(
    ("most_at_once", "most", "size"), [(9, 5000, 8), (64, 5000, 64), (300, 5000, 256), (300, 100, 64)]
)
def test_a_pass_is_halved_or_doubled_until_it_fits(
    monkeypatch: pytest.MonkeyPatch, most_at_once: int, most: int, size: int
) -> None:
    tried = []

    def run(scorer: Scorer, clip: ClipSettings, size: int) -> None:
        tried.append(size)
        if size > most_at_once:
            raise torch.OutOfMemoryError

    clock = iter(range(10**6))
    monkeypatch.setattr(scorer_module, "zeros_pass", run)
    monkeypatch.setattr(scorer_module.time, "perf_counter", lambda: float(next(clock)))  # every pass takes as long
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    scorer = Scorer(
        model=torch.nn.Linear(1, 1), device=CUDA, autocast=None, mean=(0.5,) * 3, std=(0.5,) * 3, flip=False,  # type: ignore[arg-type]
        clips_per_gpu="auto",
    )  # fmt: skip
    assert pass_size(scorer, ClipSettings(), most=most) == size
    assert size in tried
    scorer.found = size
    assert (scorer.clips_per_pass, scorer.clips_per_gpu) == (size, "auto"), "later passes may still be halved"
    most_at_once = 0
    with pytest.raises(UserError, match="with 1 clip in a pass: end other programs on the GPU"):
        pass_size(scorer, ClipSettings(), most=most)
    scorer.clips_per_gpu = 7
    assert pass_size(scorer, ClipSettings(), most=most) == 7
