"""Decoding against Pillow: every kind of image, every orientation, reduced, damaged, huge."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.frame_data import difference, encode, jpeg, picture, psnr
from tests.image_files import claiming
from tests.support import REPO, environment
from vac_ddp.data import decode as decode_module
from vac_ddp.data.decode import DamagedFrame, decode_frame, decode_plain_jpeg, frame_size, plain_jpeg_size


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


# ---------------------------------------------------------------- full decode


@pytest.mark.parametrize("shape", [(48, 64), (241, 319), (17, 3), (1, 1)])
@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
@pytest.mark.parametrize("quality", [30, 90, 100])
def test_jpegs_decode_as_pillow_does(shape: tuple[int, int], subsampling: str, quality: int) -> None:
    data = simplejpeg.encode_jpeg(picture(*shape), quality=quality, colorsubsampling=subsampling)
    image = decode_frame(data)
    assert image.dtype == np.uint8
    assert image.shape == (*shape, 3)
    assert frame_size(data) == shape
    assert difference(image, by_pillow(data)) <= 1


ODD = {
    "grey JPEG": lambda rgb: encode(rgb.convert("L"), "JPEG", quality=95),
    "progressive JPEG": lambda rgb: encode(rgb, "JPEG", quality=95, progressive=True),
    "CMYK JPEG": lambda rgb: encode(rgb.convert("CMYK"), "JPEG", quality=98, subsampling=0),
    "PNG": lambda rgb: encode(rgb, "PNG"),
    "grey PNG": lambda rgb: encode(rgb.convert("L"), "PNG"),
    "PNG with alpha": lambda rgb: encode(rgb.convert("RGBA"), "PNG"),
    "grey PNG with alpha": lambda rgb: encode(rgb.convert("LA"), "PNG"),
    "palette PNG": lambda rgb: encode(rgb.quantize(64), "PNG"),
    "bilevel PNG": lambda rgb: encode(rgb.convert("1"), "PNG"),
    "lossless WebP": lambda rgb: encode(rgb, "WEBP", lossless=True),
    "WebP with alpha": lambda rgb: encode(rgb.convert("RGBA"), "WEBP", lossless=True),
    "BMP": lambda rgb: encode(rgb, "BMP"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_what_pillow_makes_of_them(kind: str) -> None:
    data = ODD[kind](Image.fromarray(picture(60, 80, 3)))
    assert difference(decode_frame(data), by_pillow(data)) <= 1
    assert frame_size(data) == (60, 80)


def test_ycck_of_adobe_has_the_colours_of_the_picture() -> None:
    """YCCK as print software writes it: inverted, marked by Adobe's APP14 with transform 2."""
    rgb = picture(40, 56, 2)
    ycc = np.asarray(Image.fromarray(255 - rgb).convert("YCbCr"))
    plain = encode(
        Image.fromarray(np.dstack([ycc, np.full((40, 56), 255, np.uint8)]), "CMYK"), "JPEG", quality=99, subsampling=0
    )
    at = plain.find(b"Adobe")
    ycck = plain[: at + 11] + b"\x02" + plain[at + 12 :] if at >= 0 else plain
    assert simplejpeg.decode_jpeg_header(ycck)[2] == "YCCK"
    assert difference(decode_frame(ycck), by_pillow(ycck)) <= 1


def test_sixteen_bit_png_keeps_its_upper_eight_bits() -> None:
    grey = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    image = decode_frame(encode(Image.fromarray(grey), "PNG"))
    assert np.array_equal(image, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = picture(36, 64, 5)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),  # a viewer turns it by 90 degrees to the right
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert frame_size(data) == (36, 64)
    assert difference(decode_frame(data), upright) <= 4
    assert decode_frame(data).flags.c_contiguous


DECODE_ALL = """
import sys
from pathlib import Path
import numpy as np
import PIL
from vac_ddp.data.decode import decode_frame
for path in Path(sys.argv[1]).glob("*.frame"):
    np.save(path.with_suffix(".npy"), decode_frame(path.read_bytes()))
print(PIL.__version__, "torch" in sys.modules)
"""


