"""Trains as `python -m vac_ddp.train` does, and holds rank 0 before given steps until the run is asked to stop.

HOLD_AT: steps with commas, HOLD_MARK: a file name. At each of the steps, once in all attempts, rank 0 writes
`MARK.<step>` and waits for a wish to stop (a signal, the end of the job) or for `MARK.<step>.go`: what disturbs the run
comes from outside, at a known place, and however slow the machine is.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from vac_ddp import train
from vac_ddp.runtime import distributed, signals
from vac_ddp.training import step

STEPS = [int(word) for word in os.environ.get("HOLD_AT", "").split(",") if word]
MARK = os.environ.get("HOLD_MARK", "")
LONGEST_S = 240.0


def arm() -> None:
    """Wrap the step and the request to stop."""
    requests: list[signals.StopRequest] = []
    install, run = signals.StopRequest.install, step.Stepper.run

    def installed(self: signals.StopRequest) -> None:
        requests.append(self)
        install(self)

    def held(self: step.Stepper, batches: Any, **named: Any) -> None:
        mark = Path(f"{MARK}.{named['step']}")
        if named["step"] in STEPS and distributed.is_main() and not mark.exists():
            mark.touch()
            end = time.monotonic() + LONGEST_S
            go = mark.with_name(f"{mark.name}.go")
            while not (requests[-1].wanted() or go.exists()):
                if time.monotonic() > end:
                    raise RuntimeError(f"held at step {named['step']} and nobody came")
                time.sleep(0.02)
        run(self, batches, **named)

    signals.StopRequest.install, step.Stepper.run = installed, held


if __name__ == "__main__":
    arm()
    sys.exit(train.main())
