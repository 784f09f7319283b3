"""The GPU of a process: what torch can compute on it, and why torch cannot use one that is there. Imports no ranks."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from vac_ddp.errors import UserError

BF16_FROM = (8, 0)  # compute capability; below, torch emulates bf16 by float32
ON_THE_CPU = "hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
HIDES_ALL = ("", "-1", "none", "void", "NoDevFiles")  # as people, containers and SLURM hide all GPUs
DEVICE_FILES = Path("/dev")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU. bf16: whether it computes in bfloat16, rather than emulate it."""

    name: str
    capability: tuple[int, int]
    bf16: bool


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that `device` is; None for a CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    bf16 = torch.version.hip is not None or (major, minor) >= BF16_FROM
    return Gpu(name=torch.cuda.get_device_name(device), capability=(major, minor), bf16=bf16)


def cuda_available() -> bool:
    """Whether torch can use a GPU. UserError where there is an NVIDIA GPU, nobody hid it, and torch cannot use it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old drivers in several lines, without ending
        if torch.cuda.is_available():
            return True
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() in HIDES_ALL:
        return False
    found = nvidia_devices()
    if not found:
        return False
    raise UserError(f"torch {torch.__version__} cannot use {', '.join(found)}: {_why_unusable()}, or {ON_THE_CPU}")


def nvidia_devices() -> list[str]:
    """NVIDIA GPUs of this machine that this process may use: device files, else what nvidia-smi lists."""
    found = [path for path in DEVICE_FILES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if allowed := [str(path) for path in sorted(found) if _allowed(path)]:
        return allowed
    program = shutil.which("nvidia-smi")  # under WSL there are no device files
    if found or program is None:
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=True)
        return [line.partition(" (UUID")[0] for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return []


def _allowed(path: Path) -> bool:
    """Whether the control group of this process lets it open a device: SLURM denies GPUs that a job did not ask for."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def _why_unusable() -> str:
    """What torch says of the GPUs of this machine, and the remedy."""
    if torch.version.cuda is None:
        return "it is built without CUDA; install a torch with CUDA"
    said = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
    if "too old" in said:
        version = re.search(r"found version (\d+)", said)
        supports = f" (it supports CUDA {int(version[1]) // 1000}.{int(version[1]) % 1000 // 10})" if version else ""
        return (
            f"the NVIDIA driver is too old for CUDA {torch.version.cuda}{supports}; update it, install an older torch"
        )
    said = said.partition(". ")[0].rstrip(".") or "it finds no usable GPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
    return f"{said}{named}; check that nvidia-smi works"


def check_kernels(device: torch.device) -> None:
    """UserError where the installed torch has no kernels for the GPU `device`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of such a GPU in several lines, and fails at the first kernel
        built = torch.cuda.get_arch_list()
        gpu = gpu_of(device)
    if gpu is None or torch.version.cuda is None or not built or any(_runs_on(code, gpu.capability) for code in built):
        return
    number = f"{gpu.capability[0]}{gpu.capability[1]}"
    raise UserError(
        f"torch {torch.__version__} has no kernels for {gpu.name} (sm_{number}), only for {', '.join(built)}: install "
        f"a torch that is built for sm_{number}, or {ON_THE_CPU}"
    )


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Whether kernels of an architecture run on a GPU of this compute capability.

    sm_XY is machine code: the same major, the same minor or a later one. compute_XY is PTX: anything from X.Y. With an
    `a` behind it, either is for X.Y alone; with an `f`, for the same major.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code)
    if match is None:
        return True  # a kind that this version does not know
    built = (int(match[2]), int(match[3]))
    if match[4] == "a":
        return built == capability
    if match[1] == "compute" and not match[4]:
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]
