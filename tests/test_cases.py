"""Cases from the field (the optional folder `cases`): each is built by its own script and must come out right.

What is right is said in the folder's README.md; here is how it is checked. Without the folder every test says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import environment, ffmpeg_program, shared
from vac_ddp import prediction
from vac_ddp.data.video import DamagedVideo, VideoFile
from vac_ddp.errors import UserError
from vac_ddp.tools import extract


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """prepare(*names): build these cases beside each other by their scripts, once; returns the last one's folder."""
    root = tmp_path_factory.mktemp("cases")

    def build(*names: str) -> Path:
        for name in names:
            source = shared("cases", name)
            if not (root / name).exists():
                shutil.copytree(source, root / name, copy_function=shutil.copyfile)
                (root / name).chmod(0o755)
                for script in sorted((root / name).glob("make.*")):
                    run_script(script)
        return root / names[-1]

    return build


def run_script(script: Path, *arguments: str) -> None:
    """Run a case's make.sh or make.py with this Python and its programs first on the PATH."""
    ffmpeg_program()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash" if script.suffix == ".sh" else sys.executable, str(script), *arguments]
    subprocess.run(command, check=True, env=environment(PATH=path), capture_output=True, timeout=120)


def extracted(case: Path, out: Path, *options: str) -> dict[str, list[Path]]:
    """`vac extract case/videos out` without a finding: the frames of each video."""
    pytest.importorskip("av", reason="vac extract needs PyAV")
    assert extract.main([str(case / "videos"), str(out), "--workers", "0", *options]) == 0
    found: dict[str, list[Path]] = {}
    for path in sorted(out.rglob("*.jpg")):
        found.setdefault(str(path.parent.relative_to(out)), []).append(path)
    return found


def counts(frames: dict[str, list[Path]]) -> dict[str, int]:
    return {name: len(paths) for name, paths in frames.items()}


# ---------------------------------------------------------------- video files


def test_c01_frames_hidden_by_an_edit_list_are_not_missing(prepare: Callable[..., Path], tmp_path: Path) -> None:
    assert counts(extracted(prepare("c01_editlist"), tmp_path / "out")) == {"cut/cut": 62, "whole/src": 180}


def test_c02_a_mirror_in_the_display_matrix_is_applied(prepare: Callable[..., Path], tmp_path: Path) -> None:
    case = prepare("c02_flip")
    references = sorted((case / "ref").glob("*.png"))
    assert len(references) == 6
    frames = extracted(case, tmp_path / "out")
    for path in references:
        expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
        got = np.asarray(Image.open(frames[path.stem][0])).astype(int)
        assert got.shape == expected.shape
        assert np.abs(got - expected).mean() < 8  # what the JPEG takes
        np.testing.assert_array_equal(next(VideoFile(path=case / "videos" / f"{path.stem}.mp4").frames()), expected)


def test_c03_a_class_folder_that_is_a_link_is_followed(prepare: Callable[..., Path], tmp_path: Path) -> None:
    frames = extracted(prepare("c03_symlink"), tmp_path / "out")
    assert counts(frames) == {"run/r1": 10, "run/r2": 10, "walk/w1": 10, "walk/w2": 10}


def test_c04_a_file_name_of_244_bytes_is_extracted(prepare: Callable[..., Path], tmp_path: Path) -> None:
    frames = extracted(prepare("c04_longname"), tmp_path / "out")
    assert counts(frames) == {"run/b": 10, f"run/{'가' * 80}": 10, "walk/a": 10}


@pytest.mark.parametrize("jump", [600, 33500])
def test_c08_a_clock_that_jumps_gives_what_ffmpeg_gives(
    prepare: Callable[..., Path], tmp_path: Path, jump: int
) -> None:
    case = prepare("c08_ptsjump")
    run_script(case / "make.sh", str(jump))
    got = counts(extracted(case, tmp_path / "out", "--rate", "10"))
    for name, expected in (("plain", 10), ("jump", 20), ("back", 20)):
        command = [ffmpeg_program(), "-v", "fatal", "-i", f"{case}/videos/{name}.ts", "-r", "10", "-f", "framecrc", "-"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
        assert abs(got[name] - sum(not line.startswith("#") for line in lines)) <= 2
        assert got[name] == expected


def test_c20_unusual_codecs_sizes_and_colours_stay_right(prepare: Callable[..., Path], tmp_path: Path) -> None:
    case = prepare("c20_odd")
    frames = extracted(case, tmp_path / "out")
    shapes = {name: (len(paths), *Image.open(paths[0]).size) for name, paths in frames.items()}
    assert shapes == {
        "alpha": (10, 161, 121),
        "anim": (10, 161, 121),
        "col_bt709": (5, 160, 120),
        "col_full": (5, 160, 120),
        "col_smpte170m": (5, 160, 120),
        "hevc10": (10, 160, 120),
        "odd": (10, 161, 121),
        "raw": (10, 160, 120),
        "reschange": (19, 160, 120),  # 19 by the ffmpeg program too: the last of the first stream is not ended
        "sar": (10, 128, 160),
        "wrong_ending": (10, 161, 121),
    }
    assert {Image.open(path).size for path in frames["reschange"]} == {(160, 120)}
    for name in ("col_bt709", "col_full", "col_smpte170m"):
        colour = np.asarray(Image.open(frames[name][0])).reshape(-1, 3).mean(axis=0)
        assert np.abs(colour - (0x20, 0xC0, 0x40)).max() < 6  # FFmpeg's own conversions round


def test_c22_predict_reads_a_file_as_extract_does(prepare: Callable[..., Path], tmp_path: Path) -> None:
    case = prepare("c02_flip", "c20_odd", "c22_predict_file")
    videos = sorted((case / "videos").iterdir())
    shapes = {}
    for path in videos:
        target = tmp_path / f"laid_out_{path.stem}"
        if path.name == "cutoff.mkv":  # no frame of it decodes
            with pytest.raises(DamagedVideo) as refused:
                list(VideoFile(path=path).frames())
            with pytest.raises(UserError) as caught:
                prediction.lay_out(path, "video file", target, short_side=1000)
            assert str(caught.value).endswith(str(refused.value))
            continue
        frames = list(VideoFile(path=path).frames())
        assert prediction.lay_out(path, "video file", target, short_side=1000) == []
        images = [np.asarray(Image.open(image)) for image in sorted(target.rglob("*.jpg"))]
        assert len(images) == len(frames)
        for image, frame in zip(images, frames, strict=True):
            assert image.shape == frame.shape
            assert np.abs(image.astype(int) - frame).mean() < 3
        shapes[path.name] = (len(frames), *frames[0].shape[:2])
    assert shapes == {
        "latin1.mp4": (10, 120, 160),
        "rot180.mp4": (10, 120, 160),
        "rot90.mp4": (10, 160, 120),
        "sar.avi": (10, 160, 128),
    }
