"""What surrounds a training: run directory, lock, log, services and the request to stop; closed in good order."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.data.loader import Loader
from vac_ddp.errors import Interrupted, exit_status
from vac_ddp.report.tracker import Tracker
from vac_ddp.runtime import distributed
from vac_ddp.runtime.exit_status import report
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.signals import StopRequest, end_of_allocation, save_by
from vac_ddp.settings import Config
from vac_ddp.training import run_directory
from vac_ddp.training.resuming import Resumed

# Left in the run directory by a run that was stopped and saved: scripts requeue by it, not by torchrun's status.
INTERRUPTED = "interrupted.json"


@dataclass(kw_only=True)
class Session:
    """An open run directory. `run` is on rank 0 only; `loaders` are closed with the session."""

    folder: Path
    run: run_directory.OpenRun | None
    resumed: Resumed
    tracker: Tracker
    stop: StopRequest
    loaders: list[Loader] = field(default_factory=list)

    def begin(self) -> None:
        """The run is built and starts: what it replaces is not brought back, and signals save from here on."""
        if self.run is not None:
            self.run.begin(self.tracker.say)
            (self.folder / INTERRUPTED).unlink(missing_ok=True)
            self.run.state = self.resumed.state = None  # it is in model and optimizer now
        self.stop.install()


@contextlib.contextmanager
def open_session(config: Config, *, debug: bool = False, notes: Sequence[str] = ()) -> Iterator[Session]:
    """Open the run directory of the settings and close everything whether it went well or not.

    debug: mark it as a debug run, and replace one; notes: lines about the settings, for the log.
    """
    folder, stop = Path(config.run.dir), StopRequest(distributed.broadcast_object(_deadline(config)))
    run: run_directory.OpenRun | None = None
    tracker: Tracker | None = None
    loaders: list[Loader] = []
    try:
        lines = list(notes)
        run = distributed.main_first(
            lambda: run_directory.open_run(config.run, settings_io.to_dict(config), lines.append, debug=debug),
            lambda: None,
        )
        tracker = Tracker(folder, config.log, rank=distributed.rank())
        for line in lines:
            tracker.say(line)
        facts = distributed.broadcast_object(run.facts if run is not None else None)
        resumed = Resumed(
            state=run.state if run is not None else None, facts=facts, source=run.source if run is not None else None
        )
        yield Session(folder=folder, run=run, resumed=resumed, tracker=tracker, stop=stop, loaders=loaders)
    except Interrupted as error:
        if distributed.is_main():
            files.write_json(folder / INTERRUPTED, {"step": error.step, "why": str(error)})
        error.run = str(folder)
        raise
    except (Exception, KeyboardInterrupt) as error:
        report(error)  # before files and services are closed: other ranks may wait for this one
        raise
    finally:
        PROCESS.release()
        for loader in loaders:
            loader.close()
        if tracker is not None:
            tracker.close(exit_status(sys.exc_info()[1]))
        if run is not None:
            run.discard()
            run.lock.release()
        stop.restore()


def _deadline(config: Config) -> float | None:
    """When to save because the SLURM job is about to end, in time.time() seconds; asked on rank 0 only."""
    if not distributed.is_main():
        return None
    return save_by(end_of_allocation(), config.checkpoint.before_end_s, now=time.time())
