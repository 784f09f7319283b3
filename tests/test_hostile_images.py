"""Image files made to do harm: other formats, sizes that are not there, streams that end early."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from tests.frame_data import picture, write_video
from tests.image_files import GIF_IMAGE, claiming, encode, png
from tests.runs import Workplace
from tests.support import REPO, environment
from vac_ddp.data import decode as decode_module
from vac_ddp.data.decode import DamagedFrame, decode_frame, frame_size, plain_jpeg_size
from vac_ddp.data.video_scan import decodes

RGB = Image.fromarray(picture(40, 56))
DISGUISED = ("EPS", "PDF", "ICO", "PCX", "TGA", "JPEG2000", "PPM", "TIFF", "DDS", "SGI")


# ---------------------------------------------------------------- other formats


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once anything started Ghostscript; the real one, if any, is hidden behind the script."""
    trace, programs = tmp_path / "gs-was-here", tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch '{trace}'\nexit 1\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked up once in a process
    return trace


def test_the_trap_works(trap: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError), Image.open(io.BytesIO(encode(RGB, "EPS"))) as image:
        image.load()
    assert trap.exists()


@pytest.mark.parametrize("kind", DISGUISED)
def test_other_formats_are_not_opened(kind: str, trap: Path) -> None:
    data = encode(RGB, kind)
    for tolerant in (False, True):
        with pytest.raises(DamagedFrame, match=r"not an image \(JPEG, PNG, WebP, BMP, GIF\)"):
            decode_frame(data, tolerant=tolerant)
    with pytest.raises(DamagedFrame):
        frame_size(data)
    assert not decodes(data)
    assert not trap.exists()


COMMANDS = """
import os, sys
from pathlib import Path
from PIL import Image
from vac_ddp import load
from vac_ddp.cli import main
data, cache, run = sys.argv[1:]
statuses = [
    main(["init", data, "--out", "made.yaml"]),
    main(["audit", data, "--test", data + "/good", "--json", "audit.json"]),
    main(["pack", data, "packed", "--cache", cache]),
    main(["audit", "packed"]),
    main(["train", f"--config={os.path.dirname(data)}/tiny.yaml", f"data.train={data}", f"data.val={data}",
          f"data.cache={cache}", f"run.dir={run}", "data.on_bad_video=skip", "data.max_damaged=1", "data.workers=0",
          "train.max_steps=2"]),
    main(["predict", "--run", run, "--data", data + "/disguised", "--out", "predicted"]),
    main(["predict", "--run", run, "--data", "packed", "--out", "predicted_pack"]),
    main(["report", run]),
    main(["export", run, "exported", "--data", data]),
    main(["extract", data + "/disguised", "extracted"]),
    main(["audio", data, "--out", "sound", "data.on_bad_video=skip", "data.max_damaged=1"]),
]
print("statuses", *statuses)
print(len(load(run).predict(data + "/disguised")))
"""


@pytest.mark.fault
def test_no_command_starts_ghostscript(trap: Path, tmp_path: Path) -> None:
    """Ten formats in files that are called .jpg, in every command that reads frames."""
    place = Workplace(tmp_path / "place")
    data = tmp_path / "place" / "data"
    for kind in DISGUISED:
        folder = data / "disguised" / kind
        folder.mkdir(parents=True)
        for name in ("0001.jpg", "0002.png", "clip.mp4"):
            (folder / name).write_bytes(encode(RGB, kind))
    for label in ("good", "other", "disguised"):
        for number in range(4):
            write_video(data / label / f"v{number}", 5, seed=number)
    done = place.python("-c", COMMANDS, data, tmp_path / "cache", tmp_path / "run")
    assert "statuses" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "place" / "predicted" / "submission.csv").exists(), done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").exists(), done.stdout + done.stderr
    assert not trap.exists()


# ---------------------------------------------------------------- memory

