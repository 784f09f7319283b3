"""The meters of a run, against known numbers, formulas and a clock; compiling that fails."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.common import our_training, settings_for
from tests.frame_data import random_batch
from tests.runs import Workplace
from tests.support import environment
from vac_ddp.errors import UserError
from vac_ddp.models import build_model
from vac_ddp.models.compilation import compile_if_it_works, train_pass
from vac_ddp.scoring.scorer import Scorer, pass_size
from vac_ddp.settings import ClipSettings, ModelSettings
from vac_ddp.training import meters
from vac_ddp.training.health import Summary
from vac_ddp.training.step_record import StepRecord, phases

CPU = torch.device("cpu")
SMALL = ClipSettings(frames=4, size=32)
GIGA = 1e9


def small(**options: object) -> torch.nn.Module:
    return build_model(ModelSettings(weights=None, width=32, depth=3, heads=2, **options), SMALL, 5)


def test_videomae_base_costs_what_a_counter_of_its_own_said() -> None:
    """360.7 GFLOP forward, 1078 with the backward pass, counted on the official model's shape."""
    model = build_model(ModelSettings(weights=None, size="base"), ClipSettings(), 400)
    forward, whole = meters.clip_flops(model, ClipSettings())
    assert forward / GIGA == pytest.approx(360.7, abs=0.05)
    assert whole / GIGA == pytest.approx(1078, abs=0.5)


def test_flops_are_those_of_the_formula_whatever_is_computed_again() -> None:
    tokens, width, depth, classes = 2 * 2 * 2, 32, 3, 5
    block = 2 * tokens * (3 + 1 + 8) * width**2 + 2 * 2 * tokens**2 * width
    embed, head = 2 * tokens * 3 * 2 * 16 * 16 * width, 2 * width * classes
    for options in ({}, {"drop_path": 0.2, "head_dropout": 0.5}):
        model = small(**options)
        model.checkpointing = 2
        forward, whole = meters.clip_flops(model, SMALL)
        assert forward == depth * block + embed + head
        assert whole == 3 * forward - embed  # nobody asks for the gradient of the pixels
        assert model.checkpointing == 2
        assert not torch.isnan(torch.cat([p.flatten() for p in model.parameters()])).any()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.depth_of(name) >= 3)
    frozen = meters.clip_flops(model, SMALL)[1]
    assert frozen == forward + 2 * block + 2 * head


def test_a_matrix_product_has_the_rate_of_a_clock() -> None:
    before = torch.get_rng_state()
    rate = meters.matmul_rate(CPU, None)
    assert torch.equal(torch.get_rng_state(), before)
    a = torch.randn(768, 768)
    a @ a
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    assert 0.1 < rate / (2 * 768**3 / min(times)) < 10


def summary(samples: int, phases: dict[str, float], memory: float = 1.0) -> Summary:
    return Summary(
        loss=0.0,
        accuracy=0.0,
        samples=samples,
        finite=samples,
        norm=0.0,
        lr=0.0,
        bad_steps=[],
        bad_samples={},
        busy_s=[0.0],
        phases=phases,
        memory_gib=memory,
    )


def test_a_line_is_of_all_steps_since_the_last_one() -> None:
    """Counters that were read in between, and the end of an epoch, count with the time that they took."""
    found = meters.Meters(device=CPU, world_size=2, flops_per_clip=3e9, matmul=6e9)
    found.take(summary(20, {"idle": 0.5, "forward": 1.0}))
    found.take(summary(10, {"idle": 0.25, "forward": 0.5}, memory=2.0))
    found.spend(3.0, 0.6)
    found.take(summary(30, {"idle": 0.25}))
    found.spend(2.0, 0.4)
    line = found.line()
    assert line["clips_per_s"] == pytest.approx(60 / 5)
    assert line["data_wait"] == pytest.approx(1.0 / 5)
    assert line["mfu"] == pytest.approx(12 * 3e9 / (2 * 6e9))
    assert (line["idle_s"], line["forward_s"], line["memory_gib"]) == (1.0, 1.5, 2.0)
    found.take(summary(8, {"idle": 0.0}))
    found.spend(1.0, 0.0)
    assert found.line()["clips_per_s"] == pytest.approx(8)
    assert found.seconds["training"] == pytest.approx(6.0)
    assert "8 clips/s" in found.end_line() and "200 % of the matmul" in found.end_line()  # the first line is the start
    assert "unreliable" in found.end_line()
    found.measure_again(None)  # the real rate of this machine is far above 6 GFLOP/s' worth of this run
    assert found.matmul is not None and found.matmul > 6e9
    assert "unreliable" not in found.end_line()
    with found.phase("saving"):
        pass
    assert "saving" in found.seconds


