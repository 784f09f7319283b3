"""`report.html` of a run: one file without network, its pictures inside. Every name in it is text, never markup."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vac_ddp.report import plots
from vac_ddp.results.metrics import Metrics
from vac_ddp.text import printable

# Nothing may be fetched and nothing may run: what is not in the file is not in the report.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: #fff; color: #1a202c;
       font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; print-color-adjust: exact; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 2px solid #2b6cb0; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .3rem 0 .6rem; }
.quiet { color: #4a5568; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.4rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.beside { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.beside > div { break-inside: avoid; max-width: 100%; }
.figure { border: 1px solid #cbd5e0; border-radius: .4rem; padding: .5rem .7rem; }
.figure b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.figure span { color: #4a5568; font-size: .85rem; }
img { max-width: 100%; height: auto; display: block; margin: .3rem 0; }
.strip { margin: .6rem 0; break-inside: avoid; }
.strip img { border: 1px solid #cbd5e0; }
.strip div { font-size: .85rem; overflow-wrap: anywhere; }
.warning { background: #fffaf0; border-left: 4px solid #c05621; padding: .4rem .8rem; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid #e2e8f0;
         font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .text { text-align: left; overflow-wrap: anywhere; }
thead { display: table-header-group; }
tr, .figure { break-inside: avoid; }
pre { background: #f7fafc; border: 1px solid #e2e8f0; padding: .7rem; font-size: .75rem; line-height: 1.35;
      white-space: pre-wrap; overflow-wrap: anywhere; columns: 2 22rem; column-gap: 2rem; }
pre.lines { columns: 1; }
h2, h3, section > p { break-after: avoid; }
@media print {
  body { max-width: none; padding: 0; font-size: 11px; }
  h2 { margin-top: 1.2rem; }
  pre { columns: 3 10rem; font-size: .7rem; }
}
"""


@dataclass(kw_only=True)
class Example:
    """One video of the validation part that was taken for something else: its frames as a JPEG strip, or none."""

    name: str
    true: str
    predicted: str
    confidence: float
    true_share: float
    strip: bytes | None = None


@dataclass(kw_only=True)
class Pair:
    """Two classes that are confused, in this direction, how often, and examples of it."""

    true: str
    predicted: str
    times: int
    videos: int
    examples: list[Example] = field(default_factory=list)


@dataclass(kw_only=True)
class Validation:
    """What the best weights say about the validation part."""

    metrics: Metrics
    confidence: np.ndarray
    correct: np.ndarray
    interval: tuple[float, float]
    sources: int
    views: int
    pairs: list[Pair]
    worst: list[Example]
    surest: list[Example]


@dataclass(kw_only=True)
class Facts:
    """All that a report shows; what a run does not have is empty or None."""

    name: str
    folder: str
    written: str
    versions: str
    epochs: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    events: list[str]
    classes: list[str]
    train_counts: list[int]
    val_counts: list[int]
    audit: list[str]
    load: list[str]
    speed: list[str]
    settings: str
    validation: Validation | None
    note: str = ""
    probes: Sequence[Mapping[str, Any]] = ()


