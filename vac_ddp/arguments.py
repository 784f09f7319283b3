"""Arguments: the parser of all programs, the settings of a training, what a prediction or embedding is asked for."""

from __future__ import annotations

import argparse  # noqa: TID251 - the one place
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vac_ddp.checks import OF_A_RUN, check, check_prediction, leaves, short
from vac_ddp.config import find_config, one_rate, override, read_yaml, to_yaml
from vac_ddp.errors import UserError
from vac_ddp.settings import Bounds, Config
from vac_ddp.settings_help import short_help, unknown_word, with_preset

Namespace = argparse.Namespace


class ArgumentParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations; an error is a UserError of one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message} (see --help)")


def number(kind: type[int] | type[float], **bounds: float) -> Callable[[str], float]:
    """A `type=` for argparse: text to a number within bounds (see `settings.Bounds`)."""
    allowed = Bounds(**bounds)

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if (value := kind(text)) in allowed:
                return value
        raise argparse.ArgumentTypeError(f"expected {kind.__name__}, {allowed}; got {short(text)}")

    return read


def take_nproc(argv: list[str]) -> tuple[int, list[str]]:
    """The number of ranks (--nproc N, default: one a GPU, or one) and the other arguments."""
    for place, word in enumerate(argv):
        if word == "--nproc" or word.startswith("--nproc="):
            inside = "=" in word
            text = word.partition("=")[2] if inside else "".join(argv[place + 1 : place + 2])
            if not re.fullmatch("[1-9][0-9]{0,3}", text):
                raise UserError(f"--nproc {text or '(nothing)'}: a number of ranks from 1")
            return int(text), argv[:place] + argv[place + (1 if inside else 2) :]
    if {"-h", "--help", "--print-config"} & set(argv):
        return 1, argv  # answered before anything slow is imported
    import torch

    return max(1, torch.cuda.device_count()), argv


# ---------------------------------------------------------------- training


@dataclass(kw_only=True)
class CommandLine:
    """What was asked for: the settings, the flags that are no settings, and lines about what was ignored."""

    config: Config
    debug: bool
    given: list[str]
    notes: list[str]


def parse_settings(argv: list[str], *, program: str = "", about: str = "") -> CommandLine:
    """Settings of a training program from its arguments. Raises UserError; --help and --print-config end here."""
    parser = ArgumentParser(prog=program, add_help=False)
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    flags, words = parser.parse_known_args(argv)
    if flags.help:
        print(short_help(program, about, with_preset(flags.config)))
        raise SystemExit(0)
    for place, word in enumerate(words):
        if word.startswith("-") or "=" not in word:
            raise unknown_word(words, place, flags=["--config", "--debug", "--print-config", "--help", "--nproc"])
    config, notes = Config(), []
    if flags.config:
        path = find_config(flags.config)
        config = read_yaml(path)
        notes = _leave_out_overwrite(config, path)
    if flags.debug:
        config = read_yaml(find_config("debug"), config)
    one_rate(config, [name for name, _, value in (w.partition("=") for w in words) if value != "null"])
    for word in words:
        override(config, word)
    check(config)
    if flags.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return CommandLine(config=config, debug=flags.debug, given=words, notes=notes)


def _leave_out_overwrite(config: Config, path: Path) -> list[str]:
    """run.overwrite=true discards a run, so it counts where it was typed, not where a file brings it along.

    Returns a line where the file is the config.yaml of a run, which says how that run was started; else UserError.
    """
    if not config.run.overwrite:
        return []
    config.run.overwrite = False
    if path.name == "config.yaml" and (path.parent / "log.txt").exists():
        return [f"{path}: run.overwrite=true is how that run was started; it is ignored here"]
    raise UserError(f"{path}: run.overwrite=true counts only on the command line: remove it from the file")


# ---------------------------------------------------------------- prediction


@dataclass(kw_only=True)
class PredictionOptions:
    """What was asked of a prediction: `weights` is a run directory or a file, `words` are settings."""

    weights: str
    data: Path | None
    part: str | None
    out: Path | None
    sample: str | None
    views: str | None
    overwrite: bool
    debug: bool
    words: list[str]


def parse_prediction(argv: list[str]) -> PredictionOptions:
    """Read the command line; UserError in one line, --help ends here."""
    parser = ArgumentParser(
        prog="vac predict",
        usage="vac predict RUN DATA [options] [group.name=value ...]",
        description="Predict a test folder, evaluate a labelled one, or classify one video. RUN and DATA can also be "
        "given as --run and --data.",
        epilog="group.name=value changes the run's settings: "
        + ", ".join(name for name in leaves() if name.startswith("predict."))
        + ", data.workers, train.precision, clip.short_side and other settings of data and clip.",
    )
    add = parser.add_argument
    add("--run", metavar="RUN", help="a run directory: its best_<model>.pt is used")
    add("--weights", metavar="FILE", help="or a best_<model>.pt itself")
    add("--data", metavar="DIR", help="<video>/*.jpg, labelled <class>/<video>/*.jpg, CSV, packed set; or one video: "
        "a folder of frames or a video file")  # fmt: skip
    add("--part", choices=("train", "val"), help="instead: this part of the run's own data, by its split.csv")
    add("--out", metavar="DIR", help="where the results go (default: RUN/predictions/<name of the data folder>)")
    add("--sample", metavar="CSV", help="write submission.csv after the rows of this sample_submission.csv")
    add("--views", metavar="KxC", help="K windows over the video x C crops (5x3), with +flip also mirrored")
    add("--nproc", metavar="N", help="start N ranks on this machine (torchrun does it as well)")
    add("--overwrite", action="store_true", help="overwrite another prediction in --out")
    add("--debug", action="store_true", help="one process, no loader processes, plain tracebacks")
    flags, words = _flags_and_settings(parser, argv)
    words = _take_positional(flags, words, ("data",) if flags.weights else ("run", "data"))
    if (flags.run is None) == (flags.weights is None):
        raise UserError("give one of --run DIR and --weights FILE")
    if flags.data is None and flags.part is None:
        raise UserError("give --data DIR, or --part val for the run's own validation part (see --help)")
    return PredictionOptions(
        weights=flags.run or flags.weights,
        data=Path(flags.data).expanduser() if flags.data else None,
        part=flags.part,
        out=Path(flags.out).expanduser() if flags.out else None,
        sample=flags.sample,
        views=flags.views,
        overwrite=flags.overwrite,
        debug=flags.debug,
        words=words,
    )


