"""The reader of video files: unusual files of each type, made here, against what was put into them."""

from __future__ import annotations

import struct
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from tests.support import REPO, unpack
from tests.test_extract import levels, make_video, picture, with_matrix
from vac_ddp.commands.extract_command import main
from vac_ddp.data.decode import decode_frame
from vac_ddp.data.video_frames import Encoding, VideoFrames, open_video
from vac_ddp.data.video_reader import DamagedVideo, VideoFile
from vac_ddp.errors import UserError

av = pytest.importorskip("av", reason="video files need PyAV")

RATE = 10


def encode(
    path: Path,
    numbers: Sequence[int],
    *,
    codec: str = "mpeg4",
    container: str | None = None,
    begin: float = 0.0,
    options: dict[str, str] | None = None,
) -> Path:
    """A file with the pictures of these numbers (`picture`), ten a second, the first at `begin` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=RATE, options=options or {"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for place, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = round(begin * RATE) + place, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def remux(source: Path, target: Path, stamps: Sequence[int]) -> Path:
    """The packets of a file of ten frames a second, shown at `stamps` (in tenths of a second)."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        stream.time_base = Fraction(1, RATE)  # PyAV 17.0 takes another one
        packets = [packet for packet in read.demux(video=0) if packet.size]
        for packet, stamp in zip(packets, stamps, strict=True):
            packet.pts = packet.dts = round(Fraction(stamp, RATE) / packet.time_base)
            packet.stream = stream
            write.mux(packet)
    return target


def frames_of(path: Path, *, rate: float | None = None, faults: bool = False) -> list[np.ndarray]:
    video = VideoFile(path=path)
    frames = list(video.frames(rate=rate))
    assert bool(video.faults) == faults, video.faults
    return frames


def frames_at(path: Path, numbers: Sequence[int]) -> list[np.ndarray]:
    read = VideoFrames(path, Encoding())
    return [read.pixels(number) for number in numbers]


# ---------------------------------------------------------------- how frames are shown


@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [(x, 0, 0, y) for x in (1, -1) for y in (1, -1)] + [(0, x, y, 0) for x in (1, -1) for y in (1, -1)],
)
def test_the_display_matrix_is_applied_in_all_eight_orientations(
    tmp_path: Path, a: int, b: int, c: int, d: int
) -> None:
    path = make_video(tmp_path / "a.mp4", 3)
    stored = frames_of(path)
    path.write_bytes(with_matrix(path.read_bytes(), [a, b, 0, c, d, 0, 0, 0, 1]))
    for before, shown in zip(stored, frames_of(path), strict=True):
        height, width = before.shape[:2]
        points = {(a * x + c * y, b * x + d * y): before[y, x] for y in range(height) for x in range(width)}
        left, top = min(x for x, _ in points), min(y for _, y in points)
        expected = np.empty_like(shown)
        for (x, y), colour in points.items():
            expected[y - top, x - left] = colour
        np.testing.assert_array_equal(shown, expected)


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    movie = encode(tmp_path / "movie.mp4", range(6))
    for name, with_movie in (("both.mp4", True), ("cover.mp4", False)):
        with av.open(str(tmp_path / name), "w") as write, av.open(str(movie)) as read:
            cover = write.add_stream("mjpeg", rate=RATE)
            cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic.value
            stream = write.add_stream_from_template(read.streams.video[0]) if with_movie else None
            sound = None if with_movie else write.add_stream("aac", rate=8000, layout="mono")
            write.start_encoding()
            image = av.VideoFrame.from_ndarray(np.full((480, 640, 3), 200, np.uint8), format="rgb24")
            image.pts = 0
            write.mux(cover.encode(image))
            write.mux(cover.encode(None))
            for packet in read.demux(video=0) if stream else ():
                if packet.size:
                    packet.stream = stream
                    write.mux(packet)
            if sound is not None:
                part = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
                part.rate, part.pts = 8000, 0
                write.mux([*sound.encode(part), *sound.encode(None)])
    assert levels(frames_of(tmp_path / "both.mp4")) == list(range(6))
    with pytest.raises(DamagedVideo, match="only a cover picture"):
        frames_of(tmp_path / "cover.mp4")


# ---------------------------------------------------------------- which frames


