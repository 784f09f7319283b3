"""Help on settings and presets, and what to type in place of arguments of other programs."""

from __future__ import annotations

import difflib
import functools
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vac_ddp.checks import leaves, short, type_name
from vac_ddp.config import PRESETS, find_config, read_yaml
from vac_ddp.errors import UserError
from vac_ddp.settings import Config

_WIDTH = 100  # of a line of the short help

# The settings that people change most, by program.
COMMON = {
    "train": (
        *("data.train", "data.val_fraction", "data.group_by", "model.weights", "clip.frames", "clip.size"),
        *("train.epochs", "train.global_batch", "optim.lr", "run.dir"),
    ),
    "probe": (
        *("data.train", "data.group_by", "model.encoder", "model.backbone", "model.weights", "model.pooling"),
        *("clip.frames", "clip.size", "data.workers", "run.dir"),
    ),
}
_USAGE = {
    "train": (
        "vac train [--nproc N] [--config FILE|PRESET] [group.name=value ...]",
        "torchrun --nproc_per_node=N -m vac_ddp.train [--config FILE|PRESET] [group.name=value ...]",
    ),
    "probe": (
        "vac probe [--nproc N] [--config FILE|PRESET] [group.name=value ...]",
        "torchrun --nproc_per_node=N -m vac_ddp.probe [--config FILE|PRESET] [group.name=value ...]",
    ),
}

# Options of other programs, and the setting or flag that does the same here.
_ELSEWHERE = {
    "batch_size": "train.global_batch",
    "per_device_train_batch_size": "train.clips_per_gpu",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "learning_rate": "optim.lr",
    "wd": "optim.weight_decay",
    "output_dir": "run.dir",
    "out": "run.dir",
    "work_dir": "run.dir",
    "data": "data.train",
    "data_path": "data.train",
    "data_dir": "data.train",
    "num_workers": "data.workers",
    "num_frames": "clip.frames",
    "sampling_rate": "clip.stride",
    "input_size": "clip.size",
    "finetune": "model.weights",
    "model": "model.weights",
    "amp": "train.precision",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "gradient_accumulation_steps": "train.global_batch",
    "accum_iter": "train.global_batch",
    "update_freq": "train.global_batch",
}


