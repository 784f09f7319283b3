from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vac_ddp.data import pixels, randaugment
from vac_ddp.data.augment import (
    augment_clips,
    draw_crop_box,
    draw_erase_box,
    draw_parameters,
    flip_guard,
    plan,
)
from vac_ddp.data.normalization import normalize
from vac_ddp.data.randaugment import Op
from vac_ddp.errors import UserError
from vac_ddp.settings import AugmentSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = "rand-m7-n4-mstd0.5-inc1"
TIMM = {
    Op.AUTOCONTRAST: "AutoContrast",
    Op.EQUALIZE: "Equalize",
    Op.INVERT: "Invert",
    Op.ROTATE: "Rotate",
    Op.POSTERIZE: "PosterizeIncreasing",
    Op.SOLARIZE: "SolarizeIncreasing",
    Op.SOLARIZE_ADD: "SolarizeAdd",
    Op.COLOR: "ColorIncreasing",
    Op.CONTRAST: "ContrastIncreasing",
    Op.BRIGHTNESS: "BrightnessIncreasing",
    Op.SHARPNESS: "SharpnessIncreasing",
    Op.SHEAR_X: "ShearX",
    Op.SHEAR_Y: "ShearY",
    Op.TRANSLATE_X: "TranslateXRel",
    Op.TRANSLATE_Y: "TranslateYRel",
}


def pictures(count: int = 3, size: int = 64) -> np.ndarray:
    """(count, size, size, 3) uint8: a smooth picture, one of narrow range with noise, and noise."""
    rng = np.random.default_rng(5)
    x, y = np.meshgrid(np.linspace(0, 3, size), np.linspace(0, 2, size))
    smooth = np.stack([np.sin(x + 2 * y + i) * 0.5 + 0.5 for i in range(3)], -1) * 255
    narrow = 60 + 60 * smooth / 255 + rng.integers(0, 12, (size, size, 3))
    noise = rng.integers(0, 256, (size, size, 3))
    return np.stack([smooth, narrow, noise, smooth[::-1], narrow.T.reshape(size, size, 3)])[:count].astype(np.uint8)


