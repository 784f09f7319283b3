"""Which source a video was cut from, told from its name: grammars of known sets, and the user's own rules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vac_ddp.data.video_list import read_table
from vac_ddp.errors import UserError
from vac_ddp.settings import DataSettings
from vac_ddp.text import printable

# FIELD-NOTES section 7: this parses 6766 of 6766 HMDB51 names
_HMDB51 = re.compile(r"_[a-z]_(cm|nm)_np\d+_(fr|ba|le|ri)_(goo|med|bad)_\d+(\.avi)?$")
_UCF101 = re.compile(r"^(v_.+_g\d+)_c\d+(\.avi)?$")
_NUMBERED = re.compile(r"^(.*?[^\W\d_].*?)(?:[ _.-]*+\d++)++$")  # all numbers at the end: the widest source
_LAST_NUMBER = re.compile(r"^(.+?)[ _.-]*+(?<!\d)\d++$")  # the last number only

_AUTO = ("hmdb51", "ucf101", "numbered", "last number")
_ENOUGH = 0.9  # of the names, for a grammar to be taken unasked
_SHOWN = 3


@dataclass(kw_only=True)
class Sources:
    """The source of every video, and how it was told."""

    grammar: str
    groups: list[str]  # (V,) videos of one group stay on one side
    notes: list[str] = field(default_factory=list)


def source_of(grammar: str, name: str, class_name: str) -> str | None:
    """The source in the video's own name (without its class folder), None where the grammar does not fit.

    >>> source_of("hmdb51", "April_09_brush_hair_u_nm_np1_ba_goo_0", "brush_hair")
    'April_09'
    >>> source_of("ucf101", "v_Archery_g07_c02", "Archery")
    'v_Archery_g07'
    >>> source_of("numbered", "party_003", "dance")
    'party'
    """
    if grammar == "hmdb51":
        stem, found = _HMDB51.subn("", name)
        return stem.removesuffix(f"_{class_name}") if found else None
    pattern = {"ucf101": _UCF101, "numbered": _NUMBERED, "last number": _LAST_NUMBER}[grammar]
    match = pattern.match(name)
    return match.group(1) if match else None


def known_sources(
    names: Sequence[str], classes: Sequence[str], settings: DataSettings, say: Callable[[str], None]
) -> list[str]:
    """The sources of V videos as `find_sources` infers them; each empty where it cannot, which is passed to `say`."""
    try:
        found = find_sources(names, classes, settings)
    except UserError as error:
        say(f"every video counts as its own source: {error}")
        return [""] * len(names)
    return [""] * len(names) if found.grammar == "none" else list(found.groups)


def find_sources(names: Sequence[str], classes: Sequence[str], settings: DataSettings) -> Sources:
    """The sources of V videos. `names` (V,) are "class/video", `classes` (V,) the class name of each.

    `settings.group_by=auto` takes the user's regex or CSV if one is given (a regex that fits not one name, as a
    preset's may, is named and passed over), else the first grammar that fits the names and leaves every class two
    sources or more, else every video is its own (with a note that warns).
    Raises UserError where a grammar was asked for that does not do this.
    """
    videos = [name.rpartition("/")[2] for name in names]
    kind = settings.group_by
    if kind == "auto":
        kind = "csv" if settings.group_csv else "regex" if settings.group_regex else "auto"
    notes = []
    if kind == "regex" and settings.group_by == "auto" and not any(_from_regex(names, videos, settings)):
        kind = "auto"
        notes = [f"data.group_regex={settings.group_regex} fits none of the names: looking for a known grammar"]
    ignored = _ignored(kind, settings)
    if kind == "none":
        note = "grouping: none, every video is its own source"
        return Sources(grammar="none", groups=list(names), notes=[note, *ignored])
    if kind != "auto":
        found = _told(kind, names, videos, classes, settings)
        told = _asked_for(kind, found, names, classes, settings)
        told.notes += ignored
        return told
    reasons = []
    for grammar in _AUTO:
        found = _told(grammar, names, videos, classes, settings)
        reason = _why_not(found, classes, _across(grammar, settings))
        if reason is None:
            told = _sources(grammar, found, names, classes, settings)
            return dataclasses.replace(told, notes=notes + told.notes)
        if reason:
            reasons.append(f"{grammar}: {reason}")
    because = f" ({'; '.join(reasons)})" if reasons else ""
    return Sources(
        grammar="none",
        groups=list(names),
        notes=[
            *notes,
            f"warning: no source is told by the names{because}; every video is its own source, and clips cut from one "
            "recording may land on both sides: set data.group_by, data.group_regex or data.group_csv",
        ],
    )


def _ignored(kind: str, settings: DataSettings) -> list[str]:
    given = {"regex": settings.group_regex, "csv": settings.group_csv}
    return [
        f"warning: data.group_{name} is not used, grouping is by {kind}"
        for name in given
        if given[name] and kind != name
    ]


def _told(
    kind: str, names: Sequence[str], videos: Sequence[str], classes: Sequence[str], settings: DataSettings
) -> list[str | None]:
    if kind == "csv":
        return _from_csv(names, videos, settings)
    if kind == "regex":
        return _from_regex(names, videos, settings)
    return [source_of(kind, video, label) for video, label in zip(videos, classes, strict=True)]


def _from_regex(names: Sequence[str], videos: Sequence[str], settings: DataSettings) -> list[str | None]:
    if not settings.group_regex:
        raise UserError("data.group_by=regex needs data.group_regex, an expression whose first group is the source")
    try:
        pattern = re.compile(settings.group_regex)
    except re.error as error:
        raise UserError(f"data.group_regex={settings.group_regex} is no regular expression: {error}") from error
    if pattern.groups < 1:
        raise UserError(f"data.group_regex={settings.group_regex} has no group: put ( ) around the source")
    found = [pattern.search(video) or pattern.search(name) for video, name in zip(videos, names, strict=True)]
    return [match.group(1) if match else None for match in found]


def _from_csv(names: Sequence[str], videos: Sequence[str], settings: DataSettings) -> list[str | None]:
    if not settings.group_csv:
        raise UserError("data.group_by=csv needs data.group_csv, a CSV with the columns video,source")
    path = Path(settings.group_csv).expanduser()
    try:
        table = read_table(path, ("video", "source"))
    except OSError as error:
        raise UserError(f"cannot read data.group_csv={path}: {error.strerror}") from error
    if table is None:
        raise UserError(f"{path} must have the columns video,source")
    names_of_columns, rows = table
    places = [names_of_columns.index(name) for name in ("video", "source")]
    told: dict[str, str] = {}
    for row in rows:
        video, source = (printable(row.fields[place].strip()) if place < len(row.fields) else "" for place in places)
        if not video or not source:
            raise UserError(f"{path} line {row.line} has no video or no source")
        if told.setdefault(video, source) != source:
            raise UserError(f"{path} line {row.line} gives {video} a second source: {told[video]} and {source}")
    return [told.get(name, told.get(video)) for name, video in zip(names, videos, strict=True)]


def _asked_for(
    kind: str, found: list[str | None], names: Sequence[str], classes: Sequence[str], settings: DataSettings
) -> Sources:
    if kind == "numbered" and _why_not(found, classes, _across(kind, settings)):
        finer = _told("last number", names, [name.rpartition("/")[2] for name in names], classes, settings)
        found = found if _why_not(finer, classes, _across(kind, settings)) else finer
    unknown = [name for name, source in zip(names, found, strict=True) if source is None]
    if unknown:
        raise UserError(
            f"data.group_by={kind} does not tell the source of {len(unknown)} of {len(names)} videos "
            f"({', '.join(unknown[:_SHOWN])}): extend it, or use another data.group_by"
        )
    poor = _poor_class(found, classes)
    if poor is not None:
        raise UserError(
            f"data.group_by={kind} finds fewer than two sources in class {poor}, which can't be on both sides: "
            "use another data.group_by"
        )
    return _sources(kind, found, names, classes, settings)


def _why_not(found: list[str | None], classes: Sequence[str], across: bool) -> str | None:
    """Why a grammar is not taken unasked: None if it is, "" if the names simply look otherwise."""
    known = [
        (source, "" if across else label) for source, label in zip(found, classes, strict=True) if source is not None
    ]
    if len(known) < _ENOUGH * len(found) or not known:
        return ""
    if len(set(known)) == len(known):
        return ""  # every video a source of its own: nothing told
    poor = _poor_class(found, classes)
    return None if poor is None else f"fewer than two sources in class {poor}"


def _poor_class(found: list[str | None], classes: Sequence[str]) -> str | None:
    """The first class with fewer than two sources; a name without one counts as its own."""
    sources: dict[str, set[str]] = {}
    for i, (source, label) in enumerate(zip(found, classes, strict=True)):
        sources.setdefault(label, set()).add(f"video {i}" if source is None else f"source {source}")
    return next((label for label, some in sources.items() if len(some) < 2), None)


def _across(grammar: str, settings: DataSettings) -> bool:
    """Whether equal source names in two classes are one source."""
    asked = settings.group_across_classes
    return grammar != "hmdb51" if asked is None else asked


def _sources(
    grammar: str, found: list[str | None], names: Sequence[str], classes: Sequence[str], settings: DataSettings
) -> Sources:
    across = _across(grammar, settings)
    groups = [
        name if source is None else source if across else f"{label}/{source}"
        for name, source, label in zip(names, found, classes, strict=True)
    ]
    known = sum(source is not None for source in found)
    note = (
        f"grouping: {grammar}, {known} of {len(names)} names recognised, {len(set(groups))} sources"
        f"{' across classes' if across else ' by class'}"
    )
    shown: dict[str, str] = {}
    for name, group, source in zip(names, groups, found, strict=True):
        if source is not None and group not in shown and len(shown) < _SHOWN:
            shown[group] = name
    notes = [note, "  e.g. " + ", ".join(f"{name} -> {group}" for group, name in shown.items())]
    if known < len(names):
        unknown = [name for name, source in zip(names, found, strict=True) if source is None]
        notes.append(
            f"warning: {len(unknown)} videos are their own source, their names fit no {grammar} name: "
            f"{', '.join(unknown[:_SHOWN])}"
        )
    return Sources(grammar=grammar, groups=groups, notes=notes)
