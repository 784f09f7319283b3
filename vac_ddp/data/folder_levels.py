"""Folders given one level too high or too deep: where the frames really lie, for the message that says so."""

# ruff: noqa: PTH118, PTH208 - as in scan.py, paths stay text

from __future__ import annotations

import os
from pathlib import Path

from vac_ddp.data.scan import IMAGE_SUFFIXES
from vac_ddp.data.video_scan import is_video_file

_LOOKS = 8  # folders of each level that are looked into
_DEEPEST = 5


def better_roots(root: Path, *, labelled: bool) -> list[Path]:
    """Folders below `root` that look like what was asked for, where its frames lie deeper than expected.

    Expected are <class>/<video>/*.jpg, or <video>/*.jpg without labels. Nothing where a folder of `root` has frames
    where they belong, or has none at all.
    """
    wanted = 2 if labelled else 1
    found = []
    for folder in _folders(str(root))[:_LOOKS]:
        depth = frames_below(folder)
        if depth is None or depth < wanted:
            continue
        while (below := frames_below(folder)) is not None and below > wanted:
            folder = next(inner for inner in _folders(folder) if frames_below(inner) is not None)
        found.append(Path(folder))
    return found


def frames_below(folder: str, deepest: int = _DEEPEST) -> int | None:
    """How many levels of folders lie between `folder` and the nearest images in it; None: there are none.

    A video file is as a folder of images.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return None
    if any(name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") for name in names):
        return 0
    if deepest == 0:
        return None
    depths: list[int | None] = [0] if any(is_video_file(n) and not n.startswith(".") for n in names) else []
    depths += [frames_below(inner, deepest - 1) for inner in _folders(folder)[:_LOOKS]]
    known = [depth for depth in depths if depth is not None]
    return min(known) + 1 if known else None


def _folders(folder: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
    except OSError:
        return []
    paths = (os.path.join(folder, name) for name in names)
    return [path for path in paths if Path(path).is_dir()]
