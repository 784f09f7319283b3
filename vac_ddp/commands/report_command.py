"""`vac report RUN`: write RUN/report.html, one file with everything a run has to show."""

from __future__ import annotations

from pathlib import Path

from vac_ddp.arguments import ArgumentParser
from vac_ddp.errors import Findings, UserError
from vac_ddp.files import sha256
from vac_ddp.report.page import read_split, write_report
from vac_ddp.results.logits_file import NAME, Views, read_views

ABOUT = "Write RUN/report.html, one file with everything a run has to show."


def main(argv: list[str]) -> int:
    """Gather what the run left, predict its validation part where that is missing, and write the page."""
    parser = ArgumentParser(prog="vac report", description=ABOUT)
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
    if not any(row[3] == "val" for row in read_split(run)):
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