@pytest.mark.parametrize("which", ["Pillow", "Pillow-SIMD"])
def test_pillow_and_pillow_simd_decode_alike(which: str, tmp_path: Path) -> None:
    """The same files in another interpreter. VAC_SIMD_PYTHON: one with numpy, simplejpeg and Pillow-SIMD."""
    python = sys.executable if which == "Pillow" else os.environ.get("VAC_SIMD_PYTHON")
    if python is None:
        pytest.skip(
            "extra test: no Pillow-SIMD (launch/install_simd.sh makes it, VAC_SIMD_PYTHON names its interpreter)"
        )
    kinds = [kind for kind in ODD if "WebP" not in kind]  # what Pillow-SIMD was compiled without
    for i, kind in enumerate(kinds):
        (tmp_path / f"{i}.frame").write_bytes(ODD[kind](Image.fromarray(picture(60, 80, i))))
    done = subprocess.run(
        [python, "-c", DECODE_ALL, str(tmp_path)],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ("post" in done.stdout) == (which == "Pillow-SIMD")
    assert done.stdout.endswith("False\n")
    for i in range(len(kinds)):
        assert difference(np.load(tmp_path / f"{i}.npy"), decode_frame((tmp_path / f"{i}.frame").read_bytes())) <= 1


# ---------------------------------------------------------------- the short way for plain JPEGs


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["colour", "grey", "progressive"])
def test_plain_jpegs_decode_the_same_the_short_way(factor: int, kind: str) -> None:
    image = Image.fromarray(picture(123, 163))
    data = encode(image.convert("L") if kind == "grey" else image, "JPEG", progressive=kind == "progressive")
    assert plain_jpeg_size(data) == (123, 163)
    out = np.full((-(-123 // factor), -(-163 // factor), 3), 7, np.uint8)
    assert decode_plain_jpeg(data, factor, out)
    assert np.array_equal(out, decode_frame(data, factor=factor))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_damaged_jpeg_is_left_to_the_long_way(share: float) -> None:
    data = jpeg(120, 160)
    data = data[: int(share * len(data))]
    assert plain_jpeg_size(data) == (120, 160)
    assert not decode_plain_jpeg(data, 1, np.empty((120, 160, 3), np.uint8))
    with pytest.raises(DamagedFrame):
        decode_frame(data)


def test_what_is_not_plain_is_told_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(picture(40, 60))
    turned = Image.Exif()
    turned[0x0112] = 6
    assert plain_jpeg_size(encode(image, "JPEG", exif=turned)) is None
    assert plain_jpeg_size(encode(image.convert("CMYK"), "JPEG")) is None
    assert plain_jpeg_size(encode(image, "PNG")) is None
    for scrap in (b"", b"\xff\xd8", b"text", jpeg(40, 60)[:20]):
        assert plain_jpeg_size(scrap) is None
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 40 * 60 - 1)
    assert plain_jpeg_size(encode(image, "JPEG")) is None


# ---------------------------------------------------------------- reduced decode


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("shape", [(720, 1280), (360, 648)])
def test_reduced_decode_is_close_to_a_resized_full_decode(factor: int, shape: tuple[int, int]) -> None:
    data = jpeg(*shape, seed=1, quality=90)
    small = decode_frame(data, factor=factor)
    assert small.shape == (shape[0] // factor, shape[1] // factor, 3)
    assert decode_frame(jpeg(41, 67), factor=factor).shape == (-(-41 // factor), -(-67 // factor), 3)
    box = Image.fromarray(decode_frame(data)).resize(small.shape[1::-1], Image.Resampling.BOX)
    assert psnr(small, np.asarray(box)) > 36


def test_reduced_decode_of_cmyk_and_turned_jpegs() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(picture(320, 400, 4))
    turned = encode(image, "JPEG", quality=95, exif=exif)
    assert decode_frame(turned, factor=4).shape == (100, 80, 3)
    full = Image.fromarray(decode_frame(turned)).resize((80, 100), Image.Resampling.BOX)
    assert psnr(decode_frame(turned, factor=4), np.asarray(full)) > 33
    cmyk = encode(image.convert("CMYK"), "JPEG", quality=95)
    full = Image.fromarray(decode_frame(cmyk)).resize((100, 80), Image.Resampling.BOX)
    assert decode_frame(cmyk, factor=4).shape == (80, 100, 3)
    assert psnr(decode_frame(cmyk, factor=4), np.asarray(full)) > 33


# ---------------------------------------------------------------- damage


def test_a_cut_png_shows_its_upper_part_where_that_is_wanted() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = encode(Image.fromarray(noise), "PNG")
    image = decode_frame(data[: len(data) // 2], tolerant=True)
    assert np.array_equal(image[:20], noise[:20])
    assert not image[-10:].any()
    with pytest.raises(DamagedFrame):
        decode_frame(data[: len(data) // 2])
    with pytest.raises(DamagedFrame):  # the setting of Pillow went back
        decode_frame(data[: len(data) // 2])


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF"]
)
@pytest.mark.parametrize("tolerant", [False, True])
def test_scraps_are_damage_and_nothing_worse(data: bytes, tolerant: bool) -> None:
    with pytest.raises(DamagedFrame):
        decode_frame(data, tolerant=tolerant)
    with pytest.raises(DamagedFrame):
        frame_size(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_corruption_raises_anything_but_damage(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from([jpeg(48, 64), encode(Image.fromarray(picture(30, 40)), "PNG")]))
    broken = bytearray(source)
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(broken[: data.draw(st.integers(1, len(broken)))])
    for tolerant in (False, True):
        try:
            image = decode_frame(broken, tolerant=tolerant)
        except DamagedFrame:
            continue
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3


# ---------------------------------------------------------------- huge frames


def test_a_huge_jpeg_is_decoded_reduced_whatever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 100_000)
    assert decode_frame(jpeg(800, 1200)).shape == (200, 300, 3)
    assert decode_frame(jpeg(800, 1200), factor=8).shape == (100, 150, 3)


def test_a_jpeg_that_is_huge_even_reduced_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 100)
    with pytest.raises(DamagedFrame, match="128x96 pixels are too many"):
        decode_frame(jpeg(96, 128))


def test_a_huge_png_is_a_damaged_frame_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 1000)
    with pytest.raises(DamagedFrame, match="64x48 pixels are too many for a PNG"):
        decode_frame(encode(Image.fromarray(picture(48, 64)), "PNG"))


def test_pillows_alarm_about_huge_files_is_not_heard(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """At 100 megapixels Pillow would warn; the header is looked at before."""
    for kind in ("PNG", "BMP", "GIF"):
        with pytest.raises(DamagedFrame, match="10000x10000 pixels are too many"):
            decode_frame(claiming(encode(Image.fromarray(picture(40, 56)), kind), 10_000, 10_000))
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DamagedFrame, match=r"exceeds limit|pixels"):
        decode_frame(encode(Image.fromarray(picture(48, 64)), "PNG"))