def planar(frames: np.ndarray) -> torch.Tensor:
    """(F, H, W, 3) as one clip (1, F, 3, H, W)."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)[None].contiguous()


def channels_last(clip: torch.Tensor) -> np.ndarray:
    return clip[0].permute(0, 2, 3, 1).numpy()


def parameters(*, ops=(), size=64, flip=False, erase=(0, 0, 0, 0), seed=0, slots=8) -> dict[str, np.ndarray]:
    """What draw_parameters would give for these operations, made by hand."""
    composed, matrix = randaugment.compose(list(ops), size)
    composed += [(Op.NONE, 0.0)] * (slots - len(composed))
    return {
        "flip": np.array(flip),
        "ops": np.array([op for op, _ in composed], dtype=np.int64),
        "values": np.array([value for _, value in composed], dtype=np.float32),
        "affine": matrix.astype(np.float32),
        "erase": np.array(erase, dtype=np.int64),
        "erase_seed": np.array(seed, dtype=np.int64),
    }


def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def back_to_grey_levels(clips: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (clips.double() * std + mean) * 255


def augmented(clips: torch.Tensor, samples: list[dict[str, np.ndarray]], augment=None, dtype=torch.float32):
    augment = augment or AugmentSettings(erase=1.0)
    return augment_clips(clips, collate(samples), augment, mean=MEAN, std=STD, dtype=dtype)


# ---- the crop ----


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    seed=st.integers(0, 1000),
    low=st.floats(0.05, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_a_crop_lies_inside_its_frame(height, width, seed, low):
    augment = AugmentSettings(crop_scale=(low, 1.0))
    top, left, h, w = draw_crop_box(np.random.default_rng(seed), augment, height, width)
    assert top >= 0
    assert left >= 0
    assert 1 <= h <= height - top
    assert 1 <= w <= width - left


@pytest.mark.parametrize(("height", "width"), [(30, 400), (400, 30), (100, 100), (120, 131)])
def test_a_crop_that_finds_no_place_is_the_centre_of_torchvision(height, width):
    from torchvision.transforms import v2

    augment = AugmentSettings(crop_scale=(1.7, 1.8))  # too large: every try fails
    reference = v2.RandomResizedCrop(8, scale=augment.crop_scale, ratio=augment.crop_ratio)
    box = reference.make_params([torch.empty(3, height, width)])
    ours = draw_crop_box(np.random.default_rng(0), augment, height, width)
    assert ours == (box["top"], box["left"], box["height"], box["width"])


def test_crops_are_distributed_as_torchvision_distributes_them():
    from torchvision.transforms import v2

    augment = AugmentSettings()
    rng, n = np.random.default_rng(0), 1500
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(8, scale=augment.crop_scale, ratio=augment.crop_ratio)
    frame = [torch.empty(3, 240, 320)]
    boxes = [reference.make_params(frame) for _ in range(n)]
    theirs = np.array([[b["top"], b["left"], b["height"], b["width"]] for b in boxes], dtype=float)
    ours = np.array([draw_crop_box(rng, augment, 240, 320) for _ in range(n)], dtype=float)
    for column in range(4):
        deviation = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.15 * deviation  # 4 standard errors
        assert ours[:, column].std() == pytest.approx(deviation, rel=0.1)


# ---- normalize, flip ----


def test_normalise_is_torchvisions():
    from torchvision.transforms.v2 import functional as reference

    clips = torch.from_numpy(pictures(4)).view(2, 2, 64, 64, 3)
    expected = reference.normalize(clips.permute(0, 1, 4, 2, 3).float() / 255, MEAN, STD)
    ours = normalize(clips, MEAN, STD, torch.float32)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert ours.movedim(2, -1).is_contiguous()  # as the embedding takes it
    half = normalize(clips, torch.tensor(MEAN), torch.tensor(STD), torch.bfloat16)
    assert torch.equal(half, ours.bfloat16())


def test_only_the_clips_that_are_to_be_flipped_are():
    clips = torch.from_numpy(pictures(4)).view(2, 2, 64, 64, 3)
    before = clips.clone()
    out = augmented(clips, [parameters(flip=False), parameters(flip=True)])
    plain = normalize(clips, MEAN, STD, torch.float32)
    assert torch.equal(out[0], plain[0])
    assert torch.equal(out[1], plain[1].flip(-1))
    assert torch.equal(clips, before)


@pytest.mark.parametrize(
    ("names", "suspected"),
    [
        (["turn_left", "turn_right", "run"], ["turn_left", "turn_right"]),
        (["SwipeLeft", "Wave"], ["SwipeLeft"]),
        (["Pushing something from left to right", "Pouring"], ["Pushing something from left to right"]),
        (["rotate clockwise", "rotate anti-clockwise", "leftwards"], ["rotate clockwise", "rotate anti-clockwise"]),
        (["punch_l", "punch_r", "l"], ["punch_l", "punch_r"]),
        (["punch_r", "kick"], []),
        (["upright", "brightness", "leftover", "copyright", "shoot_ball", "clean and jerk"], []),
    ],
)
def test_flip_guard_finds_what_tells_sides_apart(names, suspected):
    found = flip_guard(names)
    assert [name for name in found if name != "leftwards"] == suspected
    assert ("leftwards" in found) == ("leftwards" in names)


# ---- RandAugment: notation, strength, draw ----


@pytest.mark.parametrize("notation", [RECIPE, "rand-m9-n3-mstd0.5", "rand-m9-mstd101-p0.7-mmax30", "rand"])
def test_the_notation_means_what_timm_makes_of_it(notation):
    from timm.data.auto_augment import rand_augment_transform

    ours = randaugment.parse(notation)
    theirs = rand_augment_transform(notation, {})
    op = theirs.ops[0]
    assert ours.layers == theirs.num_layers
    assert (ours.probability, ours.magnitude, ours.std) == (op.prob, op.magnitude, op.magnitude_std)
    assert ours.maximum == (op.magnitude_max or 10)
    assert ours.increasing == any(op.name == "ColorIncreasing" for op in theirs.ops)


def test_the_recipes_operations_are_timms():
    from timm.data.auto_augment import _FILL, rand_augment_transform

    assert {op.name for op in rand_augment_transform(RECIPE, {}).ops} == {TIMM[op] for op in randaugment.CHOICES}
    assert _FILL == (pixels.FILL,) * 3
    assert randaugment.parse("") is None


@pytest.mark.parametrize("notation", ["auto-m7", "rand-x3", "rand-m", "rand-m7-tweights", "rand-p1.5", "m7-n4"])
def test_a_notation_that_is_not_understood_is_named(notation):
    with pytest.raises(UserError, match=r"augment\.randaugment="):
        randaugment.parse(notation)


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("op", randaugment.CHOICES, ids=lambda op: op.name)
def test_strength_is_timms_for_every_magnitude(op, increasing, monkeypatch):
    from timm.data import auto_augment

    name = TIMM[op] if increasing else TIMM[op].replace("Increasing", "")
    level_to_argument = auto_augment.LEVEL_TO_ARG[name]
    for negative in (True, False):
        monkeypatch.setattr(auto_augment.random, "random", lambda negative=negative: 0.9 if negative else 0.1)
        for level in (0.0, 0.3, 2.5, 6.1, 7.0, 7.51, 9.99, 10.0):
            theirs = level_to_argument(level, {})[0] if level_to_argument else 0.0
            theirs = max(1, theirs) if op is Op.POSTERIZE else theirs  # Pillow refuses to keep 0 bits
            assert randaugment.strength(op, level, negative, increasing) == pytest.approx(theirs, abs=1e-12)


def test_draws_have_the_frequencies_of_the_notation():
    spec = randaugment.parse(RECIPE)
    rng = np.random.default_rng(1)
    draws = [randaugment.draw(rng, spec) for _ in range(3000)]
    assert {len(ops) for ops in draws} == {4}
    ops = [op for draw in draws for op, _ in draw]
    n = len(ops)
    assert ops.count(Op.NONE) / n == pytest.approx(0.5, abs=0.02)
    for op in randaugment.CHOICES:
        assert ops.count(op) / n == pytest.approx(0.5 / 15, abs=0.007)  # 4 standard errors
    angles = np.array([value for draw in draws for op, value in draw if op is Op.ROTATE])
    assert np.abs(angles).mean() == pytest.approx(21.0, abs=0.4)
    assert np.abs(angles).std() == pytest.approx(1.5, abs=0.3)
    assert (angles < 0).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("notation", "largest"), [("rand-m9-n8-mstd8", 30.0), ("rand-m9-n8-mstd8-mmax20", 60.0)])
def test_magnitudes_are_cut_to_their_range(notation, largest):
    rng, spec = np.random.default_rng(1), randaugment.parse(notation)
    angles = [abs(value) for _ in range(400) for op, value in randaugment.draw(rng, spec) if op is Op.ROTATE]
    assert (min(angles), max(angles)) == (0.0, largest)


# ---- single operations against Pillow (through timm) and torchvision ----

PHOTOMETRIC = [
    (Op.AUTOCONTRAST, 0.0),
    (Op.EQUALIZE, 0.0),
    (Op.INVERT, 0.0),
    *[(Op.POSTERIZE, bits) for bits in (1, 3, 8)],
    *[(Op.SOLARIZE, level) for level in (0, 77, 128, 256)],
    *[(Op.SOLARIZE_ADD, added) for added in (0, 77, 110)],
    *[(op, f) for op in (Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS) for f in (0.0, 0.1, 0.37, 1.0, 1.63, 1.9)],
]


def by_timm(op: Op, value: float, frames: np.ndarray, resample=Image.Resampling.BICUBIC) -> np.ndarray:
    """Each frame through timm's operation on a Pillow image."""
    from timm.data import auto_augment

    function = auto_augment.NAME_TO_OP[TIMM[op]]
    has_value = auto_augment.LEVEL_TO_ARG[TIMM[op]] is not None
    integer = op in (Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD)
    arguments = [int(value) if integer else value] if has_value else []
    grey = (128, 128, 128)
    done = [function(Image.fromarray(f), *arguments, fillcolor=grey, resample=resample) for f in frames]
    return np.stack([np.asarray(frame) for frame in done])


