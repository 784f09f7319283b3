"""Pictures of a report, drawn by matplotlib as SVG bytes: light, without a display, legible in grey on paper."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TRAIN, VAL, GREY = "#2b6cb0", "#c05621", "#718096"
NAMED_CLASSES = 60  # up to so many classes have their names on the confusion matrix
BARS = 40  # classes in the bar chart, the hardest ones
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "vac_ddp",
}


def curves(epochs: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss and accuracy over epochs, learning rate and gradient norm over steps: four small plots."""
    with _style():
        figure, ((loss, accuracy), (rate, norm)) = _figure(9.6, 5.6, 2, 2)
        number = [row["epoch"] for row in epochs]
        for axis, train, val in ((loss, "train_loss", "val_loss"), (accuracy, "train_accuracy", "val_top1")):
            for key, label, colour, line in ((train, "training", TRAIN, "-"), (val, "validation", VAL, "--")):
                values = [_number(row.get(key)) for row in epochs]
                if any(v == v for v in values):
                    axis.plot(number, values, line, color=colour, label=label, marker="." if len(values) < 40 else None)
            axis.set_xlabel("epoch")
            if axis.lines:
                axis.legend()
        loss.set_title("loss")
        loss.set_ylim(bottom=0)
        accuracy.set_title("accuracy")
        accuracy.set_ylim(0, 1.02)
        best = [row for row in epochs if row.get("best") and row.get("val_top1") is not None]
        if best:
            accuracy.plot(best[-1]["epoch"], best[-1]["val_top1"], "o", color=VAL, markerfacecolor="white", ms=8)
        number = [row["step"] for row in steps]
        for axis, key, title in (
            (rate, "lr", "learning rate"),
            (norm, "grad_norm", "norm of the gradient, before clipping"),
        ):
            axis.plot(number, [_number(row.get(key)) for row in steps], color=TRAIN)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        return _svg(figure)


COMPARED = (
    ("training loss", "train_loss", "epoch"),
    ("validation loss", "val_loss", "epoch"),
    ("training accuracy", "train_accuracy", "epoch"),
    ("validation accuracy", "val_top1", "epoch"),
    ("learning rate", "lr", "step"),
    ("clips a second", "clips_per_s", "step"),
)


