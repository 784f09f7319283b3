"""`vac audio DATA --out DIR`: train a classifier of the videos' sound, and write its views files for `vac score`.

OUT/audio.pt, OUT/val/views.npz and, with --test, OUT/test/views.npz. Picture and sound are put together by
`vac score VIDEO/test OUT/test --fit VIDEO/val OUT/val --temperature-from VIDEO/val OUT/val`: without temperatures the
less confident of two models drowns.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from vac_ddp import config as settings_io
from vac_ddp.arguments import ArgumentParser, number
from vac_ddp.checks import check_bounds
from vac_ddp.errors import Findings, UserError
from vac_ddp.settings import Config

if TYPE_CHECKING:
    from vac_ddp.audio.sound_run import SoundOptions


def main(argv: list[str]) -> int:
    """Read the sounds, train, write weights and views files. Raises UserError, and Findings for damaged sounds."""
    options, config = _parse(argv)
    from vac_ddp.audio.sound_run import NAMED, train_and_predict

    damaged = train_and_predict(options, config, functools.partial(print, flush=True))
    if damaged:
        raise Findings(f"{len(damaged)} sounds cannot be used: {'; '.join(damaged[:NAMED])}")
    return 0


def _parse(argv: list[str]) -> tuple[SoundOptions, Config]:
    parser = ArgumentParser(
        prog="vac audio",
        description="Train a classifier of log-mel spectrograms, and predict with it.",
        epilog="seed=N and data.name=value change the settings of the data, as for vac train.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="the training folder, with an audio.wav beside the frames of a video")
    add("--out", required=True, metavar="DIR", help="where the weights and the views files go")
    add("--run", metavar="DIR", help="a run of the picture: its split.csv, classes, seed and data settings")
    add("--test", metavar="DIR", help="a test folder to predict, labelled or not")
    add("--backbone", default="resnet18", help="timm image model (default: resnet18)")
    add("--pretrained", action="store_true", help="begin with timm's weights for pictures")
    add("--epochs", type=number(int, low=1, high=10**6), default=30)
    add("--batch", type=number(int, low=1, high=10**6), default=32, help="sounds of a step (default: 32)")
    add("--lr", type=number(float, above=0, high=10), default=1e-3, help="peak learning rate of AdamW (default: 0.001)")
    add("--seconds", type=number(float, above=0, high=3600), default=4.0, help="length of a window (default: 4)")
    add("--mels", type=number(int, low=1, high=1024), default=64, help="bands of a spectrogram (default: 64)")
    add(
        "--windows",
        type=number(int, low=1, high=1000),
        default=3,
        help="windows of a scored video, spread over it (default: 3)",
    )
    add("--overwrite", action="store_true", help="overwrite what is in --out")
    given, words = parser.parse_known_args(argv)
    run = Path(given.run).expanduser() if given.run else None
    config = settings_io.read_yaml(run / "config.yaml") if run else Config()
    for word in words:
        if not word.startswith(("data.", "seed=")) or "=" not in word:
            raise UserError(f"unknown argument {word} (see --help)")
        settings_io.override(config, word)
    check_bounds(config, ("data.", "seed"))
    from vac_ddp.audio.sound_run import SoundOptions  # torch: only once the arguments are good
    from vac_ddp.audio.sound_training import Schedule
    from vac_ddp.audio.spectrogram import SoundSettings

    options = SoundOptions(
        data=given.data,
        out=Path(given.out).expanduser(),
        run=run,
        test=given.test,
        sound=SoundSettings(
            seconds=given.seconds, mels=given.mels, backbone=given.backbone, pretrained=given.pretrained
        ),
        schedule=Schedule(epochs=given.epochs, batch=given.batch, lr=given.lr),
        windows=given.windows,
        overwrite=given.overwrite,
    )
    return options, config
