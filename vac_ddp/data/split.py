"""Which videos train and which validate: whole sources on one side, every class near its share on both."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vac_ddp.data.grouping import find_sources
from vac_ddp.data.holdout import grouped_folds, grouped_holdout
from vac_ddp.data.index import Index
from vac_ddp.data.official_lists import TEST, TRAIN, official_parts, read_official
from vac_ddp.errors import UserError
from vac_ddp.files import write_atomic
from vac_ddp.settings import DataSettings
from vac_ddp.text import encoded, listed, printable

COLUMNS = ("video", "class", "source", "part")
PARTS = ("train", "val", "unused")
_NAMED = 5
_FAR = 0.1  # a class whose validation share is this far from the wish is named


@dataclass(kw_only=True)
class Split:
    """The two parts, as sorted video numbers int64. A video may be in neither (official lists have unused ones)."""

    train: np.ndarray
    val: np.ndarray
    groups: list[str]  # (V,) the source of every video
    grammar: str  # how the sources were told
    notes: list[str] = field(default_factory=list)  # what the user should read, one line each


def make_split(index: Index, settings: DataSettings, *, seed: int) -> Split:
    """Split the videos of a labelled index: official lists, a fold, or a hold-out of `data.val_fraction`.

    The same names give the same split for the same seed, in whatever order the file system lists them. With
    `data.val` set, or `data.val_fraction=0`, everything trains. Raises UserError where a setting cannot be met.
    """
    names = list(index.names)
    classes = [index.classes[label] for label in index.labels.tolist()]
    sources = find_sources(names, classes, settings)
    notes = list(sources.notes)
    fold = parse_fold(settings.fold)
    everything = np.arange(len(names), dtype=np.int64)
    if settings.official_lists:
        if fold:
            raise UserError("data.fold and data.official_lists both make the split: set one of them")
        lists = read_official(settings.official_lists, settings.official_split)
        parts, found = official_parts(lists, names)
        train, val = np.flatnonzero(parts == TRAIN), np.flatnonzero(parts == TEST)
        notes += [f"split: official {lists.kind} lists, split {settings.official_split}", *found]
    elif fold:
        k, folds = fold
        if folds > len(set(sources.groups)):
            raise UserError(
                f"data.fold={settings.fold}: there are only {len(set(sources.groups))} sources to put in folds"
            )
        assigned = grouped_folds(sources.groups, index.labels, folds=folds, seed=seed)
        train, val = np.flatnonzero(assigned != k - 1), np.flatnonzero(assigned == k - 1)
        notes.append(f"split: fold {k} of {folds}, seed {seed}")
    elif settings.val or settings.val_fraction == 0:
        why = f"validation is data.val={settings.val}" if settings.val else "data.val_fraction=0"
        return Split(
            train=everything,
            val=everything[:0],
            groups=sources.groups,
            grammar=sources.grammar,
            notes=[*notes, f"split: everything trains, {why}"],
        )
    else:
        if not 0 < settings.val_fraction < 1:
            raise UserError(f"data.val_fraction={settings.val_fraction:g} must be at least 0 and below 1")
        held = grouped_holdout(sources.groups, index.labels, fraction=settings.val_fraction, seed=seed)
        train, val = np.flatnonzero(~held), np.flatnonzero(held)
        notes.append(f"split: grouped hold-out of {settings.val_fraction:g}, seed {seed}")
        if not len(val):
            raise UserError("no source can be held out for validation: set data.val_fraction=0 or add videos")
    notes += _balance_notes(index, train, val, settings.val_fraction if not fold else 1 / fold[1], settings)
    if sources.grammar != "none":
        notes += _leak_notes(index, sources.groups, train, val, seed)
    return Split(train=train, val=val, groups=sources.groups, grammar=sources.grammar, notes=notes)


def parse_fold(text: str | None) -> tuple[int, int] | None:
    """(k, K) of "k/K", k from 1 to K and K at least 2; None where no fold is asked for."""
    if text is None or not text.strip():
        return None
    k, slash, folds = text.partition("/")
    try:
        fold = int(k), int(folds)
    except ValueError:
        fold = 0, 0
    if not slash or not 1 <= fold[0] <= fold[1] or fold[1] < 2:
        raise UserError(f"data.fold={text} must be k/K with 1 <= k <= K and K >= 2, as in 1/5")
    return fold


def leak_share(groups: Sequence[str], train: np.ndarray, val: np.ndarray) -> float:
    """Share of the validation videos whose source is also in training, 0 to 1 (0 without validation)."""
    seen = {groups[i] for i in train.tolist()}
    return sum(groups[i] in seen for i in val.tolist()) / max(1, len(val))


def random_split(labels: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The split most people make: stratified over the classes, blind to the sources. (train, val) int64."""
    rng = np.random.default_rng([seed, 0x1EAF])
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        videos = np.flatnonzero(labels == label)
        held[rng.permutation(videos)[: round(fraction * len(videos))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _balance_notes(index: Index, train: np.ndarray, val: np.ndarray, wish: float, settings: DataSettings) -> list[str]:
    notes = [f"  {len(train)} videos train, {len(val)} validate, {len(index) - len(train) - len(val)} unused"]
    trained = np.bincount(index.labels[train], minlength=len(index.classes))
    held = np.bincount(index.labels[val], minlength=len(index.classes))
    there = np.bincount(index.labels, minlength=len(index.classes)) > 0
    for count, what in ((trained, "training"), (held, "validation")):
        lacking = [index.classes[i] for i in np.flatnonzero(there & (count == 0))]
        if lacking:
            notes.append(f"warning: {len(lacking)} classes have no {what} video: {', '.join(lacking[:_NAMED])}")
    if not settings.official_lists:
        share = held / np.maximum(1, trained + held)
        far = np.flatnonzero(there & (held > 0) & (abs(share - wish) > _FAR))
        if len(far):
            some = ", ".join(f"{index.classes[i]} {share[i]:.0%}" for i in far[:_NAMED])
            notes.append(f"  {len(far)} classes are held out far from {wish:.0%}, as their sources allow: {some}")
    return notes


def _leak_notes(index: Index, groups: Sequence[str], train: np.ndarray, val: np.ndarray, seed: int) -> list[str]:
    used = np.sort(np.concatenate([train, val]))
    fraction = len(val) / max(1, len(used))
    blind_train, blind_val = random_split(index.labels[used], fraction=fraction, seed=seed)
    blind = leak_share(groups, used[blind_train], used[blind_val])
    chosen = leak_share(groups, train, val)
    note = f"  validation videos with their source in training: {chosen:.1%} (a random split: {blind:.1%})"
    return [("warning: " + note.strip()) if chosen else note]


def write_split(path: str | Path, index: Index, split: Split) -> None:
    """Write video,class,source,part (train, val or unused) for every video, atomically."""
    parts = np.full(len(index), "unused", object)
    parts[split.train] = "train"
    parts[split.val] = "val"
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    labels = index.labels.tolist()
    for name, label, source, part in zip(index.names, labels, split.groups, parts, strict=True):
        writer.writerow((name, index.classes[label] if label >= 0 else "", source, part))
    write_atomic(path, lambda stream: stream.write(encoded(text.getvalue())))


def read_split(path: str | Path, index: Index) -> Split:
    """The split that `write_split` wrote, for the same videos. UserError names what is missing or changed."""
    path = Path(path)
    rows = split_rows(path)
    videos, classes, sources, parts = ([row[i] for row in rows] for i in range(len(COLUMNS)))
    names = list(index.names)
    if videos != names:
        _same_videos(path, videos, names, index)
        place = {video: i for i, video in enumerate(videos)}
        order = [place[name] for name in names]
        classes, sources, parts = ([column[i] for i in order] for column in (classes, sources, parts))
    for name, label, known in zip(names, index.labels.tolist(), classes, strict=True):
        if label >= 0 and known != index.classes[label]:
            raise UserError(
                f"{path} has {name} in class {known}, the data in {index.classes[label]}: "
                "bring the data back as it was, or begin a new run"
            )
    return Split(
        train=np.array([i for i, part in enumerate(parts) if part == "train"], np.int64),
        val=np.array([i for i, part in enumerate(parts) if part == "val"], np.int64),
        groups=sources,
        grammar="as written",
        notes=[f"split: read from {path}"],
    )


def split_rows(path: Path) -> list[tuple[str, str, str, str]]:
    """The rows video, class, source, part of a split.csv. UserError for a file that is none, or a line that is none."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the split {path}: {error.strerror}") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    rows = []
    try:
        if tuple(next(reader, ())) != COLUMNS:
            raise UserError(f"{path} is no split: its first line must be {','.join(COLUMNS)}")
        for row in reader:
            if len(row) != len(COLUMNS) or row[3] not in PARTS:
                raise UserError(
                    f"{path} line {reader.line_num} is not video,class,source and one of {', '.join(PARTS)}: "
                    "restore the file, or begin a new run"
                )
            label, source, part = (sys.intern(printable(cell)) for cell in row[1:])
            rows.append((printable(row[0]), label, source, part))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} cannot be read as CSV ({error}): restore it") from None
    return rows


def _same_videos(path: Path, videos: list[str], names: list[str], index: Index) -> None:
    written, there = set(videos), set(names)
    if len(written) < len(videos):
        raise UserError(f"{path} names a video twice: it is not as it was written")
    gone = [name for name in videos if name not in there]
    new = [name for name in names if name not in written]
    for some, what in ((gone, f"of {path} are not in {index.root}"), (new, f"of {index.root} are not in {path}")):
        if some:
            raise UserError(
                f"{len(some)} videos {what} ({listed(some, _NAMED)}): bring the data back as it was, or begin a new run"
            )
