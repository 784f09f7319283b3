"""Which device a rank computes on, and in which precision: torch's answers are replaced, as no GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import torchrun
from vac_ddp.errors import UserError
from vac_ddp.models.precision import precision_of, run_precision
from vac_ddp.models.weight_files import open_own
from vac_ddp.runtime import distributed, gpus
from vac_ddp.runtime.gpus import Gpu
from vac_ddp.scoring.scorer import open_scorer
from vac_ddp.settings import Config

T4 = Gpu(name="Tesla T4", capability=(7, 5), bf16=False)
A100 = Gpu(name="NVIDIA A100", capability=(8, 0), bf16=True)
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
OLD_RUN = Path(__file__).parent / "fixtures" / "be24294" / "videomae" / "best_videomae.pt"


def fake_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str], *, count: int = 1
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="13.0", hip=None))


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 5), CUDA_13, True),
        ((7, 0), CUDA_13, False),  # V100
        ((6, 0), CUDA_13, False),  # P100
        ((8, 9), CUDA_13, True),  # by sm_86
        ((8, 0), ["sm_86"], False),  # an earlier minor
        ((9, 0), ["sm_80", "sm_86"], False),  # another major
        ((9, 0), ["sm_80", "compute_80"], True),  # by PTX
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a", "compute_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((7, 0), [], True),  # torch does not say
        ((7, 0), ["sm_next"], True),
    ],
)
def test_a_gpu_without_kernels_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    fake_cuda(monkeypatch, capability, built)
    if runs:
        assert distributed.pick_device() == torch.device("cuda", 0)
        return
    with pytest.raises(UserError, match=r"no kernels for NVIDIA X \(sm_\d\d\d?\)") as error:
        distributed.pick_device()
    assert "\n" not in str(error.value) and "CUDA_VISIBLE_DEVICES= " in str(error.value)


def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *names: str, cuda: str | None, says: str = "") -> None:
    """A machine with these device files, where torch sees no GPU and CUDA's initialization ends by `says`."""
    for name in names:
        (tmp_path / name).touch()

    def init() -> None:
        raise RuntimeError(says)

    monkeypatch.setattr(gpus, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda, hip=None))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by\nhttps"


@pytest.mark.parametrize(
    ("cuda", "says", "part"),
    [
        (None, "", "it is built without CUDA"),
        ("13.0", TOO_OLD, "driver is too old for CUDA 13.0 (it supports CUDA 11.4)"),
        ("13.0", "Unexpected error from cudaGetDeviceCount(). Did you run some", "Unexpected error from cudaGetDevi"),
        ("13.0", "", "it finds no usable GPU"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_no_silent_cpu_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, says: str, part: str
) -> None:
    machine(monkeypatch, tmp_path, "nvidia1", "nvidiactl", "nvidia-uvm", cuda=cuda, says=says)
    with pytest.raises(UserError, match="nvidia1:") as error:
        distributed.pick_device()
    assert part in str(error.value) and "\n" not in str(error.value)
    assert "nvidiactl" not in str(error.value)
    for hidden in ("", "-1", "NoDevFiles"):  # the CPU was asked for
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert distributed.pick_device() == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError):
        distributed.pick_device()


def test_the_cpu_is_taken_where_there_is_no_gpu_for_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(monkeypatch, tmp_path, "nvidiactl", "null", cuda="13.0")
    assert distributed.pick_device() == torch.device("cpu")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    program.chmod(0o755)
    assert distributed.pick_device() == torch.device("cpu")
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)'\n")
    with pytest.raises(UserError, match="cannot use GPU 0: NVIDIA GeForce RTX 4090: "):  # WSL: no device files
        distributed.pick_device()
    program.unlink()
    (tmp_path / "nvidia0").touch()
    real = os.open

    def denied(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).endswith("nvidia0"):
            raise PermissionError(1, "Operation not permitted")
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", denied)  # a job without a GPU, on a machine that has some
    assert distributed.pick_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("gpu", "trained", "precision"),
    [
        (None, None, "fp32"),
        (None, "bf16", "fp32"),
        (T4, None, "fp16"),
        (T4, "bf16", "fp16"),
        (A100, None, "bf16"),
        (A100, "fp16", "fp16"),
        (A100, "bf16", "bf16"),
        (A100, "fp32", "bf16"),
    ],
)
def test_auto_is_fp16_where_bf16_is_emulated(gpu: Gpu | None, trained: str | None, precision: str) -> None:
    config = Config()
    assert precision_of(config, gpu, trained) == precision
    config.train.precision = "fp32"
    assert precision_of(config, gpu, trained) == "fp32"