def presets() -> dict[str, str]:
    """The presets by name, each with the first line of its file."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for path in sorted(PRESETS.glob("*.yaml"))
    }


def short_help(program: str, about: str, config: Config) -> str:
    """Usage, flags, the settings changed most with their values in `config`, the presets, and where the rest is."""
    name = program.replace(".", " ").split()[-1]
    usage = _USAGE.get(name, (f"{program} [--config FILE|PRESET] [group.name=value ...]",))
    lines = [f"{'usage:' if place == 0 else '':<6} {line}" for place, line in enumerate(usage)]
    lines += ["", about, ""]
    flags = {
        "--config FILE|PRESET": "settings from a YAML file or a preset; with --help: its values",
        "--debug": "one process, a tiny model and a few steps; breakpoints work",
        "--print-config": "print all settings as they would be used, and end",
    }
    if name in _USAGE:
        flags = {"--nproc N": "ranks on this machine; default: one per GPU, or one"} | flags
    lines += [f"  {flag:<21} {meaning}" for flag, meaning in flags.items()]
    lines += ["", "settings that are changed most, with their values:"]
    shown = {setting: f"{setting}={_value(config, setting)}" for setting in COMMON.get(name, COMMON["train"])}
    width = max(map(len, shown.values())) if shown else 0
    for setting, text in shown.items():
        meaning = textwrap.shorten(leaves()[setting].metadata["help"], max(30, _WIDTH - width - 4), placeholder=" ...")
        lines.append(f"  {text:<{width}}  {meaning}")
    lines += ["", "presets (vac presets show NAME):"]
    lines += [
        f"  {preset:<24}{textwrap.shorten(text, _WIDTH - 26, placeholder=' ...')}" for preset, text in presets().items()
    ]
    lines += ["", "all settings: vac settings; those about a word: vac settings WORD"]
    return "\n".join(lines)


def settings_text(word: str | None, config: Config) -> str:
    """Settings with type, value in `config`, bounds and meaning: all, or those with `word` in name or meaning.

    Raises UserError where no setting has it.
    """
    needle = (word or "").lower()
    names = [name for name, field in leaves().items() if needle in f"{name} {field.metadata['help']}".lower()]
    if not names:
        near = difflib.get_close_matches(needle, [part for name in leaves() for part in (name, *name.split("."))], 1)
        raise UserError(
            f"no setting has {word!r} in its name or meaning" + (f": did you mean {near[0]}?" if near else "")
        )
    lines: list[str] = []
    group = ""
    for name in names:
        field = leaves()[name]
        head = name.rpartition(".")[0]
        if head != group and lines:
            lines.append("")
        group = head
        bounds = f"  ({field.metadata['bounds']})" if field.metadata["bounds"] else ""
        lines.append(f"  {name}  <{type_name(field.type)}>  = {_value(config, name)}{bounds}")
        lines.append(f"      {field.metadata['help']}")
    return "\n".join(lines)


def _value(config: Config, name: str) -> str:
    """The value of a setting as it is typed."""
    value = functools.reduce(getattr, name.split("."), config)
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "[]"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def with_preset(name: str | None) -> Config:
    """The settings of a file or preset, or the defaults."""
    return read_yaml(find_config(name)) if name else Config()


def hint(words: Sequence[str], place: int) -> str | None:
    """What to type in place of `words[place]`, which is neither a flag nor name=value; None: unknown."""
    word = words[place]
    following = words[place + 1] if place + 1 < len(words) and not words[place + 1].startswith("-") else ""
    bare, equals, given = word.lstrip("-").partition("=")
    value = given if equals else following
    if word.startswith("-"):
        if bare in ("c", "cfg", "conf", "config_file", "config-file"):
            return f"--config {value or 'FILE'}"
        if bare in ("gpus", "nproc_per_node", "nproc-per-node", "num_gpus", "n"):
            return f"--nproc {value or 'N'}"
        setting = _setting_called(bare)
        return f"{setting}={short(value) or 'VALUE'}" if setting else None
    if word in leaves() and value and "=" not in value:
        return f"{word}={short(value)}"
    if word.endswith((".yaml", ".yml")) or word in presets():
        return f"--config {short(word)}"
    return f"data.train={word}" if os.path.isdir(word) else None  # noqa: PTH112 - Path.is_dir raises for a long name


def _setting_called(name: str) -> str | None:
    """The setting that an option of another program stands for."""
    plain = name.replace("-", "_")
    if plain in leaves():
        return plain
    if plain in _ELSEWHERE:
        return _ELSEWHERE[plain]
    same = [setting for setting in leaves() if setting.rpartition(".")[2] == plain]
    first = [
        setting
        for group in ("train", "optim", "data", "clip", "model")
        for setting in same
        if setting.startswith(group)
    ]
    return next(iter(first or same), None)


_BASH = """\
_vac() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [ "$before" = --config ]; then
        COMPREPLY=($(compgen -W "{presets}" -- "$word") $(compgen -f -- "$word"))
    else
        case "${{COMP_WORDS[1]}}" in
            train|probe|doctor|ensemble|predict|embed)
                compopt -o nospace
                COMPREPLY=($(compgen -W "--config --nproc --debug --help {settings}" -- "$word")) ;;
        esac
        COMPREPLY+=($(compgen -f -- "$word"))
    fi
}}
complete -F _vac vac
"""


def completion(shell: str, commands: Sequence[str]) -> str:
    """The completion of `vac` for bash or zsh: commands, presets after --config, names of settings, files."""
    names = " ".join(f"{name}=" for name in leaves())
    script = _BASH.format(commands=" ".join(commands), presets=" ".join(presets()), settings=names)
    return script if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{script}"


def unknown_word(words: Sequence[str], place: int, *, flags: Sequence[str]) -> UserError:
    """The error for `words[place]`, with what to type instead where that is known."""
    word = words[place]
    what = f"unknown flag {short(word)}" if word.startswith("-") else f"'{short(word)}' is not a setting"
    known = hint(words, place)
    near = difflib.get_close_matches(word, flags, 1) if re.match("--[a-z]", word) else []
    if near and (known is None or difflib.SequenceMatcher(None, word, near[0]).ratio() > 0.85):
        return UserError(f"{what}: did you mean {near[0]}?")
    return UserError(f"{what}: type {known}" if known else f"{what} (see --help, vac settings)")


def show_preset(name: str) -> str:
    """The YAML of a preset. Raises UserError for an unknown name."""
    path: Any = PRESETS / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, presets(), 1)
        raise UserError(
            f"no preset {name!r}: " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(presets())}")
        )
    return path.read_text(encoding="utf-8")