def by_us(op: Op, value: float, frames: np.ndarray) -> np.ndarray:
    """The frames as one clip through augment_clips and back to grey levels."""
    out = augmented(torch.from_numpy(frames)[None], [parameters(ops=[(op, value)], size=frames.shape[1])])
    return channels_last(back_to_grey_levels(out).round().to(torch.uint8))


@pytest.mark.parametrize(("op", "value"), PHOTOMETRIC, ids=lambda v: getattr(v, "name", str(v)))
def test_photometric_operations_are_pillows(op, value):
    frames = np.concatenate([pictures(3), np.full((1, 64, 64, 3), 93, np.uint8)])
    expected, ours = by_timm(op, value, frames).astype(int), by_us(op, value, frames).astype(int)
    # The same to the last bit with Pillow for x86-64; fused multiply-adds of another build may round single pixels.
    difference = np.abs(ours - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("op", "value", "name"),
    [
        (Op.AUTOCONTRAST, 0.0, "autocontrast"),
        (Op.EQUALIZE, 0.0, "equalize"),
        (Op.INVERT, 0.0, "invert"),
        (Op.POSTERIZE, 3, "posterize"),
        (Op.SOLARIZE, 77, "solarize"),
        (Op.COLOR, 0.37, "adjust_saturation"),
        (Op.COLOR, 1.63, "adjust_saturation"),
        (Op.CONTRAST, 0.37, "adjust_contrast"),
        (Op.CONTRAST, 1.63, "adjust_contrast"),
        (Op.BRIGHTNESS, 1.63, "adjust_brightness"),
        (Op.SHARPNESS, 0.37, "adjust_sharpness"),
        (Op.SHARPNESS, 1.63, "adjust_sharpness"),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_photometric_operations_are_torchvisions_within_two_levels(op, value, name):
    from torchvision.transforms.v2 import functional as reference

    frames = pictures(3)
    arguments = [value] if value else []
    expected = getattr(reference, name)(planar(frames)[0], *arguments).int()
    ours = planar(by_us(op, value, frames))[0].int()
    assert (ours - expected).abs().max() <= 2  # other rounding of the blend and of the grey
    assert (ours - expected).abs().float().mean() < 0.6


GEOMETRIC = [
    *[(Op.ROTATE, degrees) for degrees in (-30.0, 3.3, 21.0)],
    *[(Op.SHEAR_X, shear) for shear in (-0.3, 0.21)],
    *[(Op.SHEAR_Y, shear) for shear in (-0.21, 0.3)],
    *[(Op.TRANSLATE_X, share) for share in (-0.45, 0.111)],
    *[(Op.TRANSLATE_Y, share) for share in (0.3, -0.111)],
]


@pytest.mark.parametrize(("op", "value"), GEOMETRIC, ids=lambda v: getattr(v, "name", str(v)))
def test_geometric_operations_move_pixels_as_pillow_does(op, value):
    smooth = pictures(1, size=96)
    expected, ours = by_timm(op, value, smooth).astype(int), by_us(op, value, smooth).astype(int)
    # Pillow cuts bicubic results off (0.5 lower on average) and weighs with slope -1 where torch has -0.75.
    assert np.abs(ours - expected).mean() < 0.8
    assert np.quantile(np.abs(ours - expected), 0.999) <= 3
    outside = (expected == 128).all(-1) & (smooth != 128).any(-1)
    assert outside.any() == ((ours == 128).all(-1) & (smooth != 128).any(-1)).any()
    # On noise the cubics differ more; a shift by half a pixel would give a mean difference above 40.
    noise = pictures(3, size=96)[2:]
    expected, ours = by_timm(op, value, noise).astype(int), by_us(op, value, noise).astype(int)
    assert np.abs(ours - expected).mean() < 8


@pytest.mark.parametrize(("op", "value"), GEOMETRIC, ids=lambda v: getattr(v, "name", str(v)))
def test_the_place_of_every_pixel_is_pillows(op, value):
    """Bilinear in both, on a ramp of places: no interpolation error, so this is the matrix alone, in pixels."""
    size = 96
    ramp = np.arange(size, dtype=np.float32)
    matrix = randaugment.affine(op, value, size)
    centre = np.stack(np.meshgrid(ramp + 0.5, ramp + 0.5))
    x, y = np.einsum("ij,jhw->ihw", matrix[:2, :2], centre) + matrix[:2, 2, None, None]
    for picture, place in ((np.tile(ramp, (size, 1)), x), (np.tile(ramp[:, None], (1, size)), y)):
        image = Image.fromarray(picture)  # float32 grey levels
        from timm.data import auto_augment

        moved = np.asarray(
            auto_augment.NAME_TO_OP[TIMM[op]](image, value, fillcolor=-1, resample=Image.Resampling.BILINEAR)
        )
        inner = (moved >= 0) & (x > 1) & (x < size - 1) & (y > 1) & (y < size - 1)
        assert inner.mean() > 0.3
        assert np.abs(moved - (place - 0.5))[inner].max() < 1e-3


def test_several_geometric_operations_are_one_resampling():
    ops = [(Op.ROTATE, 17.0), (Op.SHEAR_X, -0.2), (Op.TRANSLATE_Y, 0.13), (Op.SHEAR_Y, 0.1)]
    frames = np.concatenate([pictures(1, size=96), np.full((1, 96, 96, 3), 255, np.uint8)])
    expected = frames
    for op, value in ops:
        expected = by_timm(op, value, expected)
    out = augmented(torch.from_numpy(frames)[None], [parameters(ops=ops, size=96)])
    ours = channels_last(back_to_grey_levels(out).round())
    kept = (expected[1] > 250).all(-1) & (ours[1] > 250).all(-1)  # where neither has grey from outside
    difference = np.abs(ours - expected.astype(float))[0][kept]
    assert kept.mean() > 0.4
    assert difference.mean() < 2.5  # Pillow cuts off four times, half a level each
    assert np.quantile(difference, 0.95) < 6  # but for the overshoot along the borders
    composed, _ = randaugment.compose(ops, 96)
    assert [op for op, _ in composed] == [Op.RESAMPLE, Op.NONE, Op.NONE, Op.NONE]


@pytest.mark.parametrize("flip", [False, True])
def test_the_input_is_left_as_it_is_whatever_its_layout(flip: bool) -> None:
    """Clips whose channels are planes in memory (a permuted view) need no copy to be worked on, and still get one."""
    frames = torch.from_numpy(pictures(2))[None]
    for clips in (frames.clone(), frames.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)):
        augmented(clips, [parameters(flip=flip, ops=[(Op.INVERT, 0.0), (Op.COLOR, 1.6)])])
        assert torch.equal(clips, frames)


def test_a_chain_of_operations_runs_in_its_order():
    ops = [(Op.SOLARIZE, 100.0), (Op.COLOR, 1.6), (Op.EQUALIZE, 0.0), (Op.POSTERIZE, 2.0), (Op.SHARPNESS, 1.5)]
    for chain in (ops, ops[::-1]):
        expected = pictures(3)
        for op, value in chain:
            expected = by_timm(op, value, expected)
        out = augmented(torch.from_numpy(pictures(3))[None], [parameters(ops=chain)])
        assert np.array_equal(channels_last(back_to_grey_levels(out).round()), expected)
    mixed = [(Op.INVERT, 0.0), (Op.SHEAR_X, 0.2), (Op.BRIGHTNESS, 1.3)]
    expected = pictures(1)
    for op, value in mixed:
        expected = by_timm(op, value, expected)
    out = augmented(torch.from_numpy(pictures(1))[None], [parameters(ops=mixed)])
    assert np.abs(channels_last(back_to_grey_levels(out)) - expected).mean() < 1.5


# ---- colour jitter, erasing ----


def test_color_jitter_draws_its_range_in_any_order():
    augment = AugmentSettings(color_jitter=0.4, randaugment=RECIPE)
    rng = np.random.default_rng(2)
    draws = [draw_parameters(rng, augment, size=32) for _ in range(400)]
    assert {draw["ops"].shape for draw in draws} == {(7,)}
    first = [tuple(draw["ops"][:3]) for draw in draws]
    assert set(map(frozenset, first)) == {frozenset({Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR})}
    assert len(set(first)) == 6
    factors = np.concatenate([draw["values"][:3] for draw in draws])
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    assert factors.std() == pytest.approx(0.8 / math.sqrt(12), rel=0.05)


def test_erased_rectangles_are_distributed_as_timm_distributes_them():
    import random

    from timm.data.random_erasing import RandomErasing

    size, n = 64, 600
    random.seed(0)
    reference = RandomErasing(probability=1.0, mode="const", device="cpu")
    theirs = []
    for _ in range(n):
        erased = reference(torch.ones(1, size, size))[0] == 0
        rows, columns = erased.any(1).nonzero()[:, 0], erased.any(0).nonzero()[:, 0]
        theirs.append([rows[0], columns[0], len(rows), len(columns)])
    rng = np.random.default_rng(0)
    ours = np.array([draw_erase_box(rng, size) for _ in range(n)], dtype=float)
    theirs = np.array(theirs, dtype=float)
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    for column in range(4):
        deviation = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.24 * deviation  # 4 standard errors
        assert ours[:, column].std() == pytest.approx(deviation, rel=0.15)


def test_erasing_is_noise_in_one_rectangle_of_all_frames_and_nothing_else():
    clips = torch.from_numpy(pictures(4)).view(2, 2, 64, 64, 3)
    out = augmented(clips, [parameters(erase=(5, 9, 40, 31), seed=3), parameters()])
    plain = normalize(clips, MEAN, STD, torch.float32)
    changed = (out != plain)[0]
    assert changed[:, :, 5:45, 9:40].all()
    assert changed.sum() == 2 * 3 * 40 * 31
    assert torch.equal(out[1], plain[1])
    noise = out[0, :, :, 5:45, 9:40]
    assert abs(noise.mean()) < 0.06
    assert noise.std() == pytest.approx(1.0, abs=0.05)
    other = augmented(clips, [parameters(erase=(5, 9, 40, 31), seed=4), parameters()])[0, :, :, 5:45, 9:40]
    assert abs((noise * other).mean()) < 0.06


def test_noise_is_normal_and_of_its_seed_alone():
    from torch.distributions import Normal

    cpu, n = torch.device("cpu"), 120_000
    seeds = [0, 1, 2**32 - 1]
    noise = [pixels.normal_noise([seed], [n], cpu) for seed in seeds]
    together = pixels.normal_noise(seeds, [n, 100, n], cpu).split([n, 100, n])
    for one, stretch in zip(noise, together, strict=True):
        torch.testing.assert_close(stretch, one[: len(stretch)])
    for one in noise:
        ordered = Normal(0.0, 1.0).cdf(one.sort().values)
        distance = (ordered - (torch.arange(n) + 0.5) / n).abs().max()
        assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.001
        assert one.isfinite().all()
        for shift in (1, 100, 10_000):
            assert abs((one[shift:] * one[:-shift]).mean()) < 4 / math.sqrt(n)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs((noise[a] * noise[b]).mean()) < 4 / math.sqrt(n)
    assert len(torch.cat(noise).unique()) > 0.95 * 3 * n


# ---- the whole of it ----

EVERYTHING = AugmentSettings(randaugment="rand-m7-n4-mstd0.5-inc1-p0.9", color_jitter=0.3, erase=0.5)


def drawn(count: int, size: int, augment=EVERYTHING) -> list[dict[str, np.ndarray]]:
    return [draw_parameters(np.random.default_rng([7, i]), augment, size=size) for i in range(count)]


def test_parameters_are_of_fixed_shapes_and_of_the_generator_alone():
    samples = drawn(50, 32)
    shapes = {name: (array.shape, array.dtype.str) for name, array in samples[0].items()}
    for sample, again in zip(samples, drawn(50, 32), strict=True):
        assert {name: (array.shape, array.dtype.str) for name, array in sample.items()} == shapes
        assert all(np.array_equal(sample[name], again[name]) for name in sample)
    nothing = draw_parameters(np.random.default_rng(0), AugmentSettings(flip=0), size=32)
    assert nothing["ops"].shape == (0,)
    assert not nothing["flip"]


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_clip_does_not_see_the_batch_around_it(chunk, monkeypatch):
    monkeypatch.setattr("vac_ddp.data.augment.CHUNK_CPU", chunk)
    count, size = 24, 40
    samples = drawn(count, size)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (count, 2, size, size, 3), dtype=torch.uint8, generator=generator)
    clips[::2] = torch.from_numpy(pictures(1, size))[0]
    assert {int(op) for sample in samples for op in sample["ops"]} == {*range(11), Op.RESAMPLE}
    together = augmented(clips, samples, EVERYTHING)
    for i in range(count):
        alone = augmented(clips[i : i + 1], samples[i : i + 1], EVERYTHING)
        assert torch.equal(together[i], alone[0])
    order = np.random.default_rng(0).permutation(count)
    shuffled = augmented(clips[order], [samples[i] for i in order], EVERYTHING)
    assert torch.equal(shuffled, together[order])


