"""Folders as people have them: RGB and flow together, a level too high or too deep, files that are no images."""

from __future__ import annotations

import io
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.frame_data import jpeg, write_video
from tests.support import environment
from vac_ddp import cli
from vac_ddp.config import read_yaml
from vac_ddp.data.decode import DamagedFrame, decode_frame
from vac_ddp.data.file_kinds import meaning
from vac_ddp.data.frame_types import stranger, types_of
from vac_ddp.data.index import open_index
from vac_ddp.errors import UserError, plain
from vac_ddp.settings import DataSettings


def tree(root: Path, *, classes: tuple[str, ...] = ("run", "walk"), videos: int = 2) -> Path:
    for name in classes:
        for video in range(videos):
            write_video(root / name / f"v{video}", 4)
    return root


def fails(root: Path, cache: Path, *, labelled: bool = True, classes: list[str] | None = None, **settings: str) -> str:
    with pytest.raises(UserError) as caught:
        open_index(root, labelled=labelled, classes=classes, settings=DataSettings(cache=str(cache), **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reason_of(data: bytes) -> str:
    """Why it is damaged; where it is not, words that say so."""
    try:
        decode_frame(data, factor=8)
    except DamagedFrame as error:
        return str(error)
    return "it decodes"


def numbered(*forms: str, count: int = 20) -> list[str]:
    return [form.format(number) for form in forms for number in range(count)]


# ---------------------------------------------------------------- types of pictures


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (numbered("img_{:05d}.jpg", "flow_x_{:05d}.jpg", "flow_y_{:05d}.jpg"), "flow_x_*.jpg flow_y_*.jpg img_*.jpg"),
        (numbered("{:04d}.jpg", "{:04d}.png"), "*.jpg *.png"),
        (numbered("{:04d}.jpg", "{:04d}_mask.png"), "*.jpg *_mask.png"),
        (numbered("{:04d}.jpg", "{:04d}_mask.jpg"), "*[0-9].jpg *_mask.jpg"),
        (numbered("{:04d}.jpg", "img_{:04d}.jpg"), "[0-9]*.jpg img_*.jpg"),
        (numbered("rgb_{}.jpg") + numbered("depth_{}.png", count=19), "depth_*.png rgb_*.jpg"),
        (numbered("a[1]_{}.jpg", "b_{}.jpg"), "a[[]*]_*.jpg b_*.jpg"),
        (numbered("{:04d}.jpg"), ""),
        (numbered("{}.jpg") + numbered("{:04d}.png")[19:], ""),  # one left over
        ([f"{number:x}e.jpg" for number in range(1000, 1300, 7)], ""),  # names at random
        ([f"00-{i // 60:02d}-{i % 60:02d}.jpg" for i in range(150)], ""),  # times
        (numbered("scene1_{}.jpg", "scene2_{}.jpg"), ""),  # two shots of one film
        (["01.png", "02.png", "04.jpg", "09.png.jpg", "10.webp"], ""),
    ],
)
def test_types_of_pictures(names: list[str], patterns: str) -> None:
    found = types_of(names)
    assert " ".join(found) == patterns
    assert sum(found.values()) == (len(names) if patterns else 0)


def test_a_cover_is_a_stranger() -> None:
    assert stranger([*numbered("{:04d}.jpg"), "cover.jpg"]) == "cover.jpg"
    assert stranger(numbered("{:04d}.jpg")) is None
    assert stranger(["a.jpg", "b.jpg"]) is None