CLAIMED = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "WEBP lossless": {"lossless": True},
    "GIF": {},
    "BMP": {},
}
MEASURE = """
import sys
from pathlib import Path
from tests.image_files import peak_mib
from vac_ddp.data.decode import DamagedFrame, decode_frame, frame_size, plain_jpeg_size
data = Path(sys.argv[1]).read_bytes()
before = peak_mib()
for how in ({"factor": 8}, {"tolerant": True}, {"factor": 8, "tolerant": True}):
    try:
        print(decode_frame(data, **how).shape)
    except DamagedFrame as error:
        print(error)
print(plain_jpeg_size(data))
print(peak_mib() - before)
"""


@pytest.mark.parametrize("kind", CLAIMED)
def test_a_small_file_that_claims_a_huge_image_takes_no_memory(kind: str, tmp_path: Path) -> None:
    data = claiming(encode(RGB, kind.split()[0], **CLAIMED[kind]), 50_000, 50_000)
    (tmp_path / "frame").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "frame")],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *reasons, plain, grown = done.stdout.splitlines()
    assert all("too many" in reason for reason in reasons), reasons
    assert plain == "None"
    assert int(grown) < 20  # MiB


def test_pixels_need_bytes_beyond_ten_million(monkeypatch: pytest.MonkeyPatch) -> None:
    """An even frame up to 4K may pack into nothing; a larger one needs a byte for 1032 pixels."""
    even = Image.new("RGB", (3840, 2160), (9, 90, 200))
    assert decode_frame(encode(even, "WEBP", lossless=True, method=0)).shape == (2160, 3840, 3)
    monkeypatch.setattr(decode_module, "ANY_FILE_PIXELS", 40 * 56)
    small = encode(even.resize((57, 40)), "WEBP", lossless=True)
    limit = f"its header claims 57x40 pixels, too many for a file of {len(small)} bytes"
    monkeypatch.setattr(decode_module, "PIXELS_PER_BYTE", 57 * 40 / len(small))
    assert decode_frame(small).shape == (40, 57, 3)
    monkeypatch.setattr(decode_module, "PIXELS_PER_BYTE", 57 * 40 / len(small) - 0.1)
    for read in (decode_frame, frame_size):
        with pytest.raises(DamagedFrame, match=limit):
            read(small)
    jpeg = encode(even.resize((57, 40)), "JPEG")
    assert plain_jpeg_size(jpeg) == (40, 57)
    monkeypatch.setattr(decode_module, "PIXELS_PER_BYTE", 1)
    assert plain_jpeg_size(jpeg) is None


@pytest.mark.parametrize("form", ["progressive", "one scan a component"])
def test_a_jpeg_whose_coefficients_are_kept_is_not_decoded_reduced(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """libjpeg keeps all coefficients of an image of many scans, at full size whatever the reduction."""
    rgb = Image.fromarray(picture(96, 128))
    one = encode(rgb, "JPEG", subsampling=0)
    many = encode(rgb, "JPEG", progressive=True)
    if form != "progressive":
        at = one.index(b"\xff\xda")
        components = one[at + 5 : at + 11]
        many = one[:at] + b"\xff\xda\0\x08\x01" + components[:2] + b"\0\x3f\0" + one[at + 14 :]
    monkeypatch.setattr(decode_module, "ANY_FILE_PIXELS", 1000)
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 96 * 128 - 1)
    assert decode_frame(one, factor=2).shape == (48, 64, 3)
    with pytest.raises(DamagedFrame, match="128x96 pixels are too many for a progressive JPEG"):
        decode_frame(many, factor=2)
    with pytest.raises(DamagedFrame, match="128x96 pixels are too many for a progressive JPEG"):
        frame_size(many)