def _flags_and_settings(parser: ArgumentParser, argv: list[str]) -> tuple[Namespace, list[str]]:
    """The flags, and the words that are settings; `run.dir=DIR` means --run, for the torchrun that takes `--run`."""
    flags, words = parser.parse_known_args(argv[argv[:1] == ["--"] :])
    for word in [word for word in words if word.startswith("run.dir=")]:
        flags.run = word.partition("=")[2]
        words.remove(word)
    for word in words:
        if word.startswith("-"):
            raise UserError(f"unknown argument {word} (see --help)")
    return flags, words


def _take_positional(flags: Namespace, words: list[str], names: tuple[str, ...]) -> list[str]:
    """Fill the flags `names` that were not given from the words that are not settings; returns the settings."""
    free = [name for name in names if getattr(flags, name) is None]
    settings = [word for word in words if "=" in word]
    for word in words:
        if "=" in word:
            continue
        if not free:
            raise UserError(f"unknown argument {word} (see --help)")
        setattr(flags, free.pop(0), word)
    return settings


def change_settings(
    config: Config, options: PredictionOptions | EmbeddingOptions, *, allowed: tuple[str, ...], refusal: str
) -> None:
    """Change settings as the words, --views and --debug of a prediction or embedding say, and check those it uses.

    UserError for a setting that does not begin with one of `allowed`; `refusal` says why.
    """
    from vac_ddp.scoring.views import set_views  # numpy, only once the arguments are good

    if options.views:
        set_views(config.predict.views, options.views)
    for word in options.words:
        override(config, word)
        if not word.startswith(allowed):
            raise UserError(f"{word}: {refusal}; it can change {', '.join(allowed)}")
    if options.debug:
        config.data.workers = 0
    check_prediction(config)


# ---------------------------------------------------------------- embedding

OF_AN_ENCODER = ("model.", "seed=", *OF_A_RUN)


@dataclass(kw_only=True)
class EmbeddingOptions:
    """What was asked of an embedding: `run` is a run directory or a file, or `config` names settings."""

    run: str | None
    config: str | None
    data: Path | None
    out: Path | None
    steps: bool
    dtype: str
    views: str | None
    overwrite: bool
    debug: bool
    words: list[str]


def parse_embedding(argv: list[str]) -> EmbeddingOptions:
    """Read the command line; UserError in one line, --help ends here."""
    parser = ArgumentParser(
        prog="vac embed",
        usage="vac embed RUN [DATA] [options] [group.name=value ...]\n"
        "       vac embed --config FILE|PRESET [DATA] --out DIR [options] [group.name=value ...]",
        description="Write the features that a frozen encoder gives for the videos of a folder.",
        epilog="group.name=value changes settings: model.weights, model.backbone and others of model, clip, data and "
        "predict.views with --config; with --run what vac predict can change.",
    )
    add = parser.add_argument
    add("--run", metavar="DIR", help="a run directory: the encoder of its best_<model>.pt")
    add("--config", metavar="FILE", help="or settings as YAML, or a preset's name: the encoder of its group model")
    add("--data", metavar="DIR", help="<class>/<video>/*.jpg, <video>/*.jpg, CSV or packed set (default: data.train)")
    add("--out", metavar="DIR", help="where features.npz goes (default: RUN/features/<name of the data folder>)")
    add("--steps", action="store_true", help="keep the features of each time step as well, not only their mean")
    add("--dtype", choices=("float32", "float16"), default="float32", help="float16 takes half the space")
    add("--views", metavar="KxC", help="K windows over the video x C crops (5x3), with +flip also mirrored")
    add("--nproc", metavar="N", help="start N ranks on this machine (torchrun does it as well)")
    add("--overwrite", action="store_true", help="overwrite other features in --out")
    add("--debug", action="store_true", help="one process, no loader processes, plain tracebacks")
    flags, words = _flags_and_settings(parser, argv)
    words = _take_positional(flags, words, ("data",) if flags.config else ("run", "data"))
    if (flags.run is None) == (flags.config is None):
        raise UserError("give one of --run DIR and --config FILE (see --help)")
    if flags.run is None and flags.out is None:
        raise UserError("give --out DIR for the features: --config names no run")
    if flags.out is not None and flags.out.endswith(".npz"):
        raise UserError(f"--out {flags.out}: give a folder, features.npz is written to it")
    return EmbeddingOptions(
        run=flags.run,
        config=flags.config,
        data=Path(flags.data).expanduser() if flags.data else None,
        out=Path(flags.out).expanduser() if flags.out else None,
        steps=flags.steps,
        dtype=flags.dtype,
        views=flags.views,
        overwrite=flags.overwrite,
        debug=flags.debug,
        words=words,
    )