def test_a_run_keeps_its_precision_or_says_that_a_gpu_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_t4, of_an_a100 = ({"precision": p, "device": d} for p, d in (("fp16", "Tesla T4"), ("bf16", "NVIDIA A100")))
    assert run_precision(Config(), A100, of_a_t4) == "fp16"
    assert run_precision(Config(), T4, None) == "fp16"
    with pytest.raises(UserError, match="trained in bf16 on NVIDIA A100, which Tesla T4 lacks"):
        run_precision(Config(), T4, of_an_a100)
    assert run_precision(Config(), T4, {"precision": "bf16", "device": "Tesla T4"}) == "bf16"  # of an earlier version
    for capability, bf16 in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        fake_cuda(monkeypatch, capability, [])
        assert gpus.gpu_of(torch.device("cuda", 0)) == Gpu(name="NVIDIA X", capability=capability, bf16=bf16)


@pytest.mark.parametrize(("trained", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_prediction_keeps_the_precision_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: str, dtype: torch.dtype
) -> None:
    content = torch.load(OLD_RUN, weights_only=True)
    torch.save({**content, "precision": trained}, tmp_path / "best_videomae.pt")
    source = open_own(tmp_path / "best_videomae.pt")
    config = Config()
    config.clip.frames, config.clip.size = 4, 32
    assert open_scorer(config, source, torch.device("cpu"), None).autocast is None
    assert open_scorer(config, source, torch.device("cpu"), A100).autocast is dtype


RANKS = """
import os
from types import SimpleNamespace
import torch
from vac_ddp.errors import UserError
from vac_ddp.models.precision import precision_of
from vac_ddp.runtime import distributed as d
from vac_ddp.settings import Config

rank = d.rank()
torch.cuda.set_device = lambda device: None
torch.cuda.device_count = lambda: 3
torch.cuda.get_arch_list = lambda: ["sm_75", "sm_80"]
torch.cuda.get_device_name = lambda device: f"card {rank}"
torch.version = SimpleNamespace(cuda="13.0", hip=None)

def refused(attempt, available, capability=(8, 0)):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # a store of its own
    torch.cuda.is_available = lambda: available
    torch.cuda.get_device_capability = lambda device: capability
    try:
        d.start(timeout_s=60)
    except UserError as error:
        assert not d.active()
        return str(error)
    raise AssertionError("nothing was raised")

said = refused(10, available=rank != 1)
assert "see different types of devices: rank 0 cuda (" in said and ", rank 1 cpu (" in said, said
if os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True":  # the one that rank 0 made had its use
    os.write(1, b"good\\n")
    os._exit(0)
said = refused(11, available=True, capability=(7, 0) if rank == 1 else (8, 0))
assert "no kernels for card 1 (sm_70), only for sm_75, sm_80" in said, said
os.environ["TORCHELASTIC_RESTART_COUNT"] = "12"
d.start(torch.device("cpu"), timeout_s=60)
torch.cuda.get_device_capability = lambda device: (7, 5) if rank == 2 else (8, 0)
weakest = d.weakest_gpu(torch.device("cuda", 0))
assert weakest.name == "card 2", weakest
assert precision_of(Config(), weakest) == "fp16"
assert d.weakest_gpu(torch.device("cpu")) is None
os.write(1, b"good\\n")
d.end(0)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("share", ["0", pytest.param("1", marks=pytest.mark.fault)])
def test_ranks_agree_on_devices_before_the_process_group(tmp_path: Path, share: str) -> None:
    """By the store of torchrun's agent, and by one that rank 0 makes, as on several machines."""
    program = tmp_path / "program.py"
    program.write_text(RANKS, encoding="utf-8")
    done = torchrun(3, program, cwd=tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=share)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["good"] * 3