def test_no_mutation_takes_more_than_its_size_justifies() -> None:
    """3000 mutations in a process of 2 GiB (tests/drivers/fuzz_images.py): pixels or DamagedFrame, nothing else."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.drivers.fuzz_images", "3000"],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3000 mutations, decoded strict ")
    assert int(done.stdout.split()[-2]) < 256  # MiB, the interpreter and libraries among them


# ---------------------------------------------------------------- streams that end early


def test_a_png_of_four_rows_is_incomplete() -> None:
    """7000 x 7000 pixels by its header, four rows in a properly ended stream."""
    rows = np.random.default_rng(0).integers(1, 256, (4, 7000, 3)).astype(np.uint8)
    data = png(rows, 7000)
    assert frame_size(data) == (7000, 7000)
    with pytest.raises(DamagedFrame, match="the image data ends before its last row"):
        decode_frame(data)
    assert not decodes(data)
    image = decode_frame(data, tolerant=True)
    assert np.array_equal(image[:4], rows)
    assert not image[4:].any()


@pytest.mark.parametrize("last", [0, 7])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_whole_pngs_of_every_type_are_whole(mode: str, last: int) -> None:
    """Also where the last row is black, which is what a row that is missing looks like."""
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (9, 13)).astype(np.uint16))
    else:
        noise = Image.fromarray(rng.integers(0, 256, (9, 13, 3)).astype(np.uint8))
        image = noise.quantize(16) if mode == "P" else noise.convert(mode)
    if mode != "I;16":
        image.paste(last if mode in ("1", "L", "P") else (last,) * len(mode), (0, 8, 13, 9))
    assert decode_frame(encode(image, "PNG")).shape == (9, 13, 3)


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize(("height", "width"), [(9, 13), (8, 8), (1, 1), (3, 1), (1, 6)])
def test_interlaced_pngs_are_counted_pass_by_pass(height: int, width: int, missing: int) -> None:
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    pixels = picture(height, width)
    rows = [row for x, y, dx, dy in passes if x < width for row in pixels[y::dy, x::dx]]
    rows = rows[: len(rows) - missing]
    data = png(rows, height, width=width, interlaced=True)
    if missing:
        with pytest.raises(DamagedFrame, match=r"ends before its last row|truncated"):
            decode_frame(data)
    else:
        assert np.array_equal(decode_frame(data), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "GIF", "WEBP", "WEBP lossless"])
def test_other_formats_with_four_rows_are_incomplete(kind: str) -> None:
    rows = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 64, 3)).astype(np.uint8))
    data = claiming(encode(rows, kind.split()[0], lossless="lossless" in kind), 640, 64)
    assert frame_size(data) == (640, 64)
    with pytest.raises(DamagedFrame):
        decode_frame(data)


def test_a_cut_gif_shows_its_upper_part_where_that_is_wanted() -> None:
    grey = np.random.default_rng(0).integers(1, 256, (64, 64)).astype(np.uint8)
    data = encode(Image.fromarray(grey), "GIF", interlace=False)
    assert GIF_IMAGE in data
    image = decode_frame(data[: len(data) // 2], tolerant=True)
    assert np.array_equal(image[:10, :, 0], grey[:10])
    assert (image[-10:] == image[-1, -1]).all()
    with pytest.raises(DamagedFrame):
        decode_frame(data[: len(data) // 2])


# ---------------------------------------------------------------- threads


def test_threads_do_not_change_what_the_others_raise() -> None:
    """Strict and tolerant side by side on one cut file: no setting of Pillow or Python is switched."""
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)), "PNG")
    cut = data[: len(data) // 2]
    seen: list[object] = []
    ended = threading.Event()
    filters = list(warnings.filters)

    def watch() -> None:
        while not ended.is_set():
            if ImageFile.LOAD_TRUNCATED_IMAGES or warnings.filters != filters:
                seen.append((ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)))

    def decode(number: int) -> bool:
        try:
            decode_frame(cut, tolerant=bool(number % 2))
        except DamagedFrame:
            return False
        return True

    with ThreadPoolExecutor(17) as pool:
        watching = pool.submit(watch)
        decoded = list(pool.map(decode, range(800)))
        ended.set()
        watching.result()
    assert decoded == [False, True] * 400
    assert seen == []
    assert warnings.filters == filters
