"""Video files as training and test data, against the same frames extracted without loss, and the cache of frames."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs import TINY, Workplace, assert_same_end
from vac_ddp import train
from vac_ddp.commands.audit_command import main as audit_main
from vac_ddp.commands.pack_command import main as pack_main
from vac_ddp.data import frame_cache
from vac_ddp.data.data_kind import kind_of
from vac_ddp.data.dataset import TestViews, TrainClips
from vac_ddp.data.decode import frame_size
from vac_ddp.data.frame_cache import FrameCache
from vac_ddp.data.frame_cache_setup import for_clips
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.sampler import Key
from vac_ddp.data.scan import looks_labelled
from vac_ddp.data.split import make_split
from vac_ddp.data.video_frames import Encoding, VideoFrames
from vac_ddp.data.video_reader import VideoFile
from vac_ddp.doctor.machine_rates import sample_video_files
from vac_ddp.embed import main as embed_main
from vac_ddp.errors import UserError
from vac_ddp.predict import main as predict_main
from vac_ddp.predicting.fingerprint import fingerprint
from vac_ddp.results.features_file import read_features
from vac_ddp.results.logits_file import read_views
from vac_ddp.settings import AugmentSettings, ClipSettings, Config, DataSettings, ViewSettings

av = pytest.importorskip("av", reason="video files need PyAV")

CLIP = ClipSettings(frames=4, stride=2, size=32)
FORMS = ((".mp4", "mpeg4", {"g": "4"}), (".avi", "mpeg4", {"g": "4", "bf": "2"}), (".mkv", "libx264", {"g": "5"}))


def write_file(path: Path, seed: int, frames: int, form: int, *, height: int = 40, width: int = 48) -> Path:
    """A video file of noise around a colour that changes with time."""
    _, codec, options = FORMS[form]
    codec = codec if codec in av.codecs_available else "mpeg4"
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 2_000_000
        for number in range(frames):
            coarse = rng.random((height // 8, width // 8, 3)).repeat(8, axis=0).repeat(8, axis=1)
            pixels = coarse * 90 + np.eye(3)[seed % 3] * 110 + number * 4
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def extract(path: Path, folder: Path) -> None:
    """The frames of a video file as PNG."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(VideoFile(path=path).frames(), start=1):
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """videos/<class>/*.mp4 (.avi, .mkv), frames/<class>/<video>/*.png of the same pixels; test_videos, test_frames."""
    folder = tmp_path_factory.mktemp("video_data")
    for label in range(3):
        for number in range(5):
            name, form = f"class{label}/film{number // 2}_{number % 2}", (label + number) % 3
            path = folder / "videos" / (name + FORMS[form][0])
            extract(write_file(path, 10 * number + label, 7 + number, form), folder / "frames" / name)
    for number in range(4):
        path = folder / "test_videos" / f"{number}{FORMS[number % 3][0]}"
        extract(write_file(path, 100 + number, 6 + number, number % 3), folder / "test_frames" / str(number))
    (folder / "tiny.yaml").write_text(TINY.replace("group_by: none, ", ""), encoding="utf-8")
    return folder


def index_of(
    root: Path, cache: Path, image: str = "png", *, labelled: bool = True, keep: bool = False, gb: float = 1.0
) -> Index:
    config = Config(clip=CLIP, data=DataSettings(cache=str(cache), cache_format=image, cache_gb=gb))
    index = open_index(root, labelled=labelled, settings=config.data)
    return for_clips(index, config, keep=keep, note=True)


def clips_of(index: Index) -> torch.Tensor:
    """Random clips of all videos, two epochs, and views of them: everything that is read in training."""
    config = Config(clip=CLIP, augment=AugmentSettings(repeats=1))
    clips = TrainClips(index, np.arange(len(index)), config, noise_size=0, seed=3)
    keys = [Key(epoch, draw, video) for epoch in range(2) for draw, video in enumerate(range(len(index)))]
    views = TestViews(index, np.arange(len(index)), CLIP, ViewSettings(windows="spread", count=2), tolerant=False)
    scored = [views[video].clips.flatten(0, 1) for video in range(len(index))]
    return torch.cat([clips.__getitems__(keys).clips, *scored])


def kept_files(cache: Path) -> list[Path]:
    return sorted((cache / "frames").glob("*.frames"))


