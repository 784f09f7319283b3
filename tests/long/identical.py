"""Two revisions of the code do the same to the bit: tiny trainings and predictions with each, and what they left.

    python -m tests.long.identical OLD [NEW]

OLD is a git revision, NEW another one or, if absent, the working tree. With each, in one process and in two ranks: a
training of every model family with augmentation, mixing, averaging and a short last step, one that is resumed from a
step in the middle, and predictions of several views; one thread. Compared are the tensors of the best weights and of
the checkpoints, the losses and figures of metrics.jsonl, the logits and submission.csv. Only command lines are used, so
that nothing depends on where modules are. Exit status: 0 equal, 1 not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.fixtures.make_runs import FAMILIES, SETTINGS, make_data

REPO = Path(__file__).resolve().parents[2]
TIMED = ("s", "_s", "per_s", "seconds", "gib", "mfu", "time", "rate")  # ends of names of measured figures


def run_all(code: Path, folder: Path) -> None:
    """Train and predict in `folder` with the package of the checkout `code`."""
    folder.mkdir(parents=True)
    make_data(folder)
    (folder / "settings.yaml").write_text(SETTINGS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def python(*words: str, ranks: int = 1) -> None:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *start, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")

    for family in FAMILIES:
        for ranks in (1, 2):
            run = f"{family}-{ranks}"
            words = ["--config=settings.yaml", f"model.name={family}", f"run.dir={run}", "train.clips_per_gpu=1"]
            python("vac_ddp.train", *words, "train.epochs=2", ranks=ranks)
            python("vac_ddp.predict", f"run.dir={run}", "--data", "data_test", ranks=ranks)
    words = ["--config=settings.yaml", "run.dir=resumed", "checkpoint.every_steps=2", "checkpoint.keep=20"]
    python("vac_ddp.train", *words)
    for path in (folder / "resumed" / "checkpoints").glob("step-*"):
        if int(path.stem.split("-")[1]) > 4:
            path.unlink()  # as if the run had been killed after step 4
    python("vac_ddp.train", *words, "run.resume=auto")


def facts(folder: Path) -> dict[str, str]:
    """A short hash of everything in `folder` that must not differ, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name.startswith("best_") or (path.suffix == ".pt" and path.parent.name == "checkpoints"):
            for key, tensor in tensors(torch.load(path, weights_only=True)):
                found[f"{name} {key}"] = digest(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        elif path.name in ("views.npz", "validation.npz"):
            with np.load(path, allow_pickle=False) as arrays:
                for key in ("ids", "logits", "labels"):
                    if key in arrays:
                        found[f"{name} {key}"] = digest(arrays[key].tobytes())
        elif path.name in ("submission.csv", "split.csv", "classes.json", "scores.csv"):
            found[name] = digest(path.read_bytes())
        elif path.name == "metrics.jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                kept = {k: v for k, v in json.loads(line).items() if not any(k.endswith(end) for end in TIMED)}
                if kept.get("kind") in ("train", "epoch"):
                    loss = {
                        k: kept[k] for k in kept if "loss" in k or "acc" in k or "lr" in k or k in ("step", "epoch")
                    }
                    found[f"{name} {number}"] = json.dumps(loss, sort_keys=True)
    return found


def tensors(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """All tensors inside a nest of dictionaries and lists, with their place."""
    if isinstance(value, torch.Tensor):
        return [(name, value.reshape(-1))] if value.numel() else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [pair for key, part in inner for pair in tensors(part, f"{name}/{key}")]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as work:
        for number, revision in enumerate((options.old, options.new)):
            code = REPO
            if revision is not None:
                code = Path(work) / f"code{number}"
                code.mkdir()
                archive = subprocess.run(["git", "archive", revision], cwd=REPO, capture_output=True, check=True).stdout
                subprocess.run(["tar", "-x", "-C", str(code)], input=archive, check=True)
            run_all(code, Path(work) / f"runs{number}")
            found.append(facts(Path(work) / f"runs{number}"))
    old, new = found
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in different[:50]:
        print(f"{name}: {old.get(name)} before, {new.get(name)} now")
    print(f"{len(old)} tensors, arrays, files and lines compared, {len(different)} differ")
    return int(bool(different) or not old)


if __name__ == "__main__":
    sys.exit(main())