def test_rgb_and_flow_in_one_folder_need_a_choice(tmp_path: Path) -> None:
    root = tree(tmp_path / "d")
    for folder in root.glob("*/*"):
        for frame in range(3):
            (folder / f"flow_x_{frame:04d}.jpg").write_bytes(jpeg(16, 16))
    text = fails(root, tmp_path / "c")
    assert "4 of 4 videos" in text
    assert "run/v0: [0-9]*.jpg (4), flow_x_*.jpg (3)" in text
    assert "data.frame_pattern='[0-9]*.jpg'" in text
    with pytest.raises(UserError, match="several types of pictures"):
        open_index(root / "run", labelled=False, settings=DataSettings(cache=str(tmp_path / "c")))
    for pattern, first, count in (("[0-9]*", "0001.jpg", 4), ("flow_x_*.jpg", "flow_x_0000.jpg", 3)):
        settings = DataSettings(cache=str(tmp_path / "c"), frame_pattern=pattern)
        for _ in range(2):  # from the scan, and from the cache
            index = open_index(root, labelled=True, settings=settings)
            assert index.frame_counts.tolist() == [count] * 4
            assert index.frame_name(0, 0) == f"run/v0/{first}"
    none = fails(root, tmp_path / "c", frame_pattern="img_*.jpg")
    assert "run/v0 (no frames in it)" in none
    assert "only files named img_*.jpg count (data.frame_pattern)" in none
    assert "named img_*.jpg (data.frame_pattern)" in fails(
        root / "run", tmp_path / "c", labelled=False, frame_pattern="img_*.jpg"
    )


def test_a_picture_beside_the_frames_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "d")
    (root / "run" / "v0" / "thumb.jpg").write_bytes(jpeg(16, 16))
    index = open_index(root, labelled=True, settings=DataSettings(cache=str(tmp_path / "c")))
    assert index.frame_counts.tolist() == [5, 4, 4, 4]
    assert any("run/v0/thumb.jpg" in note and "data.frame_pattern" in note for note in index.notes)


# ---------------------------------------------------------------- levels


def test_a_folder_one_level_too_high_or_too_deep_says_so(tmp_path: Path) -> None:
    """Of training, of the test, or of both; what to give is named."""
    both = tmp_path / "both"
    tree(both / "data_train")
    write_video(both / "data_test" / "00001", 2)
    cache = tmp_path / "c"
    wrapped = tmp_path / "wrapped" / "set" / "data_train"
    shutil.copytree(both / "data_train", wrapped)
    train = fails(tmp_path / "wrapped" / "set", cache)
    assert f"one folder too high: expected <class>/<video>/*.jpg, which {wrapped} has; give {wrapped}" in train
    assert f"give {wrapped}" in fails(tmp_path / "wrapped", cache)
    assert f"give {both / 'data_train'}" in fails(both, cache)
    inside = fails(both / "data_train" / "run", cache)
    assert "is it the folder of one class? then give" in inside
    assert inside.endswith(str(both / "data_train"))
    deep = fails(both, cache, labelled=False)
    assert f"{both / 'data_test'} has <video>/*.jpg, a test folder" in fails(both, cache, classes=["run", "walk"])
    assert f"give {both / 'data_test'}" in deep
    (tmp_path / "test" / "deep").mkdir(parents=True)
    shutil.copytree(both / "data_test", tmp_path / "test" / "deep" / "data_test")
    given = fails(tmp_path / "test" / "deep", cache, labelled=False)
    assert f"expected <video>/*.jpg, which {tmp_path / 'test/deep/data_test'} has" in given
    asked = fails(tmp_path / "test" / "deep", cache, classes=["run", "walk"])  # as predict takes it
    assert f"if its videos have no classes, it is one folder too high: give {tmp_path / 'test/deep/data_test'}" in asked


