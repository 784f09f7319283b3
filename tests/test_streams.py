"""Copies to and from a GPU, shown with streams that record what is asked of them; the next epoch's first batches."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.runs import Workplace
from tests.test_dataset import NOISE, config
from tests.test_dataset import folder as folder  # fixtures
from tests.test_dataset import index as index
from vac_ddp.arguments import parse_settings
from vac_ddp.data.batch import TestBatch
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.loader import copy_stream, to_device, train_loader
from vac_ddp.data.sampler import StepSampler
from vac_ddp.scoring import engine
from vac_ddp.scoring import scorer as scorer_module
from vac_ddp.settings import Config
from vac_ddp.training.trainer import open_trainer

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Recorder:
    """Stands for torch.cuda's streams; `said` is what was asked of them, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.made = 0

    def stream(self, device: torch.device) -> Any:
        self.made += 1
        return self.named(f"copies {device}")

    def current(self, device: torch.device | None = None) -> Any:
        return self.named(f"work {device}")

    def named(self, name: str) -> Any:
        def wait(other: Any) -> None:
            self.said.append((name, "waits for", other.name))

        def record_event() -> str:
            self.said.append((name, "records"))
            return f"event of {name}"

        return SimpleNamespace(name=name, wait_stream=wait, record_event=record_event)

    @contextlib.contextmanager
    def inside(self, stream: Any) -> Iterator[None]:
        self.said.append(("enter", stream.name))
        yield
        self.said.append(("leave", stream.name))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    for name, value in (
        ("Stream", recorder.stream), ("current_stream", recorder.current), ("stream", recorder.inside)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    copy_stream.cache_clear()
    yield recorder
    copy_stream.cache_clear()


def batch_of(recorder: Recorder, name: str) -> Any:
    """A batch with one tensor on a GPU."""
    tensor = SimpleNamespace(is_cuda=True, record_stream=lambda s: recorder.said.append((name, "kept for", s.name)))
    moved = SimpleNamespace(tensors=lambda: [tensor])

    def to(device: torch.device, *, non_blocking: bool) -> Any:
        recorder.said.append((name, "to", str(device), non_blocking))
        return moved

    return SimpleNamespace(to=to)


def test_batches_are_copied_on_one_stream_of_their_device(recorder: Recorder) -> None:
    for epoch in range(3):
        assert len(list(to_device([batch_of(recorder, f"batch {epoch}")], SECOND))) == 1
    assert recorder.made == 1, "every epoch had a stream of its own, with memory of its own"
    assert recorder.said[:5] == [
        ("enter", "copies cuda:1"),
        ("batch 0", "to", "cuda:1", True),
        ("leave", "copies cuda:1"),
        ("work cuda:1", "waits for", "copies cuda:1"),
        ("batch 0", "kept for", "work cuda:1"),
    ]
    list(to_device([batch_of(recorder, "other")], FIRST))
    assert recorder.made == 2


def test_logits_are_read_after_the_copy_from_their_own_device(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current device may be another one: `load(run, device="cuda:1")` in a program that is on cuda:0."""
    host = SimpleNamespace(copy_=lambda rows, non_blocking: recorder.said.append(("copy", non_blocking)))
    monkeypatch.setattr(engine.torch, "empty", lambda shape, dtype, pin_memory: host)
    rows: Any = SimpleNamespace(is_cuda=True, device=SECOND, shape=(2, 1, 3), dtype=torch.float32)
    assert engine._to_host(rows) == (host, "event of work cuda:1")
    assert recorder.said == [("copy", True), ("work cuda:1", "records")]


class Recorded(TestBatch):
    """A batch that says when it is copied, and stays in host memory."""

    recorder: Any = None

    def to(self, device: torch.device, *, non_blocking: bool = False) -> TestBatch:
        self.recorder.said.append((f"video {int(self.places)}", "to", str(device), non_blocking))
        return self


def test_a_prediction_copies_on_the_copy_stream_and_computes_outside_of_it(recorder: Recorder) -> None:
    Recorded.recorder = recorder
    clips = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1, 1, 1).expand(4, 2, 1, 1, 1, 3)  # two a video
    batches = [
        Recorded(
            clips=clips[[video]],
            places=torch.tensor([video]),
            videos=torch.tensor([video]),
            labels=torch.tensor([0]),
            decoded=torch.tensor([True]),
        )
        for video in range(4)
    ]

    def outputs(clips: torch.Tensor) -> torch.Tensor:
        recorder.said.append(("pass", len(clips)))
        return clips.flatten(1).sum(1, keepdim=True).float()

    scorer: Any = SimpleNamespace(
        device=SECOND,
        flip=False,
        pad=False,
        clips_per_pass=4,
        model=SimpleNamespace(eval=lambda: None),
        outputs=outputs,
    )
    found = list(engine.scored_videos(scorer, batches))
    assert [video.outputs.tolist() for video in found] == [[[3.0 * n], [3.0 * n]] for n in range(4)]
    copied = [
        [
            ("enter", "copies cuda:1"),
            (f"video {video}", "to", "cuda:1", True),
            ("leave", "copies cuda:1"),
            ("work cuda:1", "waits for", "copies cuda:1"),
        ]
        for video in range(4)
    ]
    assert recorder.said == [*copied[0], *copied[1], ("pass", 4), *copied[2], *copied[3], ("pass", 4)]
    assert recorder.made == 1


def test_a_classifier_on_cuda_stays_on_the_device_that_was_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load(run, device="cuda")` in a program whose current device is cuda:1 then, and another one later."""
    model = nn.Linear(1, 1)
    monkeypatch.setattr(model, "to", lambda device: nn.Module.to(model, "meta"))  # a device that is there
    loaded = SimpleNamespace(model=model, report=SimpleNamespace(missing=[]), mean=(0.5,), std=(0.5,))
    monkeypatch.setattr(scorer_module, "load_model", lambda *_, **__: loaded)
    source: Any = SimpleNamespace(path="best.pt", classes=["a", "b"], precision=None, own=True)
    assert scorer_module.open_scorer(Config(), source, torch.device("cuda"), None).device == torch.device("meta")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_logits_from_a_second_gpu() -> None:
    busy = torch.randn(4096, 4096, device=SECOND)
    for _ in range(20):
        busy = busy @ busy / 4096
    host, event = engine._to_host(busy)
    assert event is not None
    event.synchronize()
    assert torch.equal(host, busy.cpu())


class Told(TrainClips):
    """Sends a byte for every batch that a loader process begins."""

    pipe: Any = None

    def __getitems__(self, keys: list[Any]) -> Any:
        self.pipe.send_bytes(b"1")
        return super().__getitems__(keys)


def test_a_loader_that_was_started_decodes_before_it_is_asked(index: Any) -> None:
    hears, Told.pipe = multiprocessing.Pipe(duplex=False)
    dataset = Told(index, np.arange(13), config(), NOISE, 11)
    sampler = StepSampler(np.arange(13), seed=0, global_batch=4, clips_per_gpu=4, rank=0, world=1)
    plain = train_loader(TrainClips(index, np.arange(13), config(), NOISE, 11), sampler, workers=0, pin=False)
    loader = train_loader(dataset, sampler, workers=1, pin=False)
    random = torch.get_rng_state()
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        loader.start()
        assert hears.recv_bytes() == b"1"  # nobody has asked for a batch
        found, expected = list(loader), list(plain)
        assert len(found) == len(expected) == 4
        assert torch.equal(torch.get_rng_state(), random), "it is in the checkpoint, and the model's dropout follows it"
        assert all(torch.equal(a.clips, b.clips) for a, b in zip(found, expected, strict=True))
        for _ in range(3):
            hears.recv_bytes()
    loader.close()


def test_the_next_epoch_is_under_way_while_the_model_is_validated(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    settings = parse_settings(place.arguments("run", "checkpoint.every_steps=null")).config
    seen = []
    with open_trainer(settings, torch.device("cpu")) as trainer:
        validator = trainer.validator
        assert validator is not None
        real = validator.run

        def run(stop: Any) -> Any:
            seen.append((trainer.position.epoch, trainer.sampler.epoch, trainer.loader._begun is not None))
            return real(stop)

        validator.run = run  # type: ignore[method-assign]
        trainer.run()
    assert seen == [(1, 1, True), (2, 2, True), (3, 2, False)], "the last epoch has none behind it"
