"""Unusual video files, read by `vac extract`, `vac predict` and the API, against the ffmpeg program.

Number, size and pixels before JPEG: PSNR of at least 40 dB in every frame. `UNLIKE` names the files where the ffmpeg
program is told to do something else than by default, with the reason.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from tests.support import REPO, ffmpeg_program, shared, unpack
from tests.test_extract import with_matrix
from vac_ddp import load
from vac_ddp.data.extraction import Options, extract
from vac_ddp.data.video_reader import SUFFIXES, DamagedVideo, VideoFile
from vac_ddp.errors import UserError
from vac_ddp.predict import main

pytestmark = pytest.mark.fault  # the longer tier

TEST = "-f lavfi -i testsrc=size=96x64:rate=10:duration=1"
SMALL = "-f lavfi -i testsrc=size=48x32:rate=10:duration=4"
CHECK = "-f lavfi -i testsrc2=size=96x64:rate=10:duration=1"
TONE = "-f lavfi -i sine=frequency=440:duration=1"
MATRICES = {
    "upright": (1, 0, 0, 1), "mirrored": (-1, 0, 0, 1), "upside_down": (1, 0, 0, -1), "turned_180": (-1, 0, 0, -1),
    "turned_90": (0, 1, -1, 0), "turned_270": (0, -1, 1, 0), "transposed": (0, 1, 1, 0), "transverse": (0, -1, -1, 0),
}  # fmt: skip
MADE = {  # file: arguments of ffmpeg
    "plain.mp4": f"{TEST} -c:v libx264 -pix_fmt yuv420p",
    "long_gop.mp4": f"{TEST.replace('duration=1', 'duration=4')} -c:v libx264 -pix_fmt yuv420p -g 250 -bf 2",
    "cut_by_copy.mp4": "-ss 2 -i long_gop.mp4 -t 1 -c copy",
    "late.mp4": f"-itsoffset 0.5 {TEST} {TONE} -c:v libx264 -pix_fmt yuv420p -c:a aac",
    "wide_pixels.mp4": f"{TEST} -vf setsar=4/3 -c:v libx264 -pix_fmt yuv420p",
    "narrow_pixels.avi": f"{TEST} -vf setsar=3/4 -c:v mpeg4 -q:v 2",
    "pixel_aspect.mpg": f"{TEST.replace('96x64', '176x144')} -r 25 -vf setdar=16/9 -c:v mpeg2video -q:v 2",
    "variable.mkv": f"{TEST} -vf select='not(between(n,3,6))' -fps_mode vfr -c:v libx264 -pix_fmt yuv420p",
    "variable.mp4": f"{TEST} -vf setpts='N*N/100/TB' -fps_mode vfr -c:v libx264 -pix_fmt yuv420p",
    "empty_chunks.avi": f"{TEST} -vf select='not(between(n,3,6))' -fps_mode vfr -c:v mpeg4 -q:v 2",
    "cover.png": f"{CHECK.replace('96x64', '320x240')} -frames:v 1",
    "cover_first.mp4": "-i cover.png -i plain.mp4 -map 0 -map 1 -c copy -c:v:0 mjpeg -disposition:v:0 attached_pic "
    "-disposition:v:1 0",
    "cover.mkv": "-i plain.mp4 -attach cover.png -metadata:s:t mimetype=image/png -c copy",
    "b_frames.avi": f"{TEST} -c:v mpeg4 -bf 2 -g 5 -q:v 2",
    "animation.gif": f"{TEST}",
    "transparent.webm": f"{TEST} -c:v libvpx-vp9 -pix_fmt yuva420p",
    "vp8.webm": f"{TEST} -c:v libvpx -b:v 1M",
    "broadcast.mxf": f"{TEST.replace('rate=10', 'rate=25')} -c:v mpeg2video -q:v 2",
    "flash.flv": f"{TEST} -c:v flv1 -q:v 2",
    "windows.wmv": f"{TEST} -c:v wmv2 -q:v 2",
    "theora.ogv": f"{TEST} -c:v libtheora -q:v 8",
    "telephone.3gp": f"{TEST.replace('96x64', '176x144')} -c:v h263 -q:v 2",
    "disc.vob": f"{TEST.replace('rate=10', 'rate=25')} -c:v mpeg2video -q:v 2 -f vob",
    "camera.m2ts": f"{TEST} -c:v libx264 -pix_fmt yuv420p -f mpegts -mpegts_m2ts_mode 1",
    "open_gop.ts": f"{TEST} -c:v libx264 -pix_fmt yuv420p -g 4 -bf 2 -x264-params open-gop=1",
    "prores.mov": f"{TEST} -c:v prores_ks",
    "motion_jpeg.avi": f"{TEST} -c:v mjpeg -q:v 2 -pix_fmt yuvj420p",
    "ten_bits.mp4": f"{TEST} -c:v libx265 -x265-params log-level=error -pix_fmt yuv420p10le",
    "odd_size.mkv": f"{TEST.replace('96x64', '97x65')} -c:v libx264 -pix_fmt yuv444p",
    "odd_size.mp4": f"{TEST.replace('96x64', '98x66')} -vf crop=97:65 -c:v mpeg4 -q:v 2 -pix_fmt yuv420p",
    "interlaced.mpg": f"{TEST.replace('rate=10', 'rate=25')} -c:v mpeg2video -flags +ildct+ilme -q:v 2",
    "no_stamps.ts": f"{TEST} -c:v libx264 -pix_fmt yuv420p -f h264",
    "fragments.mp4": f"{TEST} -c:v libx264 -pix_fmt yuv420p -g 3 -movflags frag_keyframe+empty_moov",
    "two_videos.mkv": f"{CHECK} {TEST} -map 0 -map 1 -c:v libx264 -pix_fmt yuv420p -disposition:v:0 0 "
    "-disposition:v:1 default",
    "small.mp4": f"{SMALL} -c:v libx264 -pix_fmt yuv420p -g 250",
    "small_cut.mp4": "-ss 2 -i small.mp4 -t 1 -c copy",
    "small_wide.mp4": f"{SMALL} -vf setsar=4/3 -c:v libx264 -pix_fmt yuv420p",
    "grey.mkv": f"{TEST} -c:v ffv1 -pix_fmt gray",
    "rgb.avi": f"{TEST} -c:v rawvideo -pix_fmt bgr24",
}  # fmt: skip
CUT = ("open_gop.ts", "b_frames.avi", "odd_size.mkv", "fragments.mp4")  # and these once more, without their last third

# FFmpeg 8 places colour as H.264 and HEVC do (on the left) and converts interlaced frames by field; 5 has to be told.
LEFT = "flags=bicubic:in_h_chr_pos=0:in_v_chr_pos=128"
SQUARE = f"scale=trunc(iw*sar+0.5):ih:{LEFT},setsar=1,format=rgb24"
NO_ROWS = SQUARE.replace(":in_v_chr_pos=128", "")  # colour of every row: nothing lies between two
UNLIKE = {
    "turned_90_wide_pixels.mp4": (["-noautorotate"], SQUARE.replace("setsar=1,", "setsar=1,transpose=1,")),
    "interlaced.mpg": ([], SQUARE.replace(LEFT, "flags=bicubic:interl=-1")),
    "odd_size.mkv": ([], NO_ROWS),
    "wrong_ending.avi": ([], NO_ROWS),
    "prores.mov": ([], NO_ROWS),
    "theora.ogv": ([], NO_ROWS),
}


def make(folder: Path) -> None:
    """Write the files into `folder`."""
    for name, arguments in MADE.items():
        subprocess.run(
            [ffmpeg_program(), "-v", "error", "-y", *arguments.split(), name], cwd=folder, check=True, timeout=60
        )
    plain = (folder / "plain.mp4").read_bytes()
    for name, (a, b, c, d) in MATRICES.items():
        (folder / f"{name}.mp4").write_bytes(with_matrix(plain, [a, b, 0, c, d, 0, 0, 0, 1]))
    small = (folder / "small.mp4").read_bytes()
    (folder / "small_transverse.mp4").write_bytes(with_matrix(small, [0, -1, 0, -1, 0, 0, 0, 0, 1]))
    wide = (folder / "wide_pixels.mp4").read_bytes()
    (folder / "turned_90_wide_pixels.mp4").write_bytes(with_matrix(wide, [0, 1, 0, -1, 0, 0, 0, 0, 1]))
    for name in CUT:
        data = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(data[: len(data) * 2 // 3])
    (folder / "wrong_ending.avi").write_bytes((folder / "odd_size.mkv").read_bytes())
    (folder / "latin1.mp4").write_bytes(plain.replace(b"Lavf", "Laéf".encode("latin-1")))
    (folder / "cover.png").unlink()


def by_ffmpeg(path: Path) -> list[np.ndarray]:
    """What the ffmpeg program shows: each frame once, with square pixels, as RGB."""
    options, filters = UNLIKE.get(path.name, ([], SQUARE))
    command = [ffmpeg_program(), "-nostdin", "-v", "quiet", *options, "-i", f"file:{path}", "-fps_mode", "passthrough"]
    command += ["-vf", filters, "-an", "-f", "image2pipe", "-c:v", "ppm", "-"]
    data = subprocess.run(command, capture_output=True, timeout=120).stdout
    frames, at = [], 0
    while at < len(data):
        kind, width, height, most = data[at : at + 64].split(maxsplit=4)[:4]
        assert (kind, most) == (b"P6", b"255")
        size = int(width) * int(height) * 3
        at += len(b" ".join((kind, width, height, most))) + 1
        frames.append(np.frombuffer(data, np.uint8, size, at).reshape(int(height), int(width), 3))
        at += size
    return frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def check(path: Path) -> float:
    """Compare all of a file's frames with the ffmpeg program's; returns the lowest PSNR."""
    expected = by_ffmpeg(path)
    try:
        got = list(VideoFile(path=path).frames())
    except DamagedVideo:
        got = []
    assert [frame.shape for frame in got] == [frame.shape for frame in expected], path.name
    lowest = min((psnr(a, b) for a, b in zip(got, expected, strict=True)), default=99.0)
    assert lowest >= 40, f"{path.name}: {lowest:.1f} dB"
    return lowest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ffmpeg_program()
    made = tmp_path_factory.mktemp("videos")
    make(made)
    return made


def test_frames_are_those_of_the_ffmpeg_program(folder: Path) -> None:
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    assert len(paths) >= 45
    lowest = {path.name: check(path) for path in paths}
    print("\n".join(f"{value:6.1f} dB  {name}" for name, value in lowest.items()))
    assert sum(value == 99.0 for value in lowest.values()) > 30  # the same to the last bit


def test_real_files_too() -> None:
    for path in sorted(shared("videos").iterdir()):
        if path.suffix in SUFFIXES:
            print(f"{check(path):6.1f} dB  {path.name}")


def test_extract_and_predict_write_these_frames(folder: Path, tmp_path: Path) -> None:
    videos = tmp_path / "in"
    videos.mkdir()
    for path in folder.iterdir():
        if path.suffix in SUFFIXES:
            (videos / path.name.replace(".", "_")).with_suffix(path.suffix).symlink_to(path)  # one folder each
    extract(videos, tmp_path / "out", Options(quality=90, keep_damaged=True))
    for path in sorted(videos.iterdir()):
        if path.name == "cut_odd_size_mkv.mkv":  # no frame of it is whole
            with pytest.raises(UserError, match="no frame decodes"):
                unpack(path, tmp_path / path.stem, short_side=10_000)
            assert not (tmp_path / "out" / path.stem).exists()
            continue
        frames = list(VideoFile(path=path).frames())
        assert written(tmp_path / "out" / path.stem) == encoded(frames, 90, "420")
        unpack(path, tmp_path / path.stem, short_side=10_000)
        assert written(tmp_path / path.stem / path.stem) == encoded(frames, 90, "420")


def written(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


def encoded(frames: list[np.ndarray], quality: int, subsampling: str) -> list[bytes]:
    how = {"quality": quality, "colorspace": "RGB", "colorsubsampling": subsampling}
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(frame), **how) for frame in frames]


@pytest.mark.parametrize("name", ["small_transverse.mp4", "small_cut.mp4", "small_wide.mp4"])
def test_the_api_predicts_from_the_frames_of_the_ffmpeg_program(folder: Path, tmp_path: Path, name: str) -> None:
    model = load(REPO / "tests/fixtures/be24294/videomae", device="cpu")
    images = encoded(by_ffmpeg(folder / name), 90, "420")
    assert 2 * model.config.clip.size == 32  # smaller frames are not shrunk
    for number, data in enumerate(images, start=1):
        (tmp_path / f"{number:04d}.jpg").write_bytes(data)
    (expected,), (got,) = model.predict(tmp_path), model.predict(folder / name)
    assert got.faults == [] and not got.failed
    np.testing.assert_array_equal(got.logits, expected.logits)
    plain = model.predict(folder / "small.mp4")[0]
    assert np.abs(plain.logits - got.logits).max() > 1e-4  # and it matters


def test_a_file_that_is_cut_off_is_predicted_with_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = REPO / "tests/fixtures/be24294/videomae"
    (answer,) = load(run, device="cpu").predict(folder / "cut_open_gop.ts")
    assert len(answer.faults) == 1 and "cut off" in answer.faults[0]
    assert main(["--run", str(run), "--data", str(folder / "cut_open_gop.ts")]) == 3
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3  # the classes
    assert f"{answer.faults[0]}; predicted from the frames that decode" in said.err
    for name, share in answer.top:
        assert f"{share:.4f}  {name}" in said.out