def test_an_edit_list_hides_frames_and_nothing_is_missing(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", range(20))
    data = bytearray(path.read_bytes())
    at = data.find(b"elst") + 4
    assert at > 3 and data[at] == 0 and struct.unpack(">I", data[at + 4 : at + 8])[0] == 1  # version 0, one entry
    scale = struct.unpack(">I", data[data.find(b"mdhd") + 16 : data.find(b"mdhd") + 20])[0]
    movie = struct.unpack(">I", data[data.find(b"mvhd") + 16 : data.find(b"mvhd") + 20])[0]
    data[at + 8 : at + 16] = struct.pack(">Ii", movie * 15 // RATE, scale * 5 // RATE)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 20
    assert levels(frames_of(path)) == list(range(5, 20))
    assert levels(frames_at(path, [0, 14])) == [5, 19]


def test_empty_chunks_of_an_avi_are_no_missing_frames(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.avi", range(20))
    path = remux(whole, tmp_path / "a.avi", [*range(10), *range(30, 40)])
    data = path.read_bytes()
    header = data.find(b"strh") + 8 + 32  # dwLength
    assert struct.unpack("<I", data[header : header + 4])[0] == 40
    path.write_bytes(data[:header] + struct.pack("<I", 80) + data[header + 4 :])  # 40 more at the end
    assert levels(frames_of(path)) == list(range(20))
    assert levels(frames_of(path, rate=RATE)) == [*range(9), *[9] * 21, *range(10, 20)]


@pytest.mark.parametrize("jump", [600.0, 20_000.0, -1.0])
def test_a_clock_that_jumps_is_read_as_continuous(tmp_path: Path, jump: float) -> None:
    first = encode(tmp_path / "1.ts", range(10), codec="mpeg2video", begin=2.0)
    second = encode(tmp_path / "2.ts", range(10, 20), codec="mpeg2video", begin=2.0 + jump)
    path = tmp_path / "both.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    assert levels(frames_of(path)) == list(range(20))
    assert levels(frames_of(path, rate=RATE)) == list(range(20))
    assert len(frames_of(path, rate=5)) == 10
    assert levels(frames_at(path, [3, 12])) == [3, 12]


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        ([*range(10), *range(60_000, 60_010)], list(range(20))),  # a jump of 100 minutes in a file that has no gaps
        ([0] * 20, None),  # the clock stands still
        ([*range(10), *range(30, 40)], [*range(9), *[9] * 21, *range(10, 20)]),  # a pause of two seconds is a pause
    ],
)
def test_no_frame_is_lost_and_the_work_is_bounded(
    tmp_path: Path, stamps: list[int], expected: list[int] | None
) -> None:
    path = remux(encode(tmp_path / "a.mkv", range(20), options={"g": "1", "qscale": "2"}), tmp_path / "b.mkv", stamps)
    assert levels(frames_of(path)) == list(range(20))
    got = levels(frames_of(path, rate=RATE))
    if expected is None:  # the first ones may share their time
        assert got == sorted(got) and set(range(4, 20)) <= set(got) and len(got) <= 20
    else:
        assert got == expected


def test_a_stream_without_time_stamps_is_played_at_its_rate(tmp_path: Path) -> None:
    path = encode(tmp_path / "raw.mpg", range(12), container="m4v")
    assert levels(frames_of(path)) == list(range(12))
    assert levels(frames_at(path, [11, 2])) == [11, 2]


# ---------------------------------------------------------------- single frames


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"g": "12", "bf": "2", "crf": "10"}),
        ("a.mkv", "libx264", {"g": "12", "bf": "3", "crf": "10", "x264-params": "open-gop=1"}),
        ("a.avi", "mpeg4", {"g": "12", "bf": "2", "qscale": "2"}),
        ("a.ts", "mpeg2video", {"g": "12", "bf": "2", "qscale": "2"}),
        ("a.webm", "libvpx-vp9", {"g": "12", "crf": "10", "cpu-used": "8"}),
    ],
)
def test_single_frames_are_those_of_the_whole_pass(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    path = encode(tmp_path / name, [(7 * i) % 25 for i in range(60)], codec=codec, options=options)
    video = VideoFile(path=path)
    whole = list(video.frames())
    table = video.table()
    assert len(table) == len(whole) == 60 and table.seekable
    for asked in ([0], [59], [13, 14, 40], [50, 3, 3, 27], list(range(60))):
        for got, number in zip(frames_at(path, asked), asked, strict=True):
            np.testing.assert_array_equal(got, whole[number])
    assert VideoFrames(path, Encoding(short_side=24)).pixels(5).shape == (24, 32, 3)
    with pytest.raises(OSError, match="60 frames"):
        frames_at(path, [60])


def test_single_frames_are_read_without_those_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vac_ddp.data.video_stream import Picture

    path = encode(tmp_path / "a.mkv", range(100), options={"g": "10", "qscale": "2"})
    decoded = []
    plain = Picture.decode

    def count(self: Picture):
        for frame in plain(self):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(Picture, "decode", count)
    assert levels(frames_at(path, [25, 95])) == [0, 20]
    assert len(decoded) <= 20  # of two groups of ten


def whole_pass(path: Path, short_side: int) -> list[bytes]:
    """The frames of a file as JPEGs, by the means of `frames` alone."""
    images = VideoFile(path=path).frames(short_side=short_side)
    return [simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420") for image in images]


def damaged_files(folder: Path) -> list[Path]:
    """Files that are damaged at several places, or cut off; one that changes its size."""
    files = []
    for name, codec, options in (
        ("a.mp4", "mpeg4", {"g": "8", "qscale": "2"}),
        ("a.avi", "mpeg4", {"g": "8", "bf": "2", "qscale": "2"}),
        ("a.mkv", "libx264", {"g": "8", "bf": "2", "crf": "10"}),
        ("a.ts", "mpeg2video", {"g": "8", "bf": "2", "qscale": "2"}),
    ):
        whole = encode(folder / name, [i % 25 for i in range(40)], codec=codec, options=options)
        data = whole.read_bytes()
        for part in (0.2, 0.35, 0.5, 0.6):
            at = int(len(data) * part)
            path = whole.with_stem(f"{part}_{codec}")
            path.write_bytes(data[:at] + bytes(60) + data[at + 60 :])
            files.append(path)
        cut = whole.with_stem(f"cut_{codec}")
        cut.write_bytes(data[: len(data) * 2 // 3])
        files.append(cut)
    small, large = encode(folder / "1.ts", range(10), codec="mpeg2video"), folder / "2.ts"
    make_video(folder / "2.mp4", 10, height=64, width=96)
    with av.open(str(folder / "2.mp4")) as read, av.open(str(large), "w") as write:
        stream = write.add_stream("mpeg2video", rate=RATE, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number, frame in enumerate(read.decode(video=0)):
            frame.pts, frame.time_base = 20 + number, Fraction(1, RATE)
            write.mux(stream.encode(frame))
        write.mux(stream.encode(None))
    (folder / "sizes.ts").write_bytes(small.read_bytes() + large.read_bytes())
    return [*files, folder / "sizes.ts"]


def test_one_open_video_has_the_frames_of_a_whole_pass_in_any_order(tmp_path: Path) -> None:
    rotated = encode(tmp_path / "turned.mp4", [(7 * i) % 25 for i in range(20)], options={"g": "5", "qscale": "2"})
    rotated.write_bytes(with_matrix(rotated.read_bytes(), [0, 1, 0, -1, 0, 0, 0, 0, 1]))
    faulty = 0
    for path in [rotated, *damaged_files(tmp_path)]:
        judged = VideoFile(path=path)
        try:
            list(judged.frames())
        except DamagedVideo:
            with pytest.raises(UserError, match="cannot be read as a video"):
                open_video(path, Encoding())
            continue
        expected = whole_pass(path, 30)
        video = open_video(path, Encoding(short_side=30))
        assert (video.count, video.faults) == (len(expected), judged.faults), path
        rng = np.random.default_rng(0)
        for number in [*rng.permutation(video.count).tolist(), *range(video.count)]:
            assert video.read(number) == expected[number], (path, number)
        faulty += bool(video.faults)
    assert faulty >= 8


def test_png_keeps_every_pixel_of_a_video(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", range(5))
    video = open_video(path, Encoding(image="png"))
    for number, image in enumerate(VideoFile(path=path).frames()):
        np.testing.assert_array_equal(decode_frame(video.read(number)), image)


# ---------------------------------------------------------------- sound


def test_sound_that_changes_its_format_is_written_whole(tmp_path: Path) -> None:
    parts = []
    for rate, layout, begin in ((44100, "stereo", 0), (48000, "mono", 1), (32000, "stereo", 2)):
        path = tmp_path / f"{rate}.ts"
        with av.open(str(path), "w") as output:
            stream = output.add_stream("mp2", rate=rate, layout=layout)
            tone = (np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * 20000).astype(np.int16)
            samples = np.repeat(tone, 2)[None] if layout == "stereo" else tone[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
            frame.rate, frame.pts, frame.time_base = rate, begin * rate, Fraction(1, rate)
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        parts.append(path.read_bytes())
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    video = VideoFile(path=tmp_path / "a.ts")
    assert video.write_sound(tmp_path / "audio.wav")
    with wave.open(str(tmp_path / "audio.wav")) as sound:
        assert (sound.getframerate(), sound.getnchannels()) == (16000, 1)
        samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16)
    assert abs(len(samples) - 48000) < 3000  # each part is rounded to whole packets
    for second in (0.5, 1.5, 2.5):
        part = samples[int(16000 * second) - 2000 :][:4000]
        assert abs(np.abs(np.fft.rfft(part)).argmax() * 16000 / len(part) - 440) < 5


# ---------------------------------------------------------------- refused, in one line


def huge_gif() -> bytes:
    size = struct.pack("<HH", 60000, 60000)
    return b"GIF89a" + size + b"\0\0\0,\0\0\0\0" + size + b"\0\x02\x02\x44\x01\0;"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("sound.mp4", None, "no video"),
        (
            "list.mp4",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
            "playlist|cannot be opened",
        ),
        ("huge.gif", huge_gif(), "packets that do not decode"),
        ("empty.mkv", b"", "empty file"),
        ("page.mp4", b"<!DOCTYPE html><title>404</title>", "cannot be opened"),
    ],
)
def test_what_is_no_video_is_refused_by_extract_and_predict_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "in" / name
    encode(tmp_path / "in" / "good.avi", range(3))
    if content is None:
        with wave.open(str(path), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(4000))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        unpack(path, tmp_path / "laid_out", short_side=100)
    assert len(str(caught.value).splitlines()) == 1
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0"]) == 3
    said = capsys.readouterr().out
    assert "extracted 1 videos, 3 frames" in said
    assert f"  {name}: {str(caught.value).partition('as a video: ')[2]}" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".extract.json", "good"]


# ---------------------------------------------------------------- names, links, one bad file


def test_metadata_that_is_not_utf8_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        output.metadata["title"] = "TITLEXXXX"
        stream = output.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(1), format="rgb24")))
        output.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.count(b"TITLEXXXX") == 1
    path.write_bytes(data.replace(b"TITLEXXXX", "TITLEéééé".encode("latin-1")))
    assert len(frames_of(path)) == 1
    assert unpack(path, tmp_path / "laid_out", short_side=100) == []


