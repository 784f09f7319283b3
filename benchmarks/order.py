"""Is it motion that was learned? A run's test accuracy on `vac synth` data, and on the same clips out of order.

    python -m benchmarks.order --run quickstart/run --data quickstart/data --out quickstart/order

Predicts the test part (or takes the prediction that is there), scores its submission.csv against test_labels.csv, then
shuffles the frames of every test video in time (several times over) and scores the same checkpoint on those. The frames
of a video are the same set whatever its class, so in a random order all classes are equally likely and nobody can
expect more than 1/6. `--reference` checks that with classifiers of its own: a linear one on an order-blind
description of the frames (it should reach the ceiling and no more), and the same on frames in order.

Exit status 3 where the accuracy is below --least, or the shuffled clips score more than --margin above the ceiling.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from vac_ddp.data.synthetic import FACTS
from vac_ddp.errors import DONE, FINDINGS, UserError
from vac_ddp.files import read_json, write_json, write_text


def read_answers(path: Path) -> dict[str, str]:
    """id -> class of a CSV with these columns; ids without leading zeros, each once."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [(row["id"].lstrip("0"), row["class"]) for row in csv.DictReader(stream)]
    answers = dict(rows)
    if len(answers) != len(rows):
        raise UserError(f"{path} names a video twice")
    return answers


def accuracy(answers: dict[str, str], labels: dict[str, str]) -> float:
    """Share of right answers; every labelled video has exactly one."""
    if answers.keys() != labels.keys():
        missing, unknown = len(labels.keys() - answers.keys()), len(answers.keys() - labels.keys())
        raise UserError(f"the submission does not fit the labels: {missing} videos missing, {unknown} unknown")
    return sum(answers[video] == name for video, name in labels.items()) / len(labels)


def shuffle_videos(test: Path, labels: dict[str, str], out: Path, *, times: int, seed: int) -> dict[str, str]:
    """Test videos with their frames in a random order, `times` versions of each; returns their labels.

    Frames are links, or copies where links can't be had. What an earlier call left is used again.
    """
    table = out / "labels.csv"
    if not table.is_file():
        rng = np.random.default_rng(seed)
        rows = [("id", "class")]
        for _ in range(times):
            for video in sorted(test.iterdir()):
                name = f"{len(rows):05d}"
                rows.append((str(len(rows)), labels[video.name.lstrip("0")]))
                target = out / "clips" / name
                target.mkdir(parents=True, exist_ok=True)
                frames = sorted(video.iterdir())
                for number, place in enumerate(rng.permutation(len(frames)), start=1):
                    link_or_copy(frames[place], target / f"{number:04d}.jpg")
        write_text(table, "".join(f"{video},{name}\n" for video, name in rows))
    return read_answers(table)


def link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def predict(run: Path, data: Path, out: Path, ranks: int) -> dict[str, str]:
    """Answers of a run, by `vac_ddp.predict` under torchrun; what is there already is used again."""
    # `--` and run.dir=: torchrun of Python before 3.12.8 takes --run for a flag of its own
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "vac_ddp.predict", "--", f"run.dir={run}", "--data", str(data), "--out", str(out)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"predicting {data} failed: its reason stands above")
    return read_answers(out / "submission.csv")


# ---------------------------------------------------------------- reference: what a plain classifier can do

SEGMENTS, SIDE = 16, 8


def describe(video: Path) -> tuple[np.ndarray, np.ndarray]:
    """A video with its order, (SEGMENTS * SIDE * SIDE,), and without: length, and its frames' statistics."""
    from PIL import Image

    small = []
    for path in sorted(video.iterdir()):
        with Image.open(path) as image:
            small.append(np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel())
    frames = np.stack(small) / 255
    frames -= frames.min()
    frames /= frames.max() + 1e-6
    places = ((np.arange(SEGMENTS) + 0.5) * len(frames) / SEGMENTS).astype(int)
    blind = [[len(frames) / 50], frames.mean(0), frames.std(0), np.sort(frames, axis=0)[places].ravel()]
    return frames[places].ravel(), np.concatenate(blind)


