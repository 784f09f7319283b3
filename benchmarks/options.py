"""What the options of a training step bring: with and without each one in turns, on a GPU all of them.

    python -m benchmarks.options            # those that a CPU can show; on a GPU all of them
    python -m benchmarks.options --dry      # every piece at tiny sizes

A figure is the median of the ratios within a round; the spread of the rounds stands beside it. An option that brings
nothing where it should is to be taken out of the code.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    SMALL,
    Ours,
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
from vac_ddp.runtime.torch_compat import uncompile
from vac_ddp.settings import Config

Run = Callable[[Stopwatch], float]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Option:
    """Two ways to do the same: `make` returns functions that measure clips a second, with the option and without."""

    name: str
    expected: str
    make: Callable[[], tuple[Run, Run]]
    gpu: bool = True  # nothing to see on a CPU


class Bench:
    """What the options are tried on: training steps with a batch in memory."""

    def __init__(self, options: Any, device: torch.device, folder: Path) -> None:
        self.options, self.device = options, device
        index = make_frames(folder, videos=4, frames=24 if options.dry else 48)
        config = self._settings(train_compile=False)
        noise = our_training(config, device).stepper.model.noise_size
        self.batch = training_set(index, config, noise).__getitems__(keys_of(index, options.clips))
        self.on_device = self.batch.to(device)

    def steps(
        self,
        prepare: Callable[[Ours], None] | None = None,
        context: Context = contextlib.nullcontext,
        **changes: Any,
    ) -> Run:
        """Training steps of a model of their own, built and run inside `context`, with settings changed.

        changes: `train_compile=...` sets train.compile. prepare: changes the stepper before its first step.
        """
        with context():
            ours = our_training(self._settings(**changes), self.device)
            if prepare is not None:
                prepare(ours)

        def run(watch: Stopwatch) -> float:
            with context():
                while True:
                    ours.step([self.on_device], watch.steps)
                    if not watch.tick(self.options.clips):
                        return watch.rate

        return run

    def attention(self, kernel: str) -> tuple[Run, Run]:
        """One kernel of exact attention against what PyTorch takes by itself.

        The kernel is chosen when a block is compiled, and blocks share what is compiled with those of the model before:
        so nothing is left of that one, and the model is built anew, compiled and run inside the context.
        """
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, kernel)

        def anew(context: Context) -> Run:
            def run(watch: Stopwatch) -> float:
                torch.compiler.reset()
                return self.steps(context=context)(watch)

            return run

        return anew(lambda: sdpa_kernel([chosen])), anew(contextlib.nullcontext)

    def compiled(self, mode: str | None = None, dynamic: bool | None = None) -> tuple[Run, Run]:
        """Blocks compiled in another way, against the way they are."""

        def prepare(ours: Ours) -> None:
            uncompile(ours.stepper.model)
            for module in ours.stepper.model.compiled_modules():
                module.compile(fullgraph=mode is None, mode=mode, dynamic=dynamic)

        return self.steps(prepare), self.steps()

    def fp8(self) -> tuple[Run, Run]:
        """Linear layers in 8 bits."""
        from torchao.float8 import convert_to_float8_training

        return self.steps(lambda ours: convert_to_float8_training(ours.stepper.model)), self.steps()

    def copied(self) -> tuple[Run, Run]:
        """Batches from pinned memory under training steps: on a stream of their own, against waited for."""
        pinned = self.batch.pin_memory() if self.device.type == "cuda" else self.batch

        def waited_for() -> Iterator[Batch]:
            while True:
                yield pinned.to(self.device)

        def endless() -> Iterator[Batch]:
            while True:
                yield pinned

        def way(batches: Callable[[], Iterator[Batch]]) -> Run:
            ours = our_training(self._settings(), self.device)

            def run(watch: Stopwatch) -> float:
                for batch in batches():
                    ours.step([batch], watch.steps)
                    if not watch.tick(self.options.clips):
                        break
                return watch.rate

            return run

        return way(lambda: to_device(endless(), self.device)), way(waited_for)

    def _settings(self, **changes: Any) -> Config:
        config = settings_for(self.options.sizes, frames=16, size=self.options.size, clips=self.options.clips)
        config.train.compile = self.device.type == "cuda" and not self.options.dry
        for name, value in changes.items():
            group, _, leaf = name.partition("_")
            setattr(getattr(config, group), leaf, value)
        return config


def all_options(bench: Bench) -> list[Option]:
    """Every option that is compared."""
    steps = bench.steps

    def pair(with_it: dict[str, Any], without: dict[str, Any]) -> Callable[[], tuple[Run, Run]]:
        return lambda: (steps(**with_it), steps(**without))

    compiled = pair({"train_compile": True}, {"train_compile": False})
    autocast = pair({"train_precision": "bf16"}, {"train_precision": "fp32"})
    fused = pair({"optim_fused": True}, {"optim_fused": False})
    again = pair({"train_checkpointing": 99}, {})
    no_graphs = "max-autotune-no-cudagraphs"
    return [
        Option("blocks compiled before DDP", "1.2 to 1.4 on a GPU", compiled, gpu=False),
        Option("compiled for each size apart", "1.00 to 1.05", lambda: bench.compiled(dynamic=False)),
        Option(no_graphs, "1.00 to 1.05", lambda: bench.compiled(no_graphs)),
        Option("CUDA graphs", "1.00 at batch 32", lambda: bench.compiled("reduce-overhead")),
        Option("bf16 autocast, against fp32", "4 to 8 on a GPU", autocast, gpu=False),
        Option("bf16, against fp16 with a scaler", "1.0 to 1.05", pair({}, {"train_precision": "fp16"})),
        Option("fp8 linears (torchao)", "1.1 to 1.3", bench.fp8),
        Option("attention: cuDNN", "1.05 to 1.1 on Hopper", lambda: bench.attention("CUDNN_ATTENTION")),
        Option("attention: flash", "1.00: what PyTorch takes", lambda: bench.attention("FLASH_ATTENTION")),
        Option("attention: memory-efficient", "0.9", lambda: bench.attention("EFFICIENT_ATTENTION")),
        Option("fused AdamW", "1.02 to 1.05", fused, gpu=False),
        Option("copies on a side stream", "1.02", bench.copied),
        Option("checkpointing all blocks (saves memory)", "0.75", again, gpu=False),
    ]


def measured(option: Option, options: Any, device: torch.device) -> dict[str, Any]:
    """The ratios of an option, or why there are none."""
    if option.gpu and device.type != "cuda" and not options.dry:
        return {"brought": "needs a GPU"}
    try:
        ways = dict(zip(("with", "without"), option.make(), strict=True))
        ratios = []
        for turn in range(options.rounds):
            order = list(ways)[:: -1 if turn % 2 else 1]
            rates = {n: ways[n](Stopwatch(device, seconds=options.seconds, warm=3, alone=True)) for n in order}
            ratios.append(rates["with"] / rates["without"])
    except Exception as error:
        return {"brought": f"not to be had: {type(error).__name__}: {' '.join(str(error).split())[:90]}"}
    finally:
        ways = {}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    middle = statistics.median(ratios)
    return {"ratios": ratios, "brought": f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"}


def main(argv: list[str] | None = None) -> int:
    parser = arguments("options", __doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--part", default="1/1", help="k/K: every K-th option from the k-th on (%(default)s)")
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
    result: dict[str, Any] = {"about": machine(device), "options": []}
    part, parts = map(int, options.part.split("/"))
    where = "gpu" if cuda else "cpu"
    name = f"options_{where}" + (f"_{part}" if parts > 1 else "")

    def keep(*, last: bool) -> None:
        rows = [[one["name"], one["expected"], one["brought"]] for one in result["options"]]
        lines = ["# Options of a training step", "", about_line("options", result["about"]), ""]
        lines += table(["option", "expected", f"brought, on this {where.upper()} (rounds)"], rows)
        lines += ["Times as fast with the option as without: the median of the ratios within a round, and their range."]
        write(options.out, name, result, lines, dry=options.dry, shown=last)

    with tempfile.TemporaryDirectory() as folder:
        for option in all_options(Bench(options, device, Path(folder)))[part - 1 :: parts]:
            found = {"name": option.name, "expected": option.expected, **measured(option, options, device)}
            result["options"].append(found)
            print(f"  {found['name']} | {found['expected']} | {found['brought']}", file=sys.stderr, flush=True)
            keep(last=False)
    keep(last=True)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
