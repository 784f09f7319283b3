"""Predict: `vac predict [--nproc N] --run DIR --data DIR [--out DIR] [group.name=value ...]`, or under torchrun.

The torchrun of Python before 3.12.8 takes `--run` for its own `--run-path` and ends. There write
`torchrun ... -m vac_ddp.predict -- --run DIR`, or `run.dir=DIR`, which means the same.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vac_ddp.runtime.monitor import end_imports_quietly

    end_imports_quietly()

import os
import re
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vac_ddp import config as settings_io
from vac_ddp.arguments import PredictionOptions, parse_prediction, take_nproc
from vac_ddp.checks import check_prediction
from vac_ddp.errors import Findings, UserError
from vac_ddp.results import averaging, submission
from vac_ddp.results.logits_file import read_views
from vac_ddp.results.metrics import log_softmax
from vac_ddp.runtime import distributed
from vac_ddp.runtime.exit_status import run_door
from vac_ddp.runtime.monitor import PROCESS
from vac_ddp.runtime.torchrun import run_ranks
from vac_ddp.settings import Config

if TYPE_CHECKING:
    import torch

    from vac_ddp.models.weight_files import Source
    from vac_ddp.runtime.signals import StopRequest

CHANGEABLE = ("predict.", "data.", "clip.", "train.precision")
TOP = 5
NAMED = 5


def prediction_settings(saved: dict[str, Any], options: PredictionOptions, where: str) -> Config:
    """The run's settings with what the command line changes. UserError for a setting that means nothing here."""
    config = settings_io.from_dict(saved, where=where)
    if options.views:
        set_views(config, options.views)
    for word in options.words:
        settings_io.override(config, word)
        if not word.startswith(CHANGEABLE):
            raise UserError(f"{word}: a prediction has the run's setting; it can change {', '.join(CHANGEABLE)}")
    if options.debug:
        config.data.workers = 0
    check_prediction(config)
    return config


def set_views(config: Config, text: str) -> None:
    """Windows, crops and mirroring as in 5x3 or 2x3+flip."""
    match = re.fullmatch(r"([1-9][0-9]{0,2})x([13])(\+flip)?", text)
    if match is None:
        raise UserError(f"--views {text}: expected KxC with C 1 or 3, as 5x3 or 2x3+flip")
    views = config.predict.views
    views.windows, views.count, views.crops, views.flip = "spread", int(match[1]), int(match[2]), bool(match[3])


Kind = Literal["video file", "frames", "test", "labelled"]


def kind_of(data: Path) -> Kind:
    """What --data names, by a first look."""
    from vac_ddp.data.pack import is_pack, read_facts
    from vac_ddp.data.scan import IMAGE_SUFFIXES, looks_labelled
    from vac_ddp.data.video_reader import SUFFIXES

    if not data.exists():
        raise UserError(f"no such data: {data} (expected a folder of videos, one video, a packed set, or a CSV)")
    if data.is_file() and data.suffix.lower() in SUFFIXES:
        return "video file"
    if is_pack(data):
        return "labelled" if read_facts(data)["labelled"] else "test"
    if data.is_dir():
        with os.scandir(data) as entries:
            own = [e.name for e in entries if not e.name.startswith(".") and e.name.lower().endswith(IMAGE_SUFFIXES)]
            if own:
                return "frames"
    return "labelled" if looks_labelled(data) else "test"


# ---------------------------------------------------------------- the program


def predict(argv: list[str]) -> dict[str, Any] | None:
    """Parse, build, run, close. Returns facts for the status file; raises Findings for videos without an answer."""
    options = parse_prediction(argv)
    kind = "labelled" if options.part or options.data is None else kind_of(options.data)
    if options.sample:
        submission.read_sample(options.sample)
    weights = _weights_file(options.weights)
    from vac_ddp.models.weight_files import open_own
    from vac_ddp.runtime.signals import StopRequest, end_of_allocation, save_by

    source = open_own(weights)
    config = prediction_settings(source.config or {}, options, str(weights))
    if options.data is None:
        own_val = options.part == "val" and config.data.val
        options.data = Path(config.data.val if own_val else config.data.train).expanduser()
    device = distributed.start(timeout_s=config.health.start_timeout_s)
    end = end_of_allocation() if distributed.is_main() else None
    end = distributed.broadcast_object(end)
    stop = StopRequest(save_by(end, config.checkpoint.before_end_s, now=time.time()))
    if kind in ("video file", "frames"):
        _predict_one(options, config, source, device, kind)
    else:
        _predict_folder(options, config, source, device, labelled=kind == "labelled", stop=stop)
    return {"run": options.weights, "step": None}