def render(facts: Facts) -> str:
    """The whole page."""
    title = f"{text(facts.name)}: report"
    body = [
        f"<h1>{text(facts.name)}</h1>",
        f'<p class="quiet">{text(facts.folder)} · {text(facts.written)} · {text(facts.versions)}</p>',
        _headline(facts),
        f'<p class="warning">{text(facts.note)}</p>' if facts.note else "",
        *[f'<p class="warning">{text(event)}</p>' for event in facts.events],
        _section("Probes", _probes(facts.probes)) if facts.probes else _section("Training", _training(facts)),
        _section("Validation", _validation(facts.validation)),
        _section("Data", _data(facts)),
        _section("Weights at the start", _lines(facts.load)),
        _section("Throughput", _speed(facts)),
        _section("Settings", f"<pre>{text(facts.settings)}</pre>" if facts.settings else ""),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>{CSS}</style>\n</head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """`value` as text of a page, whatever characters it has."""
    return html.escape("\n".join(map(printable, str(value).split("\n"))), quote=True)


def picture(data: bytes, about: str) -> str:
    """An image inside the page: SVG or JPEG bytes, and what they show."""
    kind = "image/jpeg" if data[:2] == b"\xff\xd8" else "image/svg+xml"
    return f'<img alt="{text(about)}" src="data:{kind};base64,{base64.b64encode(data).decode()}">'


# ---------------------------------------------------------------- sections


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _headline(facts: Facts) -> str:
    boxes: list[tuple[str, str]] = []
    found = facts.validation
    if found is not None:
        m = found.metrics
        low, high = found.interval
        span = "" if math.isnan(low) else f", 95 %: {low:.3f} to {high:.3f}"
        boxes += [
            (f"{m.top1:.4f}", f"top-1 of {m.count} videos{span}"),
            (f"{m.mean_class:.4f}", "mean over classes"),
            (f"{m.top5:.4f}", "top-5"),
            (f"{m.loss:.4f}", "loss"),
            (f"{m.calibration_error:.4f}", "calibration error"),
        ]
    best = [row for row in facts.epochs if row.get("best") and row.get("val_top1") is not None]
    if best:
        boxes.append((f"{best[-1]['val_top1']:.4f}", f"best in training, epoch {best[-1]['epoch']}"))
    if facts.epochs:
        last = facts.epochs[-1]
        boxes.append((str(last["epoch"]), f"epochs, {last['step']} steps"))
    shown = (f'<div class="figure"><b>{text(a)}</b><span>{text(b)}</span></div>' for a, b in boxes)
    return f'<div class="figures">{"".join(shown)}</div>'


def _training(facts: Facts) -> str:
    if not facts.epochs and not facts.steps:
        return "<p>No epoch has ended yet.</p>"
    return picture(plots.curves(facts.epochs, facts.steps), "Loss, accuracy, learning rate and gradient norm")


def _probes(probes: Sequence[Mapping[str, Any]]) -> str:
    """The table of probes that were tried; the last line is of the nested selection among all of them."""
    head = ["probe", "accuracy", "SE", "loss", "seconds", "hyper-parameters"]
    rows = []
    for line in probes:
        name = f"selected: {line.get('probe')}" if line["kind"] == "selected" else str(line.get("probe"))
        numbers = (line.get("accuracy"), line.get("error"), line.get("loss"))
        shown = ["" if value is None else f"{abs(value):.4f}" for value in numbers]
        rows.append([text(name), *shown, f"{line.get('seconds') or 0:.1f}", text(line.get("settings"))])
    return (
        '<p class="quiet">Accuracy of outer folds, which took no part in the choice of hyper-parameters, and its '
        f"standard error over groups. k-NN is a reference.</p>{_table(head, rows, last_is_text=True)}"
    )


def _validation(found: Validation | None) -> str:
    if found is None:
        return "<p>There are no predictions of a validation part.</p>"
    m = found.metrics
    names = [row.name for row in m.per_class]
    recall = np.array([row.recall for row in m.per_class])
    counts = np.array([row.count for row in m.per_class])
    shown = f", the {plots.BARS} hardest" if (counts > 0).sum() > plots.BARS else ""
    parts = [
        f'<p class="quiet">The best weights, {found.views} view{"s" if found.views > 1 else ""} a video, mean of the '
        f"logits; {m.count} videos from {found.sources} sources.</p>",
        f"<h3>Classes{shown}</h3>",
        picture(plots.class_bars(names, recall, counts), "Recall of every class"),
        '<div class="beside">',
        f"<div><h3>Confusion</h3>{picture(plots.confusion(m.confusion, names), 'Confusion matrix')}</div>",
        "<div><h3>Confidence</h3>",
        picture(plots.reliability(found.confidence, found.correct), "Accuracy against confidence"),
        "</div></div>",
    ]
    seen: set[str] = set()
    if found.pairs:
        parts.append("<h3>Most confused</h3>")
        for pair in found.pairs:
            named = f"<b>{text(pair.true)}</b> taken for <b>{text(pair.predicted)}</b>"
            parts.append(f"<p>{named}: {pair.times} of {pair.videos}</p>")
            parts += [_strip(example, seen) for example in pair.examples]
    for title, examples in (
        ("Mistakes that were most sure of themselves", found.surest),
        ("Mistakes with the least share for the true class", found.worst),
    ):
        if examples:
            parts += [f"<h3>{title}</h3>", *[_strip(example, seen) for example in examples]]
    if not found.pairs:
        parts.append("<p>No mistake was made.</p>")
    parts += ["<h3>All classes</h3>", _class_table(m)]
    return "\n".join(parts)


def _strip(example: Example, seen: set[str]) -> str:
    """Frames and what they were taken for; the frames of a video are shown once in a page."""
    shown = ""
    above = " Its frames are shown above." if example.strip and example.name in seen else ""
    if example.strip and not above:
        shown = picture(example.strip, f"Frames of {example.name}")
        seen.add(example.name)
    return (
        f'<div class="strip">{shown}<div>{text(example.name)}: {text(example.true)} (given {example.true_share:.3f}) '
        f"taken for {text(example.predicted)} ({example.confidence:.3f}).{above}</div></div>"
    )


def _class_table(m: Metrics) -> str:
    head = ["class", "videos", "right", "recall", "precision", "F1"]
    rows = [
        [text(r.name), str(r.count), str(r.correct), *(_share(v) for v in (r.recall, r.precision, r.f1))]
        for r in m.per_class
    ]
    for row, r in zip(rows, m.per_class, strict=True):
        row.append(f"{text(r.mistaken_for)} ({r.mistaken_count})" if r.mistaken_count else "")
    return _table([*head, "mostly mistaken for"], rows, last_is_text=True)


def _data(facts: Facts) -> str:
    rows = [
        [text(name), str(train), str(val)]
        for name, train, val in zip(facts.classes, facts.train_counts, facts.val_counts, strict=True)
    ]
    rows.append(["<b>all</b>", str(sum(facts.train_counts)), str(sum(facts.val_counts))])
    lines = "".join(
        f"<p{' class=' + chr(34) + 'warning' + chr(34) if line.startswith('warning') else ''}>{text(line)}</p>"
        for line in facts.audit
    )
    return lines + (_table(["class", "training", "validation"], rows) if facts.classes else "")


def _speed(facts: Facts) -> str:
    lines = "".join(f"<p>{text(line)}</p>" for line in facts.speed)
    return lines + (picture(plots.throughput(facts.steps), "Clips a second and waiting") if facts.steps else "")


def _lines(lines: Sequence[str]) -> str:
    return f'<pre class="lines">{text(chr(10).join(lines))}</pre>' if lines else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, last_is_text: bool = False) -> str:
    """A table of cells that are markup already."""

    def cells(row: Sequence[str], tag: str) -> str:
        marks = [' class="text"' if last_is_text and i == len(row) - 1 else "" for i in range(len(row))]
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
