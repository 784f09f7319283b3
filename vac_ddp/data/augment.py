"""Clip augmentation on the device, whole batch at once.

Parameters are drawn per sample on the CPU (:func:`draw_parameters`) and stay in host memory, where a batch is planned:
which clips are flipped, which operation each clip has in each slot. The device only sees tensor operations on
the clips concerned, and nothing waits for it. A clip's result depends on its own pixels and parameters alone,
whatever batch it sits in. Order: flip, colour jitter, RandAugment, normalize, erase. The crop is drawn here and done
while decoding; the VideoMAE recipe runs RandAugment before the crop, on the larger frame, we after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vac_ddp.data import pixels, randaugment
from vac_ddp.data.frames import Box
from vac_ddp.data.normalization import Values, normalize
from vac_ddp.data.randaugment import Op
from vac_ddp.settings import AugmentSettings

CHUNK_CPU = 1  # clips that one tensor operation takes on: what stays in the cache
CHUNK_DEVICE = 16  # bounds the memory of wide intermediates

ERASE_AREA = (0.02, 1 / 3)  # timm's defaults, which the VideoMAE recipe keeps
ERASE_RATIO = (0.3, 1 / 0.3)

HOST_PARAMETERS = ("flip", "ops", "values", "affine", "erase", "erase_seed")  # a loader leaves these in host memory


def draw_crop_box(rng: np.random.Generator, augment: AugmentSettings, height: int, width: int) -> Box:
    """The random resized crop (top, left, height, width) in pixels of a frame of `height` x `width`.

    Area and log aspect ratio (width / height) are uniform; ten tries, then the largest centre crop within the ratios
    (the method of torchvision's `RandomResizedCrop`).
    """
    (low, high), (flat, wide) = augment.crop_scale, augment.crop_ratio
    for _ in range(10):
        area = height * width * rng.uniform(low, high)
        ratio = math.exp(rng.uniform(math.log(flat), math.log(wide)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < flat:
        h = max(1, round(width / flat))
    elif width / height > wide:
        w = max(1, round(height * wide))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_parameters(rng: np.random.Generator, augment: AugmentSettings, *, size: int) -> dict[str, np.ndarray]:
    """What happens to one clip of `size` x `size` pixels, the same in all its frames, as arrays of fixed shapes.

    S is 3 with colour jitter, plus the n of RandAugment. Where they are collated they gain a batch axis in front and
    stay in host memory.

    Returns
    -------
    flip : () bool
    ops, values : (S,) int64, (S,) float32
        Numbers of :class:`randaugment.Op` in order and what goes with each.
    affine : (2, 3) float32
        All geometric operations as one matrix for `Op.RESAMPLE`.
    erase : (4,) int64
        top, left, height, width of the erased rectangle, height 0: none.
    erase_seed : () int64
        What its noise is made from.

    """
    flip = rng.random() < augment.flip
    ops: list[tuple[Op, float]] = []
    if augment.color_jitter > 0:
        jitter = [Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR]
        factors = rng.uniform(max(0.0, 1 - augment.color_jitter), 1 + augment.color_jitter, size=3)
        ops += [(jitter[i], float(factors[i])) for i in rng.permutation(3)]
    spec = randaugment.parse(augment.randaugment)
    if spec is not None:
        ops += randaugment.draw(rng, spec)
    ops, matrix = randaugment.compose(ops, size)
    erase = draw_erase_box(rng, size) if rng.random() < augment.erase else (0, 0, 0, 0)
    return {
        "flip": np.array(flip, dtype=np.bool_),
        "ops": np.array([op for op, _ in ops], dtype=np.int64),
        "values": np.array([value for _, value in ops], dtype=np.float32),
        "affine": matrix.astype(np.float32),
        "erase": np.array(erase, dtype=np.int64),
        "erase_seed": np.array(rng.integers(1 << 32), dtype=np.int64),
    }


def draw_erase_box(rng: np.random.Generator, size: int) -> Box:
    """A rectangle (top, left, height, width) of 2 % to 33 % of the area; ten tries, then an empty one (timm)."""
    for _ in range(10):
        area = size * size * rng.uniform(*ERASE_AREA)
        ratio = math.exp(rng.uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < size and 0 < w < size:
            return int(rng.integers(size - h + 1)), int(rng.integers(size - w + 1)), h, w
    return 0, 0, 0, 0


def flip_guard(class_names: Sequence[str]) -> list[str]:
    """The classes that mirroring may turn into another one, in the order given; empty where none is suspected.

    A name is suspected for a word that tells sides or a sense of rotation apart (left, rightwards, clockwise, ...), or
    for a short form of one (l, rh, ccw, west, ...) where the mirrored name is a class as well.
    """
    words = {name: _words(name) for name in class_names}
    known = {tuple(parts) for parts in words.values()}
    sided = re.compile(r"(left|right)(s|ward|wards|hand|handed|most|side)?|(anti|counter)?clockwise")

    def suspected(parts: list[str]) -> bool:
        if any(sided.fullmatch(part) for part in parts):
            return True
        mirrored = tuple(_MIRROR.get(part, part) for part in parts)
        return mirrored != tuple(parts) and mirrored in known

    return [name for name in class_names if suspected(words[name])]


_PAIRS = (("l", "r"), ("lh", "rh"), ("lt", "rt"), ("cw", "ccw"), ("west", "east"), ("gauche", "droite"))
_MIRROR = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}


def _words(name: str) -> list[str]:
    """`TurnLeft`, `turn_left` and `turn-left2` in lower-case words without digits."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def augment_clips(
    clips: Tensor,
    params: dict[str, Tensor],
    augment: AugmentSettings,
    *,
    mean: Values,
    std: Values,
    dtype: torch.dtype,
) -> Tensor:
    """Augmented and normalized clips.

    Parameters
    ----------
    clips : (B, T, H, W, 3) uint8
        On any device; not changed. B may be 0.
    params : dict of tensors
        Those of :func:`draw_parameters` with a batch axis in front, in host memory (elsewhere they are fetched, which
        waits for the device). Other names are ignored.
    augment : AugmentSettings
        As given to :func:`draw_parameters`.
    mean, std : 3 values each
        As shares of 255.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    (B, T, 3, H, W) of `dtype` on the device of `clips`.

    """
    if len(clips) == 0:
        return normalize(clips, mean, std, dtype)
    host = {name: params[name].cpu() for name in HOST_PARAMETERS}
    flipped = host["flip"].nonzero()[:, 0].tolist()
    if flipped:
        clips = clips.clone()
    for rows in _chunks(flipped, clips.device):
        _replace(clips, rows, lambda part: part.flip(-2))
    rounds = plan(host["ops"].tolist())
    if rounds:
        planar = clips.permute(0, 1, 4, 2, 3).clone(memory_format=torch.contiguous_format)
        for kind, rows, slots in rounds:
            for part in _chunks(list(zip(rows, slots, strict=True)), planar.device):
                _operate(planar, kind, [row for row, _ in part], [slot for _, slot in part], host)
        clips = planar.permute(0, 1, 3, 4, 2)
    out = normalize(clips, mean, std, dtype)
    if augment.erase > 0:
        _erase(out, host["erase"].tolist(), host["erase_seed"].tolist())
    return out