def _weights_file(asked: str) -> Path:
    path = Path(asked).expanduser()
    if path.is_dir() and not any(path.glob("best_*.pt")):
        raise UserError(f"{path} has no best_<model>.pt: give a run that has been validated, or --weights FILE")
    return path


def _predict_folder(
    options: PredictionOptions,
    config: Config,
    source: Source,
    device: torch.device,
    *,
    labelled: bool,
    stop: StopRequest,
) -> None:
    """A folder of videos: views file, submission, scores, and the evaluation where there are labels."""
    from vac_ddp.predicting import prediction

    assert options.data is not None
    name = options.part or options.data.resolve().name
    out = options.out or source.path.parent / "predictions" / name
    with prediction.locked(out):
        index = prediction.read_index(options.data, config, source, out, labelled=labelled)
        for note in index.notes:
            prediction.say(note)
        sources = None
        if options.part:
            index, sources = prediction.part_of(index, source.path.parent, config, options.part)
        task = prediction.make_task(config, source, index, device, sources=sources)
        head = task.head
        distributed.main_first(lambda: prediction.gate(head.ids, head.classes, config, options.sample), lambda: None)
        scorer = prediction.open_scorer(config, source, device)
        stop.install()
        PROCESS.watch(config.health.start_timeout_s)
        try:
            done = prediction.score(task, config, scorer, index, out, overwrite=options.overwrite, stop=stop.wanted)
        finally:
            stop.restore()
        prediction.say_how(done, task)
        failed = distributed.main_first(lambda: prediction.finish(out, config, options.sample), list)
    failed = distributed.broadcast_object(failed)
    if failed:
        shown = ", ".join(failed[:NAMED]) + (", ..." if len(failed) > NAMED else "")
        raise Findings(
            f"{len(failed)} of {len(index)} videos have no frame that can be decoded, or no finite logits, and got the "
            f"class prior: {shown}"
        )


def _predict_one(options: PredictionOptions, config: Config, source: Source, device: torch.device, kind: Kind) -> None:
    """One video: its best classes are printed, and files are written only where --out says so."""
    from vac_ddp.predicting import prediction

    assert options.data is not None
    if distributed.world_size() > 1:
        raise UserError(f"{options.data} is one video: start `vac predict` without torchrun")
    with tempfile.TemporaryDirectory(prefix="vac_predict_") as scratch:
        root = Path(scratch) / "data"
        faults = prediction.lay_out(options.data, kind, root, short_side=2 * config.clip.size)
        config.data.cache, config.data.workers = scratch, 0
        out = options.out or Path(scratch) / "out"
        index = prediction.read_index(root, config, source, out, labelled=False)
        task = prediction.make_task(config, source, index, device)
        scorer = prediction.open_scorer(config, source, device)
        done = prediction.score(task, config, scorer, index, out, overwrite=options.overwrite, stop=lambda: 0)
        views = read_views(out)
        if views.failed[0]:
            raise UserError(f"{options.data}: {done.damage[0] if done.damage else 'no frame of it can be decoded'}")
        if options.out:
            prediction.finish(out, config, options.sample)
    shares = np.exp(log_softmax(averaging.average_views(views.logits, method=config.predict.average)[0]))
    for number in np.argsort(-shares, kind="stable")[:TOP].tolist():
        print(f"{shares[number]:.4f}  {views.classes[number]}")
    if faults:
        raise Findings(f"{options.data}: {'; '.join(faults)}; predicted from the frames that decode")


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit statuses are in `errors`."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--nproc" for word in argv):
        from vac_ddp.runtime.exit_status import run_command

        return run_command(_start_ranks, argv)
    return run_door(predict, argv)


def _start_ranks(argv: list[str]) -> int:
    """Check what one process can check, then start the ranks."""
    ranks, rest = take_nproc(argv)
    options = parse_prediction(rest)
    if options.data is not None:
        kind_of(options.data)
    _weights_file(options.weights)
    return main(rest) if ranks == 1 else run_ranks("vac_ddp.predict", rest, ranks)


class _Door(types.ModuleType):
    """A module that can also be called: `from vac_ddp import predict` means `api.predict` to a program of yours.

    The name is this module's, as `python -m vac_ddp.predict` is promised, and a function of the package of the same
    name would be gone as soon as anything imports the module.
    """

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from vac_ddp import api

        return api.predict(*arguments, **named)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Door
