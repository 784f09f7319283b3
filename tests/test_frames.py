"""Clips of frames: crops and resampling against Pillow, every frame read once, and what becomes of damaged ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.frame_data import cut_out, difference, encode, jpeg, picture, psnr
from vac_ddp.data import decode as decode_module
from vac_ddp.data import frames as frames_module
from vac_ddp.data.frames import (
    NoFrame,
    _scratch,
    neighbours,
    read_clip,
    reduction,
    resize_crop,
    scale_box,
    view_boxes,
)

# ---------------------------------------------------------------- reduced decode


@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=3), st.integers(1, 300))
def test_reduction_leaves_every_box_its_pixels(sizes: list[tuple[int, int]], size: int) -> None:
    factor = reduction([(0, 0, h, w) for h, w in sizes], size)
    least = min(min(pair) for pair in sizes)
    assert factor in (1, 2, 4, 8)
    assert factor == 1 or least // factor >= size
    assert factor == 8 or least // (factor * 2) < size


@pytest.mark.parametrize("shape", [(480, 854), (1080, 1920)])
def test_clips_of_reduced_frames_are_close_to_those_of_full_ones(shape: tuple[int, int]) -> None:
    data = jpeg(*shape, seed=7)
    clips = {}
    for reduced in (False, True):
        clips[reduced] = torch.empty((1, 1, 112, 112, 3), dtype=torch.uint8)
        boxes = lambda h, w: view_boxes(h, w, size=112, short_side=112, crops=1)  # noqa: E731
        read_clip(lambda _: data, np.array([0]), boxes, clips[reduced], n_frames=1, reduced=reduced)
    assert not torch.equal(clips[True], clips[False])
    assert psnr(clips[True].numpy(), clips[False].numpy()) > 36


# ---------------------------------------------------------------- crop and resize


@pytest.mark.parametrize("box", [(0, 0, 120, 160), (7, 11, 90, 60), (30, 40, 33, 47), (119, 0, 1, 160), (5, 5, 64, 64)])
@pytest.mark.parametrize("count", [1, 3])
def test_resize_is_pillows_within_one_grey_level(box: tuple[int, int, int, int], count: int) -> None:
    stack = np.stack([picture(120, 160, seed) for seed in range(count)])
    top, left, height, width = box
    ours = cut_out(stack, box, 64)
    assert ours.shape == (count, 64, 64, 3)
    for image, result in zip(stack, ours.numpy(), strict=True):
        cut = Image.fromarray(image).crop((left, top, left + width, top + height))
        assert difference(np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR)), result) <= 1


@pytest.mark.parametrize("box", [(7, 11, 90, 60), (0, 0, 120, 160), (3, 5, 30, 150)])
@pytest.mark.parametrize("count", [1, 3])
def test_resize_into_its_place_is_torchs_interpolation(box: tuple[int, int, int, int], count: int) -> None:
    stack = np.stack([picture(120, 160, seed) for seed in range(count)])
    top, left, height, width = box
    pixels = torch.from_numpy(stack)[:, top : top + height, left : left + width].permute(0, 3, 1, 2)
    whole = torch.full((2, count + 2, 48, 48, 3), 7, dtype=torch.uint8)
    resize_crop(torch.from_numpy(stack), box, whole[1, 1:-1])
    expected = torch.nn.functional.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)
    assert torch.equal(whole[1, 1:-1], expected.permute(0, 2, 3, 1))
    assert (whole[0] == 7).all()
    assert (whole[1, [0, -1]] == 7).all()


@pytest.mark.parametrize("shape", [(4, 240, 320, 3), (1, 31, 33, 3), (2, 720, 1280, 3), (3, 5, 7, 3)])
def test_frames_are_decoded_beside_the_addresses_where_libjpeg_writes_past_the_caches(shape: tuple[int, ...]) -> None:
    buffer = _scratch(*shape)
    assert buffer.shape == shape
    assert buffer.flags.c_contiguous
    assert buffer.ctypes.data % 32 == 16


@pytest.mark.parametrize("windows", [[[0, 2], [3, 5]], [[0, 2], [2, 4]], [[4, 1], [0, 5]], [[1, 3]]])
@pytest.mark.parametrize("crops", [1, 3])
def test_windows_and_crops_come_to_their_places(windows: list[list[int]], crops: int) -> None:
    """Against frames decoded and cut one by one; the crops of a window are neighbours in memory, as in a batch."""
    video = [jpeg(40, 60, seed) for seed in range(6)]
    boxes = view_boxes(40, 60, size=24, short_side=24, crops=crops)
    batch = torch.full((len(windows), crops, 2, 24, 24, 3), 7, dtype=torch.uint8)
    read_clip(video.__getitem__, np.array(windows), lambda h, w: boxes, batch.movedim(1, 0), n_frames=6)
    for window, clips in zip(windows, batch, strict=True):
        stack = np.stack([decode_module.decode_frame(video[frame]) for frame in window])
        for box, clip in zip(boxes, clips, strict=True):
            assert torch.equal(clip, cut_out(stack, box, 24))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 400), st.integers(0, 200), st.sampled_from([1, 3]))
def test_view_boxes_are_squares_within_the_frame(height: int, width: int, size: int, more: int, crops: int) -> None:
    boxes = view_boxes(height, width, size=size, short_side=size + more, crops=crops)
    short = min(height, width)
    assert len(boxes) == crops
    for top, left, h, w in boxes:
        assert h == w
        assert abs(h - short * size / (size + more)) <= 0.5 or h == 1
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
    middle = boxes[crops // 2]
    assert abs(middle[0] + middle[2] / 2 - height / 2) <= 0.5
    assert abs(middle[1] + middle[3] / 2 - width / 2) <= 0.5
    if crops == 3:
        along = 1 if width >= height else 0
        assert boxes[0][along] == 0
        assert boxes[2][along] + boxes[2][2] == (height, width)[along]


def test_view_is_what_resize_and_crop_in_two_steps_make() -> None:
    """Short side to 64, then the centre 56: against Pillow's two steps, which resample the same grid."""
    image = picture(128, 192, 3)
    (box,) = view_boxes(128, 192, size=56, short_side=64, crops=1)
    assert box == (8, 40, 112, 112)
    two = Image.fromarray(image).resize((96, 64), Image.Resampling.BILINEAR).crop((20, 4, 76, 60))
    inner = np.s_[1:-1, 1:-1]  # at the border of a crop the filter has other neighbours
    assert difference(cut_out(image[None], box, 56)[0].numpy()[inner], np.asarray(two)[inner]) <= 1


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.integers(1, 500),
    st.integers(1, 500),
    st.randoms(use_true_random=False),
)
def test_scaled_boxes_stay_inside(h: int, w: int, new_h: int, new_w: int, random: object) -> None:
    height, width = random.randint(1, h), random.randint(1, w)
    box = (random.randint(0, h - height), random.randint(0, w - width), height, width)
    top, left, tall, wide = scale_box(box, (h, w), (new_h, new_w))
    assert 0 <= top < top + tall <= new_h
    assert 0 <= left < left + wide <= new_w
    assert scale_box(box, (h, w), (h, w)) == box
    if tall > 1 and wide > 1:
        assert abs(top - box[0] * new_h / h) <= 0.5
        assert abs(left + wide - (box[1] + width) * new_w / w) <= 0.5


