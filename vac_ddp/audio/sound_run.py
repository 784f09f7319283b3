"""A classifier of the videos' sound: trained, written, and its predictions as logits files for `vac score`.

OUT/audio.pt, OUT/val/views.npz and, with a test folder, OUT/test/views.npz. A video without sound counts as failed, so
that the picture alone decides. The weights are those of the last epoch: nothing is chosen on the validation part, which
stays good for fitting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vac_ddp.audio import spectrogram
from vac_ddp.audio.sound_training import Schedule, predict_sounds, train_model
from vac_ddp.audio.sounds import Sounds
from vac_ddp.audio.spectrogram import SoundModel, SoundSettings
from vac_ddp.data.data_kind import kind_of
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.split import Split, make_split, read_split
from vac_ddp.errors import UserError
from vac_ddp.files import sha256, write_atomic
from vac_ddp.report.run_reader import read_classes
from vac_ddp.results import averaging, evaluation
from vac_ddp.results.logits_file import NAME as VIEWS
from vac_ddp.results.logits_file import read_views, write_views
from vac_ddp.runtime import distributed
from vac_ddp.settings import Config
from vac_ddp.version import VERSION

WEIGHTS = "audio.pt"
NAMED = 5


@dataclass(frozen=True, kw_only=True)
class SoundOptions:
    """What to train on, predict and write. run: a run of the picture, whose split and classes are taken."""

    data: str
    out: Path
    run: Path | None
    test: str | None
    sound: SoundSettings
    schedule: Schedule
    windows: int  # of a scored video, spread over it
    overwrite: bool


def train_and_predict(options: SoundOptions, config: Config, log: Callable[[str], None]) -> list[str]:
    """Train on the sounds of `options.data`, write weights and logits files. Returns a line for every damaged sound.

    Raises UserError where OUT holds a classifier already, or fewer than two classes have sound.
    """
    out = options.out
    if (out / WEIGHTS).exists() and not options.overwrite:
        raise UserError(f"{out} holds a classifier already: --overwrite throws it away, or give another --out")
    index, val_index, split = _read_data(options, config)
    for note in [*index.notes, *split.notes]:
        log(note)
    sounds = Sounds(index)
    train = np.array([video for video in split.train.tolist() if sounds.lengths[video]], np.int64)
    log(f"{len(train)} of {len(split.train)} training videos have sound")
    if len(np.unique(index.labels[train])) < 2:
        raise UserError(_too_few(index, sounds))
    model = SoundModel(options.sound, len(index.classes), seed=config.seed).to(distributed.pick_device())
    train_model(model, sounds, train, options.schedule, seed=config.seed, log=log)
    settings = dataclasses.asdict(options.sound)
    content = {
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
        "classes": list(index.classes),
        "settings": settings,
    }
    write_atomic(out / WEIGHTS, lambda stream: torch.save(content, stream))
    about = {"weights": sha256(out / WEIGHTS), "settings": settings}
    about |= {"versions": {"vac_ddp": VERSION, "torch": torch.__version__}}
    counts = np.bincount(index.labels[split.train], minlength=len(index.classes))
    read = [sounds]
    for name, part, groups in _parts(index, val_index, split, options, config):
        own = sounds if part is index else Sounds(part)
        read += [] if own is sounds else [own]
        videos = split.val if part is index else np.arange(len(part), dtype=np.int64)
        head, logits = predict_sounds(
            model, own, videos, groups, counts, classes=list(index.classes), windows=options.windows
        )
        head.about |= about
        write_views(out / name / VIEWS, head, [logits])
        _log_figures(out / name, log)
    return [line for some in read for line in some.damaged]


def _too_few(index: Index, sounds: Sounds) -> str:
    """Why fewer than two classes have sound: sounds that cannot be used, or that there are none."""
    few = f"fewer than two classes of {index.root} have sound that can be used"
    if sounds.damaged:
        some = "; ".join(sounds.damaged[:NAMED])
        return f"{len(sounds.damaged)} of {len(index)} sounds cannot be used, and so {few}: {some}"
    return f"{few}: `vac extract --audio` writes {spectrogram.NAME}"


def _read_data(options: SoundOptions, config: Config) -> tuple[Index, Index, Split]:
    """Training and validation videos and their split: that of the run, or one of its own."""
    run = options.run
    classes = read_classes(run) if run else None
    index = open_index(options.data, labelled=True, settings=config.data, classes=classes)
    if index.packed is not None:
        raise UserError(f"{options.data} is a packed set, which holds no sound: give the folder it was made of")
    split = read_split(run / "split.csv", index) if run else make_split(index, config.data, seed=config.seed)
    val_index = index
    if config.data.val:
        val_index = open_index(config.data.val, labelled=True, settings=config.data, classes=index.classes)
    return index, val_index, split


def _parts(
    index: Index, val_index: Index, split: Split, options: SoundOptions, config: Config
) -> list[tuple[str, Index, list[str] | None]]:
    """What is predicted: name, videos, and their sources where known. The validation part is `index` or another one."""
    parts: list[tuple[str, Index, list[str] | None]] = []
    if val_index is not index:
        parts.append(("val", val_index, None))
    elif len(split.val):
        parts.append(("val", index, [split.groups[video] for video in split.val.tolist()]))
    if options.test:
        labelled = kind_of(Path(options.test).expanduser()) == "labelled"
        classes = index.classes if labelled else None
        parts.append(("test", open_index(options.test, labelled=labelled, settings=config.data, classes=classes), None))
    return parts


def _log_figures(folder: Path, log: Callable[[str], None]) -> None:
    views = read_views(folder)
    heard = len(views.ids) - int(views.failed.sum())
    log(f"\n{views.path}: {heard} of {len(views.ids)} videos with sound")
    if views.labelled:
        found = evaluation.evaluate(
            averaging.average_views(views.logits, method=averaging.method_for([views])),
            views.labels,
            views.classes,
            views.sources,
        )
        log("\n".join(evaluation.lines(found)))