def compare(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Curves of several runs side by side as PNG, over epochs and steps.

    runs: by the name that is shown, the lines of metrics.jsonl. A run keeps its colour and line in every plot.
    """
    with _style():
        figure, grid = _figure(12.0, 8.4, 3, 2)
        for axis, (title, key, over) in zip(grid.flat, COMPARED, strict=True):
            axis.set_title(title)
            axis.set_xlabel(over)
            for number, lines in enumerate(runs.values()):
                points = [(line[over], line[key]) for line in lines if line.get(key) is not None and over in line]
                if points:
                    colour, line = f"C{number % 10}", ("-", "--", ":", "-.")[number // 10 % 4]
                    marker = "." if len(points) < 40 else None
                    axis.plot(*zip(*points, strict=True), line, color=colour, marker=marker)
            axis.set_ylim(0, 1.02 if "accuracy" in title else max(1e-9, 1.05 * axis.dataLim.y1))
            axis.xaxis.get_major_locator().set_params(integer=True)
        handles = [
            grid[0][0].plot([], [], ("-", "--", ":", "-.")[i // 10 % 4], color=f"C{i % 10}")[0]
            for i in range(len(runs))
        ]
        labels = [_short(name, 60).replace("$", r"\$") for name in runs]
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        return png(figure)


def throughput(steps: Sequence[Mapping[str, Any]]) -> bytes:
    """Clips a second, and the share of the time in which rank 0 waited for data, over steps; utilisation if known."""
    with _style():
        figure, (speed, wait) = _figure(9.6, 2.6, 1, 2)
        number = [row["step"] for row in steps]
        speed.plot(number, [_number(row.get("clips_per_s")) for row in steps], color=TRAIN)
        speed.set_title("clips a second, all ranks")
        wait.plot(number, [100 * _number(row.get("data_wait")) for row in steps], color=VAL, label="waiting for data")
        wait.set_title("waiting for data, % of the time")
        if any(row.get("mfu") for row in steps):
            used = [100 * _number(row.get("mfu")) for row in steps]
            wait.plot(number, used, "--", color=TRAIN, label="of the matrix product's FLOP/s")
            wait.set_title("% of the time, % of the FLOP/s")
            wait.legend()
        wait.set_ylim(0, 100)
        for axis in (speed, wait):
            axis.set_xlabel("step")
        speed.set_ylim(bottom=0)
        return _svg(figure)


def class_bars(names: Sequence[str], recall: np.ndarray, counts: np.ndarray) -> bytes:
    """Recall of each class that has videos, the hardest on top; at most `BARS` of them."""
    order = [i for i in np.argsort(recall, kind="stable").tolist() if counts[i]][:BARS]
    with _style():
        figure, axis = _figure(9.6, 0.7 + 0.24 * max(4, len(order)))
        places = np.arange(len(order))
        axis.barh(places, recall[order], color=TRAIN, height=0.7)
        axis.set_yticks(places, [f"{_short(names[i])}  ({counts[i]})" for i in order], parse_math=False)
        axis.set_ylim(len(order) - 0.4, -0.6)
        axis.set_xlim(0, 1)
        axis.set_xlabel("share of the class's videos that are right (number of videos)")
        axis.grid(axis="y", visible=False)
        return _svg(figure)


def confusion(matrix: np.ndarray, names: Sequence[str], form: str = "svg") -> bytes:
    """Rows: the true class, shares of its videos; columns: what they were taken for. Counts where there is room.

    form: svg, or png for services that show no SVG.
    """
    size = len(names)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    side = float(np.clip(1.6 + 0.32 * size, 3.6, 9.6))
    with _style():
        figure, axis = _figure(side + 1.2, side)
        axis.grid(visible=False)
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        if size <= NAMED_CLASSES:
            labels = [_short(name, 24) for name in names]
            axis.set_xticks(range(size), labels, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
            axis.set_yticks(range(size), labels, parse_math=False)
            axis.tick_params(labelsize=9 if size <= 30 else 6, length=0)
        if size <= 25:
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    colour = "white" if shares[row, column] > 0.55 else "black"
                    axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
        axis.set_ylabel("true class")
        axis.set_xlabel("predicted class")
        figure.colorbar(image, ax=axis, fraction=0.04, label="share of the true class")
        return _svg(figure) if form == "svg" else png(figure)


def reliability(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 10) -> bytes:
    """Accuracy against confidence in bins: on the diagonal a confidence means what it says."""
    place = np.clip((confidence * bins).astype(int), 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    used = counts > 0
    mean = np.bincount(place, weights=confidence, minlength=bins)[used] / counts[used]
    right = np.bincount(place, weights=correct.astype(float), minlength=bins)[used] / counts[used]
    with _style():
        figure, axis = _figure(4.4, 3.8)
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
        axis.plot(mean, right, color=TRAIN)
        axis.scatter(mean, right, s=12 + 180 * counts[used] / counts.sum(), color=TRAIN)
        axis.set_xlim(0, 1.02)
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("confidence (area of a dot: share of the videos)")
        axis.set_ylabel("share that is right")
        return _svg(figure)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _svg(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def png(figure: Any) -> bytes:
    """A figure as PNG, at 120 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _short(name: str, most: int = 32) -> str:
    """A name on one line; a box stands for a character that the font lacks (the tables beside the plot have it)."""
    known = _characters()
    clean = "".join(" " if not c.isprintable() else c if ord(c) in known else "\N{WHITE SQUARE}" for c in name)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    with _style():
        font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return frozenset(font.get_charmap())
