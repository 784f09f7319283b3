"""Audit a data set: damage, leaks between the parts of the split, duplicates, and classes that size gives away."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from vac_ddp.audit import duplicates
from vac_ddp.audit.inspection import Inspection, inspect_all
from vac_ddp.audit.shortcuts import nearest_neighbour
from vac_ddp.data.grouping import find_sources
from vac_ddp.data.index import Index, open_as_it_is
from vac_ddp.data.scan import Scan
from vac_ddp.data.split import Split, leak_share, make_split, random_split
from vac_ddp.data.video_scan import GOOD, STATES
from vac_ddp.errors import UserError
from vac_ddp.settings import Config

RANDOM_SPLITS = 10
LISTED = 1000  # names of each kind in the JSON file
UNBALANCED = 5  # times more videos in the largest class than in the smallest
PARTS = ("training", "validation", "test", "unused")


@dataclass(kw_only=True)
class Audited:
    """One folder and what was seen in it."""

    name: str  # "data", "validation" or "test"
    index: Index
    found: Scan
    inspections: list[Inspection]


def audit(config: Config, *, test: str | None = None, workers: int | None = None) -> dict[str, Any]:
    """Audit `config.data.train` as it would be split, `config.data.val` if set, and a test folder.

    Every frame is decoded. Returns plain values as they go into the JSON file; `findings` has a line for everything
    that would spoil a result, `remarks` for what is worth knowing.
    """
    roots = [("data", config.data.train, True)]
    roots += [("validation", config.data.val, True)] if config.data.val else []
    roots += [("test", test, False)] if test else []
    opened = [(name, *open_as_it_is(root, labelled=labelled, settings=config.data)) for name, root, labelled in roots]
    sets = [
        Audited(name=name, index=index, found=found, inspections=inspect_all(index, workers=workers, what=name))
        for name, index, found in opened
    ]
    report: dict[str, Any] = {
        "data": config.data.train,
        "validation": config.data.val,
        "test": test,
        "seed": config.seed,
        "findings": [],
        "remarks": [note for part in sets for note in part.index.notes],
    }
    report["damage"] = {part.name: _damage(part, report) for part in sets}
    report["damaged_videos"] = {part.name: _damaged_videos(part)[:LISTED] for part in sets}
    parts, groups = _split(sets, config, report)
    report["classes"] = _classes(sets[0], parts[0], report)
    report["duplicates"] = _duplicates(sets, parts, report)
    report["giveaway"] = _giveaway(sets[0], groups, report)
    return report


# ---------------------------------------------------------------- frames


def _damage(part: Audited, report: dict[str, Any]) -> dict[str, Any]:
    index, inspections, states = part.index, part.inspections, part.found.states
    frames = int(index.frame_counts.sum())
    damaged = [
        f"{index.frame_name(v, f)}: {why}" for v, inspection in enumerate(inspections) for f, why in inspection.damaged
    ]
    odd = [f"{index.frame_name(v, f)}" for v, inspection in enumerate(inspections) for f in inspection.odd]
    lost = [
        f"{index.names[v]}: {STATES[states[v]] if states[v] != GOOD else 'no frame decodes'}"
        for v, inspection in enumerate(inspections)
        if not inspection.sizes
    ]
    if damaged and not any(inspection.sizes for inspection in inspections):
        report["findings"].append(f"no frame of any video of the {part.name} decodes, e.g. {damaged[0]}")
        damaged, lost = [], []
    for some, what in (
        (damaged, f"of {frames} frames of the {part.name} are damaged"),
        (odd, f"of {frames} frames of the {part.name} have another size than the rest of their video"),
        (lost, f"of {len(index)} videos of the {part.name} have no frame that decodes"),
    ):
        if some:
            report["findings"].append(f"{len(some)} {what}, e.g. {some[0]}")
    usual = [inspection.sizes.most_common(1)[0][0] for inspection in inspections if inspection.sizes]
    counts = index.frame_counts[index.frame_counts > 0]
    return {
        "videos": len(index),
        "frames": frames,
        "damaged": len(damaged),
        "odd_sized": len(odd),
        "lost_videos": len(lost),
        "damaged_frames": damaged[:LISTED],
        "odd_sized_frames": odd[:LISTED],
        "videos_without_frames": lost[:LISTED],
        "sizes": [[w, h, n] for (h, w), n in Counter(usual).most_common(5)],
        "frames_least_median_most": [int(f(counts)) for f in (np.min, np.median, np.max)] if len(counts) else [0, 0, 0],
    }


def _damaged_videos(part: Audited) -> list[str]:
    """One line for each video with damaged frames: how many, and what is wrong with the first."""
    return [
        f"{part.index.names[video]}: {len(inspection.damaged)} of {part.index.frame_counts[video]} frames, the first "
        f"{part.index.frames.name(video, inspection.damaged[0][0])}: {inspection.damaged[0][1]}"
        for video, inspection in enumerate(part.inspections)
        if inspection.damaged
    ]


# ---------------------------------------------------------------- split and classes


def _make_split(index: Index, config: Config, report: dict[str, Any]) -> Split:
    """The split of training. Where damage was found, one that cannot be made is a finding behind it, not the end."""
    try:
        if len(index):
            return make_split(index, config.data, seed=config.seed)
    except UserError as error:
        if not report["findings"]:
            raise
        report["findings"].append(f"what is left cannot be split: {error}")
    none = np.zeros(0, np.int64)
    return Split(train=none, val=none, groups=list(index.names), grammar="none", notes=["no split can be made"])


def _split(sets: list[Audited], config: Config, report: dict[str, Any]) -> tuple[list[np.ndarray], list[str]]:
    """The part of every video of every set (numbers into PARTS), and the sources of the first one's videos."""
    data = sets[0]
    good = np.flatnonzero(data.found.states == GOOD)
    split = _make_split(data.index.take(good), config, report)
    part = np.full(len(data.index), PARTS.index("unused"), np.int64)
    part[good[split.train]] = PARTS.index("training")
    part[good[split.val]] = PARTS.index("validation")
    groups = list(data.index.names)
    for video, group in zip(good.tolist(), split.groups, strict=True):
        groups[video] = group
    parts = [part]
    training, validation = good[split.train], good[split.val]
    sources, labels = groups, data.index.labels
    for other in sets[1:]:
        parts.append(np.full(len(other.index), PARTS.index(other.name), np.int64))
        if other.name == "validation":
            together = [data.index, other.index]
            names = [name for index in together for name in index.names]
            classes = [index.classes[label] for index in together for label in index.labels.tolist()]
            sources = find_sources(names, classes, config.data).groups
            validation = np.arange(len(data.index), len(names))
            labels = np.array([sorted(set(classes)).index(name) for name in classes], np.int64)
    used = np.sort(np.concatenate([training, validation]))
    fraction = len(validation) / max(1, len(used))
    blind = []
    for seed in range(RANDOM_SPLITS):
        train, val = random_split(labels[used], fraction=fraction, seed=seed)
        blind.append(leak_share(sources, used[train], used[val]))
    chosen = leak_share(sources, training, validation)
    known = split.grammar != "none"
    report["split"] = {
        "grammar": split.grammar,
        "sources": len(set(sources)),
        "training": len(training),
        "validation": len(validation),
        "notes": split.notes,
        "leak_random": float(np.mean(blind)) if known and len(validation) else None,
        "leak_chosen": chosen if known and len(validation) else None,
    }
    if chosen > 0:
        report["findings"].append(f"{chosen:.1%} of the validation videos have their source in training")
    if not known:
        report["remarks"].append(
            "no sources are known, so a leak cannot be ruled out: set data.group_by, data.group_regex or data.group_csv"
        )
    return parts, groups