# ---------------------------------------------------------------- files that are no images


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12345\n", "git-lfs pointer"),
        (b"/annex/objects/MD5E-s1--a.jpg\n", "git-annex"),
        (b"\n <!DOCTYPE html>\n<html>", "web page"),
        (b"PK\x03\x04\x14\0\0\0", "zip archive"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\0\0\0\x18ftypheic\0\0", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0", "vac extract"),
        (b"RIFF\0\0\0\0AVI LIST", "vac extract"),
        (b'{"error": "not found"}', "JSON"),
        (b"Access denied", "'Access denied'"),
        (bytes(1000), "zero bytes"),
        (b"", "empty file"),
    ],
)
def test_what_is_no_image_is_told_by_its_first_bytes(data: bytes, words: str) -> None:
    assert words in str(meaning(data))
    with pytest.raises(DamagedFrame) as caught:
        decode_frame(data)
    assert words in str(caught.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_images_are_images_and_cut_off_ones_say_so_in_words(form: str) -> None:
    stream = io.BytesIO()
    Image.open(io.BytesIO(jpeg(48, 64))).save(stream, form)
    data = stream.getvalue()
    assert meaning(data) is None
    for end in range(1, len(data) - 1, max(1, len(data) // 150)):
        reason = reason_of(data[:end])
        assert sum(map(str.isalpha, reason)) > len(reason) / 2, f"{end} of {len(data)} bytes: {reason}"


def test_pointers_in_place_of_frames_are_named_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone without git-lfs: training and audit say so, and what to do."""
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tree(tmp_path / "d")
    for file in root.rglob("*.jpg"):
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12345\n")
    assert "run/v0/0001.jpg: not an image (JPEG, PNG, WebP, BMP, GIF) but a git-lfs pointer" in fails(
        root, tmp_path / "c"
    )
    assert cli.main(["audit", str(root)]) == 3
    printed = capsys.readouterr().out
    findings = printed[printed.index("findings:") :]
    assert "no frame of any video of the data decodes" in findings.splitlines()[1]
    assert "git lfs pull" in findings.splitlines()[1]
    assert "no source can be held out" not in printed


# ---------------------------------------------------------------- places


def test_without_a_home_there_is_no_cache_and_all_else_works(tmp_path: Path) -> None:
    """A container with a user id that /etc/passwd does not know, HOME unset; and HOME in a place that is read-only."""
    root = tree(tmp_path / "d")
    code = f"""
import pwd, os
def nobody(user): raise KeyError(user)
pwd.getpwuid = nobody
from pathlib import Path
from vac_ddp.data.index import open_index
from vac_ddp.data.index_file import cache_path
from vac_ddp.settings import DataSettings
print(cache_path(Path({str(root)!r}), labelled=True, settings=DataSettings()))
print(open_index({str(root)!r}, labelled=True, settings=DataSettings()).frame_counts.sum())
"""
    for home, kept in ((None, "None"), ("/proc/1/none", "/proc/1/none/.cache/vac_ddp/")):
        variables = environment()
        variables.pop("HOME", None)
        if home:
            variables["HOME"] = home
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        where, frames = done.stdout.split()
        assert where.startswith(kept)
        assert frames == "16"
    assert "HOME is not set" in str(plain(RuntimeError("Could not determine home directory.")))


def test_printed_commands_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "my data $HOME 100% 🙂")
    out = tmp_path / "it's.yaml"
    assert cli.main(["init", str(root), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in said if line.startswith("  vac ")]
    assert commands[0] == ["vac", "audit", str(root), "--config", str(out)]
    # Which command follows depends on the weights that can be had here.
    assert commands[1][1] in ("probe", "train") and commands[1][2:4] == ["--config", str(out)]
    packed = tmp_path / "a pack"
    assert cli.main(["pack", str(root), str(packed)]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words == ["use", "it", "as", f"data.train={packed}", "or", "--data", str(packed)]


def test_frame_pattern_reaches_init_and_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "d")
    for folder in root.glob("*/*"):
        for frame in range(3):
            (folder / f"flow_{frame:04d}.jpg").write_bytes(jpeg(16, 16))
    assert cli.main(["init", str(root), "--out", str(tmp_path / "a.yaml"), "--frame-pattern", "[0-9]*"]) == 0
    assert read_yaml(tmp_path / "a.yaml").data.frame_pattern == "[0-9]*"
    assert f"vac audit {root} --config {tmp_path / 'a.yaml'}" in capsys.readouterr().out
    assert cli.main(["pack", str(root), str(tmp_path / "p"), "--frame-pattern", "flow_*"]) == 0
    index = open_index(tmp_path / "p", labelled=True, settings=DataSettings())
    assert index.frame_counts.tolist() == [3] * 4
