"""From a run directory to its report.html: what the files say, and the page that shows it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vac_ddp.data.index import Index
from vac_ddp.data.split import split_rows
from vac_ddp.files import write_text
from vac_ddp.report import html
from vac_ddp.report.lines import METRICS, read_metrics
from vac_ddp.report.pictures import Strip, frame_strips, strips_of
from vac_ddp.report.run_reader import read_classes
from vac_ddp.results import averaging, evaluation
from vac_ddp.results.logits_file import Views
from vac_ddp.results.metrics import log_softmax
from vac_ddp.schema import read_json
from vac_ddp.text import listed
from vac_ddp.version import VERSION

PAIRS, EXAMPLES, MISTAKES = 6, 2, 6
NAMED = 5

LoadFacts = dict[str, bool | float | str | list[str] | list[float] | dict[str, Any] | None]  # load_report.json


def write_report(run: Path, views: Views | None, out: Path, *, note: str = "", index: Index | None = None) -> None:
    """Write the report of a run, with the labelled `views` of its best weights or without.

    index: the validation videos, for the frames of mistakes; without it they are looked up by the run's settings.
    """
    strip = frame_strips(run) if index is None else strips_of(index)
    write_text(out, html.render(gather(run, views, strip, note=note)))


def gather(run: Path, views: Views | None, strip: Strip, *, note: str = "") -> html.Facts:
    """What a run directory says, ready to be shown."""
    lines = read_metrics(run) if (run / METRICS).exists() else []
    rows = read_split(run)
    classes = read_classes(run) if (run / "classes.json").exists() else []
    counts = {part: Counter(row[1] for row in rows if row[3] == part) for part in ("train", "val")}
    steps = [line for line in lines if line.get("kind") == "train"]
    return html.Facts(
        name=run.resolve().name,
        folder=str(run),
        written=time.strftime("%Y-%m-%d %H:%M"),
        versions=f"vac_ddp {VERSION}",
        epochs=[line for line in lines if line.get("kind") == "epoch"],
        steps=steps,
        probes=[line for line in lines if line.get("kind") in ("probe", "selected")],
        events=[_event(line) for line in lines if line.get("kind") == "event"],
        classes=classes,
        train_counts=[counts["train"][name] for name in classes],
        val_counts=[counts["val"][name] for name in classes],
        audit=audit_lines(rows),
        load=_load_lines(run),
        speed=speed_lines(steps, [line for line in lines if line.get("kind") == "speed"]),
        settings=(run / "config.yaml").read_text(encoding="utf-8", errors="backslashreplace"),
        validation=None if views is None else validation_of(views, strip),
        note=note,
    )


def read_split(run: Path) -> list[tuple[str, str, str, str]]:
    """Rows video, class, source, part of split.csv; none where there is no such file."""
    path = run / "split.csv"
    return split_rows(path) if path.exists() else []


def _event(line: Mapping[str, Any]) -> str:
    rest = [f"{key} {value}" for key, value in line.items() if key not in ("kind", "step", "event")]
    return f"step {line.get('step')}: {', '.join([str(line.get('event')), *rest])}"


def audit_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Where the split leaks: validation videos whose source is in training, overall and by name."""
    train = {row[2] for row in rows if row[3] == "train"}
    val = [row for row in rows if row[3] == "val"]
    if not rows:
        return ["The run has no split.csv."]
    if not val:
        return ["Everything was trained on; there is no validation part."]
    shared = [row for row in val if row[2] in train]
    sources = len({row[2] for row in val})
    line = (
        f"{len(shared)} of {len(val)} validation videos ({100 * len(shared) / len(val):.1f} %) have their source in "
        f"training; the part holds {sources} sources, training {len(train)}."
    )
    if not shared:
        return [line]
    some = ", ".join(row[0] for row in shared[:NAMED])
    return [f"warning: {line} Its accuracy is too good to be true on new sources. First: {some}"]