def _classes(data: Audited, part: np.ndarray, report: dict[str, Any]) -> list[dict[str, Any]]:
    index = data.index
    rows: list[dict[str, Any]] = []
    for label, name in enumerate(index.classes):
        mine = index.labels == label
        rows.append(
            {
                "class": name,
                "videos": int(mine.sum()),
                "training": int((mine & (part == PARTS.index("training"))).sum()),
                "validation": int((mine & (part == PARTS.index("validation"))).sum()),
                "frames_median": float(np.median(index.frame_counts[mine])) if mine.any() else 0.0,
            }
        )
    counts = [row["videos"] for row in rows if row["videos"]]
    hollow = [row["class"] for row in rows if not row["videos"]]
    if hollow:
        report["findings"].append(f"{len(hollow)} classes have no videos: {', '.join(hollow[:5])}")
    if len(rows) < 2:
        report["findings"].append("there is a single class: nothing can be told apart")
    if counts and max(counts) >= UNBALANCED * min(counts):
        report["remarks"].append(
            f"the largest class has {max(counts) / min(counts):.1f} times the videos of the smallest: "
            "consider data.balance=class or train.class_weights=inverse"
        )
    return rows


# ---------------------------------------------------------------- duplicates and shortcut features


def _duplicates(sets: list[Audited], parts: list[np.ndarray], report: dict[str, Any]) -> dict[str, Any]:
    """Clips that look the same in two parts, or in one part under two labels."""
    names = [(s.name, v) for s in sets for v in range(len(s.index))]
    part = np.concatenate(parts)
    label = np.concatenate([s.index.labels for s in sets])
    clips = [inspection.hashes for s in sets for inspection in s.inspections]
    some = np.arange(len(clips))
    if len(clips) > duplicates.MOST_CLIPS:
        some = np.sort(np.random.default_rng([0, 0xD0]).choice(len(clips), duplicates.MOST_CLIPS, replace=False))
        report["remarks"].append(f"duplicates were looked for among {len(some)} of {len(clips)} clips, drawn at random")
    kinds = part[some] * (int(label.max(initial=0)) + 2) + label[some] + 1
    hashes = duplicates.collect([clips[i] for i in some.tolist()])
    by_name = {s.name: s.index for s in sets}
    found: dict[str, list[dict[str, Any]]] = {}
    for i, j, distance, mirrored in duplicates.near_pairs(hashes, kinds):
        one, other = int(some[i]), int(some[j])
        both = sorted((int(part[one]), int(part[other])))
        if "unused" in (PARTS[both[0]], PARTS[both[1]]):
            continue
        if both[0] == both[1]:
            kind = f"{PARTS[both[0]]}, two labels"
        else:
            kind = f"{PARTS[both[0]]} and {PARTS[both[1]]}"
        pair = [by_name[names[c][0]].names[names[c][1]] for c in (one, other)]
        found.setdefault(kind, []).append({"clips": pair, "bits": round(distance, 2), "mirrored": mirrored})
    for kind, pairs in found.items():
        first = " and ".join(pairs[0]["clips"])
        report["findings"].append(f"{len(pairs)} pairs of clips look the same ({kind}), e.g. {first}")
    return {
        "threshold_bits": duplicates.THRESHOLD,
        "frames_a_clip": duplicates.FRAMES,
        "clips": int(hashes.known.sum()),
        "without_hash": int((~hashes.known).sum()),
        "pairs": {kind: len(pairs) for kind, pairs in found.items()},
        "examples": {kind: pairs[:LISTED] for kind, pairs in found.items()},
    }


def _giveaway(data: Audited, groups: list[str], report: dict[str, Any]) -> dict[str, Any] | None:
    seen = [v for v, inspection in enumerate(data.inspections) if inspection.sizes]
    if len(seen) < 2:
        return None
    sizes = [data.inspections[v].sizes.most_common(1)[0][0] for v in seen]
    features = np.array([(w, h, data.index.frame_counts[v]) for v, (h, w) in zip(seen, sizes, strict=True)], float)
    told = nearest_neighbour(features, data.index.labels[seen], [groups[v] for v in seen])
    if told.found:
        report["findings"].append(
            f"size and length alone tell the class in {told.accuracy:.1%} of the cases, chance is {told.chance:.1%}"
        )
    return {
        "accuracy": told.accuracy,
        "chance": told.chance,
        "margin": told.margin,
        "videos": told.videos,
        "found": told.found,
    }
