"""Mutated images with a larger budget than the fast tests have: python -m tests.long.images [COUNT] [SEED].

20,000 mutations of seed 7 ended in pixels or DamagedFrame, within 187 MiB (2026-11-27).
"""

from __future__ import annotations

import sys

from tests.drivers import fuzz_images

if __name__ == "__main__":
    fuzz_images.main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, int(sys.argv[2]) if len(sys.argv) > 2 else 7)
