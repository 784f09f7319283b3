"""Settings from YAML and the command line: the one place that knows either.

A YAML file has the groups and names of `settings.Config`; `group.name=value` on the command line overrides it. The text
behind the first `=` is read by the type of its setting, so that a text setting takes any text as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vac_ddp.errors import UserError
from vac_ddp.settings import Config

PACKAGE = Path(__file__).resolve().parent
PRESETS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"  # installed, repository

AT_LEAST_ONE = (
    "clip.frames",
    "clip.stride",
    "clip.size",
    "train.epochs",
    "train.global_batch",
    "train.val_every",
    "augment.repeats",
    "log.every_steps",
    "checkpoint.keep",
    "health.max_bad_steps",
    "predict.save_every",
    "data.prefetch",
)

SHARES = (
    "data.val_fraction",
    "augment.flip",
    "augment.erase",
    "augment.mix_probability",
    "augment.mix_switch",
    "data.max_damaged",
    "train.label_smoothing",
    "model.drop_path",
    "model.head_dropout",
)


@dataclass(kw_only=True)
class CommandLine:
    """What was asked for: the settings, the flags that are no settings, and lines about what was ignored."""

    config: Config
    debug: bool
    given: list[str]
    notes: list[str]


# ---------------------------------------------------------------- names and types


def leaves(kind: type = Config, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """All settings by their dotted name, in the order of the dataclasses."""
    found: dict[str, dataclasses.Field[Any]] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        annotation = hints[field.name]
        if dataclasses.is_dataclass(annotation):
            found.update(leaves(annotation, f"{prefix}{field.name}."))
        else:
            field.type = annotation
            found[prefix + field.name] = field
    return found


def type_name(annotation: Any) -> str:
    """A type as people write it: `int | null`, `error|skip`, `(float, float)`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if origin is tuple:
        return f"({', '.join(map(type_name, arguments))})"
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    return {"str": "text", "bool": "true|false"}.get(annotation.__name__, annotation.__name__)


def parse_text(text: str, annotation: Any) -> Any:
    """The value that `text` means for a setting of this type. Raises ValueError where it means none."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        if text in arguments:
            return text
    elif origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text == "null":
            return None
        for option in sorted((a for a in arguments if a is not type(None)), key=lambda a: a is str):
            try:
                return parse_text(text, option)
            except ValueError:
                continue
    elif origin in (list, tuple):
        inner = text.strip().removeprefix("[").removeprefix("(").removesuffix("]").removesuffix(")")
        words = [word.strip() for word in inner.split(",")] if inner.strip() else []
        if origin is list:
            return [parse_text(word, arguments[0]) for word in words]
        if len(words) == len(arguments):
            return tuple(parse_text(word, kind) for word, kind in zip(words, arguments, strict=True))
    elif annotation is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif annotation is str:
        return text
    else:
        return annotation(text)
    raise ValueError(text)


def unknown_setting(name: str) -> UserError:
    """The error for a name that is no setting, with the nearest one that is."""
    names = list(leaves())
    groups = sorted({n.rsplit(".", 1)[0] for n in names if "." in n})
    if name in groups:
        return UserError(f"{name} is a group of settings: give one of them, as {name}.NAME=value (see --help)")
    near = difflib.get_close_matches(name, names, 1, 0.5)
    if not near:
        near = [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
    return UserError(f"unknown setting {name}" + (f": did you mean {near[0]}?" if near else " (see --help)"))


# ---------------------------------------------------------------- reading


def find_config(name: str) -> Path:
    """A YAML file by path, or a preset by name (with or without .yaml)."""
    for candidate in (Path(name), PRESETS / f"{Path(name).name.removesuffix('.yaml')}.yaml"):
        if candidate.is_file():
            return candidate
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    raise UserError(f"no settings file {name}; presets: {', '.join(presets) or 'none found'}")


def read_yaml(path: Path, base: Config | None = None) -> Config:
    """Settings from a YAML file, over the defaults (or over `base`)."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    base = base if base is not None else Config()
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path} holds no settings: expected lines as 'train:' and '  epochs: 20'")
    _check_names(OmegaConf.to_container(loaded, resolve=False), str(path))
    _one_rate(base, [f"optim.{name}" for name, rate in (loaded.get("optim") or {}).items() if rate is not None])
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), loaded))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    assert isinstance(merged, Config)
    return merged


def _one_line(error: Any) -> str:
    text = str(error).splitlines()[0]
    name = getattr(error, "full_key", None)
    field = leaves().get(name) if name else None
    expected = f" (expected {type_name(field.type)})" if field is not None else ""
    return f"{name}: {text}{expected}" if name else text


def _check_names(node: Any, where: str, prefix: str = "") -> None:
    names = leaves()
    if not isinstance(node, dict):
        raise UserError(f"{where}: {prefix.rstrip('.')} is a group of settings, not a value")
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name in names:
            continue
        if any(n.startswith(f"{name}.") for n in names):
            if value is not None:
                _check_names(value, where, f"{name}.")
            continue
        raise UserError(f"{where}: {unknown_setting(name)}")


