"""RandAugment: its notation, the draw of one clip's operations, and the strength of each.

Method: Cubuk et al. 2020 in timm's variant, which the VideoMAE recipe uses as `rand-m7-n4-mstd0.5-inc1`: n operations
of 15 with replacement, each done with probability 0.5, its magnitude normal around m and cut to [0, 10]; with inc1 a
larger magnitude is a larger change for all of them. One draw holds for all frames of a clip.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

from vac_ddp.errors import UserError


class Op(IntEnum):
    """What one slot of a clip does. The value that goes with it is what the comment says."""

    NONE = 0
    AUTOCONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4  # bits kept, 1 to 8
    SOLARIZE = 5  # first grey level that is inverted, 0 to 256
    SOLARIZE_ADD = 6  # what is added to grey levels below 128
    COLOR = 7  # factor, 1: unchanged; so for the next three
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    ROTATE = 11  # degrees, counter-clockwise
    SHEAR_X = 12  # pixels to the side per pixel down
    SHEAR_Y = 13
    TRANSLATE_X = 14  # share of the width
    TRANSLATE_Y = 15
    RESAMPLE = 16  # all geometric operations of the clip as one matrix


CHOICES = tuple(Op(number) for number in range(1, 16))
GEOMETRIC = frozenset({Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y})

MOST = 100  # of a magnitude or a number of operations
LEVELS = 10.0  # the magnitude at which an operation has its full strength


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Settings in timm's notation: `rand` and -m, -n, -p, -mstd, -mmax, -inc, each followed by its number."""

    magnitude: float = 10.0
    layers: int = 2
    probability: float = 0.5
    std: float = 0.0  # inf: uniform between 0 and the magnitude
    maximum: float = LEVELS
    increasing: bool = False


@lru_cache(maxsize=16)
def parse(notation: str) -> RandAugment | None:
    """Read timm's notation; None where it is empty. A UserError names the part that is not understood."""
    if not notation:
        return None
    head, *parts = notation.split("-")
    names = {"m": "magnitude", "n": "layers", "p": "probability", "mstd": "std", "mmax": "maximum", "inc": "increasing"}
    values: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(inf|\d+\.?\d*)", part)
        if head != "rand" or match is None or match[1] not in names:
            head = ""
            break
        values[names[match[1]]] = float(match[2])
    if head != "rand":
        raise UserError(
            f"augment.randaugment={notation}: expected timm's notation, as rand-m7-n4-mstd0.5-inc1 "
            "(m magnitude, n operations, p probability, mstd, mmax, inc)"
        )
    if not 0 <= values.get("probability", 0.5) <= 1:
        raise UserError(f"augment.randaugment={notation}: the probability p must lie in 0 to 1")
    if any(values.get(name, 0) > MOST for name in ("magnitude", "layers", "maximum")):
        raise UserError(f"augment.randaugment={notation}: m, n and mmax must be at most {MOST}")
    std = values.get("std", 0.0)
    return RandAugment(
        magnitude=values.get("magnitude", LEVELS),
        layers=int(values.get("layers", 2)),
        probability=values.get("probability", 0.5),
        std=math.inf if std > 100 else std,  # timm: above 100 stands for uniform
        maximum=values.get("maximum", 0.0) or LEVELS,
        increasing=bool(values.get("increasing", 0)),
    )


def draw(rng: np.random.Generator, spec: RandAugment) -> list[tuple[Op, float]]:
    """The `spec.layers` operations of one clip with their values, in order; (Op.NONE, 0) where one is skipped."""
    n = spec.layers
    chosen = rng.integers(len(CHOICES), size=n)
    done = rng.random(n) < spec.probability
    if math.isinf(spec.std):
        levels = rng.uniform(0.0, spec.magnitude, size=n)
    else:
        levels = rng.normal(spec.magnitude, spec.std, size=n)
    levels = np.clip(levels, 0.0, spec.maximum)
    negative = rng.random(n) < 0.5
    return [
        (CHOICES[chosen[i]], strength(CHOICES[chosen[i]], float(levels[i]), bool(negative[i]), spec.increasing))
        if done[i]
        else (Op.NONE, 0.0)
        for i in range(n)
    ]


def strength(op: Op, level: float, negative: bool, increasing: bool) -> float:
    """The value of `op` at magnitude `level` (0 to 10 and, with mmax, above), to the left or down if `negative`.

    timm's table: rotation to 30 degrees, shear to 0.3, translation to 0.45 of the side, enhancement factors 1 +- 0.9
    (without `increasing` 0.1 to 1.9), posterize down to 1 bit (timm: 0, which Pillow refuses), solarize down to 0,
    solarize-add up to 110.
    """
    share = level / LEVELS
    sign = -1.0 if negative else 1.0
    if op in (Op.AUTOCONTRAST, Op.EQUALIZE, Op.INVERT, Op.NONE):
        return 0.0
    if op is Op.ROTATE:
        return sign * 30.0 * share
    if op in (Op.SHEAR_X, Op.SHEAR_Y):
        return sign * 0.3 * share
    if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
        return sign * 0.45 * share
    if op is Op.POSTERIZE:
        return float(max(1, 4 - int(share * 4) if increasing else int(share * 4)))
    if op is Op.SOLARIZE:
        threshold = min(256, int(share * 256))
        return float(256 - threshold if increasing else threshold)
    if op is Op.SOLARIZE_ADD:
        return float(min(128, int(share * 110)))
    return max(0.1, 1.0 + sign * 0.9 * share) if increasing else 0.1 + 1.8 * share


def affine(op: Op, value: float, size: int) -> np.ndarray:
    """A geometric operation on `size` x `size` pixels as a (3, 3) float64 matrix from places in its result to places
    in its input; x to the right, y down, from the upper left corner of the upper left pixel.
    """
    matrix = np.eye(3)
    if op is Op.ROTATE:
        angle, half = -math.radians(value), size / 2
        cos, sin = math.cos(angle), math.sin(angle)
        matrix[:2, :2] = (cos, sin), (-sin, cos)
        matrix[:2, 2] = half - (cos + sin) * half, half - (cos - sin) * half
    elif op is Op.SHEAR_X:
        matrix[0, 1] = value
    elif op is Op.SHEAR_Y:
        matrix[1, 0] = value
    elif op is Op.TRANSLATE_X:
        matrix[0, 2] = value * size
    elif op is Op.TRANSLATE_Y:
        matrix[1, 2] = value * size
    return matrix


def compose(ops: list[tuple[Op, float]], size: int) -> tuple[list[tuple[Op, float]], np.ndarray]:
    """The same operations with all geometric ones as one RESAMPLE at the place of the first, and its (2, 3) matrix.

    Geometric and photometric operations commute but for the fill colour and for what is measured over a whole frame
    (autocontrast, equalize, contrast): one that lies between two geometric ones sees the frame after both of them.
    """
    matrix, out = np.eye(3), []
    first = True
    for op, value in ops:
        if op not in GEOMETRIC:
            out.append((op, value))
            continue
        matrix = matrix @ affine(op, value, size)
        out.append((Op.RESAMPLE if first else Op.NONE, 0.0))
        first = False
    return out, matrix[:2]
