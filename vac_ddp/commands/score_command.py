"""`vac score VIEWS...`: scores, ensembles and a submission from views files. No GPU, no frames, no model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vac_ddp.arguments import ArgumentParser, Namespace
from vac_ddp.errors import UserError
from vac_ddp.files import whole_folder, write_json, write_text
from vac_ddp.results import averaging, ensemble, evaluation, submission
from vac_ddp.results.logits_file import Views, read_views

ABOUT = "Average the views, and the models, of predictions that `vac predict` left in views files."


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="vac score", description=ABOUT)
    add = parser.add_argument
    add("views", nargs="+", metavar="VIEWS", help="views files, or folders of predictions; several: an ensemble")
    add("--method", choices=averaging.METHODS, help="what is averaged (default: predict.average of the predictions)")
    add("--weights", metavar="W,W,...", help="weights of the files; default: equal")
    add("--greedy", nargs="+", metavar="VAL", help="choose weights greedily on these labelled views files, one each")
    add("--fit", nargs="+", metavar="VAL", help="fit weights to the loss on these labelled views files, one each")
    add("--temperature-from", nargs="+", metavar="VAL", help="fit a temperature on these labelled files, one each")
    add("--subset", nargs="+", metavar="PICK", help="only these views: window=0,2 crop=1 flip=0, or numbers 0,3,4")
    add("--answer", choices=("name", "index"), default="name", help="class column: names (default) or numbers")
    add("--sample", metavar="CSV", help="write the submission after the rows of this sample_submission.csv")
    add("--no-table", action="store_true", help="leave out the table of accuracy against the number of views")
    add("--out", metavar="DIR", help="write submission.csv, scores.csv, ensemble.json and the evaluation here")
    return parser


@dataclass(kw_only=True)
class Fitted:
    """How the files are put together."""

    weights: np.ndarray
    temperatures: list[float]
    how: str


def main(argv: list[str]) -> int:
    """Read, average, print the figures that labels allow, and write what --out asks for. Raises UserError."""
    options = _parser().parse_args(argv)
    files = [read_views(path) for path in options.views]
    options.method = averaging.method_for(files, options.method)
    aligned = averaging.align(files)
    for file in files[1:]:
        if _data(file) != _data(files[0]):
            print(f"note: {file.path} was made of {_data(file)}, {files[0].path} of {_data(files[0])}", file=sys.stderr)
    labels = aligned.labels
    logits = [part[:, ensemble.picked(file, options.subset)] for part, file in zip(aligned.logits, files, strict=True)]
    fitted = _fit(options, files)
    scores = [
        averaging.average_views(part, method=options.method, temperature=temperature)
        for part, temperature in zip(logits, fitted.temperatures, strict=True)
    ]
    mixed = averaging.combine(scores, fitted.weights, method=options.method, absent=aligned.absent)
    first = files[0]

    for file, weight, temperature, part in zip(files, fitted.weights, fitted.temperatures, logits, strict=True):
        heated = f"  temperature {temperature:.3f}" if options.temperature_from else ""
        print(f"{file.path}  {options.method} of {part.shape[1]} views  weight {weight:.3f}{heated}")
    if len(files) > 1 and fitted.how:
        print(f"weights {fitted.how}")
    found = None
    if (labels >= 0).any():
        found = evaluation.evaluate(mixed, labels, first.classes, first.sources)
        if len(files) > 1:
            _print_singles(files, scores, labels)
        if not options.no_table:
            _print_table(files, logits, labels, fitted, options.method)
        print("\n".join(evaluation.lines(found)))
    if options.out:
        _write(Path(options.out), options, first, mixed, fitted, found)
        print(f"written to {options.out}")
    return 0


def _data(file: Views) -> str:
    return str(file.about.get("fingerprint", {}).get("data"))


def _fit(options: Namespace, files: Sequence[Views]) -> Fitted:
    """Weights and temperatures, from the command line or from validation."""
    chosen = [name for name in ("weights", "greedy", "fit") if getattr(options, name)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} both set the weights: give one of them")
    how: dict[str, Any] = {"method": options.method, "subset": options.subset}
    temperatures = [1.0] * len(files)
    if options.temperature_from:
        temperatures = ensemble.fit_temperatures(_validation_files(options.temperature_from, files), **how)
    if options.greedy or options.fit:
        validation = _validation_files(options.greedy or options.fit, files)
        weights, text = ensemble.choose_weights(validation, temperatures, greedy=bool(options.greedy), **how)
        return Fitted(weights=weights, temperatures=temperatures, how=text)
    given = _numbers(options.weights) if options.weights else [1.0] * len(files)
    weights = averaging.row_weights(given, len(files), 1)[:, 0]
    return Fitted(weights=weights, temperatures=temperatures, how="")


def _validation_files(paths: Sequence[str], files: Sequence[Views]) -> list[Views]:
    """The validation files, checked: one for each scored file, of the same classes, with labels."""
    if len(paths) != len(files):
        raise UserError(f"{len(paths)} validation files for {len(files)} scored ones: give one each, in the same order")
    read = [read_views(path) for path in paths]
    for file, scored in zip(read, files, strict=True):
        if sorted(file.classes) != sorted(scored.classes):
            raise UserError(f"{file.path} has other classes than {scored.path}")
        if not file.labelled:
            raise UserError(f"{file.path} has no labels: validation needs a labelled data set")
        if file.about.get("weights") != scored.about.get("weights"):
            print(f"note: {file.path} and {scored.path} are of different weights", file=sys.stderr)
    return read


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--weights {text}: expected numbers with commas, as 2,1,1") from None


def _print_singles(files: Sequence[Views], scores: Sequence[np.ndarray], labels: np.ndarray) -> None:
    known = labels >= 0
    print("each alone")
    for file, part in zip(files, scores, strict=True):
        print(f"  {averaging.top1(part[known], labels[known]):.4f}  {file.path}")


def _print_table(
    files: Sequence[Views], logits: Sequence[np.ndarray], labels: np.ndarray, fitted: Fitted, method: averaging.Method
) -> None:
    """Accuracy against the number of views, of every file."""
    known = labels >= 0
    for file, part, temperature in zip(files, logits, fitted.temperatures, strict=True):
        if part.shape[1] < 2:
            continue
        print(f"views   top-1   lowest  highest  of subsets of that size{f'  {file.path}' if len(files) > 1 else ''}")
        rows = averaging.views_table(part[known], labels[known], method=method, temperature=temperature)
        for number, mean, low, high in rows:
            print(f"{number:>5}   {mean:.4f}  {low:.4f}  {high:.4f}")


def _write(
    out: Path,
    options: Namespace,
    first: Views,
    mixed: np.ndarray,
    fitted: Fitted,
    found: evaluation.Evaluation | None,
) -> None:
    numbers = mixed.argmax(axis=1).tolist()
    answers = [str(n) if options.answer == "index" else first.classes[n] for n in numbers]
    with whole_folder(out) as folder:
        submission.write_submission(
            folder / "submission.csv", first.ids, answers, sample=options.sample, scores=mixed, classes=first.classes
        )
        write_text(folder / "scores.csv", submission.scores_text(first.ids, mixed, first.classes))
        about = {
            "files": [str(path) for path in options.views],
            "method": options.method,
            "weights": fitted.weights.tolist(),
            "temperatures": fitted.temperatures,
            "subset": options.subset,
        }
        write_json(folder / "ensemble.json", about)
        if found is not None:
            evaluation.write_evaluation(folder, found)
