"""The end of a run that is done: what is where, its report, and what to type next."""

from __future__ import annotations

import shlex

from vac_ddp.results.logits_file import read_views
from vac_ddp.runtime import distributed
from vac_ddp.training import run_files
from vac_ddp.training.trainer import Trainer


def finish(trainer: Trainer, *, report: bool = True) -> None:
    """Write the report, say what is where and what to type next."""
    folder, stopping, best = trainer.session.folder, trainer.stopping, trainer.saver.best.path
    tracker = trainer.tracker
    run_files.write_again(folder, trainer.metadata, tracker.say)
    tracker.artifact(best)
    if stopping.best is not None:
        tracker.say(f"best validation accuracy {stopping.best:.4f} after epoch {stopping.best_epoch}")
    tracker.say(f"best weights  {best}")
    tracker.say(f"log, figures  {folder / 'log.txt'}, {folder / 'metrics.jsonl'}")
    if report and distributed.is_main():
        _report(trainer)
    tracker.say(f"next          vac predict --run {shlex.quote(str(folder))} --data data_test", fit=False)


def _report(trainer: Trainer) -> None:
    """Write report.html. A run that is done is done: what goes wrong here is one line."""
    folder, tracker, index = trainer.session.folder, trainer.tracker, trainer.objective.data.val_index
    try:
        from vac_ddp.report.page import write_report
        from vac_ddp.report.pictures import show_pictures

        kept = folder / run_files.VALIDATION
        views = read_views(kept) if trainer.stopping.best is not None and kept.exists() else None
        if views is not None and views.about.get("epoch") != trainer.stopping.best_epoch:
            views = None
        write_report(folder, views, folder / "report.html", index=index)
        tracker.say(f"report        {folder / 'report.html'}")
        if views is not None and tracker.shows_pictures:
            show_pictures(tracker, views, index, trainer.position.step)
    except Exception as error:
        tracker.say(
            f"no report.html ({type(error).__name__}: {error}); vac report {shlex.quote(str(folder))} makes one"
        )
