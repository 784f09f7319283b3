"""Cases from the field (the optional folder `cases`): each is built by its own script and must come out right.

What is right is said in the folder's README.md; here is how it is checked. Without the folder every test says so.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from tests.support import REPO, environment, ffmpeg_program, shared, unpack
from vac_ddp.commands import extract_command
from vac_ddp.data.index import open_index
from vac_ddp.data.video_reader import DamagedVideo, VideoFile
from vac_ddp.errors import UserError
from vac_ddp.models.weight_files import open_source
from vac_ddp.results.logits_file import read_views
from vac_ddp.settings import DataSettings


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
    assert extract_command.main([str(case / "videos"), str(out), "--workers", "0", *options]) == 0
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
                unpack(path, target, short_side=1000)
            assert str(caught.value).endswith(str(refused.value))
            continue
        frames = list(VideoFile(path=path).frames())
        assert unpack(path, target, short_side=1000) == []
        assert [image.read_bytes() for image in sorted(target.rglob("*.jpg"))] == [
            simplejpeg.encode_jpeg(frame, quality=90, colorsubsampling="420") for frame in frames
        ]  # the files that vac extract writes
        shapes[path.name] = (len(frames), *frames[0].shape[:2])
    assert shapes == {
        "latin1.mp4": (10, 120, 160),
        "rot180.mp4": (10, 120, 160),
        "rot90.mp4": (10, 160, 120),
        "sar.avi": (10, 160, 128),
    }


# ---------------------------------------------------------------- folders, lists and samples


def vac(
    *words: str | Path, cwd: Path, status: int = 0, timeout: float = 300, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run `vac WORDS` in `cwd`; its exit status must be `status`."""
    command = [sys.executable, "-m", "vac_ddp.cli", *map(str, words)]
    variables = environment(XDG_CACHE_HOME=str(cwd), HOME=str(cwd), **extra)
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == status, done.stdout + done.stderr
    return done


TINY_RUN = ("--config", "scratch_small", "--nproc", "1", "run.dir=run", "train.epochs=1", "train.max_steps=2",
            "train.global_batch=8", "data.workers=0")  # fmt: skip


@pytest.fixture(scope="module")
def base(prepare: Callable[..., Path]) -> Path:
    """The small data set and the run that several cases use."""
    common = prepare("common")
    if not (common / "base" / "run").exists():
        with_vac(common / "base.sh")
    return common / "base"


def with_vac(script: Path, *arguments: str, timeout: float = 300) -> str:
    """Run a script that calls `vac`, which is this checkout's; its output."""
    programs = script.parent / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "vac").write_text(f'#!/bin/sh\nPYTHONPATH={REPO} exec {sys.executable} -m vac_ddp.cli "$@"\n')
    (programs / "vac").chmod(0o755)
    path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(script), *arguments]
    done = subprocess.run(command, env=environment(PATH=path), capture_output=True, text=True, timeout=timeout)
    return done.stdout + done.stderr


def test_c09_rgb_and_flow_in_one_folder_need_a_choice(prepare: Callable[..., Path], tmp_path: Path) -> None:
    data = prepare("common", "c09_rgbflow") / "data_train"
    for words in (("audit", data), ("train", *TINY_RUN, f"data.train={data}")):
        said = vac(*words, cwd=tmp_path, status=2).stderr
        assert "16 of 16 videos" in said
        assert "flow_x_*.jpg (19), flow_y_*.jpg (19), img_*.jpg (20)" in said
        assert "data.frame_pattern='img_*.jpg'" in said
    assert not (tmp_path / "run" / "checkpoints").exists()
    said = vac("audit", data, "data.frame_pattern=img_*.jpg", cwd=tmp_path).stdout
    assert "16 videos       320 frames" in said