# ---------------------------------------------------------------- clips


def whole(height: int, width: int) -> list[tuple[int, int, int, int]]:
    return [(0, 0, height, width)]


def read(
    video: list[bytes | OSError], which: list[int], size: int = 24, repeats: int = 1, **options: object
) -> tuple[np.ndarray, dict[int, str], list[int]]:
    asked: list[int] = []

    def bytes_of(frame: int) -> bytes:
        asked.append(frame)
        if isinstance(video[frame], OSError):
            raise video[frame]
        return video[frame]

    out = torch.full((repeats, len(which), size, size, 3), 255, dtype=torch.uint8)
    boxes = options.pop("boxes", lambda h, w: whole(h, w) * repeats)
    options.setdefault("reduced", False)
    damaged = read_clip(bytes_of, np.array(which), boxes, out, n_frames=len(video), **options)
    return out.numpy(), damaged, asked


def alone(data: bytes, size: int = 24, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """A frame by Pillow: open, crop, resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, height, width = box or (0, 0, image.height, image.width)
    cut = image.crop((left, top, left + width, top + height))
    return np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))


def same(clip: np.ndarray, frames: list[np.ndarray]) -> bool:
    return len(clip) == len(frames) and all(difference(a, b) <= 1 for a, b in zip(clip, frames, strict=True))


VIDEO = [jpeg(48, 64, i) for i in range(8)]


@pytest.mark.parametrize("which", [[0, 2, 4], [3, 3, 3], [1, 7, 7, 2, 0]])
@pytest.mark.parametrize("chunk", [1, 2 * 48 * 64 * 3, 1 << 22])
def test_frames_are_read_once_and_come_in_the_order_asked(
    which: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames_module, "CHUNK_BYTES", chunk)
    (clip,), damaged, asked = read(VIDEO, which)
    assert same(clip, [alone(VIDEO[i]) for i in which])
    assert not damaged
    assert asked == sorted(set(which))


def test_repeats_are_several_crops_of_one_decoding() -> None:
    boxes = [(0, 0, 48, 48), (10, 20, 30, 40)]
    clips, _, asked = read(VIDEO, [1, 3, 5], repeats=2, boxes=lambda h, w: boxes)
    assert asked == [1, 3, 5]
    for clip, box in zip(clips, boxes, strict=True):
        assert same(clip, [alone(VIDEO[i], box=box) for i in (1, 3, 5)])


def test_other_sizes_and_kinds_inside_one_video() -> None:
    """The box is the same share of each frame."""
    video = [jpeg(48, 64), jpeg(96, 128, 1), encode(Image.fromarray(picture(48, 64, 2)), "PNG"), jpeg(24, 32, 3)]
    (clip,), damaged, _ = read(video, [0, 1, 2, 3], boxes=lambda h, w: [(h // 4, w // 4, h // 2, w // 2)])
    expected = [(12, 16, 24, 32), (24, 32, 48, 64), (12, 16, 24, 32), (6, 8, 12, 16)]
    assert same(clip, [alone(data, box=box) for data, box in zip(video, expected, strict=True)])
    assert not damaged


# ---------------------------------------------------------------- damage

BAD = {
    "empty": b"",
    "text": b"this is no picture\n" * 20,
    "cut at 10 %": VIDEO[0][: len(VIDEO[0]) // 10],
    "cut at 50 %": VIDEO[0][: len(VIDEO[0]) // 2],
    "cut at 99 %": VIDEO[0][: len(VIDEO[0]) * 99 // 100],
    "wrong header": b"\x00\x01" + VIDEO[0][2:],
    "cut PNG": encode(Image.fromarray(picture(48, 64)), "PNG")[:2000],
    "vanished": FileNotFoundError(2, "No such file or directory"),
    "forbidden": PermissionError(13, "Permission denied"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_frame_is_replaced_by_its_nearest_good_one_and_named_once(kind: str) -> None:
    video = [*VIDEO[:3], BAD[kind], *VIDEO[4:]]
    (clip,), damaged, _ = read(video, [1, 3, 3, 5])
    assert same(clip, [alone(video[1]), alone(video[2]), alone(video[2]), alone(video[5])])
    assert list(damaged) == [3]
    assert damaged[3]
    assert "\n" not in damaged[3]


def test_the_first_frame_and_runs_of_damage() -> None:
    video = [b"", b"", VIDEO[2], b"", b"", b"", VIDEO[6]]
    (clip,), damaged, _ = read(video, [0, 3, 5])
    assert same(clip, [alone(VIDEO[2]), alone(VIDEO[2]), alone(VIDEO[6])])
    assert set(damaged) >= {0, 3, 5}
    assert set(damaged) <= {0, 1, 3, 4, 5}


def test_a_video_without_a_good_frame_says_so() -> None:
    with pytest.raises(NoFrame) as caught:
        read([b"", b"x" * 50, VIDEO[0][:300]], [0, 2])
    assert sorted(caught.value.damaged) == [0, 1, 2]


def test_neighbours_come_nearest_first() -> None:
    assert list(neighbours(2, 6)) == [1, 3, 0, 4, 5]
    assert list(neighbours(0, 1)) == []


def test_tolerant_what_decodes_of_a_frame_is_used_before_a_neighbour() -> None:
    big = [jpeg(96, 128, i, quality=95) for i in range(3)]
    cut = [big[0], big[1][: len(big[1]) // 2], big[2]]
    (clip,), damaged, _ = read(cut, [0, 1, 2], tolerant=True, size=96)
    good, neighbour = alone(big[1], 96), alone(big[0], 96)
    assert difference(clip[1][:30], good[:30]) <= 1
    assert difference(clip[1][:30], neighbour[:30]) > 20
    assert damaged.keys() == {1}
    (strict,), _, _ = read(cut, [0, 1, 2], tolerant=False, size=96)
    assert same(strict, [alone(big[0], 96), neighbour, alone(big[2], 96)])


@pytest.mark.parametrize("kind", ["empty", "text", "cut at 10 %", "wrong header", "vanished", "forbidden"])
def test_tolerant_a_frame_of_which_nothing_decodes_gives_way_to_a_neighbour(kind: str) -> None:
    (clip,), damaged, _ = read([VIDEO[4], BAD[kind], VIDEO[5]], [1], tolerant=True)
    assert same(clip, [alone(VIDEO[4])])
    assert list(damaged) == [1]


def test_tolerant_a_whole_neighbour_comes_before_a_nearer_cut_one() -> None:
    cut = jpeg(96, 128, 1, quality=95)
    cut = cut[: len(cut) // 2]
    (clip,), _, _ = read([VIDEO[3], cut, b""], [2], tolerant=True)
    assert same(clip, [alone(VIDEO[3])])
    (only_cut,), damaged, _ = read([cut, b"", b""], [2], tolerant=True)
    assert sorted(damaged) == [0, 1, 2]
    assert difference(only_cut[0][:6], alone(jpeg(96, 128, 1, quality=95))[:6]) <= 1


def test_a_clip_of_a_huge_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded reduced although that was not asked for."""
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 100_000)
    data = jpeg(800, 1200)
    (clip,), damaged, _ = read([data], [0], size=32)
    assert not damaged
    assert psnr(clip[0], alone(data, 32)) > 30


def test_type_is_told_by_content_not_by_name() -> None:
    png = encode(Image.fromarray(picture(20, 30)), "PNG")
    out = torch.empty((1, 1, 8, 8, 3), dtype=torch.uint8)
    assert read_clip(lambda _: png, np.array([0]), lambda h, w: [(0, 0, h, w)], out, n_frames=1) == {}
