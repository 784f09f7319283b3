"""Probe: `vac probe [--nproc N] [--config FILE] [group.name=value ...]`, or `torchrun ... -m vac_ddp.probe`.

A classifier on the features of a frozen encoder, as a run directory: all ranks embed the videos, rank 0 selects.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vac_ddp.runtime.monitor import end_imports_quietly

    end_imports_quietly()

import dataclasses
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vac_ddp import config as settings_io
from vac_ddp.arguments import parse_settings, take_nproc
from vac_ddp.errors import Interrupted, UserError
from vac_ddp.report.page import write_report
from vac_ddp.report.run_reader import differing, read_settings
from vac_ddp.results.features_file import Features, read_features
from vac_ddp.results.logits_file import Views, write_views
from vac_ddp.results.metrics import classification_metrics
from vac_ddp.runtime.exit_status import run_command, run_entry_point
from vac_ddp.runtime.torchrun import run_ranks
from vac_ddp.settings import Config
from vac_ddp.text import listed

if TYPE_CHECKING:
    import torch

    from vac_ddp.models import Loaded
    from vac_ddp.probing.selection import Selected
    from vac_ddp.training.data_setup import Data
    from vac_ddp.training.session import Session

ABOUT = "Select a classifier on the features of a frozen encoder, by nested cross-validation on grouped folds."
NAMED = 5
BEST = "best_probe.pt"
SELECTED = ("model.pooling", "model.statistics", "model.queries")  # settings that the selection makes


def probe(argv: list[str]) -> dict[str, Any] | None:
    """Parse, embed, select, write. Returns the run directory."""
    command = parse_settings(argv, program="vac_ddp.probe", about=ABOUT)
    config, folder = command.config, Path(command.config.run.dir)
    notes = _check(config)
    from vac_ddp.runtime import distributed  # here and below: torch, only once the settings are known to be good
    from vac_ddp.training import run_directory
    from vac_ddp.training.data_setup import debug_data
    from vac_ddp.training.session import open_session

    if command.debug:
        run_directory.check_debug(folder)
    device = distributed.start(timeout_s=config.health.start_timeout_s)
    if distributed.main_first(*2 * (lambda: _is_done(config, resumed=run_directory.restarted()),)):
        if distributed.is_main():
            print(f"{folder} holds this probe already\nnext          {_next(folder)}", flush=True)
        return {"run": config.run.dir, "step": 0}
    if command.debug:
        debug_data(config, command.given)
    with open_session(config, debug=command.debug, notes=[*command.notes, *notes]) as session:
        run_probe(config, session, device)
    return {"run": config.run.dir, "step": 0}


def _check(config: Config) -> list[str]:
    """UserError for settings of which no probe follows. Another model becomes its encoder: a line says so."""
    from vac_ddp.probing.selection import check_probes
    from vac_ddp.training.objective import check_settings

    name = config.model.name
    if name != "probe":
        config.model.encoder, config.model.name = name, "probe"
    check_settings(config)
    check_probes(config.probe)
    if config.run.resume not in ("auto", "none"):
        raise UserError(f"run.resume={config.run.resume}: a probe has no checkpoints; give run.resume=auto")
    return [] if name == "probe" else [f"model.name={name} is the encoder: model.name=probe model.encoder={name}"]


def _is_done(config: Config, *, resumed: bool) -> bool:
    """Whether run.dir holds this probe, finished, and is to be resumed. UserError where it has other settings.

    resumed: whether this is a later attempt of the same start.
    """
    folder = Path(config.run.dir)
    if not resumed and (config.run.resume == "none" or config.run.overwrite):
        return False
    if not all((folder / name).exists() for name in (BEST, "report.html", "config.yaml")):
        return False
    from vac_ddp.models.build import OF_ARCHITECTURE
    from vac_ddp.models.weight_files import is_own

    now = settings_io.flat(settings_io.to_dict(config))
    brought = config.model.weights is not None and is_own(config.model.weights)
    made = [f"model.{name}" for name in OF_ARCHITECTURE] if brought else SELECTED
    if changed := differing([read_settings(folder), now], besides=made):
        raise UserError(
            f"{folder} holds a probe with other settings ({listed(changed, NAMED)}): set another run.dir, or give "
            "run.overwrite=true to discard it"
        )
    return True


def _next(folder: Path) -> str:
    return f"vac predict --run {shlex.quote(str(folder))} --data data_test"


# ---------------------------------------------------------------- the run


@dataclass(kw_only=True)
class Embedded:
    """The features of the videos to train and to validate on (the same file but with data.val), and seconds it took."""

    train: Features
    val: Features
    seconds: float


def run_probe(config: Config, session: Session, device: torch.device) -> None:
    """Embed the videos, select a probe, and write the run; called by all ranks."""
    from vac_ddp.models.precision import precision_of
    from vac_ddp.runtime import distributed
    from vac_ddp.training.data_setup import read_data

    data = read_data(config, session.folder, resumed=False, say=session.tracker.say, keep_frames=False)
    given = _given_features(config, data, device)
    session.begin()
    session.stop.restore()  # an embedding takes the signals over for its own time
    features = _embed(config, session, device, data, given)
    session.stop.install()
    start = time.perf_counter()
    selected = _select(config, session, device, data, features.train)
    seconds = {"embedding": features.seconds, "selection": time.perf_counter() - start}
    precision = precision_of(config, distributed.weakest_gpu(device))

    def write() -> None:
        assert selected is not None, "rank 0 selects"
        _write(config, session, precision, data, features, selected, seconds)

    distributed.main_first(write, lambda: None)


def _given_features(config: Config, data: Data, device: torch.device) -> Features | None:
    """The features in probe.features, which are those that the settings would give; UserError where they are not."""
    from vac_ddp.predicting.embedding import Request, check_features

    if config.probe.features is None:
        return None
    features, root = read_features(config.probe.features), Path(config.data.train).expanduser()
    check_features(features, Request(data=root, config=config, out=root), data.index, device)
    return features


def _embed(config: Config, session: Session, device: torch.device, data: Data, given: Features | None) -> Embedded:
    """The features of all videos: those that were given, else embedded into the run directory."""
    from vac_ddp.predicting.embedding import Request, embed_folder

    start = time.perf_counter()

    def embedded(root: Path) -> Features:
        out = session.folder / "features" / root.resolve().name
        remedy = "another run.dir, or run.overwrite=true"
        request = Request(data=root, config=config, out=out, steps=True, remedy=remedy)
        embed_folder(request, device, labelled=True, stop=session.stop)
        return read_features(out)

    train = embedded(Path(config.data.train).expanduser()) if given is None else given
    val = embedded(Path(config.data.val).expanduser()) if config.data.val else train
    for features, index in ((train, data.index), (val, data.val_index)):
        if features.ids != list(index.names):
            raise UserError(
                f"{features.path} is not of the videos of {index.root}: start again with run.overwrite=true"
            )
    shape = (train.pooled if train.steps is None else train.steps).shape
    session.tracker.note(f"features      {train.path} ({' x '.join(map(str, shape))})")
    return Embedded(train=train, val=val, seconds=time.perf_counter() - start)


def _select(config: Config, session: Session, device: torch.device, data: Data, features: Features) -> Selected | None:
    """The selected probe, on rank 0. All ranks exchange stop requests before every fit, so that none waits longer.

    Raises Interrupted on all ranks where one was asked to stop.
    """
    from vac_ddp.probing.selection import select_probe, table_lines
    from vac_ddp.runtime import distributed
    from vac_ddp.runtime.monitor import PROCESS
    from vac_ddp.runtime.signals import signal_name

    def meet(*, fitting: bool) -> bool:
        PROCESS.progress()
        said = distributed.all_gather_objects((fitting, session.stop.wanted()))
        number = max(number for _, number in said)
        if number and said[0][0]:
            raise Interrupted(
                f"stopped by {signal_name(number)} while probes were selected; the features are saved: start the same "
                "command with run.resume=auto",
                step=0,
            )
        return bool(said[0][0])

    def tick() -> None:
        meet(fitting=True)

    videos = _usable(features, data.split.train, session)
    if not distributed.is_main():
        while meet(fitting=True):
            pass
        distributed.raise_together(None)
        return None
    selected, error = None, None
    try:
        selected = select_probe(
            features,
            config.probe,
            queries=config.model.queries,
            seed=config.seed,
            videos=videos,
            groups=data.split.groups,
            device=device,
            tick=tick,
        )
    except Interrupted:
        raise
    except Exception as caught:
        error = caught
    meet(fitting=False)
    distributed.raise_together(error)
    assert selected is not None, "an error was raised"
    for line in table_lines(selected):
        session.tracker.say(line, fit=False)
    return selected


def _usable(features: Features, videos: np.ndarray, session: Session) -> np.ndarray:
    """The numbers of those `videos` that have features; the others are named in the log."""
    failed = [features.ids[video] for video in videos[features.failed[videos]].tolist()]
    if failed:
        session.tracker.say(f"{len(failed)} videos without features are left out: {listed(failed, NAMED)}")
    return videos[~features.failed[videos]]


# ---------------------------------------------------------------- its files


def _write(
    config: Config,
    session: Session,
    precision: str,
    data: Data,
    features: Embedded,
    selected: Selected,
    seconds: dict[str, float],
) -> None:
    """Write what a run directory has, on rank 0, the weights and the report last, and say what is where."""
    from vac_ddp.probing.probe_model import make_model, pooling_settings
    from vac_ddp.training import checkpoint, discarded_runs, run_files
    from vac_ddp.training.best_weights import BestFile
    from vac_ddp.version import VERSION

    folder, say = session.folder, session.tracker.say
    about = f"{selected.candidate.probe} {selected.candidate}, fitted on {len(selected.videos)} videos"
    loaded = make_model(config, selected.head, data.classes, about)
    of_weights = {name: value for name, (_, value) in loaded.replaced.items()}  # as a run says in model.weights
    config.model = pooling_settings(selected.head, dataclasses.replace(config.model, **of_weights))
    for line in loaded.report.lines():
        say(line)
    session.tracker.connect(settings_io.to_dict(config), folder.name, None)
    validated = _usable(features.val, data.split.val, session)
    views = _views(config, data, features, selected, loaded, validated)
    write_views(folder / run_files.VALIDATION, views, [views.logits])
    figures = classification_metrics(views.logits.mean(axis=1), views.labels, data.classes).figures()
    _write_metrics(session, selected, figures, seconds)
    architecture = loaded.architecture
    facts = {
        **checkpoint.environment_facts(),
        "architecture": architecture,
        "precision": precision,
        "vac_ddp": VERSION,
    }
    run_files.write_metadata(config, loaded.report, data.classes, facts, None)
    best = BestFile(folder / BEST)
    best.offer(
        run_files.best_content(config, data, loaded.model, figures, architecture=architecture, precision=precision),
        0,
    )
    best.write()
    session.tracker.artifact(best.path)
    for line in discarded_runs.remove(session.run.discarded if session.run is not None else []):
        say(line)
    nested = f"{selected.nested.accuracy:.4f} ± {selected.nested.error:.4f}"
    say(f"accuracy      {nested} of outer folds, not used for the selection (± SE over {selected.groups} groups)")
    if len(data.split.val):
        say(f"              {figures['top1']:.4f} of the {len(views.ids)} videos of the validation split")
    say(f"best weights  {best.path}")
    say(f"log, figures  {folder / 'log.txt'}, {folder / 'metrics.jsonl'}, {folder / run_files.VALIDATION}")
    write_report(folder, views, folder / "report.html", index=data.val_index)
    say(f"report        {folder / 'report.html'}")
    say(f"next          {_next(folder)}", fit=False)


def _views(
    config: Config, data: Data, features: Embedded, selected: Selected, loaded: Loaded, validated: np.ndarray
) -> Views:
    """Logits of videos that were not fitted: of the `validated` ones, or of outer folds without a validation split."""
    from vac_ddp.probing.probe_model import view_logits

    if len(data.split.val):
        source, videos = features.val, validated
        logits = view_logits(loaded.model, source, videos)
        groups = source.groups if config.data.val else data.split.groups
        about: dict[str, Any] = {"epoch": 0, "averaged": len(source.views)}
    else:
        source, videos, groups = features.train, selected.videos, data.split.groups
        logits = selected.logits[:, None]
        about = {"epoch": 0, "averaged": len(source.views), "folds": config.probe.folds}
    return Views(
        logits=logits,
        ids=[source.ids[video] for video in videos.tolist()],
        classes=list(data.classes),
        views=source.views[: logits.shape[1]],
        labels=source.labels[videos],
        sources=[groups[video] for video in videos.tolist()],
        damaged=source.damaged[videos],
        failed=source.failed[videos],
        about=about,
    )


def _write_metrics(session: Session, selected: Selected, figures: dict[str, float], seconds: dict[str, float]) -> None:
    """A line of metrics.jsonl for every probe of the table, one for the selection, one for the time it took."""
    for row in selected.table:
        session.tracker.write("probe", 0, **asdict(row))
    session.tracker.write(
        "selected",
        0,
        **{**asdict(selected.nested), "probe": selected.candidate.probe},
        temperature=selected.temperature,
        epoch=0,
        val_top1=figures["top1"],
        val_loss=figures["loss"],
    )
    session.tracker.write("speed", 0, **seconds)


# ---------------------------------------------------------------- the program


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit statuses are in `errors`."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--nproc" for word in argv):
        return run_command(_start_ranks, argv)
    return run_entry_point(probe, argv)


def _start_ranks(argv: list[str]) -> int:
    """Check what one process can check, then start the ranks."""
    ranks, rest = take_nproc(argv)
    if ranks == 1 or "--debug" in rest or {"-h", "--help", "--print-config"} & set(rest):
        return main(rest)
    from vac_ddp.data.index import open_index

    config = parse_settings(rest).config
    _check(config)
    open_index(config.data.train, labelled=True, settings=config.data)
    return run_ranks("vac_ddp.probe", rest, ranks)


if __name__ == "__main__":
    sys.exit(main())