def ridge_accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, answers: np.ndarray) -> float:
    """Test accuracy of a linear classifier fitted by least squares with a penalty (dual form)."""
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation
    targets = (labels[:, None] == np.unique(labels)[None]).astype(np.float64) - 1 / len(np.unique(labels))
    kernel = train @ train.T
    weights = np.linalg.solve(kernel + 0.3 * np.trace(kernel) / len(kernel) * np.eye(len(kernel)), targets)
    return float((np.unique(labels)[(test @ train.T @ weights).argmax(1)] == answers).mean())


def reference(data: Path, labels: dict[str, str]) -> tuple[float, float]:
    """Test accuracy of the linear classifier with the order of the frames, and without."""
    videos = sorted((data / "data_train").glob("*/*"))
    test = sorted((data / "data_test").iterdir())
    ordered, blind = (np.stack(part) for part in zip(*map(describe, [*videos, *test]), strict=True))
    names, answers = np.array([v.parent.name for v in videos]), np.array([labels[v.name.lstrip("0")] for v in test])
    n = len(videos)
    return (
        ridge_accuracy(ordered[:n], names, ordered[n:], answers),
        ridge_accuracy(blind[:n], names, blind[n:], answers),
    )


# ---------------------------------------------------------------- the program


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.order", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--data", type=Path, required=True, help="folder that `vac synth` made")
    parser.add_argument("--out", type=Path, required=True, help="folder for shuffled clips, predictions, order.json")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--times", type=int, default=4, help="shuffled versions of each video (default: 4)")
    parser.add_argument("--least", type=float, default=0.85, help="expected test top-1 (default: 0.85)")
    parser.add_argument("--margin", type=float, default=0.05, help="allowed above the ceiling (default: 0.05)")
    parser.add_argument("--reference", action="store_true", help="also fit the linear classifiers")
    options = parser.parse_args(argv)

    facts = read_json(options.data / FACTS)
    ceiling, labels = facts["ceiling"], read_answers(options.data / "test_labels.csv")
    test = options.data / "data_test"
    top1 = accuracy(predict(options.run, test, options.run / "predictions" / "data_test", options.ranks), labels)
    mixed = options.out / f"shuffled-{options.times}"
    mixed_labels = shuffle_videos(test, labels, mixed, times=options.times, seed=0)
    shuffled = accuracy(predict(options.run, mixed / "clips", options.out / "prediction", options.ranks), mixed_labels)

    n, classes = len(mixed_labels), len(facts["classes"])
    deviation = (ceiling * (1 - ceiling) / n) ** 0.5
    print(f"test top-1                      {top1:.4f}  ({len(labels)} videos)")
    print(f"frames shuffled in time         {shuffled:.4f}  ({n} clips: each video {options.times} times)")
    print(f"ceiling without the order       {ceiling:.4f}  ({classes} classes; by luck +- {deviation:.4f} on so many)")
    result = {"top1": top1, "shuffled": shuffled, "ceiling": ceiling, "videos": len(labels), "shuffled_clips": n}
    if options.reference:
        result["linear_ordered"], result["linear_blind"] = reference(options.data, labels)
        print(f"linear classifier, in order     {result['linear_ordered']:.4f}")
        print(f"linear classifier, order-blind  {result['linear_blind']:.4f}")
    write_json(options.out / "order.json", result)
    if top1 < options.least or shuffled > ceiling + options.margin:
        print(f"expected: top-1 of {options.least} or more, shuffled {ceiling + options.margin:.3f} or less")
        return FINDINGS
    return DONE


if __name__ == "__main__":
    from vac_ddp.runtime.exit_status import run_command

    sys.exit(run_command(main, sys.argv[1:]))
