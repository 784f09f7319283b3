"""Each lever of speed: what it was expected to bring, and what it brought, with and without it in turns.

    python -m benchmarks.levers            # those that a CPU can show; on a GPU all of them
    python -m benchmarks.levers --dry      # every piece at tiny sizes

A figure is the median of the ratios within a round; the spread of the rounds stands beside it. A lever that brings
nothing where it should is to be taken out of the code.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    SMALL,
    TINY,
    Stopwatch,
    about_line,
    arguments,
    device_of,
    keys_of,
    machine,
    make_frames,
    our_training,
    settings_for,
    table,
    training_set,
    write,
)
from vac_ddp.data.batch import Batch
from vac_ddp.data.loader import to_device
from vac_ddp.errors import DONE
from vac_ddp.settings import Config
from vac_ddp.training.meters import collected_by_hand, keep_freed_memory

Run = Callable[[Stopwatch], float]


@dataclass
class Lever:
    """Two ways to do the same; `with_` and `without` return clips (or other things) a second."""

    name: str
    expected: str
    make: Callable[[], tuple[Run, Run]] | None
    gpu: bool = False  # nothing to see on a CPU
    note: str = ""


def _as_it_is(ours: Any) -> None:
    pass


class Bench:
    """What the levers are tried on: a training step in memory, and frames."""

    def __init__(self, options: Any, device: torch.device, folder: Path) -> None:
        self.options, self.device = options, device
        self.index = make_frames(folder, videos=4, frames=24 if options.dry else 48)
        self.config = settings_for(options.sizes, frames=16, size=options.size, clips=options.clips, compile=False)
        noise = our_training(self.config, device).stepper.model.noise_size
        self.batch = training_set(self.index, self.config, noise).__getitems__(keys_of(self.index, options.clips))
        self._plain: Any = None
        self.on_device = self.batch.to(device)

    def steps(self, prepare: Callable[[Any], None] = _as_it_is, around: Any = None, **changes: Any) -> Run:
        """Training steps with settings changed (`train.compile=...` as train_compile) or the stepper `prepare`d.

        Those without a change are made once.
        """
        if not changes and prepare is _as_it_is:
            if self._plain is None:
                self._plain = our_training(self._settings(), self.device)
            ours = self._plain
        else:
            ours = our_training(self._settings(**changes), self.device)
            prepare(ours)

        def run(watch: Stopwatch) -> float:
            with around() if around else contextlib.nullcontext():
                while True:
                    ours.step([self.on_device], watch.steps)
                    if not watch.tick(self.options.clips):
                        return watch.rate

        return run

    def _settings(self, **changes: Any) -> Config:
        config = settings_for(self.options.sizes, frames=16, size=self.options.size, clips=self.options.clips)
        config.train.compile = self.device.type == "cuda" and not self.options.dry
        for name, value in changes.items():
            group, _, leaf = name.partition("_")
            setattr(getattr(config, group), leaf, value)
        return config

    def repeated(self, call: Callable[[], object], count: int = 1) -> Run:
        """Calls of a function, `count` things each."""

        def run(watch: Stopwatch) -> float:
            while True:
                call()
                if not watch.tick(count):
                    return watch.rate

        return run

    # ------------------------------------------------------------ pairs

    def attention(self, kernel: str) -> tuple[Run, Run]:
        """One kernel of exact attention against what PyTorch takes by itself."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, kernel)
        return self.steps(around=lambda: sdpa_kernel([chosen])), self.steps()

    def one_qkv(self) -> tuple[Run, Run]:
        """Three linears as one product, against three, forward and backward."""
        sizes = self.options.sizes
        width = sizes.get("width", 768)
        tokens = 8 * (self.options.size // 16) ** 2
        x = torch.randn(self.options.clips, tokens, width, device=self.device, requires_grad=True)
        one, three = nn.Linear(width, 3 * width).to(self.device), [nn.Linear(width, width) for _ in range(3)]
        three = [layer.to(self.device) for layer in three]

        def together() -> None:
            one(x).sum().backward()

        def apart() -> None:
            sum(layer(x) for layer in three).sum().backward()  # type: ignore[union-attr]

        return self.repeated(self.half(together)), self.repeated(self.half(apart))

    def matmul_patches(self) -> tuple[Run, Run]:
        """The patch embedding as it is, a product, against a convolution; on a CPU against its faster, 2-D kind."""
        model = our_training(self.config, self.device).stepper.model
        arch = model.arch
        clips = torch.randn(self.options.clips, arch.frames, *arch.image, 3, device=self.device).movedim(-1, 2)
        planar = clips.contiguous()
        t, p = arch.tubelet, arch.patch
        solid = nn.Conv3d(3, arch.width, (t, p, p), stride=(t, p, p)).to(self.device)
        flat = nn.Conv2d(3 * t, arch.width, p, stride=p).to(self.device)

        def as_it_is() -> None:
            model.embed(clips).sum().backward()

        def convolution() -> None:
            if self.device.type == "cuda":
                solid(planar.transpose(1, 2)).flatten(2).transpose(1, 2).sum().backward()
            else:
                flat(planar.reshape(-1, 3 * t, *arch.image)).flatten(2).transpose(1, 2).sum().backward()

        return self.repeated(self.half(as_it_is)), self.repeated(self.half(convolution))

    def freed_memory(self) -> tuple[Run, Run]:
        """Steps of a tiny model on clips of 38 MB as floats, with freed memory kept and given back."""
        config = settings_for(TINY, frames=16, size=224, clips=4, compile=False)
        ours = our_training(config, self.device)
        noise = ours.stepper.model.noise_size
        batch = training_set(self.index, config, noise).__getitems__(keys_of(self.index, 4))

        def run(around: Callable[[], Any], watch: Stopwatch) -> float:
            with around():
                while True:
                    ours.step([batch], watch.steps)
                    if not watch.tick(4):
                        return watch.rate

        return functools.partial(run, memory_kept), functools.partial(run, memory_given_back)

    def half(self, call: Callable[[], None]) -> Callable[[], None]:
        """The call under autocast where a GPU has it."""

        def run() -> None:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
                call()

        return run

    def bytes_to_device(self) -> tuple[Run, Run]:
        """A batch on its way between processes and to the device: uint8, against float32."""
        whole = self.batch.clips
        floats = whole.float()
        if self.device.type == "cuda":
            whole, floats = whole.pin_memory(), floats.pin_memory()
            return tuple(  # type: ignore[return-value]
                self.repeated(functools.partial(tensor.to, self.device, non_blocking=True))
                for tensor in (whole, floats)
            )
        return self.repeated(whole.clone), self.repeated(floats.clone)

    def reduced(self, reduced: bool, *, height: int, width: int, folder: Path) -> Run:
        """Loading on one core, with frames decoded smaller where they are much larger than needed, or not."""
        index = make_frames(folder, videos=2, frames=40, height=height, width=width)
        config = settings_for(self.options.sizes, frames=16, size=112, clips=4)
        config.data.reduced_decode = reduced
        dataset = training_set(index, config, 0)
        return self.repeated(functools.partial(dataset.__getitems__, keys_of(index, 4)), 4)

    def copied(self, side: bool) -> Run:
        """Batches from pinned memory under training steps: on a stream of their own, or waited for."""
        ours = our_training(self.config, self.device)
        pinned = self.batch.pin_memory() if self.device.type == "cuda" else self.batch

        def plain() -> Iterator[Batch]:
            while True:
                yield self.batch.to(self.device)

        def endless() -> Iterator[Batch]:
            while True:
                yield pinned

        def run(watch: Stopwatch) -> float:
            for batch in to_device(endless(), self.device) if side else plain():
                ours.step([batch], watch.steps)
                if not watch.tick(self.options.clips):
                    break
            return watch.rate

        return run


@contextlib.contextmanager
def collecting_itself() -> Iterator[None]:
    """The collector as Python leaves it, with the objects that a large program has."""
    kept = [[{"a": i}] for i in range(400_000)]
    try:
        yield
    finally:
        del kept


@contextlib.contextmanager
def collecting_by_hand() -> Iterator[None]:
    """The same objects, frozen."""
    kept = [[{"a": i}] for i in range(400_000)]
    with collected_by_hand():
        yield
    del kept


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """As a run on the CPU has it."""
    keep_freed_memory()
    yield


@contextlib.contextmanager
def memory_given_back() -> Iterator[None]:
    """The thresholds to which glibc adapts itself at most."""
    library = ctypes.CDLL(None)
    library.mallopt(-3, 32 << 20)
    library.mallopt(-1, 64 << 20)
    library.malloc_trim(0)
    try:
        yield
    finally:
        keep_freed_memory()


def slowest(run: Run) -> Run:
    """The inverse of the slowest of a round's steps, in place of their mean: what all ranks wait for."""

    def measured(watch: Stopwatch) -> float:
        ticks: list[float] = []
        tick = watch.tick

        def noted(clips: int) -> bool:
            ticks.append(watch.clock())
            return tick(clips)

        watch.tick = noted  # type: ignore[method-assign]
        run(watch)
        gaps = sorted(b - a for a, b in itertools.pairwise(ticks[3:]))
        return 1 / gaps[int(0.95 * (len(gaps) - 1))] if gaps else 0.0

    return measured


def levers(bench: Bench, folder: Path) -> list[Lever]:
    """All of them."""
    steps = bench.steps

    def compiled(mode: str | None = None, dynamic: bool | None = None) -> Callable[[Any], None]:
        def prepare(ours: Any) -> None:
            for block in ours.stepper.model.blocks:
                block._compiled_call_impl = None
                block.compile(fullgraph=mode is None, mode=mode, dynamic=dynamic)

        return prepare

    def fp8() -> tuple[Run, Run]:
        from torchao.float8 import convert_to_float8_training

        return steps(lambda ours: convert_to_float8_training(ours.stepper.model.blocks)), steps()

    return [
        Lever(
            "blocks compiled before DDP",
            "1.2 to 1.4 on a GPU",
            lambda: (steps(train_compile=True), steps(train_compile=False)),
        ),
        Lever(
            "compiled for each size apart (dynamic=False)",
            "1.00 to 1.05",
            lambda: (steps(compiled(None, False)), steps()),
            gpu=True,
        ),
        Lever(
            "max-autotune-no-cudagraphs",
            "1.00 to 1.05",
            lambda: (steps(compiled("max-autotune-no-cudagraphs")), steps()),
            gpu=True,
        ),
        Lever(
            "CUDA graphs (reduce-overhead)",
            "1.00 at batch 32",
            lambda: (steps(compiled("reduce-overhead")), steps()),
            gpu=True,
        ),
        Lever(
            "bf16 autocast, against fp32",
            "4 to 8 on a GPU",
            lambda: (steps(train_precision="bf16"), steps(train_precision="fp32")),
        ),
        Lever(
            "bf16, against fp16 with a scaler",
            "1.0 to 1.05: no synchronisation",
            lambda: (steps(), steps(train_precision="fp16")),
            gpu=True,
        ),
        Lever("fp8 linears (torchao)", "1.1 to 1.3", fp8, gpu=True),
        Lever("attention: cuDNN", "1.05 to 1.1 on Hopper", lambda: bench.attention("CUDNN_ATTENTION"), gpu=True),
        Lever("attention: flash", "1.00: what PyTorch takes", lambda: bench.attention("FLASH_ATTENTION"), gpu=True),
        Lever("attention: memory-efficient", "0.9", lambda: bench.attention("EFFICIENT_ATTENTION"), gpu=True),
        Lever("fused AdamW", "1.02 to 1.05", lambda: (steps(optim_fused=True), steps(optim_fused=False))),
        Lever("q, k, v in one product (the linears alone)", "1.05 to 1.2", bench.one_qkv),
        Lever(
            "patch embedding by a product (alone), against a convolution",
            "1.5 to 5 on a GPU, 1.2 on a CPU",
            bench.matmul_patches,
        ),
        Lever("uint8 to the device (the copy alone)", "4: a quarter of the bytes", bench.bytes_to_device),
        Lever("copies on a side stream", "1.02", lambda: (bench.copied(True), bench.copied(False)), gpu=True),
        *(
            [Lever("freed memory kept (CPU), clips of 38 MB, a tiny model", "1.4: no page faults", bench.freed_memory)]
            if bench.device.type == "cpu"
            else []
        ),
        Lever(
            "no garbage collection in a step (95th percentile of steps)",
            "1.0 to 1.2: the slowest rank counts",
            lambda: (slowest(steps(around=collecting_by_hand)), slowest(steps(around=collecting_itself))),
        ),
        Lever(
            "checkpointing all blocks (costs time, saves memory)",
            "0.75",
            lambda: (steps(train_checkpointing=99), steps()),
        ),
        Lever(
            "reduced decode, 1280x720 frames for clips of 112",
            "1.3 to 2",
            lambda: tuple(bench.reduced(on, height=720, width=1280, folder=folder) for on in (True, False)),  # type: ignore[arg-type,return-value]
        ),
    ]


ELSEWHERE = [  # lever, expected, brought, where it was measured
    [
        "patch embedding by a 2-D convolution (CPU)",
        "2",
        "1.47 over a product of planar clips (AMD EPYC); the product of clips with neighbouring channels "
        "is 1.21 over it (Intel Xeon, not measured again on AMD): taken out",
        "levers, two revisions",
    ],
    ["q, k, v cut from the last axis", "a copy less", "1.015 of a block's backward pass", "by hand, best of 60"],
    ["mixing skipped where none is set", "1.005", "5.1 to 3.2 ms of a 400 ms step", "by hand, best of 6"],
    ["parameter groups of equal rate merged", "1.01", "1.001 of a step: not kept", "by hand, best of 12"],
    [
        "bf16 all-reduce (train.bf16_reduce)",
        "half the bytes",
        "half the bytes (computed times: scaling.md)",
        "scaling.md",
    ],
    ["accumulation under no_sync", "one all-reduce a step", "bytes a step do not grow with it", "scaling.md"],
    [
        "simplejpeg, one buffer, many frames a resampling",
        "2 over Pillow",
        "2.1 over Pillow, 7.4 over the notebook",
        "loader.md",
    ],
    [
        "frames decoded beside addresses where libjpeg-turbo writes past the caches",
        "1.05",
        "1.06 to 1.09 of loading",
        "by hand, 12 rounds in turns",
    ],
    ["crops resampled straight into their place", "1.05", "1.06 of loading", "by hand, 24 rounds in turns"],
    [
        "a clip's files, then its pictures, then its crops",
        "1.05: warm caches",
        "1.07 of loading",
        "by hand, 24 rounds in turns",
    ],
    [
        "shared memory that is used again",
        "1.1: no page faults",
        "8.3 to 7.1 ms a clip of a loader process",
        "by hand, 400 clips",
    ],
    ["views copied to their places one by one", "1.5", "1.4 to 2.1 of loading for 5x1 and 5x3 views", "by hand"],
    [
        "decoding the crop alone (nvImageCodec on the CPU)",
        "1.3 of decoding",
        "1.08 of decoding: not taken, 25 MB for little",
        "by hand, 100 clips",
    ],
    ["packed sets on a local disk", "1.0", "1.00: they are for network file systems", "loader.md"],
    ["Pillow-SIMD in place of Pillow", "1.5", "1.5, and 0.71 of ours", "loader.md"],
    ["agreement of ranks read one step late", "under 0.5 % of a step", "0.14 %", "safety.md"],
    [
        "checkpoints written in the background",
        "a snapshot's time alone",
        "34 ms of 48 MB, then beside the steps",
        "safety.md",
    ],
]


def main(argv: list[str] | None = None) -> int:
    parser = arguments("levers", __doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--part", default="1/1", help="k/K: every K-th lever from the k-th on (%(default)s)")
    parser.add_argument("--only", help="levers whose name has this in it")
    options = parser.parse_args(argv)
    device = device_of()
    cuda = device.type == "cuda"
    options.sizes = {"size": "base"} if cuda and not options.dry else dict(SMALL)
    options.size, options.clips = (224, 32) if cuda and not options.dry else (112, 4)
    options.rounds = options.rounds or (2 if cuda else 5)
    options.seconds = options.seconds or (2.0 if cuda else 1.2)
    if options.dry:
        options.sizes |= {"depth": 2, "width": 32, "heads": 2}
        options.size, options.clips, options.rounds, options.seconds = 32, 2, 1, 0.05
    result: dict[str, Any] = {"about": machine(device), "levers": []}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options, device, Path(name))
        part, parts = map(int, options.part.split("/"))
        for lever in levers(bench, Path(name))[part - 1 :: parts]:
            if options.only and options.only not in lever.name:
                continue
            found = measured(lever, options, device)
            result["levers"].append({"name": lever.name, "expected": lever.expected, **found})
            rows.append([lever.name, lever.expected, found["brought"]])
            print("  " + " | ".join(rows[-1]), file=sys.stderr, flush=True)
    where = "gpu" if cuda else "cpu"
    lines = ["# Levers", "", about_line("levers", result["about"]), ""]
    lines += table(["lever", "expected", f"brought, on this {where.upper()} (rounds)"], rows)
    lines += [
        "Times as fast with the lever as without: the median of the ratios within a round, and the rounds' range. 'Not",
        "measured yet' needs a GPU: `bash benchmarks/gpu.sh levers`.",
        "",
        "Measured by other benchmarks:",
        "",
    ]
    lines += table(["lever", "expected", "brought", "where"], ELSEWHERE)
    name = "levers" + ("_gpu" if cuda else "") + (f"_{part}" if parts > 1 else "")
    write(options.out, name, result, lines, dry=options.dry)
    return DONE


def measured(lever: Lever, options: Any, device: torch.device) -> dict[str, Any]:
    """The ratio of a lever, or why there is none."""
    if lever.make is None or (lever.gpu and device.type != "cuda"):
        return {"brought": "not measured yet"}
    try:
        with_lever, without = lever.make()
        ratios = []
        for turn in range(options.rounds):
            rates = {}
            for name, run in ((1, with_lever), (0, without)) if turn % 2 else ((0, without), (1, with_lever)):
                rates[name] = run(Stopwatch(device, seconds=options.seconds, warm=3, alone=True))
            ratios.append(rates[1] / rates[0])
        del with_lever, without
    except Exception as error:
        return {"brought": f"not to be had: {type(error).__name__}: {' '.join(str(error).split())[:90]}"}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    middle = statistics.median(ratios)
    return {"ratios": ratios, "brought": f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"}


if __name__ == "__main__":
    sys.exit(main())
