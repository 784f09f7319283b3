"""Clips by Pillow or Pillow-SIMD, in an interpreter of its own that needs nothing but numpy and one of the two.

Started by `benchmarks.loader`. First line of the input: JSON with the clips (paths, box, size, draft). Then a number a
line: so many clips are made, and the seconds of processor time they took are printed.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import PIL
from PIL import Image, features


def read_clip(paths: list[str], box: list[int], size: int, draft: bool) -> np.ndarray:
    """Decode, crop, resize in 8 bits: (T, size, size, 3) uint8. draft: decode at 1/2, 1/4, 1/8 where the box allows."""
    left, top, width, height = box
    frames = []
    for path in paths:
        with Image.open(path) as image:
            factor = 1
            if draft:
                full = image.width
                image.draft("RGB", (image.width * size // width, image.height * size // height))
                factor = full / image.width
            cut = (left / factor, top / factor, (left + width) / factor, (top + height) / factor)
            image = image.convert("RGB")
            frames.append(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=cut)))
    return np.stack(frames)


def main() -> None:
    print(json.dumps({"version": PIL.__version__, "libjpeg": features.version("jpg")}), flush=True)
    clips = json.loads(sys.stdin.readline())
    number = 0
    for line in sys.stdin:
        start = time.process_time()
        batch = []
        for _ in range(int(line)):
            batch.append(read_clip(**clips[number % len(clips)]))
            number += 1
            if len(batch) == 8:
                np.stack(batch)
                batch.clear()
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