# ---------------------------------------------------------------- the index


def test_files_are_the_videos_that_extracted_folders_are(place: Path, tmp_path: Path) -> None:
    files, folders = (index_of(place / name, tmp_path) for name in ("videos", "frames"))
    assert list(files.names) == list(folders.names) and files.classes == folders.classes
    np.testing.assert_array_equal(files.labels, folders.labels)
    np.testing.assert_array_equal(files.frame_counts, folders.frame_counts)
    assert files.frame_name(0, 3) == "class0/film0_0/0004.jpg"
    splits = [make_split(index, DataSettings(), seed=1) for index in (files, folders)]
    assert splits[0].groups == splits[1].groups and splits[0].grammar == splits[1].grammar != "none"
    np.testing.assert_array_equal(splits[0].val, splits[1].val)
    assert looks_labelled(place / "videos") and not looks_labelled(place / "test_videos")
    assert [kind_of(place / name) for name in ("videos", "test_videos")] == ["labelled", "test"]
    again = index_of(place / "videos", tmp_path)  # from the cached scan
    assert list(again.names) == list(files.names) and again.is_file(0)


def test_lists_and_folders_may_mix_files_and_folders(place: Path, tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    shutil.copytree(place / "videos", root)
    for name in ("class0/film0_0", "class1/film1_1"):
        next(root.glob(f"{name}.*")).unlink()
        shutil.copytree(place / "frames" / name, root / name)
    shutil.copytree(place / "frames" / "class2/film0_0", root / "class2/film0_0")  # beside its file: read once
    mixed = index_of(root, tmp_path / "cache")
    assert [mixed.is_file(i) for i in range(len(mixed))].count(False) == 3
    assert any("left alone (class2/film0_0.mkv)" in note for note in mixed.notes)
    folders = index_of(place / "frames", tmp_path / "cache")
    assert list(mixed.names) == list(folders.names)
    assert torch.equal(clips_of(mixed), clips_of(folders))
    lines = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.glob("*/*")) if path.is_file()]
    (root / "list.csv").write_text("\n".join(["path,label", "class0/film0_0,class0", *lines]))
    listed = index_of(root / "list.csv", tmp_path / "cache")
    assert listed.names[0] == "class0/film0_0" and not listed.is_file(0) and listed.is_file(1)
    assert all(not name.endswith((".mp4", ".avi", ".mkv")) for name in listed.names)
    shutil.copy(root / "class0/film0_1.avi", root / "class0/film0_1.mov")
    with pytest.raises(UserError, match=r"film0_1\.avi and film0_1\.mov are both the video film0_1: rename one"):
        index_of(root, tmp_path / "cache")


