"""vac doctor: what it says follows from what it measured, and what it measured is near a clock of ours."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runs import make_videos, one_line
from tests.support import REPO, environment
from vac_ddp.data.decode import decode_frame
from vac_ddp.doctor import examination, machine_rates
from vac_ddp.doctor.advice import Measured, advice, limits
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.training.meters import clip_flops

GPU = Measured(
    workers=4,
    ranks=2,
    repeats=1,
    frame_bytes=25_000,
    frame_shape=(240, 320),
    clip_frames=16,
    clip_bytes=16 * 224 * 224 * 3,
    decode_all=600.0,
    read_bytes=2e9,
    copy_bytes=20e9,
    step=350.0,
    gradient_bytes=86_000_000 * 4,
    all_reduce=200e9,
    clips_a_step=64,
    cuda=True,
)


def test_limits_are_clips_a_second_of_the_whole_machine() -> None:
    rates = limits(GPU)
    assert rates["decoding"] == 1200
    assert rates["disk"] == pytest.approx(2e9 / (25_000 * 16))
    assert rates["copies to the device"] == pytest.approx(2 * 20e9 / (16 * 224 * 224 * 3))
    assert rates["the model"] == 700
    assert rates["the model with all-reduce"] == pytest.approx(64 / (64 / 700 + 344e6 / 200e9))
    assert list(rates.values()) == sorted(rates.values())
    twice = limits(dataclasses.replace(GPU, repeats=2))
    assert (twice["decoding"], twice["disk"]) == (2400, 2 * rates["disk"])


@pytest.mark.parametrize(
    ("change", "first", "settings"),
    [
        ({"decode_all": 100.0}, "decoding", ["augment.repeats=2"]),
        ({"decode_all": 100.0, "frame_shape": (720, 1280)}, "decoding", ["vac extract --short-side 224"]),
        ({"decode_all": 100.0, "workers": 0}, "decoding", ["data.workers"]),
        ({"read_bytes": 10e6}, "disk", ["vac pack"]),
        ({"all_reduce": 1e9}, "the model with all-reduce", ["train.bf16_reduce=true", "train.global_batch"]),
        ({"copy_bytes": 1e8}, "copies to the device", ["clip.size"]),
        ({"all_reduce": None}, "the model", ["train.freeze_depth"]),
        ({"all_reduce": None, "decode_all": 400.0}, "the model", ["augment.repeats=2", "train.freeze_depth"]),
        ({"all_reduce": None, "cuda": False}, "the model", ["a GPU"]),
    ],
)
def test_advice_names_what_holds_back_and_the_settings(change: dict, first: str, settings: list[str]) -> None:
    lines = advice(dataclasses.replace(GPU, **change), Config())
    assert lines[0].startswith(f"held back by {first}: ")
    assert all(any(name in line for line in lines[1:]) for name in settings), lines


def test_advice_does_not_name_what_is_set_already() -> None:
    config = Config()
    config.augment.repeats, config.train.bf16_reduce, config.train.compile = 2, True, False
    slow = dataclasses.replace(GPU, decode_all=100.0, repeats=2)
    assert not any("augment.repeats" in line for line in advice(slow, config))
    far = dataclasses.replace(GPU, all_reduce=1e9)
    said = advice(far, config)
    assert not any("bf16_reduce" in line for line in said)
    assert any("train.compile=true" in line for line in said)


def test_decoding_is_what_a_clock_says(tmp_path: Path) -> None:
    frames = [path.read_bytes() for path in machine_rates.make_sample(tmp_path)]
    assert 15 < sum(map(len, frames)) / len(frames) / 1024 < 40
    config = Config()
    rate = machine_rates.decode_rate_together(frames, config, 1)
    times = []
    for _ in range(10):  # the quickest: others may have the processor in between
        begin = time.perf_counter()
        for data in frames:
            decode_frame(data)
        times.append(time.perf_counter() - begin)
    alone = len(frames) / 16 / min(times)
    assert 0.1 * alone < rate < 2 * alone  # decoding is most of it


def test_frames_are_looked_for_within_bounds(tmp_path: Path) -> None:
    make_videos(tmp_path / "data", classes=2, videos=40, frames=12)
    found = machine_rates.sample_frames(tmp_path / "data")
    assert 0 < len(found) <= machine_rates.SAMPLE
    assert len({path.parent for path in found}) > 10
    assert machine_rates.sample_frames(tmp_path / "nothing") == []


def tiny(name: str, **model: object) -> Config:
    """The settings of a model of few parameters."""
    config = Config()
    config.clip.frames, config.clip.size = 4, 32
    config.model = dataclasses.replace(config.model, name=name, weights=None, width=32, depth=2, heads=2, **model)
    return config


@pytest.mark.parametrize(
    "config",
    [tiny("videomae"), tiny("lsvit"), tiny("frame_vit"), tiny("probe", encoder="videomae", pooling="attentive")],
    ids=lambda config: config.model.name,
)
def test_a_model_is_counted_without_memory_for_it(config: Config) -> None:
    model = examination.unallocated(config)
    assert all(parameter.is_meta for parameter in model.parameters() if parameter.ndim > 1)
    whole = examination.model_of(config)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.parameters())
    assert examination.flops_without_memory(model, config.clip) == clip_flops(whole, config.clip)


def test_a_model_beyond_memory_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config, built = tiny("videomae"), []
    real = examination.model_of
    monkeypatch.setattr(examination, "matmul_rate", lambda device, dtype: 1e15)

    def counted(config: Config) -> object:
        built.append(torch.get_default_device().type)
        return real(config)

    monkeypatch.setattr(examination, "model_of", counted)
    parameters = sum(p.numel() for p in real(config).parameters())
    lines: list[str] = []
    for free, fits in ((8 * parameters - 1, False), (8 * parameters, True)):
        monkeypatch.setattr(examination, "free_memory", lambda free=free: free)
        rate, gradient = examination._measure_model(config, torch.device("cpu"), lines.append)
        assert (rate is not None, gradient) == (fits, 4 * parameters)
        assert ("does not fit into memory" in lines[-1]) is not fits
    assert built == ["meta", "meta", "cpu"]


@pytest.mark.parametrize(("most", "clips"), [(16, 16), (5, 4), (1, 1), (0, None)])
def test_fewer_clips_are_passed_where_memory_ends(
    monkeypatch: pytest.MonkeyPatch, most: int, clips: int | None
) -> None:
    passed = []

    def passes(model: object, clip: object, count: int, *_: object) -> None:
        if count > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passed.append(count)

    monkeypatch.setattr(examination, "train_pass", passes)
    config = tiny("videomae")
    config.train.clips_per_gpu = 64
    rate = examination.step_rate(config, 10, torch.device("cpu"), 1.0, 1.0)
    assert set(passed) == ({clips} if clips else set())
    assert (rate is None) is (clips is None)


@pytest.mark.parametrize("gpus", [1, 2])
def test_one_gpu_has_nothing_to_reduce(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    asked: list[int] = []
    monkeypatch.setattr(distributed, "pick_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "X")
    monkeypatch.setattr(machine_rates, "DECODE_S", 0.01)
    monkeypatch.setattr(examination, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(examination, "_measure_model", lambda config, device, say: (None, 400))
    monkeypatch.setattr(examination, "all_reduce_rate", lambda ranks: asked.append(ranks) or 1e9)
    config, lines = tiny("videomae"), []
    config.data.train = "nowhere"
    measured = examination.examine(config, lines.append)
    assert asked == ([] if gpus == 1 else [2])
    assert any(line.startswith("all-reduce") for line in lines) is (gpus > 1)
    assert any("one clip does not fit into memory" in note for note in measured.notes)
    assert advice(measured, config)[0].startswith("held back by ")


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vac_ddp.cli", "doctor", *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_program_measures_and_advises(tmp_path: Path) -> None:
    make_videos(tmp_path / "data_train", classes=2, videos=3)
    done = run(tmp_path, "--config", str(REPO / "configs" / "scratch_small.yaml"))
    assert done.returncode == 0, done.stderr
    for part in ("machine", "decoders", "frames", "decoding", "disk", "matrix product", "model", "all-reduce"):
        assert f"\n{part} " in "\n" + done.stdout, done.stdout
    assert "40x40" in done.stdout
    assert "held back by" in done.stdout
    made = run(tmp_path, "--config", "hmdb51_videomae_base", "data.train=nowhere")
    assert made.returncode == 0, made.stderr
    assert "made frames" in made.stdout
    assert "\nmemory " in made.stdout
    assert "1078 GFLOP a clip" in made.stdout  # the size is in the name of the weights


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    assert "train.epochs" in one_line(run(tmp_path, "train.epoch=3"))
    for label in range(2):
        (tmp_path / "data_train" / f"class{label}" / "v").mkdir(parents=True)
        (tmp_path / "data_train" / f"class{label}" / "v" / "0001.jpg").write_bytes(b"no picture")
    assert "vac audit" in one_line(run(tmp_path))