def override(config: Config, text: str) -> None:
    """Apply one `group.name=value` to `config`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"'{text}' is no setting: write group.name=value, or see --help")
    field = leaves().get(name)
    if field is None:
        raise unknown_setting(name)
    try:
        parsed = parse_text(value, field.type)
    except ValueError:
        raise UserError(f"{name}={value}: expected {type_name(field.type)}") from None
    target: Any = config
    *groups, last = name.split(".")
    for group in groups:
        target = getattr(target, group)
    setattr(target, last, parsed)


def parse(argv: list[str], *, program: str, about: str) -> CommandLine:
    """Settings of a training program from its arguments. Raises UserError; --help and --print-config end here."""
    parser = argparse.ArgumentParser(prog=program, description=about, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.error = _usage_error  # type: ignore[method-assign]  # argparse offers no other way to keep one line
    flags, words = parser.parse_known_args(argv)
    if flags.help:
        print(help_text(program, about))
        raise SystemExit(0)
    for word in words:
        if word.startswith("-"):
            near = difflib.get_close_matches(word, ["--config", "--debug", "--print-config", "--help"], 1)
            raise UserError(f"unknown flag {word}" + (f": did you mean {near[0]}?" if near else " (see --help)"))
    config, notes = Config(), []
    if flags.config:
        path = find_config(flags.config)
        config = read_yaml(path)
        notes = _leave_out_overwrite(config, path)
    if flags.debug:
        config = read_yaml(find_config("debug"), config)
    _one_rate(config, [name for name, _, value in (w.partition("=") for w in words) if value != "null"])
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


def _one_rate(config: Config, given: list[str]) -> None:
    """Giving optim.lr takes the place of optim.base_lr of an earlier layer (preset, default), and the other way."""
    rates = [name for name in ("optim.lr", "optim.base_lr") if name in given]
    if rates == ["optim.lr"]:
        config.optim.base_lr = None
    elif rates == ["optim.base_lr"]:
        config.optim.lr = None


def _usage_error(message: str) -> typing.NoReturn:
    raise UserError(f"{message} (see --help)")


# ---------------------------------------------------------------- writing


def to_dict(config: Config) -> dict[str, Any]:
    """All settings as plain nested dicts, lists and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any], *, where: str) -> Config:
    """Settings from what `to_dict` made; what this version does not know is an error naming `where`."""
    _check_names(values, where)
    return _fill(Config, values)


def _fill(kind: Any, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            made[name] = _fill(hints[name], value)
        else:
            made[name] = tuple(value) if isinstance(value, list) and "tuple" in str(hints[name]) else value
    return kind(**made)


def to_yaml(config: Config) -> str:
    """All settings as YAML that `read_yaml` takes back unchanged."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that begins like a number: OmegaConf reads 1e3 as one, PyYAML would not quote it."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "'" if value[:1] in "+-.0123456789" else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value.replace("${", "\\${"), style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def help_text(program: str, about: str) -> str:
    """The flags, then every setting with its type, default and meaning."""
    lines = [
        f"usage: {program} [--config FILE] [--debug] [--print-config] [group.name=value ...]",
        "",
        about,
        "",
        "  --config FILE    settings as YAML, or a preset's name (see configs/)",
        "  --debug          one process, no workers, plain tracebacks, a tiny model and a few steps, in runs/debug",
        "  --print-config   print all settings as they would be used, and end",
        "",
        "Settings (group.name=value):",
    ]
    group = ""
    for name, field in leaves().items():
        head = name.rsplit(".", 1)[0] if "." in name else ""
        if head != group:
            lines.append("")
            group = head
        default = field.default if field.default is not dataclasses.MISSING else _default(name)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        lines.append(f"  {name}  <{type_name(field.type)}>  = {shown or chr(39) * 2}")
        lines.append(f"      {field.metadata['help']}")
    return "\n".join(lines)


def _default(name: str) -> Any:
    value: Any = Config()
    for part in name.split("."):
        value = getattr(value, part)
    return value


# ---------------------------------------------------------------- checking


def check(config: Config) -> None:
    """What single settings cannot say: ranges, and settings that exclude each other."""
    c = config

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    for name in AT_LEAST_ONE:
        group, last = name.split(".")
        value = getattr(getattr(c, group), last)
        need(value >= 1, f"{name}={value}: must be at least 1")
    for name in SHARES:
        group, last = name.split(".")
        value = getattr(getattr(c, group), last)
        need(0 <= value <= 1, f"{name}={value}: must lie between 0 and 1")
    need(
        (c.optim.lr is None) != (c.optim.base_lr is None),
        "give exactly one of optim.lr (the peak as used) and optim.base_lr (per 256 clips); "
        f"now optim.lr={c.optim.lr} and optim.base_lr={c.optim.base_lr}; the other one is set off by =null",
    )
    need(
        c.train.global_batch % c.augment.repeats == 0,
        f"train.global_batch={c.train.global_batch} must be a multiple of augment.repeats={c.augment.repeats}",
    )
    for name, value in (
        ("train.clips_per_gpu", c.train.clips_per_gpu),
        ("predict.clips_per_gpu", c.predict.clips_per_gpu),
    ):
        good = value == "auto" or (isinstance(value, int) and value >= 1)
        need(good, f"{name}={value}: must be auto or a number from 1")
    need(
        c.checkpoint.before_end_s >= 0,
        f"checkpoint.before_end_s={c.checkpoint.before_end_s}: seconds from 0 (0: never)",
    )
    need(c.train.max_steps is None or c.train.max_steps >= 1, f"train.max_steps={c.train.max_steps}: at least 1")
    need(c.val.crops in (1, 3) and c.predict.views.crops in (1, 3), "val.crops and predict.views.crops are 1 or 3")
    need(
        c.train.ema_decay is None or 0 < c.train.ema_decay < 1, f"train.ema_decay={c.train.ema_decay}: between 0 and 1"
    )
    need(not (c.data.fold and c.data.val), "data.fold and data.val exclude each other: set one of them to null")
    need(
        c.model.size is None or c.model.weights is None,
        "model.size is for training from scratch: add model.weights=null, or leave model.size out",
    )
