"""`vac report RUN`: write RUN/report.html, one file with everything a run has to show."""

from __future__ import annotations

import io
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vac_ddp.arguments import ArgumentParser
from vac_ddp.data.split import split_rows
from vac_ddp.errors import Findings, UserError
from vac_ddp.files import sha256, write_text
from vac_ddp.report import html
from vac_ddp.report.lines import METRICS, read_metrics
from vac_ddp.results import averaging, evaluation
from vac_ddp.results.logits_file import NAME, Views, read_views
from vac_ddp.results.metrics import log_softmax
from vac_ddp.schema import read_json
from vac_ddp.training.run_directory import read_classes
from vac_ddp.version import VERSION

if TYPE_CHECKING:
    from vac_ddp.data.index import Index

FRAMES = 8  # in a strip
HEIGHT = 96  # of a strip, in pixels
PAIRS, EXAMPLES, MISTAKES = 6, 2, 6
NAMED = 5

Strip = Callable[[str], bytes | None]
LoadFacts = dict[str, bool | float | str | list[str] | list[float] | dict[str, Any] | None]  # load_report.json


def main(argv: list[str] | None = None) -> int:
    """Gather what the run left, predict its validation part where that is missing, and write the page."""
    parser = ArgumentParser(prog="vac report", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--views", metavar="VIEWS", help="a labelled views file instead of RUN/predictions/val")
    parser.add_argument("--no-predict", action="store_true", help="do not predict the validation part if it is missing")
    parser.add_argument("--out", metavar="FILE", help="where to write (default: RUN/report.html)")
    options = parser.parse_args(argv)
    run = Path(options.run).expanduser()
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run directory: it has no config.yaml")
    views, note = _views(run, options.views, predict=not options.no_predict)
    out = Path(options.out) if options.out else run / "report.html"
    write_report(run, views, out, note=note)
    print(f"report  {out}")
    return 0


def write_report(run: Path, views: Views | None, out: Path, *, note: str = "", index: Index | None = None) -> None:
    """Write the report of a run, with the labelled `views` of its best weights or without.

    index: the validation videos, for the frames of mistakes; without it they are looked up by the run's settings.
    """
    strip = _frame_strips(run) if index is None else strips_of(index)
    write_text(out, html.render(gather(run, views, strip, note=note)))


# ---------------------------------------------------------------- the validation part


def _views(run: Path, given: str | None, *, predict: bool) -> tuple[Views | None, str]:
    """The views file to show, made if it has to be; and what to say where there is none."""
    if given:
        views = read_views(given)
        if not views.labelled:
            raise UserError(f"{given} has no labels: the report needs a labelled data set")
        return views, ""
    best = sorted(run.glob("best_*.pt"))
    if len(best) != 1:
        return None, f"{len(best)} best_<model>.pt files in the run: nothing was predicted"
    if not any(row[3] == "val" for row in _split(run)):
        return None, "The run has no validation part: everything was trained on."
    folder = run / "predictions" / "val"
    fresh = (folder / NAME).exists() and read_views(folder).about.get("weights") == sha256(best[0])
    if not fresh and predict:
        from vac_ddp.predict import predict as predict_part

        print(f"predicting the validation part with {best[0].name}")
        try:
            predict_part(["--weights", str(best[0]), "--part", "val", "--overwrite"])
        except Findings as finding:
            return read_views(folder), str(finding)
        except UserError as error:
            return None, f"The validation part could not be predicted: {error}"
    elif not fresh:
        return None, "The validation part was not predicted with these weights."
    return read_views(folder), ""


def _split(run: Path) -> list[list[str]]:
    """Rows video, class, source, part of split.csv; none where there is no such file."""
    path = run / "split.csv"
    return [list(row) for row in split_rows(path)] if path.exists() else []


def _frame_strips(run: Path) -> Strip:
    """A function that makes a strip of frames of a validation video; it gives None where the data is not at hand."""
    from vac_ddp import config as settings_io
    from vac_ddp.data.index import open_index

    try:
        config = settings_io.read_yaml(run / "config.yaml")
        classes = read_classes(run) if config.data.val else None
        index = open_index(config.data.val or config.data.train, labelled=True, settings=config.data, classes=classes)
    except (UserError, OSError, ValueError) as error:
        print(f"no frames in the report: {error}", file=sys.stderr)
        return lambda name: None
    return strips_of(index)


def strips_of(index: Index) -> Strip:
    """A function that makes a strip of frames of the video of a name; None where it is not in the index."""
    place = {name: i for i, name in enumerate(index.names)}

    def strip(name: str) -> bytes | None:
        video = place.get(name)
        if video is None or not index.frame_counts[video]:
            return None
        count = int(index.frame_counts[video])
        wanted = sorted({round(i * (count - 1) / (FRAMES - 1)) for i in range(FRAMES)})
        return make_strip([_bytes(index, video, frame) for frame in wanted])

    return strip


def _bytes(index: Any, video: int, frame: int) -> bytes:
    try:
        return index.frame_bytes(video, frame)
    except OSError:
        return b""


def make_strip(frames: Sequence[bytes]) -> bytes | None:
    """Image files side by side, each `HEIGHT` pixels high, as one JPEG; what does not decode is left out."""
    from PIL import Image

    from vac_ddp.data.decode import DamagedFrame, decode_frame

    def enough(height: int, width: int) -> int:
        return next((factor for factor in (8, 4, 2) if height // factor >= HEIGHT), 1)

    pictures = []
    for data in frames:
        try:
            image = Image.fromarray(decode_frame(data, factor=enough))
        except DamagedFrame:
            continue
        width = max(1, min(4 * HEIGHT, round(image.width * HEIGHT / image.height)))
        pictures.append(image.resize((width, HEIGHT)))
    if not pictures:
        return None
    strip = Image.new("RGB", (sum(p.width + 2 for p in pictures) - 2, HEIGHT), "white")
    left = 0
    for one in pictures:
        strip.paste(one, (left, 0))
        left += one.width + 2
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


# ---------------------------------------------------------------- facts


def gather(run: Path, views: Views | None, strip: Strip, *, note: str = "") -> html.Facts:
    """What a run directory says, ready to be shown."""
    lines = read_metrics(run) if (run / METRICS).exists() else []
    rows = _split(run)
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


def _event(line: dict[str, Any]) -> str:
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
            value = f"{len(value)}: {', '.join(value[:6])}{', ...' if len(value) > 6 else ''}"
        elif isinstance(value, list):
            value = " ".join(f"{x:g}" for x in value)
        elif isinstance(value, float):
            value = f"{value:.4f}"
        shown.append(f"{name.replace('_', ' '):<14} {value}")
    return shown


def speed_lines(steps: Sequence[dict[str, Any]], ends: Sequence[dict[str, Any]] = ()) -> list[str]:
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

    pairs = []
    matrix = found.metrics.confusion.copy()
    np.fill_diagonal(matrix, 0)
    for cell in np.argsort(-matrix, axis=None, kind="stable")[:PAIRS].tolist():
        a, b = divmod(cell, len(views.classes))
        if matrix[a, b]:
            members = wrong[(labels[wrong] == a) & (predicted[wrong] == b)]
            members = members[np.argsort(-confidence[members], kind="stable")][:EXAMPLES]
            pairs.append(
                html.Pair(
                    true=views.classes[a],
                    predicted=views.classes[b],
                    times=int(matrix[a, b]),
                    videos=int(found.metrics.confusion[a].sum()),
                    examples=[example(row) for row in members.tolist()],
                )
            )
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES].tolist()
    worst = [row for row in wrong[np.argsort(true_share[wrong], kind="stable")].tolist() if row not in surest]
    return html.Validation(
        metrics=found.metrics,
        confidence=confidence,
        correct=predicted == labels,
        interval=found.interval if not math.isnan(found.interval[0]) else (math.nan, math.nan),
        sources=found.sources,
        views=int(views.about.get("averaged", len(views.views))),
        pairs=pairs,
        worst=[example(row) for row in worst[:MISTAKES]],
        surest=[example(row) for row in surest],
    )


if __name__ == "__main__":
    from vac_ddp.runtime.exit_status import run_command

    sys.exit(run_command(main, sys.argv[1:]))
