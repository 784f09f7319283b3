"""Predict: `vac predict [--nproc N] --run DIR --data DIR [--out DIR] [group.name=value ...]`, or under torchrun.

The torchrun of Python before 3.12.8 takes `--run` for its own `--run-path` and ends. There write
`torchrun ... -m vac_ddp.predict -- --run DIR`, or `run.dir=DIR`, which means the same.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vac_ddp.runtime.monitor import end_imports_quietly

    end_imports_quietly()

import sys
import time
from pathlib import Path
from typing import Any

from vac_ddp import config as settings_io
from vac_ddp.arguments import change_settings, parse_prediction, take_nproc
from vac_ddp.checks import OF_A_RUN
from vac_ddp.data.data_kind import kind_of
from vac_ddp.errors import UserError
from vac_ddp.results import submission
from vac_ddp.runtime.exit_status import run_command, run_entry_point
from vac_ddp.runtime.torchrun import run_ranks


def predict(argv: list[str]) -> dict[str, Any] | None:
    """Parse, open, predict. Returns facts for the status file; raises Findings for videos without an answer."""
    options = parse_prediction(argv)
    kind = "labelled" if options.part or options.data is None else kind_of(options.data)
    if options.sample:
        submission.read_sample(options.sample)
    weights = _weights_file(options.weights)
    from vac_ddp.models.weight_files import open_own  # here and below: torch, only once the arguments are good
    from vac_ddp.predicting import prediction
    from vac_ddp.runtime import distributed
    from vac_ddp.runtime.signals import StopRequest, end_of_allocation, save_by

    source = open_own(weights)
    config = settings_io.from_dict(source.config or {}, where=str(weights))
    change_settings(config, options, allowed=OF_A_RUN, refusal="a prediction has the run's setting")
    data = options.data
    if data is None:
        data = Path((options.part == "val" and config.data.val) or config.data.train).expanduser()
    device = distributed.start(timeout_s=config.health.start_timeout_s)
    end = end_of_allocation() if distributed.is_main() else None
    end = distributed.broadcast_object(end)
    stop = StopRequest(save_by(end, config.checkpoint.before_end_s, now=time.time()))
    request = prediction.Request(
        data=data,
        config=config,
        source=source,
        part=options.part,
        out=options.out,
        sample=options.sample,
        overwrite=options.overwrite,
    )
    if kind in ("video file", "frames"):
        prediction.predict_one(request, device)
    else:
        prediction.predict_folder(request, device, labelled=kind == "labelled", stop=stop)
    return {"run": options.weights, "step": None}


def _weights_file(asked: str) -> Path:
    path = Path(asked).expanduser()
    if path.is_dir() and not any(path.glob("best_*.pt")):
        raise UserError(f"{path} has no best_<model>.pt: give a run that has been validated, or --weights FILE")
    return path


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit statuses are in `errors`."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--nproc" for word in argv):
        return run_command(_start_ranks, argv)
    return run_entry_point(predict, argv)


def _start_ranks(argv: list[str]) -> int:
    """Check what one process can check, then start the ranks."""
    ranks, rest = take_nproc(argv)
    options = parse_prediction(rest)
    if options.data is not None:
        kind_of(options.data)
    _weights_file(options.weights)
    return main(rest) if ranks == 1 else run_ranks("vac_ddp.predict", rest, ranks)


if __name__ == "__main__":
    sys.exit(main())
