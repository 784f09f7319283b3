"""The sweep of all numeric settings with a run for each accepted value, and random settings in any number.

    python -m tests.long.settings [--cases 100000] [--seed 1]

Prints the settings' outcomes and how many random ones were accepted; ends with status 1 where something else than one
step or one line came of it. Minutes of one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests import sweep
from tests.test_settings_input import fuzz


def main() -> int:
    """Run both; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        words = sweep.sweep_words()
        outcomes = sweep.sweep_alone(words, Path(scratch))
        print(f"{len(sweep.numeric_settings())} numeric settings x {len(sweep.VALUES)} values = {len(words)} words")
        seconds = time.time() - start
        print(f"{len(outcomes.refused)} refused in one line, {len(outcomes.ran)} ran one step: {seconds:.0f} s")
        for word, steps in outcomes.ran.items():
            print(f"  {word}: {steps}")
        start = time.time()
        accepted = fuzz(options.cases, options.seed, Path(scratch) / "fuzz.yaml")
        print(f"{options.cases} random settings and files: {accepted} accepted, the others refused in one line: "
              f"{time.time() - start:.0f} s")  # fmt: skip
    lines = [line for line in outcomes.refused.values() if len(line.splitlines()) != 1]
    return int(bool(lines) or set(outcomes.ran.values()) != {1})


if __name__ == "__main__":
    sys.exit(main())