def test_c10_samples_are_followed_or_refused(prepare: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    case = prepare("common", "c10_sample")
    words = ("predict", "--run", base / "run", "--data", base / "data_test", "--overwrite", "--out", tmp_path / "out")
    rows = {}
    for name in ("probs", "ext", "nulls"):
        vac(*words, "--sample", case / f"{name}.csv", cwd=tmp_path)
        with (tmp_path / "out" / "submission.csv").open() as stream:
            rows[name] = list(csv.reader(stream))
    views = read_views(tmp_path / "out")
    logits = views.logits.astype(np.float64).mean(axis=1)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    assert rows["probs"][0] == ["id", "run", "walk"]
    np.testing.assert_allclose(np.array(rows["probs"][1:], float)[:, 1:], shares, atol=1e-6)
    answers = [["run", "walk"][number] for number in shares.argmax(1)]
    assert rows["ext"] == [["filename", "label"], *([f"{i + 1:05d}.mp4", answer] for i, answer in enumerate(answers))]
    assert rows["nulls"] == [["Id", "Category"], *([f"{i + 1:05d}", answer] for i, answer in enumerate(answers))]
    for name, says in (("c0c1", "columns c0, c1"), ("semicolon", "with commas"), ("utf16", "not UTF-8")):
        assert says in vac(*words, "--sample", case / f"{name}.csv", cwd=tmp_path, status=2).stderr


def test_c11_names_that_are_not_utf8_work_end_to_end(prepare: Callable[..., Path], tmp_path: Path) -> None:
    """Folders and a list; everything written is UTF-8, with the names escaped the same way everywhere."""
    case = prepare("common", "c11_surrogate")
    vac("train", *TINY_RUN, f"data.train={case / 'data_train'}", cwd=tmp_path)
    vac("predict", "--run", "run", "--data", case / "data_test", "--out", "out", cwd=tmp_path)
    vac("score", "out", "--out", "scored", cwd=tmp_path)
    names = json.loads((tmp_path / "run" / "classes.json").read_text(encoding="utf-8"))
    assert len(names) == 2
    for path in (*tmp_path.rglob("*.csv"), *tmp_path.rglob("*.jsonl"), *tmp_path.rglob("*.txt"),
                 *tmp_path.rglob("*.yaml"), *tmp_path.rglob("*.html")):  # fmt: skip
        path.read_bytes().decode("utf-8")
    answers = {line.rpartition(",")[2] for line in (tmp_path / "scored/submission.csv").read_text().splitlines()[1:]}
    assert answers <= set(names)
    for script, source in ((case / "make2.py", case / "train2"), (case / "make.py", case / "list.csv")):
        run_script(script)
        vac("train", *TINY_RUN, f"data.train={source}", "run.overwrite=true", cwd=tmp_path)


@pytest.mark.parametrize("home", ["unset", "/"])
def test_c12_a_user_without_a_home_trains(prepare: Callable[..., Path], base: Path, home: str) -> None:
    if subprocess.run(["unshare", "-U", "true"], capture_output=True).returncode:
        pytest.skip("no right to make a user namespace")
    said = with_vac(prepare("common", "c12_nouser") / "run.sh", home)
    assert said.rstrip().endswith("rc=0"), said
    assert "Traceback" not in said


@pytest.mark.fault
def test_c13_a_small_dev_shm_is_enough(prepare: Callable[..., Path], base: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    script = prepare("common", "c13_shm") / "run.sh"
    script.write_text(script.read_text().replace("timeout 150", "timeout 500"))
    said = with_vac(script, timeout=600)
    assert said.rstrip().endswith("rc=0"), said


def test_c14_official_weights_with_a_numpy_number_are_read(prepare: Callable[..., Path], base: Path) -> None:
    case = prepare("c14_official")  # of the weights of `base`
    own = open_source(str(base / "run" / "best_videomae.pt")).state
    for name in ("finetuned.pth", "mp_rank_00_model_states.pt"):
        source = open_source(str(case / name))
        assert source.arguments is not None and source.arguments["lr"] == 5e-4
        assert torch.equal(source.state["head.weight"], own["classifier.weight"])


def test_c15_lists_are_read_whatever_tool_wrote_them(prepare: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    case = prepare("common", "c15_csv")
    settings = DataSettings(cache=str(tmp_path))
    for path in sorted(case.glob("*.*")):
        if path.name in ("make.py", "videos.csv"):
            continue
        index = open_index(path, labelled=True, settings=settings)
        classes = {"floats": ["0.0", "1.0"], "videomae": ["0", "1"], "mmaction": ["0", "1"], "noheader": ["0", "1"]}
        assert index.classes == classes.get(path.stem, ["run", "walk"])
        assert [Path(name).parts[-2:] for name in index.names] == [
            (name, f"v{video}") for name in ("run", "walk") for video in range(10)
        ]
        assert index.labels.tolist() == [0] * 10 + [1] * 10
        assert index.frame_counts.tolist() == [20] * 20
    index = open_index(case / "videos.csv", labelled=False, settings=settings)  # its lines name video files
    assert index.names[0].endswith("src") and index.is_file(0)


def test_c17_pointers_in_place_of_frames_are_named(prepare: Callable[..., Path], tmp_path: Path) -> None:
    data = prepare("common", "c17_lfs") / "data_train"
    said = vac("audit", data, cwd=tmp_path, status=3).stdout
    assert "no frame of any video of the data decodes" in said
    assert "git lfs pull" in said
    assert "git-lfs pointer" in vac("train", *TINY_RUN, f"data.train={data}", cwd=tmp_path, status=2).stderr


def test_c21_unusual_frames_and_names(prepare: Callable[..., Path], tmp_path: Path) -> None:
    case = prepare("common", "c21_oddframes")
    data = case / "data 100% é🙂"
    said = vac("audit", data, cwd=tmp_path, status=3).stdout
    assert "walk it/kinds: 1 of 12 frames, the first 12.jpg: " in said
    assert "-1" not in said.split("12.jpg: ")[1].splitlines()[0]
    said = vac("init", data, "--out", tmp_path / "my settings.yaml", cwd=tmp_path).stdout
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("  vac ")]
    settings = ["--config", str(tmp_path / "my settings.yaml")]
    assert commands == [
        ["vac", "audit", str(data), *settings],
        ["vac", "probe", *settings],
        ["vac", "init", str(data), "--weights", f"runs/{data.name}_probe", "--out", "finetune.yaml"],
    ]
    vac("train", *TINY_RUN, f"data.train={data}", cwd=tmp_path)