def plan(ops: list[list[int]]) -> list[tuple[Op, list[int], list[int]]]:
    """Rounds (kind, rows, slots) that do all operations `ops` [B][S] of a batch, each clip's in their order.

    A round takes the kind that most clips have next, so few tensor operations do for many clips. All operations that
    are a fixed table of grey levels count as one kind, `Op.INVERT`.
    """
    waiting = [[slot for slot, op in enumerate(row) if op != Op.NONE] for row in ops]
    rounds = []
    while any(waiting):
        heads: dict[Op, list[int]] = {}
        for row, slots in enumerate(waiting):
            if slots:
                op = Op(ops[row][slots[0]])
                heads.setdefault(Op.INVERT if op in pixels.FIXED else op, []).append(row)
        kind, rows = max(heads.items(), key=lambda item: len(item[1]))
        rounds.append((kind, rows, [waiting[row].pop(0) for row in rows]))
    return rounds


def _operate(planar: Tensor, kind: Op, rows: list[int], slots: list[int], host: dict[str, Tensor]) -> None:
    """Do the operations of one kind in the given slots of the clips `rows`, in place."""
    values = host["values"][rows, slots]
    if kind is Op.INVERT:
        pairs = zip(host["ops"][rows, slots].tolist(), values.tolist(), strict=True)
        tables = torch.from_numpy(np.stack([pixels.fixed_table(Op(op), value) for op, value in pairs]))
        _replace(planar, rows, pixels.lookup, tables[:, None, None])
    elif kind is Op.RESAMPLE:
        _replace(planar, rows, pixels.resample, host["affine"][rows])
    elif kind in pixels.MEASURED:
        _replace(planar, rows, pixels.MEASURED[kind])
    else:
        _replace(planar, rows, pixels.ENHANCED[kind], values)


def _replace(all_clips: Tensor, rows: list[int], operation: Callable[..., Tensor], *values: Tensor) -> None:
    """Put what `operation(clips, *values)` makes of the clips `rows` in their place; `values` lie in host memory."""
    if len(rows) == 1:  # always so on the CPU, where a row's copy takes an eighth of the time of index_copy_
        clip = all_clips[rows[0] : rows[0] + 1]
        clip.copy_(operation(clip, *(_to(value, all_clips.device) for value in values)))
        return
    where = _to(torch.tensor(rows), all_clips.device)
    clips = all_clips.index_select(0, where)
    all_clips.index_copy_(0, where, operation(clips, *(_to(value, all_clips.device) for value in values)))


def _erase(clips: Tensor, boxes: list[list[int]], seeds: list[int]) -> None:
    """Put noise of mean 0 and deviation 1 into the boxes (top, left, height, width) of normalized clips, in place."""
    t, c = clips.shape[1:3]
    for rows in _chunks([row for row, box in enumerate(boxes) if box[2]], clips.device):
        sizes = [t * c * boxes[row][2] * boxes[row][3] for row in rows]
        noise = pixels.normal_noise([seeds[row] for row in rows], sizes, clips.device)
        for row, values in zip(rows, noise.split(sizes), strict=True):
            top, left, height, width = boxes[row]
            clips[row, :, :, top : top + height, left : left + width] = values.view(t, c, height, width)


def _chunks(items: list, device: torch.device) -> list[list]:
    step = CHUNK_CPU if device.type == "cpu" else CHUNK_DEVICE
    return [items[i : i + step] for i in range(0, len(items), step)]


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting for it."""
    return tensor.to(device, non_blocking=True)
