"""How fast a run is, and where its time goes: clips a second, waiting, model FLOP utilisation, memory, phases."""

from __future__ import annotations

import contextlib
import gc
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vac_ddp.models import VideoModel
from vac_ddp.models.compilation import zeros_loss
from vac_ddp.settings import ClipSettings
from vac_ddp.training.health import Summary

SIDE = {"cuda": 8192, "cpu": 768}  # of the square matrices whose product is the measure of a device
GIB = 1 << 30


def clip_flops(model: VideoModel, clip: ClipSettings) -> tuple[float, float] | None:
    """FLOP of one clip, (forward, forward and backward), a multiply-add counting as two.

    Counted on one real pass, without autocast, that leaves nothing behind. What checkpointing computes again does not
    count, and neither do the gradients of frozen layers. None where such a pass is not possible.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    again, model.checkpointing = model.checkpointing, 0
    counter = FlopCounterMode(display=False)
    try:
        with counter, sdpa_kernel(SDPBackend.MATH):  # others compute scores again going back
            loss = zeros_loss(model, clip, 1, device, None)
            forward = counter.get_total_flops()
            torch.autograd.grad(loss, trained, allow_unused=True)
    except (RuntimeError, NotImplementedError):  # out of memory, an operation that cannot be counted
        return None
    finally:
        model.checkpointing = again
    return float(forward), float(counter.get_total_flops())


def matmul_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s that `device` reaches on a large product of random matrices in `dtype` (None: float32), best of five.

    Zeros would be too fast: a GPU draws less power on them. The global generators are left alone.
    """
    side, kind = SIDE[device.type], dtype or torch.float32
    source = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=source).to(kind) for _ in range(2))
    repeats = 10 if device.type == "cuda" else 1
    best = float("inf")
    for _ in range(6):
        begin = _clock(device)
        for _ in range(repeats):
            a @ b
        best = min(best, _clock(device) - begin)
    return repeats * 2 * side**3 / best


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on a CUDA device, or that this process had resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


@contextlib.contextmanager
def collected_by_hand() -> Iterator[None]:
    """No automatic garbage collection inside: it would stop one rank, and with it all, at any time for milliseconds.

    What is there already is never looked at again; call `gc.collect()` where nobody waits.
    """
    gc.collect()
    gc.freeze()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


@dataclass(kw_only=True)
class Meters:
    """The speed of this process's part of a run.

    flops_per_clip: of forward and backward pass, None where not known; matmul: FLOP/s of one device; seconds: by
    phase, of this rank: wait (for data), idle (between steps, waiting included), prepare, forward, backward, optimizer,
    training (all of these and the rest), validation, saving; rates, waits: of every line; memory: GiB, of any rank.
    """

    device: torch.device
    world_size: int
    flops_per_clip: float | None = None
    matmul: float | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rates: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    memory: float = 0.0
    _samples: int = 0
    _seconds: float = 0.0
    _waited: float = 0.0
    _phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def take(self, summary: Summary) -> None:
        """Take in some steps; a line may have several such."""
        self._samples += summary.samples
        self.memory = max(self.memory, summary.memory_gib)
        for name, took in summary.phases.items():
            self._phases[name] += took

    def spend(self, seconds: float, waited: float) -> None:
        """The steps that were taken in took `seconds`, of which the host waited for data for `waited`."""
        self._seconds += seconds
        self._waited += waited

    def line(self) -> dict[str, float]:
        """Figures of the steps since the last line.

        A GPU that is behind the host does not notice that the host waits: only its own idle time counts.
        """
        seconds, waited = self._seconds, self._waited
        wait = min(waited, self._phases["idle"]) if self.device.type == "cuda" else waited
        rate = self._samples / max(seconds, 1e-9)
        found = {"clips_per_s": rate, "data_wait": wait / max(seconds, 1e-9), "memory_gib": self.memory}
        if self.flops_per_clip is not None and self.matmul:
            found["mfu"] = self.utilisation(rate)
        found |= {f"{name}_s": took for name, took in self._phases.items()}
        for name, took in {"training": seconds, "wait": wait, **self._phases}.items():
            self.seconds[name] += took
        self.rates.append(rate)
        self.waits.append(found["data_wait"])
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0
        self._phases.clear()
        return found

    def utilisation(self, rate: float) -> float:
        """Share of the matrix product's FLOP/s that `rate` clips/s of all ranks are."""
        assert self.flops_per_clip is not None
        assert self.matmul
        return rate * self.flops_per_clip / (self.matmul * self.world_size)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def start_line(self) -> str:
        """What the device could do, for the start of the log."""
        rate = "" if not self.matmul else f"matmul {self.matmul / 1e12:.3g} TFLOP/s"
        if self.flops_per_clip is None or not self.matmul:
            return rate
        bound = self.matmul * self.world_size / self.flops_per_clip
        return f"{rate}, {self.flops_per_clip / 1e9:.4g} GFLOP a clip: no more than {bound:.3g} clips/s"

    def measure_again(self, dtype: torch.dtype | None) -> None:
        """Measure the matmul once more and take the larger one: it is too low where the machine was busy."""
        if self.matmul:
            with contextlib.suppress(torch.OutOfMemoryError):
                self.matmul = max(self.matmul, matmul_rate(self.device, dtype))

    def end_line(self) -> str:
        """Medians over the lines, and seconds by phase; empty where no step was made."""
        later = slice(1 if len(self.rates) > 1 else 0, None)  # the first line holds the start
        if not self.rates:
            return ""
        rate, wait = statistics.median(self.rates[later]), statistics.median(self.waits[later])
        parts = [f"{rate:.4g} clips/s", f"{100 * wait:.1f} % of it waiting for data"]
        if self.flops_per_clip is not None and self.matmul:
            share = self.utilisation(rate)
            doubt = " (unreliable: the machine was busy when the matmul was measured)" if share > 1 else ""
            parts.append(f"{100 * share:.0f} % of the matmul's FLOP/s{doubt}")
        parts.append(f"at most {self.memory:.2f} GiB")
        return ", ".join(parts) + f" ({phases_text(self.seconds)})"


def phases_text(seconds: dict[str, float]) -> str:
    """Seconds by phase on one line, training with what it is made of."""
    inside = ("wait", "prepare", "forward", "backward", "optimizer")
    shown = ", ".join(f"{name} {seconds[name]:.1f}" for name in inside if name in seconds)
    rest = "".join(f"; {name} {seconds[name]:.1f} s" for name in ("validation", "saving") if seconds.get(name))
    return f"training {seconds.get('training', 0.0):.1f} s: {shown}{rest}"
