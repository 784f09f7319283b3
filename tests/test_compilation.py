"""How often the blocks are compiled: counted by a backend that runs graphs as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common import Ours, our_training, settings_for
from tests.frame_data import random_batch
from vac_ddp.data.batch import TestBatch
from vac_ddp.models.compilation import WORTH_COMPILING, zero_clips
from vac_ddp.runtime.data_parallel import wrap
from vac_ddp.runtime.torch_compat import graphs_compiled
from vac_ddp.scoring.engine import scored_videos
from vac_ddp.scoring.scorer import Scorer, prepare
from vac_ddp.settings import Config
from vac_ddp.training import health
from vac_ddp.training.step import compiles_unasked
from vac_ddp.training.step_record import StepRecord

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VIT = {"width": 32, "depth": 2, "heads": 2, "patch": 16}
MODELS = {
    "videomae": {"drop_path": 0.2, **VIT},
    "lsvit": {"name": "lsvit", "drop_path": 0.2, **VIT},
    "frame_vit": {"name": "frame_vit", "drop_path": 0.2, **VIT},
    "convolutions": {"name": "frame_vit", "backbone": "test_efficientnet"},
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The graphs that the blocks were compiled to, which run as they are."""
    found: list[object] = []
    compile_module = nn.Module.compile

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compile_module(module, backend=count, **how))
    yield found
    torch.compiler.reset()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone: the network is wrapped by DDP."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def settings(model: str) -> Config:
    config = settings_for(MODELS[model], frames=4, size=32, clips=4, compile=True)
    config.augment.mixup, config.augment.erase, config.augment.randaugment = 0.8, 0.5, "rand-m7-n4-mstd0.5-inc1"
    config.train.global_batch = 8
    return config


def videos(clips: int, count: int, size: int = 32) -> Iterator[TestBatch]:
    for place in range(count):
        yield TestBatch(
            clips=torch.zeros(1, clips, 4, size, size, 3, dtype=torch.uint8),
            places=torch.tensor([place]),
            videos=torch.tensor([place]),
            labels=torch.tensor([-1]),
            decoded=torch.tensor([True]),
        )


def step(ours: Ours, config: Config, clips: int) -> StepRecord:
    ours.step([random_batch(config, ours.stepper.model.noise_size, clips)])
    return ours.stepper.records[-1]


def score(ours: Ours, scorer: Scorer) -> None:
    scorer.pad = True
    assert sum(1 for _ in scored_videos(scorer, videos(3, 3))) == 3  # passes of 4, 4 and a padded one


def as_scorer(ours: Ours) -> Scorer:
    return Scorer(
        model=ours.stepper.model,
        device=CPU,
        autocast=ours.stepper.autocast,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        flip=False,
        clips_per_gpu=4,
    )


KINDS = {"videomae": 1, "lsvit": 3, "frame_vit": 2, "convolutions": 2}  # of compiled modules: blocks share their graphs
FAST = ("videomae", "frame_vit")
BY_TIER = [*FAST, *(pytest.param(model, marks=pytest.mark.fault) for model in MODELS if model not in FAST)]


@pytest.mark.parametrize("model", BY_TIER)
def test_a_run_compiles_so_many_graphs_and_none_of_them_twice(model: str, graphs: list[object], group: None) -> None:
    """A graph for each kind of module before the first step, one in the first short step, one in validation."""
    config = settings(model)
    ours = our_training(config, CPU)
    assert isinstance(ours.stepper.network, nn.parallel.DistributedDataParallel)
    counts = [len(graphs)]
    for _ in range(2):
        assert not step(ours, config, 8).compiled
    counts.append(len(graphs))
    short = step(ours, config, 3)
    counts.append(len(graphs))
    assert short.compiled == (counts[2] > counts[1])
    score(ours, as_scorer(ours))
    ours.stepper.network.train()
    counts.append(len(graphs))
    for clips in (8, 3):
        assert not step(ours, config, clips).compiled
    score(ours, as_scorer(ours))
    assert len(graphs) == counts[-1]
    assert (counts[0], *np.diff(counts).tolist()) == (KINDS[model], 0, KINDS[model], KINDS[model])


