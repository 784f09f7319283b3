"""Settings from YAML, text and checkpoints: the one place that reads them.

A YAML file has the groups and names of `settings.Config`; `group.name=value` on the command line overrides it. The text
behind the first `=` is read by the type of its setting, so that a text setting takes any text as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import os
import types
import typing
from collections import Counter
from pathlib import Path
from typing import Any

from vac_ddp.checks import accepts, leaves, short
from vac_ddp.errors import UserError
from vac_ddp.settings import REMOVED, Config

PACKAGE = Path(__file__).resolve().parent
PRESETS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"  # installed, repository

FILE_BYTES = 1 << 20  # of a settings file: what is larger was not written as one
DEEPEST = 150  # levels of lists and groups in it, whatever the limit of Python; no setting has more than three
NULL, MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
CONTENT = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # YAML 1.1


# ---------------------------------------------------------------- names and types


def read_value(value: Any, annotation: Any) -> Any:
    """The value of a setting of this type from text, or from what YAML, JSON or a checkpoint has in its place.

    Raises ValueError where it is none: also for a container or None where the type has no room for it.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for option in sorted((a for a in arguments if a is not type(None)), key=lambda a: a is str):
            try:
                return read_value(value, option)
            except ValueError:
                continue
    elif origin in (list, tuple):
        items = _split(value) if isinstance(value, str) else value
        if isinstance(items, list | tuple) and origin is list:
            return [read_value(item, arguments[0]) for item in items]
        if isinstance(items, list | tuple) and len(items) == len(arguments):
            return tuple(read_value(item, kind) for item, kind in zip(items, arguments, strict=True))
    elif isinstance(value, str | int | float):
        text = str(value)
        if origin is typing.Literal:
            if text in arguments:
                return text
        elif annotation is bool:
            if text.lower() in BOOLEANS:
                return BOOLEANS[text.lower()]
        else:
            return annotation(text)
    raise ValueError(short(value))


def _split(text: str) -> list[str]:
    inner = text.strip().removeprefix("[").removeprefix("(").removesuffix("]").removesuffix(")")
    return [word.strip() for word in inner.split(",")] if inner.strip() else []


def unknown_setting(name: str) -> UserError:
    """The error for a name that is not a setting, with the nearest one that is."""
    names = list(leaves())
    groups = sorted({n.rsplit(".", 1)[0] for n in names if "." in n})
    if name in groups:
        return UserError(f"{name} is a group of settings: give one of them, as {name}.NAME=value (see --help)")
    near = difflib.get_close_matches(name[:80], names, 1, 0.5)
    if not near:
        near = [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
    return UserError(f"unknown setting {short(name)}" + (f": did you mean {near[0]}?" if near else " (see --help)"))


def was_removed(name: str, value: Any, where: str = "") -> bool:
    """Whether an earlier version had this setting, and the value changes nothing. UserError for another value."""
    if name not in REMOVED:
        return False
    if value not in REMOVED[name].harmless:
        raise UserError(f"{where}{name}={short(value)}: this setting was removed; {REMOVED[name].why}")
    return True


# ---------------------------------------------------------------- reading


def find_config(name: str) -> Path:
    """A YAML file by path, or a preset by name (with or without .yaml)."""
    for candidate in (Path(name), PRESETS / f"{Path(name).name.removesuffix('.yaml')}.yaml"):
        if os.path.isfile(candidate):  # noqa: PTH113 - Path.is_file raises for a name that is too long
            return candidate
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    raise UserError(f"no settings file {short(name)}; presets: {', '.join(presets) or 'none found'}")


def read_yaml(path: Path, base: Config | None = None) -> Config:
    r"""Settings from a YAML file, over the defaults (or over `base`). Text is taken as it is: nothing is interpolated.

    `\${` stands for `${`, as in the files of vac_ddp 0.1, which were read with interpolation.
    """
    config = copy.deepcopy(base) if base is not None else Config()
    loaded = _load_yaml(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no settings: expected lines as 'train:' and '  epochs: 20'")
    values = flatten(loaded, str(path))
    one_rate(config, [name for name, value in values.items() if value is not None])
    for name, value in values.items():
        _set(config, name, value.replace("\\${", "${") if isinstance(value, str) else value, where=f"{path}: ")
    return config


def _load_yaml(path: Path) -> Any:
    """What a YAML file holds: mappings, lists, null, and every other value as text, which its setting's type reads."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Knows no other tags, and refuses a name that is given twice, and what is nested too deeply."""

        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            self.depth += 1
            if self.depth > DEEPEST:
                raise yaml.composer.ComposerError(problem="it is nested too deeply")
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE]
            if len(set(names)) < len(names):
                twice = min(name for name, count in Counter(names).items() if count > 1)
                raise yaml.constructor.ConstructorError(problem=f"{short(twice)} is given twice")
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        start: [(tag, form) for tag, form in known if tag in (NULL, MERGE)]
        for start, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (NULL, *CONTENT, None)}
    try:
        with path.open("rb") as stream:
            content = stream.read(FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > FILE_BYTES:
        raise UserError(f"{path} holds no settings: it is larger than {FILE_BYTES >> 20} MiB")
    try:
        return yaml.load(content, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:300]}") from error


def flatten(node: dict[Any, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The values of nested groups by the settings' dotted names, unread; UserError where a name is none."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{'null' if key is None else key}"
        if was_removed(name, value, f"{where}: "):
            continue
        if name in leaves():
            values[name] = value
        elif not any(known.startswith(f"{name}.") for known in leaves()):
            raise UserError(f"{where}: {unknown_setting(name)}")
        elif isinstance(value, dict):
            values |= flatten(value, where, f"{name}.")
        elif value is not None:
            raise UserError(f"{where}: {name} is a group of settings, not a value")
    return values


def _set(config: Config, name: str, value: Any, *, where: str = "") -> None:
    """Give a setting the value that text or a file has for it."""
    field = leaves()[name]
    try:
        parsed = read_value(value, field.type)
    except ValueError:
        raise UserError(f"{where}{name}={short(value)}: expected {accepts(field)}") from None
    *groups, last = name.split(".")
    setattr(functools.reduce(getattr, groups, config), last, parsed)


def override(config: Config, text: str) -> None:
    """Apply one `group.name=value` to `config`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"'{short(text)}' is not a setting: write group.name=value, or see --help")
    if was_removed(name, value):
        return
    if name not in leaves():
        raise unknown_setting(name)
    optional = type(None) in typing.get_args(leaves()[name].type)
    _set(config, name, None if value == "null" and optional else value)


def one_rate(config: Config, given: list[str]) -> None:
    """Giving optim.lr takes the place of optim.base_lr of an earlier layer (preset, default), and the other way."""
    rates = [name for name in ("optim.lr", "optim.base_lr") if name in given]
    if rates == ["optim.lr"]:
        config.optim.base_lr = None
    elif rates == ["optim.base_lr"]:
        config.optim.lr = None


# ---------------------------------------------------------------- writing


def to_dict(config: Config) -> dict[str, Any]:
    """All settings as plain nested dicts, lists and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def from_dict(values: dict[str, Any], *, where: str) -> Config:
    """Settings from what `to_dict` made; UserError, naming `where`, for what is none of them or of another type."""
    config = Config()
    for name, value in flatten(values, where).items():
        _set(config, name, value, where=f"{where}: ")
    return config


def to_yaml(config: Config) -> str:
    """All settings as YAML that `read_yaml` takes back unchanged."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that begins like a number, so that other readers of YAML take it for text as well."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "'" if value[:1] in "+-.0123456789" else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value.replace("${", "\\${"), style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)
