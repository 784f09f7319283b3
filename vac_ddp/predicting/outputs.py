"""Results of a prediction: the check before it, and the files and lines after it."""

from __future__ import annotations

from pathlib import Path

from vac_ddp.files import write_text
from vac_ddp.results import averaging, evaluation, submission
from vac_ddp.results.logits_file import read_views
from vac_ddp.runtime.ranks import say
from vac_ddp.settings import Config


def check_submission(ids: list[str], classes: list[str], config: Config, sample: str | None) -> None:
    """Raise UserError, before anything is computed, where these videos cannot make a right submission."""
    answers = [""] * len(ids)
    if sample is None:
        submission.submission_text(ids, answers)
        return
    text = submission.read_sample(sample)
    submission.submission_after(text, ids, answers, where=sample, classes=classes)
    note = submission.sample_note(text, classes, sample) if config.predict.answer == "name" else None
    if note:
        say(note)


def write_results(out: Path, config: Config, sample: str | None) -> list[str]:
    """From the views file to the results, on rank 0; returns the names of the videos that got the class prior."""
    views = read_views(out)
    scores = averaging.average_views(views.logits, method=config.predict.average)
    numbers = scores.argmax(axis=1).tolist()
    index = config.predict.answer == "index"
    answers = [str(number) if index else views.classes[number] for number in numbers]
    submission.write_submission(
        out / "submission.csv", views.ids, answers, sample=sample, scores=scores, classes=views.classes
    )
    write_text(out / "scores.csv", submission.scores_text(views.ids, scores, views.classes))
    if views.labelled:
        found = evaluation.evaluate(scores, views.labels, views.classes, views.sources)
        evaluation.write_evaluation(out, found)
        for line in evaluation.lines(found):
            say(line)
    say(f"submission   {out / 'submission.csv'}")
    say(f"views        {views.path} (vac score reads it)")
    return [name for name, failed in zip(views.ids, views.failed.tolist(), strict=True) if failed]
