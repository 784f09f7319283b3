"""Choosing whole groups for validation so that every class comes near its share. Pure functions of names and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXACT = 512  # groups of one class whose sums are searched exactly; of more, all but these are dealt before
_EXACT_BITS = 2**28  # memory of that search
_IMPROVED = 1500  # spanning groups that are moved and exchanged after they were dealt
_ROUNDS = 200
_TRIED = 50
_EMPTY_SIDE = 1e6  # cost of a class with nothing on one side


@dataclass(kw_only=True)
class _Counts:
    """How many videos each group has in each class: E entries; G groups in an order shuffled by the seed."""

    row: np.ndarray  # (V,) group of each video
    group: np.ndarray  # (E,)
    label: np.ndarray  # (E,)
    videos: np.ndarray  # (E,)
    groups: int
    classes: int


def _count(groups: Sequence[str], labels: np.ndarray, seed: int) -> _Counts:
    """Sorted names, then shuffled: the order in which the file system lists them has no say."""
    unique = sorted(set(groups))
    shuffled = np.random.default_rng([seed, 0x5917]).permutation(len(unique)).tolist()
    place = dict(zip(unique, shuffled, strict=True))
    row = np.array([place[group] for group in groups], np.int64)
    classes = int(labels.max(initial=-1)) + 1
    keys, videos = np.unique(row * classes + labels, return_counts=True)
    return _Counts(
        row=row,
        group=keys // max(1, classes),
        label=keys % max(1, classes),
        videos=videos,
        groups=len(unique),
        classes=classes,
    )


def grouped_holdout(groups: Sequence[str], labels: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """Which videos validate, (V,) bool, of the sources `groups` (V,) and `labels` (V,) int64.

    Whole groups only; each class comes as near to `fraction` as they allow with something on both sides. Groups
    that span classes are chosen first, by descent on the squared distances; then the groups of each class alone,
    exactly: the reachable number of videos nearest to the share. A class with one group trains.
    """
    counts = _count(groups, labels, seed)
    spans = np.bincount(counts.group, minlength=counts.groups) > 1
    spanning = spans[counts.group]
    total = np.bincount(counts.label, counts.videos, minlength=counts.classes)
    own_mass = np.bincount(counts.label[~spanning], counts.videos[~spanning], minlength=counts.classes)
    held = np.zeros(counts.groups, bool)
    held[_descend(counts, spanning, total, own_mass, fraction)] = True
    by_class = np.argsort(np.where(spanning, counts.classes, counts.label), kind="stable")
    edges = np.searchsorted(np.where(spanning, counts.classes, counts.label)[by_class], np.arange(counts.classes + 1))
    already = np.bincount(counts.label, counts.videos * (spanning & held[counts.group]), minlength=counts.classes)
    for label in range(counts.classes):
        own = by_class[edges[label] : edges[label + 1]]
        if len(own):
            chosen = nearest_subset(
                counts.videos[own].tolist(),
                fraction * total[label] - already[label],
                some=not already[label],
                rest=already[label] + own_mass[label] == total[label],
            )
            held[counts.group[own[chosen]]] = True
    return held[counts.row]


def nearest_subset(sizes: list[int], target: float, *, some: bool, rest: bool) -> np.ndarray:
    """Positions of a subset of `sizes` whose sum is nearest to `target`, int64.

    `some`: the subset must not be empty; `rest`: it must not be everything; where both can't be, it is empty.
    Among equally near subsets the one of early positions is taken, so shuffled sizes give a random one.
    """
    whole = sum(sizes)
    if some and rest and len(sizes) < 2:
        return np.zeros(0, np.int64)
    target = min(max(target, 1 if some else 0), whole - 1 if rest else whole)
    limit = min(whole, int(2 * target) + 1 + min(sizes)) + 1  # what is farther away than nothing is not needed
    exact = min(_EXACT, max(16, _EXACT_BITS // limit))
    first = max(0, len(sizes) - exact)
    share, dealt, taken = target * sum(sizes[:first]) / whole, 0, []
    for i, size in enumerate(sizes[:first]):
        if dealt + size > share:
            break
        dealt += size
        taken.append(i)
    reachable = [1 << dealt]
    mask = (1 << (max(limit, min(sizes[first:])) + dealt + 1)) - 1
    for size in sizes[first:]:
        reachable.append((reachable[-1] | reachable[-1] << size) & mask)
    last = reachable[-1]
    bits = np.frombuffer(last.to_bytes(last.bit_length() // 8 + 1, "little"), np.uint8)
    sums = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
    sums = sums[(sums > 0 if some else sums >= 0) & (sums < whole if rest else sums <= whole)]
    best = int(sums[np.argmin(np.abs(sums - target))])
    for i in range(len(sizes) - 1, first - 1, -1):
        if not reachable[i - first] >> best & 1:
            best -= sizes[i]
            taken.append(i)
    return np.array(sorted(taken), np.int64)


def _descend(
    counts: _Counts, spanning: np.ndarray, total: np.ndarray, own_mass: np.ndarray, fraction: float
) -> np.ndarray:
    """The groups over several classes that validate: near `fraction` of these groups' videos in every class."""
    groups = np.unique(counts.group[spanning])
    if not len(groups):
        return groups
    mass = total - own_mass
    target = fraction * mass
    weight = 1 / np.maximum(1, total) ** 2
    both_sides = (own_mass == 0) & (mass > 0)

    def cost(videos: np.ndarray) -> np.ndarray:
        """Cost of the held videos (..., K) of each class."""
        empty = both_sides & ((videos == 0) | (videos == mass))
        return ((videos - target) ** 2 * weight).sum(-1) + _EMPTY_SIDE * empty.sum(-1)

    have = np.zeros(counts.classes)
    chosen = _deal(counts, spanning, groups, have, target, weight)
    if len(groups) > _IMPROVED:
        return groups[chosen]
    table = np.zeros((len(groups), counts.classes))
    table[np.searchsorted(groups, counts.group[spanning]), counts.label[spanning]] = counts.videos[spanning]
    for _ in range(_ROUNDS):
        now = float(cost(have))
        flips = have + np.where(chosen[:, None], -table, table)
        after = cost(flips)
        best, moved = float(after.min()), [int(after.argmin())]
        inside, outside = np.flatnonzero(chosen), np.flatnonzero(~chosen)
        if len(inside) and len(outside):
            slope = 2 * table @ ((have - target) * weight)
            square = (table**2) @ weight
            change = (
                (square - slope)[inside, None]
                + (square + slope)[None, outside]
                - 2 * (table[inside] * weight) @ table[outside].T
            )
            for pair in np.argsort(change, axis=None, kind="stable")[:_TRIED].tolist():
                out, into = inside[pair // len(outside)], outside[pair % len(outside)]
                value = float(cost(have - table[out] + table[into]))
                if value < best - 1e-12:
                    best, moved = value, [int(out), int(into)]
        if best >= now - 1e-12:
            break
        for group in moved:
            have = have + (-table[group] if chosen[group] else table[group])
            chosen[group] = not chosen[group]
    return groups[chosen]


def _deal(
    counts: _Counts,
    spanning: np.ndarray,
    groups: np.ndarray,
    have: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
) -> np.ndarray:
    """One pass over the groups: each is held out if that brings its classes nearer. Adds to `have` (K,)."""
    labels, videos = counts.label[spanning], counts.videos[spanning]
    edges = np.searchsorted(counts.group[spanning], np.append(groups, counts.groups))
    chosen = np.zeros(len(groups), bool)
    for i in range(len(groups)):
        which, size = labels[edges[i] : edges[i + 1]], videos[edges[i] : edges[i + 1]]
        gap = have[which] - target[which]
        if (((gap + size) ** 2 - gap**2) * weight[which]).sum() < 0:
            chosen[i] = True
            have[which] += size
    return chosen


def grouped_folds(groups: Sequence[str], labels: np.ndarray, *, folds: int, seed: int) -> np.ndarray:
    """The fold of each video, (V,) int64 from 0: every group in exactly one, the classes spread evenly.

    Groups are dealt from the largest to the smallest, each to the fold that has least of its classes so far
    (the rule of scikit-learn's StratifiedGroupKFold, with shares of a class in place of deviations).
    """
    counts = _count(groups, labels, seed)
    total = np.bincount(counts.label, counts.videos, minlength=counts.classes)
    share = counts.videos / total[counts.label]
    edges = np.searchsorted(counts.group, np.arange(counts.groups + 1))
    size = np.bincount(counts.group, counts.videos, minlength=counts.groups)
    have = np.zeros((folds, counts.classes))
    videos = np.zeros(folds)
    fold = np.zeros(counts.groups, np.int64)
    for group in np.argsort(-size, kind="stable").tolist():
        entries = slice(edges[group], edges[group + 1])
        cost = have[:, counts.label[entries]] @ share[entries]
        best = np.flatnonzero(cost <= cost.min() + 1e-12)
        fold[group] = best[np.argmin(videos[best])]
        have[fold[group], counts.label[entries]] += share[entries]
        videos[fold[group]] += size[group]
    return fold[counts.row]
