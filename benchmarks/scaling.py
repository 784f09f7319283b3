"""What more ranks cost: measured with gloo on 1, 2 and 4 processes, computed for 8 to 512 GPUs by a written model.

    python -m benchmarks.scaling [--rate CLIPS_PER_S] [--dry]

Measured: our optimizer step with accumulation 1 and 4, with and without its all-reduce, and the bytes that are
reduced in it, counted where DDP hands them over. Computed: see MODEL.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import SMALL, about_line, arguments, machine, our_training, settings_for, table, write
from vac_ddp.data.batch import Batch
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.sampler import Key
from vac_ddp.errors import DONE
from vac_ddp.models import build_model
from vac_ddp.runtime import distributed
from vac_ddp.settings import ClipSettings, ModelSettings

MODEL = [
    "The model, for W GPUs, c clips a GPU and micro-batch, accumulation A, r clips/s of one GPU alone, G bytes of",
    "gradients (4 a parameter, 2 with train.bf16_reduce) in buckets of 25 MB, rings of B bytes a second and a latency",
    "of L seconds a step of a ring or tree. A ring enters and leaves each node once: B is what a node's network gives",
    "(nine tenths of its nominal rate), or NVLink's 300 GB/s where that is less:",
    "",
    "    compute    = A c / r",
    "    all-reduce = 2 (W - 1) / W x G / B + buckets x L x the smaller of 2 (W - 1) and 2 log2(W)",
    "    hidden     = 2/3 c / r x (1 - 1 / buckets), the last micro-batch's backward pass until its last bucket",
    "    step       = compute + the larger of (all-reduce - hidden) and the last bucket's all-reduce",
    "    efficiency = compute / step",
    "",
    "One all-reduce a step, whatever the accumulation: the measured bytes show it. Not in the model: ranks that wait",
    "for each other's data, and networks that others use.",
]
NETWORKS = {  # name: (bytes a second of the rings, seconds of latency)
    "8 x 400 Gb/s a node": (300e9, 10e-6),
    "400 Gb/s a node": (45e9, 10e-6),
    "100 Gb/s a node": (11e9, 20e-6),
    "25 Gb/s a node": (2.8e9, 30e-6),
}
ONE_NODE = (300e9, 5e-6)
BUCKET = 25 * (1 << 20)


def step_seconds(
    world: int, *, clips: int, accumulation: int, rate: float, gradient: float, bandwidth: float, latency: float
) -> tuple[float, float]:
    """(seconds of a step, its efficiency) by MODEL."""
    compute = accumulation * clips / rate
    if world == 1:
        return compute, 1.0
    buckets = max(1, -(-int(gradient) // BUCKET))
    ring = 2 * (world - 1) / world / bandwidth
    steps = min(2 * (world - 1), 2 * max(1, (world - 1).bit_length()))
    whole = ring * gradient + steps * latency * buckets
    last = ring * min(gradient, BUCKET) + steps * latency
    hidden = 2 / 3 * clips / rate * (1 - 1 / buckets)
    step = compute + max(whole - hidden, last)
    return step, compute / step


def measure_rank(options: Any) -> None:
    """One rank's part of a measurement; rank 0 leaves the figures in a file."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    distributed.start(device, timeout_s=120)
    world = distributed.world_size()
    sizes = dict(SMALL) | ({"depth": 2, "width": 32, "heads": 2} if options.dry else {})
    config = settings_for(sizes, frames=8, size=64, clips=options.clips)
    config.train.global_batch = options.clips * world * options.accumulation
    ours = our_training(config, device)
    stepper = ours.stepper
    reduced = [0]
    if world > 1:
        hook = stepper.network.register_comm_hook

        def counted(_: Any, bucket: Any) -> Any:
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            reduced[0] += bucket.buffer().nbytes
            return default_hooks.allreduce_hook(torch.distributed.group.WORLD, bucket)

        counted.__annotations__.clear()  # DDP compares them with classes, and here they are text
        hook(None, counted)
    batch = random_batch(config, ours, options.clips * options.accumulation)
    samples = config.train.global_batch

    def step(number: int) -> float:
        distributed.barrier()
        begin = time.perf_counter()
        stepper.run([batch], step=number, samples=samples, lr=1e-6, began=begin)
        stepper.records.clear()
        return time.perf_counter() - begin

    step(0)
    with_reduction, without = [], []
    for number in range(options.steps):
        reduced[0] = 0
        with_reduction.append(step(number))
        count = reduced[0]
        if world > 1:  # the same step, whose ranks keep their gradients to themselves
            stepper._reducing = lambda last: stepper.network.no_sync()  # type: ignore[method-assign]
            without.append(step(number))
            del stepper._reducing
            for tensor in stepper.model.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
    if distributed.is_main():
        found = {
            "ranks": world,
            "accumulation": options.accumulation,
            "ms": 1000 * statistics.median(with_reduction),
            "ms_alone": 1000 * statistics.median(without or with_reduction),
            "clips_per_s": samples / statistics.median(with_reduction),
            "megabytes_reduced": (count if world > 1 else 0) / 1e6,
            "parameters": sum(p.numel() for p in stepper.model.parameters()),
        }
        Path(options.report).write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.end(0)