def test_names_of_any_length_and_form_are_extracted(tmp_path: Path) -> None:
    names = ["가" * 80 + ".mp4", "x" * 251 + ".avi", "12:30.mp4", "http:__a.mp4", "50% %03d.mp4", "-i.mp4", "a\nb.mp4"]
    for name in names:
        encode(tmp_path / "in" / "c" / name, range(3), container=name[-3:])
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0"]) == 0
    assert sorted(p.name for p in (tmp_path / "out" / "c").iterdir()) == sorted(name[:-4] for name in names)
    assert all(len(list(p.glob("*.jpg"))) == 3 for p in (tmp_path / "out" / "c").iterdir())
    for name in names:
        frames = unpack(tmp_path / "in" / "c" / name, tmp_path / "one", short_side=100)
        assert frames == []
        (tmp_path / "one").rename(tmp_path / f"done{names.index(name)}")


def test_links_are_followed_and_loops_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(tmp_path / "in" / "walk" / "a.mp4", range(3))
    encode(tmp_path / "elsewhere" / "b.mp4", range(4))
    (tmp_path / "in" / "run").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "in" / "jump").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "in" / "walk" / "up").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "walk" / "self").symlink_to("self")
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0"]) == 0
    made = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("0001.jpg"))
    assert made == ["jump/b/0001.jpg", "run/b/0001.jpg", "walk/a/0001.jpg"]
    assert "walk/up (a link to a folder above it)" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_trouble_with_one_file_ends_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    for name in ("a", "b", "c"):
        encode(tmp_path / "in" / name / "v.mp4", range(3))
    (tmp_path / "in" / "b" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("a file where the folder of a class should be")
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", workers]) == 3
    said = capsys.readouterr().out
    assert "extracted 2 videos, 6 frames" in said
    assert "  a/v.mp4: cannot be extracted to" in said
    assert "  b/gone.mp4: No such file or directory" in said
    assert (tmp_path / "out" / "a").read_text().startswith("a file")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.endswith(".partial")]


@pytest.mark.parametrize("rate", ["inf", "nan", "1e9", "-1"])
def test_an_impossible_rate_is_refused(tmp_path: Path, rate: str) -> None:
    with pytest.raises(UserError, match="--rate"):
        main([str(tmp_path), str(tmp_path / "out"), "--rate", rate])


def test_one_place_opens_video_files() -> None:
    opened = [
        p.name for p in (REPO / "vac_ddp").rglob("*.py") for line in p.read_text().splitlines() if "av.open(" in line
    ]
    assert set(opened) == {
        "video_stream.py",
        "card_code.py",
    }  # the latter is the text of a program without this package
