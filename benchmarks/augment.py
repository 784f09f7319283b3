"""What augmentation and mixing cost a clip, by operation: `python -m benchmarks.augment [--device cuda]`."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vac_ddp.data.augment import augment_clips, draw_crop_box, draw_parameters
from vac_ddp.data.mixing import draw_mixing, mix
from vac_ddp.data.randaugment import Op, compose
from vac_ddp.settings import AugmentSettings

RECIPE = AugmentSettings(randaugment="rand-m7-n4-mstd0.5-inc1", erase=0.25, mixup=0.8, cutmix=1.0)
STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SINGLE = {
    "nothing but normalise": [],
    "table (solarize)": [(Op.SOLARIZE, 128.0)],
    "autocontrast": [(Op.AUTOCONTRAST, 0.0)],
    "equalize": [(Op.EQUALIZE, 0.0)],
    "contrast": [(Op.CONTRAST, 1.6)],
    "color": [(Op.COLOR, 1.6)],
    "sharpness": [(Op.SHARPNESS, 1.6)],
    "geometry (four as one)": [(Op.ROTATE, 20.0), (Op.SHEAR_X, 0.2), (Op.TRANSLATE_X, 0.2), (Op.SHEAR_Y, 0.1)],
}


class Count(TorchDispatchMode):
    """Counts the tensor operations that are started."""

    def __init__(self) -> None:
        super().__init__()
        self.started = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.started += 1
        return func(*args, **(kwargs or {}))


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The best of `repeats` runs after one to warm up: what others do on the machine only adds."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=32, help="clips of a batch")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device, count, frames, size = torch.device(arguments.device), arguments.clips, arguments.frames, arguments.size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        torch.set_num_threads(1)
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        machine = f"one core of {cpu[0].split(':')[1].strip() if cpu else platform.machine()}"
    print(
        f"{machine}; torch {torch.__version__}; {datetime.now(UTC):%Y-%m-%d}; {count} clips of {frames}x{size}x{size}"
    )

    clips = torch.randint(0, 256, (count, frames, size, size, 3), dtype=torch.uint8).to(device)
    plain = draw_parameters(np.random.default_rng(0), AugmentSettings(flip=0), frames=frames, size=size)

    def timed(label: str, params: dict[str, torch.Tensor], augment: AugmentSettings = RECIPE) -> None:
        def run(on: torch.Tensor) -> torch.Tensor:
            return augment_clips(on, params, augment, dtype=dtype, **STATISTICS)

        with Count() as counter:
            run(clips.to("meta"))  # as on a GPU: many clips in one operation
        cost = milliseconds(lambda: run(clips), device, arguments.repeats) / count
        print(
            f"{label:<28}{cost:9.3f} ms/clip{1e3 / cost:9.0f} clips/s{counter.started:6d} operations a batch on a GPU"
        )

    for name, ops in SINGLE.items():
        composed, matrix = compose(ops, size)
        sample = plain | {
            "ops": np.array([op for op, _ in composed], dtype=np.int64),
            "values": np.array([value for _, value in composed], dtype=np.float32),
            "affine": matrix.astype(np.float32),
        }
        timed(name, collate([sample] * count))
    timed("flip", collate([plain | {"flip": np.array(True)}] * count))
    timed("erase (a fifth)", collate([plain | {"erase": np.array((9, 9, size // 2, size * 2 // 5))}] * count))

    drawn = [draw_parameters(np.random.default_rng(i), RECIPE, frames=frames, size=size) for i in range(count)]
    timed("the whole recipe", collate(drawn))

    rng = np.random.default_rng(0)
    mixing = collate([draw_mixing(rng, RECIPE, size=size) for _ in range(count)])
    partner = torch.arange(count).flip(0)
    normal = torch.randn(count, frames, 3, size, size, device=device, dtype=dtype)
    cost = milliseconds(lambda: mix(normal, partner, mixing), device, arguments.repeats) / count
    print(f"{'mixup or cutmix':<28}{cost:9.3f} ms/clip")

    def draw_all() -> None:
        for _ in range(100):
            draw_crop_box(rng, RECIPE, 240, 320)
            draw_parameters(rng, RECIPE, frames=frames, size=size)

    print(f"{'drawing, in a loader process':<28}{milliseconds(draw_all, torch.device('cpu'), 5) / 100:9.3f} ms/clip")


if __name__ == "__main__":
    main()