def test_a_gpu_that_is_behind_does_not_notice_that_the_host_waits() -> None:
    found = meters.Meters(device=torch.device("cuda"), world_size=1)
    found.take(summary(10, {"idle": 0.1}))
    found.spend(1.0, 0.9)
    assert found.line()["data_wait"] == pytest.approx(0.1)


def test_phases_lie_between_their_marks() -> None:
    marks = [("", 1.0), ("idle", 1.5), ("prepare", 1.6), ("forward", 2.0), ("backward", 3.0), ("forward", 3.5)]
    none = torch.zeros(())
    record = StepRecord(
        step=0, samples=[], losses=[], correct=[], norm=none, found_inf=none, lr=0.0, busy=(0.0, 0.0), marks=marks
    )
    found = phases(record)
    assert found == pytest.approx({"idle": 0.5, "prepare": 0.1, "forward": 0.9, "backward": 1.0})


def test_garbage_is_collected_by_hand_inside_and_by_itself_after() -> None:
    assert gc.isenabled()
    with contextlib.suppress(KeyError), meters.collected_by_hand():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        raise KeyError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


FAULTS = """
import ctypes, resource, sys, torch
from vac_ddp.runtime.host_memory import GIB, keep_freed_memory
how, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if how == "kept":
    keep_freed_memory()
if how == "asked":
    print(ctypes.CDLL(None).mallopt(-3, GIB))
    raise SystemExit
for turn in range(32):
    if turn == 24:  # it takes the first turns for the allocator to settle, how many depends on what else was allocated
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt")
@pytest.mark.parametrize("count", [1, 8])
def test_memory_that_is_freed_stays_and_costs_no_page_faults(count: int) -> None:
    """Filling and freeing 128 MiB again and again, in one tensor or several, in a process of its own."""

    def measured(how: str) -> int:
        words = [sys.executable, "-c", FAULTS, how, str(count), str((128 << 20) // count)]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
        return int(done.stdout)

    if count == 1 and not measured("asked"):
        pytest.skip("this C library maps every tensor above 32 MiB: no setting changes that")
    assert measured("kept") < 8  # of the 8 turns that count, none maps its 128 MiB anew: 64 pages of 2 MiB at least
    if count == 1:  # several smaller tensors glibc may keep by itself, depending on what else was allocated
        assert measured("plain") >= 8 * 64


# ---------------------------------------------------------------- runs


def test_a_run_says_how_fast_it_was(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    done = place.train("run", "log.every_steps=3", "health.max_bad_steps=2", "train.epochs=2", ranks=1)
    assert done.returncode == 0, done.stderr
    lines = place.lines("run", "train")
    assert [line["step"] for line in lines] == [3, 6, 8]
    whole = 0.0
    for line in lines:
        parts = [line[f"{name}_s"] for name in ("idle", "prepare", "forward", "backward", "optimizer")]
        assert min(parts) >= 0 and line["mfu"] > 0 and 0 <= line["data_wait"] <= 1 and line["memory_gib"] > 0.1
        whole += sum(parts)
    (spent,) = place.lines("run", "speed")
    assert whole <= spent["training"] * 1.001
    clips = sum(line["clips_per_s"] for line in lines)
    assert math.isfinite(clips) and 42 / spent["training"] > 0
    log = (place.folder / "run" / "log.txt").read_text()
    assert "GFLOP a clip: no more than" in log and log.count("speed    ") == 2 and "validation" in log


@pytest.mark.distributed
def test_gradients_reduced_in_bfloat16_are_near_the_others_and_the_same_on_all_ranks(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    words = ["train.max_steps=4", "health.checksum_every=1", "data.val=null", "data.val_fraction=0"]
    for name in ("false", "true"):
        done = place.train(name, f"train.bf16_reduce={name}", *words)
        assert done.returncode == 0, done.stderr
    plain, half = (place.lines(name, "train") for name in ("false", "true"))
    norms = [(a["grad_norm"], b["grad_norm"]) for a, b in zip(plain, half, strict=True)]
    assert all(b == pytest.approx(a, rel=2e-2) for a, b in norms)
    assert any(a != b for a, b in norms)
    assert half[0]["loss"] == plain[0]["loss"]  # before the first update


# ---------------------------------------------------------------- compiling


def compiled(model: torch.nn.Module, wanted: bool | None, *, default: bool, said: list[str]) -> bool:
    return compile_if_it_works(
        model,
        lambda: train_pass(model, SMALL, 2, CPU, None),
        setting="train.compile",
        wanted=wanted,
        default=default,
        gather=lambda value: [value],
        say=said.append,
    )


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the compiler has no back end that works."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler\nwas found")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)


def test_compiling_that_fails_is_off_with_its_reason(broken: None) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=r"train\.compile=true, .* no working C\+\+ compiler was found"):
        compiled(small(), True, default=False, said=said)
    assert said == []
    model, clips = small(), torch.randn(2, 4, 3, 32, 32)
    expected = model(clips)
    assert not compiled(model, None, default=True, said=said)
    assert len(said) == 1 and said[0].startswith("compile off: ") and "no working C++ compiler was found" in said[0]
    assert torch.equal(model(clips), expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    for wanted, default in ((None, False), (False, True)):
        assert not compiled(small(), wanted, default=default, said=said)
    assert len(said) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="extra test: needs a CUDA device")
def test_on_a_gpu_the_blocks_are_compiled_and_the_meters_count_events(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    done = place.python("-m", "vac_ddp.train", *place.arguments("run", "train.compile=true"), CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    assert "compile off" not in done.stdout + done.stderr
    for line in place.lines("run", "train"):
        assert 0 <= line["data_wait"] <= 1 and 0 < line["mfu"] < 1 and line["memory_gib"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="extra test: needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_nothing_in_a_step_waits_for_a_gpu(compile: bool) -> None:
    """PyTorch raises where the host looks at a value of the device."""
    device = torch.device("cuda", 0)
    config = settings_for({"width": 64, "depth": 2, "heads": 2}, frames=4, size=32, clips=4, compile=compile)
    config.model.drop_path, config.train.ema_decay, config.optim.clip_norm = 0.2, 0.9, 1.0
    config.augment.mixup, config.augment.cutmix = 0.8, 1.0
    config.augment.randaugment, config.augment.erase = "rand-m7-n4-mstd0.5-inc1", 0.5
    config.train.global_batch = 8
    ours = our_training(config, device)
    batch = random_batch(config, ours.stepper.model.noise_size, 8).to(device)
    for step in range(3):
        ours.step([batch], step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 6):
            ours.step([batch], step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(record.norm) for record in ours.stepper.records)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="extra test: needs a CUDA device")
def test_a_pass_is_as_large_as_it_pays() -> None:
    model = small().cuda().eval()
    scorer = Scorer(
        model=model,
        device=torch.device("cuda", 0),
        autocast=torch.bfloat16,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        flip=False,
        clips_per_gpu="auto",
    )
    size = pass_size(scorer, SMALL, most=1000)
    assert size >= 64
    assert size % 64 == 0
    assert pass_size(scorer, SMALL, most=10) == 64
    scorer.clips_per_gpu = 7
    assert pass_size(scorer, SMALL, most=1000) == 7