def random_batch(config: Any, ours: Any, clips: int) -> Batch:
    """Random pixels with the parameters of real draws."""

    class Nothing:
        """An index of videos that is never read."""

        labels, frame_counts = torch.zeros(1, dtype=torch.int64).numpy(), torch.full((1,), 64).numpy()
        names = ("video",)

    class Random(TrainClips):
        def _read(self, key: Any, take: Any) -> list[str]:
            take.keywords["out"].random_(0, 256)
            return []

    dataset = Random(Nothing(), Nothing.labels[:1], config, ours.stepper.model.noise_size, 0)  # type: ignore[arg-type]
    return dataset.__getitems__([Key(0, draw, 0) for draw in range(clips)])


def run_ranks(options: Any, ranks: int, accumulation: int, folder: Path) -> dict[str, Any]:
    """A measurement under torchrun."""
    report = folder / f"{ranks}-{accumulation}.json"
    words = [f"--report={report}", f"--accumulation={accumulation}", f"--clips={options.clips}"]
    words += [f"--steps={options.steps}", *(["--dry"] if options.dry else [])]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, "-m", "benchmarks.scaling", *words], check=True, env=environment)
    return json.loads(report.read_text(encoding="utf-8"))


def computed(rate: float) -> tuple[list[str], list[list[str]], dict[str, Any]]:
    """The table for VideoMAE-B at 32 clips a GPU."""
    model = build_model(ModelSettings(weights=None, size="base"), ClipSettings(), 51)
    parameters = sum(p.numel() for p in model.parameters())
    head = ["GPUs, 8 a node", "accumulation", "gradients", *NETWORKS]
    rows, kept = [], {}
    for accumulation, number, name in ((1, 4, "fp32"), (1, 2, "bf16"), (4, 4, "fp32")):
        for world in (8, 16, 32, 64, 128, 256, 512):
            row = [str(world), str(accumulation), f"{number * parameters / 1e6:.0f} MB {name}"]
            for network, between in NETWORKS.items():
                bandwidth, latency = ONE_NODE if world <= 8 else between
                step, efficiency = step_seconds(
                    world,
                    clips=32,
                    accumulation=accumulation,
                    rate=rate,
                    gradient=number * parameters,
                    bandwidth=bandwidth,
                    latency=latency,
                )
                row.append(f"{32 * accumulation * world / step:.0f} clips/s, {100 * efficiency:.0f} %")
                kept[f"{world} GPUs, accumulation {accumulation}, {name}, {network}"] = round(efficiency, 4)
            rows.append(row)
    return head, rows, kept


def main(argv: list[str] | None = None) -> int:
    parser = arguments("scaling", __doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=366.0, help="clips/s of one GPU: half of an H200's end (366)")
    for name in ("--report", "--accumulation", "--clips", "--steps"):
        parser.add_argument(name, type=int if name != "--report" else str)
    options = parser.parse_args(argv)
    options.clips = options.clips or 2
    options.steps = options.steps or (2 if options.dry else 12)
    if options.report:
        measure_rank(options)
        return DONE
    result: dict[str, Any] = {"about": machine(torch.device("cpu")), "measured": []}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2) if options.dry else (1, 2, 4):
            for accumulation in (1, 4):
                result["measured"].append(run_ranks(options, ranks, accumulation, Path(folder)))
    head, rows, result["computed"] = computed(options.rate)
    lines = ["# More ranks", "", about_line("scaling", result["about"]), "", "## Measured: gloo, one thread a rank", ""]
    lines += table(
        ["ranks", "accumulation", "ms a step", "without all-reduce", "clips/s", "MB reduced a step", "MB a clip"],
        [
            [
                m["ranks"],
                m["accumulation"],
                f"{m['ms']:.1f}",
                f"{m['ms_alone']:.1f}",
                f"{m['clips_per_s']:.1f}",
                f"{m['megabytes_reduced']:.2f}",
                f"{m['megabytes_reduced'] / (options.clips * m['ranks'] * m['accumulation']):.3f}",
            ]
            for m in result["measured"]
        ],
    )
    cores = result["about"]["cores"]
    lines += [
        f"Ranks beyond the machine's {cores} cores share them: compare with the time without all-reduce. The model has",
        f"{result['measured'][0]['parameters'] / 1e6:.2f} M parameters: every gradient is reduced once a step.",
        "",
        f"## Computed: VideoMAE-B, 32 clips a GPU, {options.rate:g} clips/s of one GPU alone",
        "",
        *MODEL,
        "",
    ]
    lines += table(head, rows)
    write(options.out, "scaling", result, lines, dry=options.dry)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