def test_what_is_wrong_with_a_file_is_said(place: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(place / "videos", root)
    (root / "class0" / "page.mp4").write_text("<!DOCTYPE html><title>404</title>")
    with pytest.raises(UserError, match=r"1 of 16 .*class0/page.mp4 \(no frame decodes\).*cannot be opened as a video"):
        index_of(root, tmp_path / "cache")
    whole = write_file(root / "class0" / "cut.mkv", 3, 30, 2).read_bytes()
    (root / "class0" / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    skip = DataSettings(cache=str(tmp_path / "cache"), on_bad_video="skip", max_damaged=0.5)
    index = open_index(root, labelled=True, settings=skip)
    assert index.skipped == ["class0/page"]
    note = next(note for note in index.notes if "damaged" in note)
    assert "1 video files are damaged" in note and "class0/cut.mkv: cut off" in note
    assert 3 < index.frame_counts[list(index.names).index("class0/cut")] < 30
    (root / "empty").mkdir()
    tests = open_index(root / "class0", labelled=False, settings=skip)
    assert tests.frame_counts[list(tests.names).index("page")] == 0  # it is answered all the same


def test_frames_that_the_container_lists_and_that_do_not_decode_are_damaged_frames(tmp_path: Path) -> None:
    path = write_file(tmp_path / "data" / "a" / "x.mkv", 3, 24, 2)
    write_file(tmp_path / "data" / "b" / "y.mkv", 4, 24, 2)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    body = bytes(packets[9])
    data = path.read_bytes()
    assert data.count(body) == 1
    path.write_bytes(data.replace(body, bytes([255]) * len(body)))
    lines = []
    for keep in (False, True, True):
        index = index_of(tmp_path / "data", tmp_path / "cache", keep=keep)
        assert index.frame_counts.tolist() == [24, 24]
        views = TestViews(index, np.arange(2), CLIP, ViewSettings(windows="spread", count=12), tolerant=True)
        lines.append((views[0].damage, views[0].clips))
    assert lines[0][0] == ["a/x/0010.jpg: its part of the video file does not decode"] * len(lines[0][0])
    assert lines[0][0] and lines[0][0] == lines[1][0] == lines[2][0]
    assert torch.equal(lines[0][1], lines[1][1]) and torch.equal(lines[0][1], lines[2][1])


# ---------------------------------------------------------------- the cache


def test_pixels_do_not_depend_on_the_cache(place: Path, tmp_path: Path) -> None:
    expected = clips_of(index_of(place / "frames", tmp_path))
    assert torch.equal(clips_of(index_of(place / "videos", tmp_path)), expected)
    assert not kept_files(tmp_path)  # only a training keeps frames
    index = index_of(place / "videos", tmp_path, keep=True)
    assert torch.equal(clips_of(index), expected)
    assert len(kept_files(tmp_path)) == len(index)
    shutil.copytree(place / "videos", tmp_path / "moved")
    others = index_of(tmp_path / "moved", tmp_path, keep=False)
    assert torch.equal(clips_of(others), expected) and len(kept_files(tmp_path)) == len(index)


def test_cached_frames_are_read_without_the_video(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = index_of(place / "videos", tmp_path, "jpeg", keep=True)
    expected = clips_of(jpeg)

    def never(*_: object) -> bytes:
        raise AssertionError("decoded again")

    monkeypatch.setattr(VideoFrames, "__call__", never)
    assert torch.equal(clips_of(index_of(place / "videos", tmp_path, "jpeg")), expected)
    monkeypatch.undo()
    assert torch.equal(clips_of(index_of(place / "videos", tmp_path / "other", "jpeg")), expected)
    assert (expected != clips_of(index_of(place / "videos", tmp_path))).any()  # png: other pixels, other files
    changed = write_file(place / "videos" / "class0" / "film0_0.mp4", 999, 7, 0)
    assert not index_of(place / "videos", tmp_path, "jpeg").frame_cache.file_of(changed).exists()
    write_file(changed, 0, 7, 0)


@pytest.mark.parametrize("harm", ["cut off", "empty", "version", "table", "frame", "another file"])
def test_a_damaged_cache_file_is_written_again(place: Path, tmp_path: Path, harm: str) -> None:
    path = place / "videos" / "class0" / "film0_0.mp4"
    cache = FrameCache(folder=tmp_path, encoding=Encoding(), limit=10**9)
    decoded = VideoFrames(path, Encoding())
    expected = [decoded(frame) for frame in range(7)]
    assert [cache.reader(path)(frame) for frame in range(7)] == expected
    kept = cache.file_of(path)
    whole = kept.read_bytes()
    at = {"version": len(whole) - 12, "table": len(whole) - 60, "frame": 100}.get(harm, 0)
    changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    kept.write_bytes({"cut off": whole[: len(whole) // 2], "empty": b"", "another file": whole * 2}.get(harm, changed))
    for _ in range(3):
        assert [cache.reader(path)(frame) for frame in range(7)] == expected
    if harm != "another file":  # its end is that of a good file, and it is caught by the frames
        assert kept.read_bytes() == whole


def test_the_cache_keeps_to_its_limit(place: Path, tmp_path: Path) -> None:
    paths = sorted((place / "videos").glob("*/*"))
    everything = FrameCache(folder=tmp_path / "all", limit=10**9)
    for path in paths:
        everything.reader(path)
    total = everything.count()
    assert total == sum(kept.stat().st_size for kept in kept_files(tmp_path / "all"))
    limit = total // 3
    index = index_of(place / "videos", tmp_path / "some", "jpeg", keep=True, gb=limit / 1e9)
    note = next(note for note in index.notes if "video files" in note)
    assert "15 videos are video files" in note and "videos do not fit into" in note and "data.cache_gb" in note
    assert 8 <= int(note.split("about ")[1].split()[0]) <= 12
    clips = clips_of(index)
    assert torch.equal(clips, clips_of(index_of(place / "videos", tmp_path / "none", "jpeg")))
    sizes = [kept.stat().st_size for kept in kept_files(tmp_path / "some")]
    assert 0 < sum(sizes) <= limit and 2 <= len(sizes) < 15
    off = index_of(place / "videos", tmp_path / "off", "jpeg", keep=True, gb=0)
    assert any("not cached (data.cache_gb=0), every epoch decodes them" in note for note in off.notes)
    assert torch.equal(clips, clips_of(off)) and not (tmp_path / "off" / "frames").exists()


def _fill(root: Path, cache: Path, limit: int) -> None:
    filled = FrameCache(folder=cache, limit=limit)
    for path in sorted(root.glob("*/*")):
        filled.reader(path)


def test_many_processes_fill_one_cache(place: Path, tmp_path: Path) -> None:
    _fill(place / "videos", tmp_path / "one", 10**9)
    one = {kept.name: kept.read_bytes() for kept in kept_files(tmp_path / "one")}
    limit = sum(map(len, one.values())) // 2
    for cache, most in (("together", 10**9), ("limited", limit)):
        arguments = (place / "videos", tmp_path / cache, most)
        processes = [multiprocessing.get_context("fork").Process(target=_fill, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        found = {kept.name: kept.read_bytes() for kept in kept_files(tmp_path / cache)}
        assert found.items() <= one.items()
        assert sum(map(len, found.values())) <= most
        assert len(found) == len(one) or cache == "limited"
        assert sorted(p.name for p in (tmp_path / cache / "frames").iterdir() if p.suffix != ".frames") == ["size"]


def test_a_cache_that_cannot_be_written_is_said_and_costs_time_only(place: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").write_text("a file where the folder should be")
    index = index_of(place / "videos", tmp_path, keep=True)
    assert any("cannot be cached" in note for note in index.notes)
    assert torch.equal(clips_of(index), clips_of(index_of(place / "frames", tmp_path)))
    assert (tmp_path / "frames").read_text().startswith("a file")


def test_what_killed_writers_left_is_removed_after_a_while(tmp_path: Path) -> None:
    import os

    cache = FrameCache(folder=tmp_path, limit=1)
    cache.count()
    for name, age in (("old", 7200), ("new", 10)):
        path = tmp_path / "frames" / f"{name}.frames.1.partial"
        path.write_bytes(b"123")
        os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    assert cache.count() == 3
    assert [p.name for p in (tmp_path / "frames").glob("*.partial")] == ["new.frames.1.partial"]
    (tmp_path / "frames" / frame_cache.SIZE).write_text("nonsense")
    with frame_cache._locked(tmp_path / "frames") as total:
        assert total.bytes == 3


# ---------------------------------------------------------------- runs and commands


def arguments(place: Path, data: str, folder: Path, run: str, *words: str) -> list[str]:
    return [
        f"--config={place / 'tiny.yaml'}",
        f"data.train={place / data}",
        f"data.cache={folder / 'cache'}",
        f"run.dir={folder / run}",
        "data.cache_format=png",
        *words,
    ]


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in one folder: "frames" on extracted frames, "videos" on the files."""
    folder = tmp_path_factory.mktemp("trained")
    for data in ("frames", "videos"):
        assert train.main(arguments(place, data, folder, data, "data.workers=0", "train.epochs=2")) == 0
    return folder


def test_a_training_on_files_is_that_on_frames_extracted_without_loss(trained: Path) -> None:
    runs = Workplace.__new__(Workplace)
    runs.folder = trained
    assert_same_end(runs, "frames", "videos")
    rows = [(trained / run / "split.csv").read_text() for run in ("frames", "videos")]
    assert rows[0] == rows[1]
    assert len(kept_files(trained / "cache")) == 15
    log = (trained / "videos" / "log.txt").read_text()
    assert "15 videos are video files: their frames are cached in" in log


def test_predictions_of_files_are_those_of_frames(place: Path, trained: Path, tmp_path: Path) -> None:
    run = str(trained / "videos")
    logits = []
    for data in ("test_videos", "test_frames"):
        words = ["--run", run, "--data", str(place / data), "--out", str(tmp_path / data), "data.workers=0"]
        assert predict_main([*words, f"data.cache={tmp_path}"]) == 0
        logits.append(read_views(tmp_path / data))
    assert logits[0].ids == logits[1].ids == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(logits[0].logits, logits[1].logits)
    texts = [(tmp_path / data / "submission.csv").read_text() for data in ("test_videos", "test_frames")]
    assert texts[0] == texts[1]
    assert not (tmp_path / "frames").exists()  # read once: nothing is kept


def test_settings_of_video_files_count_in_a_fingerprint(place: Path, tmp_path: Path) -> None:
    index = index_of(place / "test_videos", tmp_path, labelled=False)

    def marks(config: Config) -> dict[str, str]:
        return fingerprint(config, index, weights="w", precision="fp32", device="cpu", version="0", frames=False)

    assert not any("cache_format" in name or "video_short_side" in name for name in marks(Config()))
    changed = marks(Config(data=DataSettings(cache_format="png", video_short_side=100)))
    assert (changed["data.cache_format"], changed["data.video_short_side"]) == ("png", "100")


def test_audit_pack_embed_and_probe_take_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "audit.json"
    cache = f"data.cache={tmp_path / 'cache'}"
    words = [str(place / "videos"), cache, "--test", str(place / "test_videos"), "--json", str(out)]
    assert audit_main(words) in (0, 3)
    report = json.loads(out.read_text())
    assert report["damage"]["data"]["frames"] == sum(range(7, 12)) * 3 and report["damage"]["data"]["damaged"] == 0
    assert report["damage"]["data"]["sizes"] == [[48, 40, 15]] and report["damage"]["test"]["videos"] == 4
    assert pack_main([str(place / "videos"), str(tmp_path / "packed"), "--cache", str(tmp_path / "cache")]) == 0
    packed = index_of(tmp_path / "packed", tmp_path / "cache", "jpeg")
    files = index_of(place / "videos", tmp_path / "cache", "jpeg")
    assert list(packed.names) == list(files.names) and torch.equal(clips_of(packed), clips_of(files))
    weights = place / "encoder.pth"
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=0, img_size=32).state_dict(), weights)
    settings = tmp_path / "embed.yaml"
    settings.write_text(
        f"model: {{name: frame_vit, backbone: test_vit, weights: {weights}}}\n"
        f"clip: {{frames: 4, size: 32, sampling: segments}}\n"
        "data: {workers: 0, cache_format: png}\npredict: {views: {windows: spread, count: 1}}\n"
    )
    found = []
    for data in ("videos", "frames"):
        words = ["--config", str(settings), "--data", str(place / data), "--out", str(tmp_path / f"e_{data}"), cache]
        assert embed_main(words) == 0
        found.append(read_features(tmp_path / f"e_{data}"))
    assert found[0].ids == found[1].ids and found[0].groups == found[1].groups
    np.testing.assert_array_equal(found[0].pooled, found[1].pooled)
    capsys.readouterr()


def test_the_doctor_samples_files(place: Path, tmp_path: Path) -> None:
    frames = sample_video_files(place / "videos", tmp_path, Config(clip=CLIP))
    assert len(frames) == len(list(tmp_path.iterdir())) > 40
    assert {frame_size(path.read_bytes()) for path in frames} == {(40, 48)}


@pytest.mark.fault
@pytest.mark.distributed
def test_two_ranks_share_a_cache_and_resume_without_it(place: Path, tmp_path: Path) -> None:
    """Two ranks on one cache folder, killed, the cache removed, resumed: the weights of two ranks on frames."""
    there = Workplace.__new__(Workplace)
    there.folder = tmp_path

    def words(data: str) -> Callable[..., list[str]]:
        return lambda run, *more: arguments(place, data, tmp_path, run, *more)

    there.arguments = words("frames")
    done = there.train("plain")
    assert done.returncode == 0, done.stderr
    there.arguments = words("videos")
    done = there.train("files")
    assert done.returncode == 0, done.stderr
    assert_same_end(there, "plain", "files")
    assert len(kept_files(tmp_path / "cache")) == 15
    shutil.rmtree(tmp_path / "cache")
    done = there.train("killed", fault="SIGKILL step=5 rank=1")
    assert done.returncode != 0
    shutil.rmtree(tmp_path / "cache" / "frames")
    done = there.train("killed", "run.resume=auto")
    assert done.returncode == 0, done.stderr
    assert_same_end(there, "plain", "killed")
