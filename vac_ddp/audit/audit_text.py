"""The report of `vac audit` as lines for people."""

from __future__ import annotations

from typing import Any

_CLASSES = 30  # more are shown as the five largest and the five smallest
_PAIRS = 5


def as_text(report: dict[str, Any]) -> str:
    """The whole report; the findings come last, where the eye is."""
    lines = ["frames (all of them decoded)", *_damage(report["damage"], report["damaged_videos"])]
    lines += ["", "split", *_split(report["split"])]
    lines += ["", "classes", *_classes(report["classes"])]
    lines += ["", "clips that look the same", *_duplicates(report["duplicates"])]
    lines += ["", "size and length", *_giveaway(report["giveaway"])]
    if report["remarks"]:
        lines += ["", "remarks", *(f"  - {remark}" for remark in report["remarks"])]
    if report["findings"]:
        lines += ["", "findings: these would spoil a result", *(f"  ! {finding}" for finding in report["findings"])]
    else:
        lines += ["", "nothing found that would spoil a result"]
    return "\n".join(lines)


def _damage(damage: dict[str, Any], videos: dict[str, list[str]]) -> list[str]:
    lines = []
    for name, seen in damage.items():
        least, median, most = seen["frames_least_median_most"]
        sizes = ", ".join(f"{w}x{h} ({n})" for w, h, n in seen["sizes"])
        lines += [
            f"  {name:<11}{seen['videos']:>7} videos {seen['frames']:>9} frames   damaged {seen['damaged']}, "
            f"of odd size {seen['odd_sized']}, videos without a good frame {seen['lost_videos']}",
            f"  {'':<11}{least} to {most} frames a video (median {median}); sizes {sizes or '-'}",
        ]
        for some in (videos[name], seen["odd_sized_frames"], seen["videos_without_frames"]):
            lines += [f"  {'':<11}  {line}" for line in some[:_PAIRS]]
    return lines


def _split(split: dict[str, Any]) -> list[str]:
    lines = [f"  {note}" for note in split["notes"] if "source in training" not in note]
    if split["leak_chosen"] is not None:
        lines += [
            f"  validation clips that share their source with training: {split['leak_chosen']:.1%} with this split, "
            f"{split['leak_random']:.1%} with a random one"
        ]
    elif not split["validation"]:
        lines.append("  nothing is held out")
    else:
        lines.append("  validation clips that share their source with training: unknown, no sources are known")
    return lines


def _classes(rows: list[dict[str, Any]]) -> list[str]:
    wide = max([5, *(len(row["class"]) for row in rows)])
    ordered = sorted(rows, key=lambda row: -row["videos"])
    shown = rows if len(rows) <= _CLASSES else [*ordered[:5], None, *ordered[-5:]]
    lines = [f"  {'class':<{wide}}  videos  training  validation  median frames"]
    for row in shown:
        if row is None:
            lines.append(f"  ... {len(rows) - 10} more")
        else:
            lines.append(
                f"  {row['class']:<{wide}}  {row['videos']:>6}  {row['training']:>8}  {row['validation']:>10}  "
                f"{row['frames_median']:>13g}"
            )
    return lines


def _duplicates(seen: dict[str, Any]) -> list[str]:
    lines = [
        f"  {seen['clips']} clips compared by pHash of {seen['frames_a_clip']} frames; the same: at most "
        f"{seen['threshold_bits']:g} of 64 bits apart"
    ]
    if seen["without_hash"]:
        lines.append(f"  {seen['without_hash']} clips have no frame to compare (damaged, black or faded)")
    if not seen["pairs"]:
        lines.append("  none in two parts, none under two labels")
    for kind, count in seen["pairs"].items():
        lines.append(f"  {kind}: {count} pairs")
        for pair in seen["examples"][kind][:_PAIRS]:
            turned = ", mirrored" if pair["mirrored"] else ""
            lines.append(f"    {' = '.join(pair['clips'])}  ({pair['bits']:g} bits{turned})")
    return lines


def _giveaway(told: dict[str, Any] | None) -> list[str]:
    if told is None:
        return ["  too few videos to tell"]
    verdict = "they give the class away" if told["found"] else "no giveaway"
    return [
        f"  nearest neighbour on width, height and length, other sources only: {told['accuracy']:.1%} right, "
        f"chance {told['chance']:.1%}: {verdict}"
    ]
