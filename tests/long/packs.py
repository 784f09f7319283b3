"""Packed sets with random faults, as many as one has time for; `test_hostile_files.py` tries the first 500.

    python -m tests.long.packs 10000         # 10,000 sets; --from 10000 for the next ones

Every set is refused in one line or can be read whole, in a few MB of memory; the seed of one that is not is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

from tests.hostile_packs import attack, good_pack


def main() -> int:
    """Try the sets, print what came of them, and return 1 where one was neither refused nor read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", type=int)
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="SEED")
    options = parser.parse_args()
    came: Counter[str] = Counter()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        good = good_pack(Path(folder))
        for seed in range(options.first, options.first + options.sets):
            try:
                came[attack(good, Path(folder) / "bad", np.random.default_rng(seed))] += 1
            except Exception as error:
                came[type(error).__name__] += 1
                print(f"seed {seed}")
                traceback.print_exc()
    print(
        ", ".join(f"{name} {count}" for name, count in sorted(came.items())), f"in {time.perf_counter() - began:.0f} s"
    )
    return int(bool(set(came) - {"refused", "read"}))


if __name__ == "__main__":
    sys.exit(main())
