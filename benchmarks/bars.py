"""What the GPU pieces had to reach, and what they found: one table from the files that they left.

python -m benchmarks.bars [--dry] [--out DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, device_of, table
from benchmarks.curves import CHANGES
from benchmarks.predict import WHOLE_SHARE
from benchmarks.train_step import EXAMPLE, GOAL, HF, HF_COMPILED, OURS, SHARE, WAIT
from vac_ddp.errors import DONE
from vac_ddp.files import read_json


def kept(folder: Path, name: str) -> dict[str, Any]:
    """A piece's result, empty where there is none."""
    path = folder / f"{name}.json"
    return read_json(path) if path.exists() else {}


def required(folder: Path, suffix: str) -> list[list[str]]:
    """Rows of what is required: what, found, bar."""
    train = {bar["what"]: bar for bar in kept(folder, f"train_{suffix}").get("bars", [])}
    predict = {row[0]: row for row in kept(folder, f"predict_{suffix}").get("bars", [])}
    curves = kept(folder, f"curves_{suffix}")
    best = [f"with loader: {OURS} / {way}" for way in (HF, HF_COMPILED)]
    rows = []
    for what in (SHARE, f"{SHARE}{GOAL}", WAIT, *best, f"with loader: {OURS} / {EXAMPLE}"):
        if what in train:
            bar = train[what]
            rows.append([what, str(bar["found"]), bar["bar"] + ("" if bar["met"] else " (missed)")])
        elif what not in best or not any(one in train for one in best):
            rows.append([what, "not measured", ""])
    rows.append([WHOLE_SHARE, *(predict[WHOLE_SHARE][1::2] if WHOLE_SHARE in predict else ("not measured", ""))])
    for change in CHANGES:
        what, spread = f"loss curve of the first seed, {change}", max(curves.get("spread", [0.0]))
        if change in curves.get("distances", {}):
            found = curves["distances"][change]
            bar = f"<= {spread:.4f}, the spread of seeds" + ("" if found <= spread else " (missed)")
            rows.append([what, f"{found:.4f}", bar])
        else:
            rows.append([what, "not measured", ""])
    return rows


def main(argv: list[str] | None = None) -> int:
    options = arguments("bars", __doc__.splitlines()[0]).parse_args(argv)
    suffix = "gpu" if device_of().type == "cuda" else "cpu"
    if options.dry:
        print("a dry run: its figures mean nothing")
    print("\n".join(table(["required", "found", "bar"], required(options.out, suffix))))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