@given(ops=st.lists(st.lists(st.integers(0, 10), min_size=5, max_size=5), max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_plan_does_every_operation_once_and_in_order(ops):
    done = [[] for _ in ops]
    for kind, rows, slots in plan(ops):
        assert len(set(rows)) == len(rows)
        for row, slot in zip(rows, slots, strict=True):
            done[row].append(slot)
            op = ops[row][slot]
            assert kind == (Op.INVERT if op in pixels.FIXED else op)
    assert done == [[slot for slot, op in enumerate(row) if op] for row in ops]


def test_all_frames_get_the_same():
    still = torch.from_numpy(pictures(2, 40))[:, None].expand(2, 3, 40, 40, 3).contiguous()
    augment = AugmentSettings(randaugment=RECIPE, color_jitter=0.3)
    out = augmented(still, drawn(2, 40, augment), augment)
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])


def test_nothing_waits_for_the_device():
    """On tensors without values, every look at one from the host is an error."""
    clips = torch.empty((24, 2, 40, 40, 3), dtype=torch.uint8, device="meta")
    out = augmented(clips, drawn(24, 40), EVERYTHING, dtype=torch.bfloat16)
    assert (out.shape, out.dtype, out.device.type) == ((24, 2, 3, 40, 40), torch.bfloat16, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="extra test: needs a CUDA device")