def _load_lines(run: Path) -> list[str]:
    if not (run / "load_report.json").exists():
        return []
    report = read_json(run / "load_report.json", LoadFacts, remedy="remove it: the report goes without")
    shown = []
    for name, value in report.items():
        if value in (None, "", [], 0) or isinstance(value, dict) or name == "format":
            continue
        if isinstance(value, list) and value and isinstance(value[0], str):
            value = f"{len(value)}: {listed(value, 6)}"
        elif isinstance(value, list):
            value = " ".join(f"{x:g}" for x in value)
        elif isinstance(value, float):
            value = f"{value:.4f}"
        shown.append(f"{name.replace('_', ' '):<14} {value}")
    return shown


def speed_lines(steps: Sequence[Mapping[str, Any]], ends: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Medians of a run's speed, waiting, utilisation and memory, the first line left out: it holds the start.

    ends: what was written at the end of each of its parts: seconds by phase.
    """
    later = [line for line in steps[1:] if line.get("clips_per_s")]
    if not later:
        return []

    def median(name: str) -> float:
        return float(np.median([line.get(name) or 0.0 for line in later]))

    found = [
        f"median {median('clips_per_s'):.1f} clips/s over all ranks; rank 0 waited {100 * median('data_wait'):.1f} % "
        "of the time for data"
    ]
    if any(line.get("mfu") for line in later):
        found.append(f"{100 * median('mfu'):.1f} % of the FLOP/s of a large matrix product, measured at the start")
    if any(line.get("memory_gib") for line in later):
        found.append(f"at most {max(line.get('memory_gib') or 0.0 for line in later):.2f} GiB on a rank")
    for end in ends:
        inside = ("wait", "prepare", "forward", "backward", "optimizer")
        spent = ", ".join(f"{name} {end[name]:.1f}" for name in inside if name in end)
        rest = "".join(f", {name} {end[name]:.1f}" for name in ("validation", "saving") if name in end)
        found.append(f"seconds until step {end.get('step')}: training {end.get('training', 0.0):.1f} ({spent}){rest}")
    return found


def validation_of(views: Views, strip: Strip) -> html.Validation:
    """Figures, confused pairs and mistakes of a labelled views file, by the mean of its logits."""
    scores = averaging.average_views(views.logits, method=averaging.method_for([views]))
    found = evaluation.evaluate(scores, views.labels, views.classes, views.sources)
    rows = np.flatnonzero(views.labels >= 0)
    shares = np.exp(log_softmax(scores[rows]))
    labels, predicted = views.labels[rows], scores[rows].argmax(axis=1)
    confidence = shares.max(axis=1)
    true_share = shares[np.arange(len(rows)), labels]
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")].tolist()
    least_true = wrong[np.argsort(true_share[wrong], kind="stable")].tolist()
    worst = [row for row in least_true if row not in surest[:MISTAKES]]

    def example(row: int) -> html.Example:
        name = views.ids[rows[row]]
        return html.Example(
            name=name,
            true=views.classes[labels[row]],
            predicted=views.classes[predicted[row]],
            confidence=float(confidence[row]),
            true_share=float(true_share[row]),
            strip=strip(name),
        )

    def pair(a: int, b: int) -> html.Pair:
        members = [row for row in surest if (labels[row], predicted[row]) == (a, b)]
        return html.Pair(
            true=views.classes[a],
            predicted=views.classes[b],
            times=int(found.metrics.confusion[a, b]),
            videos=int(found.metrics.confusion[a].sum()),
            examples=[example(row) for row in members[:EXAMPLES]],
        )

    return html.Validation(
        metrics=found.metrics,
        confidence=confidence,
        correct=predicted == labels,
        interval=found.interval,
        sources=found.sources,
        views=int(views.about.get("averaged", len(views.views))),
        pairs=[pair(a, b) for a, b in _most_confused(found.metrics.confusion)],
        worst=[example(row) for row in worst[:MISTAKES]],
        surest=[example(row) for row in surest[:MISTAKES]],
    )


def _most_confused(confusion: np.ndarray) -> list[tuple[int, int]]:
    """The pairs (true, predicted) of different classes with the most videos in the confusion matrix (K, K)."""
    matrix = confusion.copy()
    np.fill_diagonal(matrix, 0)
    cells = np.argsort(-matrix, axis=None, kind="stable")[:PAIRS].tolist()
    return [(a, b) for a, b in (divmod(cell, len(matrix)) for cell in cells) if matrix[a, b]]
