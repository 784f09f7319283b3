"""Video files to frame folders: the pictures, the tree, damage, and nothing half done."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import REPO, environment, shared
from vac_ddp.commands.extract_command import main
from vac_ddp.data.extraction import Options, Outcome, extract, extract_one, find_videos, outcomes, sweep
from vac_ddp.data.index import open_index
from vac_ddp.data.video_reader import DamagedVideo, VideoFile
from vac_ddp.errors import UserError
from vac_ddp.files import PARTIAL
from vac_ddp.settings import DataSettings

av = pytest.importorskip("av", reason="vac extract needs PyAV")


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Grey that grows with the frame's number, with one red corner (top left)."""
    image = np.full((height, width, 3), 20 + 8 * (number % 25), np.uint8)
    image[: height // 3, : width // 3] = (220, 30, 30)
    return image


def make_video(
    path: Path, frames: int = 12, *, rate: int = 10, height: int = 48, width: int = 64, sound: bool = False
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 4_000_000
        voice = container.add_stream("pcm_s16le", rate=8000) if sound else None
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice is not None:
            wave_of = np.sin(2 * np.pi * 440 * np.arange(8000 * frames // rate) / 8000)
            part = av.AudioFrame.from_ndarray((wave_of * 20000).astype(np.int16)[None], format="s16", layout="mono")
            part.rate, part.pts, part.time_base = 8000, 0, Fraction(1, 8000)
            container.mux(voice.encode(part))
            container.mux(voice.encode(None))
    return path


def read_frames(path: Path, **how: float) -> list[np.ndarray]:
    return list(VideoFile(path=path).frames(**how))


def levels(frames: list[np.ndarray]) -> list[int]:
    """Which picture each frame is, by its grey."""
    return [round((float(f[-f.shape[0] // 4 :, -f.shape[1] // 4 :].mean()) - 20) / 8) for f in frames]


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def jpegs(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.glob("*.jpg"))]


def test_frames_are_those_of_the_file_in_order(tmp_path: Path) -> None:
    make_video(tmp_path / "in" / "wave" / "a.mp4")
    summary = extract(tmp_path / "in", tmp_path / "out", Options())
    assert (summary.extracted, summary.frames, summary.there, summary.damaged) == (1, 12, 0, [])
    assert tree(tmp_path / "out") == [".extract.json", *(f"wave/a/{i:04d}.jpg" for i in range(1, 13))]
    frames = jpegs(tmp_path / "out" / "wave" / "a")
    assert levels(frames) == list(range(12))
    assert all(np.abs(f[2:14, 2:19].astype(int) - (220, 30, 30)).mean() < 12 for f in frames)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (10.0, [0, 1, 2, 3, 4, 5]),
        (5.0, [0, 2, 4]),
        (20.0, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (3.0, [0, 3]),  # at 0 and 0.33 of 0.6 seconds
        (15.0, [0, 0, 1, 2, 2, 3, 4, 4, 5]),
    ],
)
def test_the_frame_that_is_shown_at_a_time_is_taken(tmp_path: Path, rate: float | None, expected: list[int]) -> None:
    make_video(tmp_path / "a.avi", 6, rate=10)
    assert levels(read_frames(tmp_path / "a.avi", rate=rate)) == expected


@pytest.mark.parametrize(
    ("short_side", "expected"), [(None, (90, 160)), (45, (45, 80)), (30, (30, 53)), (200, (90, 160))]
)
def test_short_side_shrinks_and_never_enlarges(
    tmp_path: Path, short_side: int | None, expected: tuple[int, int]
) -> None:
    make_video(tmp_path / "a.mp4", 2, height=90, width=160)
    assert [f.shape[:2] for f in read_frames(tmp_path / "a.mp4", short_side=short_side)] == [expected] * 2


def with_matrix(data: bytes, matrix: list[int]) -> bytes:
    """An MP4 whose track header has another display matrix (ISO 14496-12, 8.3.2)."""
    at = data.find(b"tkhd") + 4 + 40
    entries = [x << (30 if i % 3 == 2 else 16) for i, x in enumerate(matrix)]
    return data[:at] + b"".join(e.to_bytes(4, "big", signed=True) for e in entries) + data[at + 36 :]


@pytest.mark.parametrize(
    ("matrix", "corner", "turned"),
    [
        ([1, 0, 0, 0, 1, 0, 0, 0, 1], (0, 0), False),
        ([0, 1, 0, -1, 0, 0, 0, 0, 1], (0, -1), True),  # clockwise: the top left corner goes to the top right
        ([-1, 0, 0, 0, -1, 0, 0, 0, 1], (-1, -1), False),
        ([0, -1, 0, 1, 0, 0, 0, 0, 1], (-1, 0), True),
    ],
)
def test_rotation_of_the_file_is_applied(
    tmp_path: Path, matrix: list[int], corner: tuple[int, int], turned: bool
) -> None:
    path = make_video(tmp_path / "a.mp4", 3)
    path.write_bytes(with_matrix(path.read_bytes(), matrix))
    frames = read_frames(path)
    assert [f.shape for f in frames] == [((64, 48, 3) if turned else (48, 64, 3))] * 3
    for frame in frames:
        red = {(y, x) for y in (0, -1) for x in (0, -1) if int(frame[y, x, 0]) - int(frame[y, x, 1]) > 100}
        assert red == {corner}


def test_pixels_become_square(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(1), format="rgb24")))
        container.mux(stream.encode(None))
    assert read_frames(path)[0].shape == (48, 96, 3)


def test_sound_becomes_a_16_khz_mono_file(tmp_path: Path) -> None:
    make_video(tmp_path / "in" / "loud.mkv", 20, sound=True)
    make_video(tmp_path / "in" / "silent.mp4", 4)
    extract(tmp_path / "in", tmp_path / "out", Options(audio=True))
    with wave.open(str(tmp_path / "out" / "loud" / "audio.wav")) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16000, 1, 2)
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16)
    assert abs(len(samples) - 32000) < 200
    assert abs(np.abs(np.fft.rfft(samples)).argmax() * 16000 / len(samples) - 440) < 2
    assert not (tmp_path / "out" / "silent" / "audio.wav").exists()
    assert len(jpegs(tmp_path / "out" / "loud")) == 20


def test_it_goes_on_where_it_was_and_keeps_one_way(tmp_path: Path) -> None:
    make_video(tmp_path / "in" / "x" / "a.mp4", 3)
    extract(tmp_path / "in", tmp_path / "out", Options(rate=10))
    first = tmp_path / "out" / "x" / "a" / "0001.jpg"
    stamp = first.stat().st_mtime_ns
    make_video(tmp_path / "in" / "x" / "b.mp4", 4)
    summary = extract(tmp_path / "in", tmp_path / "out", Options(rate=10))
    assert (summary.extracted, summary.frames, summary.there) == (1, 4, 1)
    assert first.stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"rate=10.* now it is rate=5"):
        extract(tmp_path / "in", tmp_path / "out", Options(rate=5))


def broken(tmp_path: Path) -> dict[str, Path]:
    good = make_video(tmp_path / "good.avi", 30).read_bytes()
    mp4 = make_video(tmp_path / "good.mp4", 30).read_bytes()
    mkv = make_video(tmp_path / "good.mkv", 30).read_bytes()
    contents = {
        "empty.mp4": b"",
        "text.mp4": b"no video at all\n" * 50,
        "cut10.avi": good[: len(good) // 10],
        "cut50.avi": good[: len(good) // 2],
        "cut99.avi": good[: len(good) * 99 // 100],
        "cut50.mp4": mp4[: len(mp4) // 2],
        "cut99.mp4": mp4[: len(mp4) * 99 // 100],
        "cut50.mkv": mkv[: len(mkv) // 2],
        "noise.avi": good[: len(good) // 2] + b"\xa5" * 3000 + good[len(good) // 2 + 3000 :],
    }
    paths = {}
    for name, data in contents.items():
        paths[name] = tmp_path / "in" / "class" / name
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_bytes(data)
    return paths


def test_damaged_files_are_named_and_leave_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = broken(tmp_path)
    for path in list(paths.values()):
        path.rename(path.parent / f"{path.stem}_{path.suffix[1:]}{path.suffix}")
    make_video(tmp_path / "in" / "fine" / "ok.mp4", 3)
    (tmp_path / "in" / "readme.txt").write_text("hello")
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "2"]) == 3
    assert tree(tmp_path / "out") == [".extract.json", "fine/ok/0001.jpg", "fine/ok/0002.jpg", "fine/ok/0003.jpg"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".extract.json", "fine"]
    said = capfd.readouterr().out
    assert "extracted 1 videos, 3 frames" in said
    assert f"{len(paths)} files are damaged and were left alone" in said
    assert all(f"class/{path.stem}_{path.suffix[1:]}{path.suffix}: " in said for path in paths.values())
    assert "1 files are no videos and were left alone: readme.txt" in said


def test_the_frames_of_damaged_files_are_kept_where_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in broken(tmp_path).values():
        path.rename(path.parent / f"{path.stem}_{path.suffix[1:]}{path.suffix}")
    make_video(tmp_path / "in" / "fine" / "ok.mp4", 3)
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0"]
    assert main(words) == 3
    refused = dict(re.findall(r"^  class/(.*?): (.*)$", capfd.readouterr().out, re.MULTILINE))
    assert main([*words, "--keep-damaged"]) == 3  # the same OUT takes them
    said = capfd.readouterr().out
    none = ["cut10_avi.avi", "cut50_avi.avi", "cut50_mp4.mp4", "empty_mp4.mp4", "text_mp4.mp4"]  # cut in the headers
    shown = ["cut50_mkv.mkv", "cut99_avi.avi", "cut99_mp4.mp4", "noise_avi.avi"]
    assert sorted(refused) == sorted([*none, *shown])
    assert sorted(p.name for p in (tmp_path / "out" / "class").iterdir()) == sorted(Path(name).stem for name in shown)
    assert f"extracted {len(shown)} videos, " in said and "; 1 were there" in said
    assert f"{len(none)} files are damaged and were left alone" in said
    assert all(f"class/{name}: {refused[name]}\n" in said and "--keep" not in refused[name] for name in none)
    assert f"{len(shown)} files are damaged; the frames that decode are extracted" in said
    for name in shown:
        folder = tmp_path / "out" / "class" / Path(name).stem
        frames = len(jpegs(folder))
        assert 0 < frames <= 30
        faults = (folder / ".faults.txt").read_text().splitlines()
        assert f"class/{name}: {frames} frames; {'; '.join(faults)}\n" in said
        assert refused[name] == "; ".join([*faults, f"{frames} frames decode, --keep-damaged writes them"])
    assert main(words) == 3  # and says so again
    again = capfd.readouterr().out
    assert f"extracted 0 videos, 0 frames; {len(shown) + 1} were there" in again
    named = [line for line in said.splitlines() if line.startswith("  ") and " frames; " in line]
    assert [line for line in again.splitlines() if line.startswith("  ") and " frames; " in line] == named


@pytest.mark.parametrize("kind", ["avi", "mp4", "mov", "mkv", "webm"])
def test_a_cut_video_never_becomes_a_folder(tmp_path: Path, kind: str) -> None:
    data = make_video(tmp_path / "a.mkv" if kind == "webm" else tmp_path / f"a.{kind}", 40).read_bytes()
    name = Path(f"cut.{kind}")
    for share in (*range(5, 100, 5), 99, 99.9):
        (tmp_path / name).write_bytes(data[: int(len(data) * share / 100)])
        outcome = extract_one(tmp_path, name, tmp_path / "out" / "cut", Options())
        assert outcome.problem and not outcome.frames
        assert not (tmp_path / "out").exists()
    (tmp_path / name).write_bytes(data)
    outcome = extract_one(tmp_path, name, tmp_path / "out" / "cut", Options())
    assert (outcome.problem, outcome.faults, outcome.frames) == (None, [], 40)
    assert len(jpegs(tmp_path / "out" / "cut")) == 40


@pytest.mark.parametrize("kind", ["avi", "mp4", "mov", "mkv", "webm"])
def test_a_cut_video_gives_its_first_frames_and_says_so(tmp_path: Path, kind: str) -> None:
    path = make_video(tmp_path / "a.mkv" if kind == "webm" else tmp_path / f"a.{kind}", 40)
    data, whole = path.read_bytes(), read_frames(path)
    assert len(whole) == 40
    cut = tmp_path / f"cut.{kind}"
    counts = []
    for share in (*range(5, 100, 5), 99, 99.9):
        cut.write_bytes(data[: int(len(data) * share / 100)])
        video, frames = VideoFile(path=cut), []
        try:
            frames = list(video.frames())
        except DamagedVideo:
            assert not frames
        else:
            assert any("cut off" in fault for fault in video.faults)
        counts.append(len(frames))
        same = [np.array_equal(a, b) for a, b in zip(frames, whole, strict=False)]
        assert all(same[:-1])  # of the last frame a part may be missing
    assert counts == sorted(counts) and counts[-1] <= 40
    if kind not in ("mp4", "mov"):  # their table of frames is at the end of the file
        assert 0 < counts[-5] < 40


def test_a_killed_extraction_leaves_no_folder_and_the_next_one_sweeps(tmp_path: Path) -> None:
    for i in range(4):
        make_video(tmp_path / "in" / "c" / f"{i}.mp4", 10)
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from vac_ddp.commands import extract_command\n"
        "write, calls = Path.write_bytes, [0]\n"
        "def stop(self, data):\n"
        "    calls[0] += 1\n"
        "    if calls[0] == 15: os.kill(os.getpid(), 9)\n"
        "    return write(self, data)\n"
        "Path.write_bytes = stop\n"
        f"extract_command.main([{str(tmp_path / 'in')!r}, {str(tmp_path / 'out')!r}, '--workers', '0'])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, env=environment(), capture_output=True, check=False
    )
    assert killed.returncode == -9
    there = sorted(p.name for p in (tmp_path / "out" / "c").iterdir())
    assert len(there) == 2
    assert there[0].endswith(PARTIAL)
    assert there[1] == "0"
    index = open_index(tmp_path / "out" / "c", labelled=False, settings=DataSettings(cache=str(tmp_path / "cache")))
    assert list(index.names) == ["0"]
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out" / "c").iterdir()) == ["0", "1", "2", "3"]
    assert all(len(jpegs(tmp_path / "out" / "c" / str(i))) == 10 for i in range(4))


def crash_on_b(root: Path, source: Path, folder: Path, options: Options) -> Outcome:
    if source.stem == "b":
        os.kill(os.getpid(), signal.SIGSEGV)
    return extract_one(root, source, folder, options)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_crashes_the_decoder_is_damaged_and_the_others_are_not(tmp_path: Path, workers: int) -> None:
    for name in "abc":
        make_video(tmp_path / f"{name}.mp4", 2)
    jobs = [(tmp_path, Path(f"{name}.mp4"), tmp_path / name, Options()) for name in "abc"]
    found = {outcome.name: outcome for outcome in outcomes(jobs, workers=workers, work=crash_on_b)}
    assert {name: outcome.frames for name, outcome in found.items()} == {"a.mp4": 2, "b.mp4": 0, "c.mp4": 2}
    assert found["b.mp4"].problem == "FFmpeg crashes on it"
    assert found["a.mp4"].problem is None


def test_work_of_a_living_process_or_another_machine_is_not_swept(tmp_path: Path) -> None:
    kept = [
        tmp_path / f".a.{socket.gethostname().replace('.', '_')}-{os.getpid()}{PARTIAL}",
        tmp_path / f".b.elsewhere-1{PARTIAL}",
    ]
    for folder in kept:
        folder.mkdir()
    assert sweep(tmp_path) == []
    assert all(folder.is_dir() for folder in kept)


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        main([str(tmp_path / "missing"), str(tmp_path / "out")])
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no video files"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    make_video(tmp_path / "in" / "a.mp4", 2)
    make_video(tmp_path / "in" / "a.avi", 2)
    with pytest.raises(UserError, match=r"a\.avi and a\.mp4 would become one folder"):
        find_videos(tmp_path / "in")
    for bad in (["--rate", "0"], ["--quality", "101"], ["--short-side", "0"]):
        with pytest.raises(UserError, match=bad[0]):
            main([str(tmp_path / "in"), str(tmp_path / "out"), *bad])


def test_quality_is_that_of_the_jpegs(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 1, height=240, width=320)
    sizes = {}
    for quality in (50, 95):
        extract(tmp_path / "a.mp4", tmp_path / str(quality), Options(quality=quality))
        data = (tmp_path / str(quality) / "a" / "0001.jpg").read_bytes()
        sizes[quality] = Image.open(io.BytesIO(data)).quantization[0][0]
    assert sizes == {50: 16, 95: 2}  # the first entry of the luminance table, ITU-T T.81 scaled by libjpeg's rule


def test_real_files_extract(tmp_path: Path) -> None:
    videos = shared("videos")
    out = tmp_path / "out"
    assert main([str(videos), str(out), "--audio", "--short-side", "120"]) == 0
    files = [p for p in videos.iterdir() if p.is_file()]
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == sorted(p.stem for p in files)
    for path in files:
        folder = out / path.stem
        with av.open(str(path)) as container:
            packets = sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
            sound = bool(container.streams.audio)
        assert packets - 2 <= len(list(folder.glob("*.jpg"))) <= packets  # a packet may stand for no new picture
        assert min(Image.open(folder / "0001.jpg").size) == 120
        assert (folder / "audio.wav").exists() == sound