def test_a_gpu_gives_the_same_without_waiting():
    clips = torch.randint(0, 256, (24, 2, 40, 40, 3), dtype=torch.uint8)
    expected = augmented(clips, drawn(24, 40), EVERYTHING)
    moved = clips.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augmented(moved, drawn(24, 40), EVERYTHING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (back_to_grey_levels(out.cpu()) - back_to_grey_levels(expected)).abs()
    assert (difference > 1e-3).float().mean() < 1e-3  # rounding of the resampling at a tie
    alone = augmented(moved[3:4], drawn(4, 40)[3:], EVERYTHING)
    assert torch.equal(alone[0], out[3])


def test_an_empty_batch_passes():
    clips = torch.empty((0, 2, 40, 40, 3), dtype=torch.uint8)
    params = {name: tensor[:0] for name, tensor in collate(drawn(1, 40)).items()}
    out = augment_clips(clips, params, EVERYTHING, mean=MEAN, std=STD, dtype=torch.float32)
    assert out.shape == (0, 2, 3, 40, 40)


def test_frames_of_a_few_pixels_pass():
    clips = torch.randint(0, 256, (40, 1, 2, 2, 3), dtype=torch.uint8)
    assert augmented(clips, drawn(40, 2), EVERYTHING).isfinite().all()