@pytest.mark.parametrize("model", BY_TIER)
def test_a_prediction_compiles_before_its_first_pass_alone(model: str, graphs: list[object]) -> None:
    config = settings(model)
    config.train.compile, config.predict.compile = False, True
    ours = our_training(config, CPU)
    scorer = as_scorer(ours)
    ours.stepper.model.eval()
    prepare(scorer, config, clips=9)
    assert len(graphs) == KINDS[model]
    score(ours, scorer)
    assert len(graphs) == KINDS[model]


def test_ddp_does_not_cut_blocks_where_its_buckets_end(graphs: list[object], group: None) -> None:
    config = settings("videomae")
    config.train.compile = False
    model = our_training(config, CPU).stepper.model
    clips, noise = zero_clips(config.clip, 4, CPU), torch.rand(4, model.noise_size)
    model.compile_blocks()
    network = wrap(model, CPU, bf16_reduce=False)
    network.bucket_bytes_cap = 64  # several buckets a block
    network(clips, noise).sum().backward()
    whole = len(graphs)
    torch.compiler.reset()
    graphs.clear()
    model(clips, noise)
    assert whole == len(graphs) > 0


def test_steps_in_which_a_rank_compiled_do_not_make_it_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(number: int, seconds: float, *, compiled: bool) -> StepRecord:
        return StepRecord(
            step=number,
            samples=[],
            losses=[],
            correct=[],
            norm=torch.ones(()),
            found_inf=torch.zeros(()),
            lr=0.1,
            busy=(0.0, seconds),
            marks=[],
            compiled=compiled,
        )

    def others(own: dict) -> list[dict]:
        return [own, {**own, "busy": [1.0, 1.0, 1.0], "compiled": [False] * 3}]

    monkeypatch.setattr(health.distributed, "all_gather_objects", others)
    for compiled, slow in ((True, []), (False, [0])):
        own = [record(0, 1.0, compiled=False), record(1, 30.0, compiled=compiled), record(2, 1.0, compiled=False)]
        summary = health.summarise(own, CPU)
        assert health.slow_ranks(summary.busy_s, 2.0) == slow
        assert summary.busy_s == ([2.0, 2.0] if compiled else [32.0, 3.0])


def test_short_runs_are_not_compiled_unasked() -> None:
    config, said = Config(), []
    config.train.epochs, config.train.global_batch, config.augment.repeats = 10, 32, 2
    videos = WORTH_COMPILING * 8 // (10 * 2)  # of 8 clips a micro-batch
    assert compiles_unasked(config, videos, 8, CUDA, said.append) and not said
    assert not compiles_unasked(config, videos - 1, 8, CUDA, said.append)
    assert len(said) == 1 and "compile off: 498 micro-batches" in said[0] and "train.compile=true" in said[0]
    assert not compiles_unasked(config, videos, 8, CPU, said.append)
    config.train.max_steps = WORTH_COMPILING * 8 // 32 - 1
    assert not compiles_unasked(config, videos, 8, CUDA, said.append)
    config.train.compile = True
    assert not compiles_unasked(config, videos, 8, CUDA, said.append)
    assert len(said) == 2  # where it is set, nothing is said


@pytest.mark.parametrize("model", MODELS)
def test_gradients_lie_in_memory_as_ddps_buckets(model: str, group: None) -> None:
    """Otherwise DDP copies each of them and warns of it: for 1x1 convolutions there are two ways to write strides."""
    config = settings(model)
    config.train.compile = False
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*strides")
            ours = our_training(config, CPU)
            for _ in range(2):
                step(ours, config, 8)  # two micro-batches
    finally:
        torch.set_warn_always(False)
    ours.stepper.forward(*ours.stepper.objective.zeros(4)).sum().backward()
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in ours.stepper.model.parameters())


def test_nothing_compiled_is_no_graph() -> None:
    before = graphs_compiled()
    nn.Linear(2, 2)(torch.ones(1, 2))
    assert graphs_compiled() == before
