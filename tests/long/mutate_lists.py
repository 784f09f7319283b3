"""The mutation test of lists and samples with a larger budget: python -m tests.long.mutate_lists [COUNT [SEED]]."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.drivers import mutate
from tests.frame_data import write_video
from tests.test_lists import PLAIN, READ, VIDEOS


def main() -> None:
    """Try COUNT lists and COUNT samples; an error that is not one line ends it with its traceback."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "d"
        for number, name in enumerate(VIDEOS):
            write_video(root / name, 2 + number)
        texts = [text.encode() for text in READ.values()] + [PLAIN.encode("utf-16"), PLAIN.encode("utf-32")]
        lists = mutate.try_lists(root, texts, count=count, rng=np.random.default_rng(seed))
        samples = mutate.try_samples(Path(folder), count=count, rng=np.random.default_rng(seed + 1))
    print(f"lists {dict(lists)}, samples {dict(samples)}")


if __name__ == "__main__":
    main()
