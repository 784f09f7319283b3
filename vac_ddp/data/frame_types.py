"""Which pictures of a folder are the frames: RGB and optical flow in one folder, a cover beside the frames."""

# ruff: noqa: PTH122 - names stay text

from __future__ import annotations

import fnmatch
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

_DIGITS = re.compile(r"[0-9]+")
_MAIN = 0.8  # of a folder's pictures that two types must be together, so that names at random are none


def matcher(pattern: str | None) -> Callable[[str], bool]:
    """Whether a file name is of the form `pattern` (a shell pattern with * ? [...]); None: every name is."""
    if not pattern:
        return lambda name: True
    found = re.compile(fnmatch.translate(pattern))
    return lambda name: found.match(name) is not None


def types_of(names: Sequence[str]) -> dict[str, int]:
    """Patterns of the types of pictures in one folder and how many each has, where several have the same numbers.

    Names are of one type where they differ in their numbers only; of two, where the same numbers come twice: with
    other text around them, or with another file ending. Nothing where there is one type.

    >>> types_of(["img_1.jpg", "img_2.jpg", "flow_x_1.jpg", "flow_x_2.jpg"])
    {'flow_x_*.jpg': 2, 'img_*.jpg': 2}
    """
    by_text: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_text[_DIGITS.sub("*", os.path.splitext(name)[0])].append(name)
    groups = [some for _, group in sorted(by_text.items()) for some in _by_ending(group)]
    large = [group for group in groups if len(group) > 1]
    alike: list[list[str]] = []
    for i, group in enumerate(large):
        others = large[:i] + large[i + 1 :]
        if any(_same_numbers(group, other) for other in others):
            alike.append(group)
    if sum(map(len, alike)) < _MAIN * len(names):
        return {}
    return {_pattern(group, names): len(group) for group in alike}


def stranger(names: Sequence[str]) -> str | None:
    """The one picture (a cover, say) whose name is not like those of the others, which are all of one type."""
    by_text: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_text[_DIGITS.sub("*", os.path.splitext(name)[0])].append(name)
    if len(by_text) != 2 or len(names) < 5:
        return None
    few, many = sorted(by_text.values(), key=len)
    return few[0] if len(few) == 1 < len(many) and not _DIGITS.search(few[0]) else None


def _by_ending(group: list[str]) -> list[list[str]]:
    """One list for each file ending, where the same name has several; else the group as it is."""
    by_ending: dict[str, list[str]] = defaultdict(list)
    for name in group:
        by_ending[os.path.splitext(name)[1].lower()].append(name)
    return list(by_ending.values()) if len({os.path.splitext(n)[0] for n in group}) < len(group) else [group]


def _same_numbers(one: list[str], other: list[str]) -> bool:
    """Whether half of the numbers of the smaller group are in the other one as well."""
    first, second = ({_number(name) for name in group} - {None} for group in (one, other))
    return 2 * len(first & second) >= min(len(first), len(second)) > 0


def _number(name: str) -> int | None:
    found = _DIGITS.findall(os.path.splitext(name)[0])
    return int(found[-1][-18:]) if found else None


def _pattern(group: list[str], names: Sequence[str]) -> str:
    """The simplest shell pattern of the names of `group` that no other of `names` has."""
    stem, ending = os.path.splitext(group[0])
    text = _DIGITS.sub("\0", re.sub(r"([*?[])", r"[\1]", stem))
    for number in ("*", "*[0-9]", "[0-9]*", "[0-9]*[0-9]"):
        pattern = text.replace("\0", number) + ending
        if set(filter(matcher(pattern), names)) == set(group):
            return pattern
    return text.replace("\0", "*") + ending
