from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import shared
from vac_ddp.data import scan as scanning
from vac_ddp.data import scan_freshness as freshness
from vac_ddp.data.frame_names import FrameNames, Texts, join_frames, natural_key, pack_runs, runs_of
from vac_ddp.data.index import Index, _contents, open_index
from vac_ddp.data.index_file import cache_path, read_scan
from vac_ddp.errors import UserError
from vac_ddp.settings import DataSettings

ODD_NAMES = ["a!b #1", "c&d (2)+;", "e@[x]~", "50_FIRST_DATES", "[0-9]", "*", "naïve ß"]


def jpeg(shade: int = 0, height: int = 16, width: int = 16) -> bytes:
    import simplejpeg

    pixels = (np.add.outer(np.arange(height), np.arange(width))[..., None] * 5 + shade) % 256
    return simplejpeg.encode_jpeg(np.ascontiguousarray(np.repeat(pixels, 3, 2).astype(np.uint8)))


def video(folder: Path, names: list[str], data: bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(jpeg(i) if data is None else data)
    return folder


def frames(count: int, first: int = 1) -> list[str]:
    return [f"{i:04d}.jpg" for i in range(first, first + count)]


def tree(root: Path, *, classes: tuple[str, ...] = ("run", "walk"), videos: int = 2, count: int = 3) -> Path:
    for name in classes:
        for i in range(videos):
            video(root / name / f"clip_{i}", frames(count))
    return root


def aged(root: Path) -> Path:
    """Make the folders old enough that an index trusts their times."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1e9, 1e9))
    return root


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    return DataSettings(cache=str(tmp_path / "cache"))


def names_of(index: Index, which: int) -> list[str]:
    return [index.frame_name(which, i).rpartition("/")[2] for i in range(index.frame_counts[which])]


def test_a_labelled_folder(tmp_path: Path, data: DataSettings) -> None:
    index = open_index(tree(tmp_path / "d"), labelled=True, settings=data)
    assert index.classes == ["run", "walk"]
    assert list(index.names) == ["run/clip_0", "run/clip_1", "walk/clip_0", "walk/clip_1"]
    assert index.labels.tolist() == [0, 0, 1, 1]
    assert index.labels.dtype == np.int64
    assert index.frame_counts.tolist() == [3, 3, 3, 3]
    assert len(index) == 4
    assert index.frame_name(2, 1) == "walk/clip_0/0002.jpg"
    assert index.frame_bytes(2, 1) == (tmp_path / "d/walk/clip_0/0002.jpg").read_bytes()
    assert index.notes == []
    with pytest.raises(IndexError):
        index.frame_bytes(2, 3)


@pytest.mark.parametrize(
    "names",
    [
        ["1.jpg", "2.jpg", "10.jpg", "100.jpg"],
        ["0.jpg", "1.jpg", "2.jpg"],
        ["000007.png", "000008.png", "000011.png", "000012.png", "000020.png"],
        ["img_1.JPG", "img_2.jpeg", "img_3.PNG", "img_4.webp"],
        ["0001.jpg", "0001.png", "0002.jpg"],
        ["frame1_320x240.jpg", "frame2_320x240.jpg", "frame10_320x240.jpg"],
        ["998.jpg", "999.jpg", "1000.jpg"],
        ["2.jpg", "4.jpg", "6.jpg", "8.jpg"],
        ["01.jpg", "2.jpg", "003.jpg"],
        ["cover.jpg"],
        ["b.jpg", "ab.jpg", "z9.jpg", "z10.jpg"],
        ["123456789012345678901234567890.jpg", "123456789012345678901234567891.jpg"],
        [f"{i:04d}.jpg" for i in range(1, 9999, 7)],
        ["a [1]!.jpg", "a [2]!.jpg", "a [12]!.jpg"],
    ],
)
def test_frames_come_in_natural_order_whatever_their_names(
    tmp_path: Path, data: DataSettings, names: list[str]
) -> None:
    shuffled = sorted(names, key=lambda name: hash((name, 1)))
    video(tmp_path / "t" / "v", shuffled, b"")
    index = open_index(tmp_path / "t", labelled=False, settings=data)
    expected = sorted(names, key=natural_key)
    assert names_of(index, 0) == expected
    assert index.frames.names(0) == expected
    assert set(index.frames.names(0)) == set(names)


def test_natural_order_is_by_value() -> None:
    assert sorted(["10", "9", "1a", "1", "b2", "b10"], key=natural_key) == ["1", "1a", "9", "10", "b2", "b10"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(
            st.one_of(
                st.from_regex(r"[ab_]{0,2}[0-9]{1,4}(_[0-9]{1,2})?\.(jpg|PNG)", fullmatch=True),
                st.integers(0, 30).map(lambda i: f"{i:03d}.jpg"),
            ),
            unique=True,
            max_size=25,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_packed_frame_names_are_the_names(videos: list[list[str]]) -> None:
    expected = [sorted(names, key=natural_key) for names in videos]
    packed = pack_runs([runs_of(list(names)) for names in videos])
    assert packed.counts.tolist() == [len(names) for names in videos]
    assert [packed.names(i) for i in range(len(videos))] == expected
    for i, names in enumerate(expected):
        assert [packed.name(i, j) for j in range(len(names))] == names
    back = np.arange(len(videos))[::-1]
    assert [packed.take(back).names(i) for i in range(len(videos))] == expected[::-1]
    twice = join_frames([packed, packed.take(back)])
    assert [twice.names(i) for i in range(2 * len(videos))] == expected + expected[::-1]


def test_regular_names_take_one_run_a_video() -> None:
    packed = pack_runs([runs_of(frames(300)), runs_of([f"img_{i}.png" for i in range(2, 2000, 3)]), runs_of([])])
    assert np.diff(packed.starts).tolist() == [1, 1, 0]
    assert isinstance(packed, FrameNames)


def test_texts_hold_any_file_name() -> None:
    texts = ["", "ß", "日本", "bad\udcff", "plain"]
    packed = Texts.of(texts)
    assert list(packed) == texts == [packed[i] for i in range(5)] == packed[:]
    assert packed[-1] == "plain"
    assert list(packed.take(np.array([3, 0, 3]))) == [texts[3], "", texts[3]]
    with pytest.raises(IndexError):
        packed[5]


def test_names_that_look_like_patterns(tmp_path: Path, data: DataSettings) -> None:
    for name in ODD_NAMES:
        video(tmp_path / "d" / name / name, frames(2))
    video(tmp_path / "d" / "plain" / "*", ["[1].jpg", "?2.jpg"])
    index = open_index(tmp_path / "d", labelled=True, settings=data)
    assert index.classes == sorted([*ODD_NAMES, "plain"])
    for i in range(len(index)):
        assert index.frame_bytes(i, 1) == (tmp_path / "d" / index.frame_name(i, 1)).read_bytes()


def test_a_file_name_that_is_no_utf8(tmp_path: Path, data: DataSettings) -> None:
    folder = tmp_path / "t" / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (folder / "1.jpg").write_bytes(b"x")
    for _ in range(2):  # scanned, then from the cache
        index = open_index(tmp_path / "t", labelled=False, settings=data)
        assert index.frame_bytes(0, 0) == b"x"


def test_hidden_and_stray_files_are_counted_and_named(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d")
    (root / "readme.txt").touch()
    (root / ".DS_Store").touch()
    (root / "run" / "list.csv").touch()
    (root / "run" / "clip_0" / "._0001.jpg").touch()
    (root / "run" / "clip_0" / "Thumbs.db").touch()
    (root / "walk" / "clip_1" / "folder.jpg").mkdir()
    (root / "__MACOSX").mkdir()
    for _ in range(2):
        index = open_index(root, labelled=True, settings=data)
        assert index.frame_counts.tolist() == [3, 3, 3, 3]
        stray, hidden = index.notes
        assert "4 files or folders" in stray
        assert all(name in stray for name in ("readme.txt", "run/list.csv", "Thumbs.db", "walk/clip_1/folder.jpg"))
        assert "3 hidden" in hidden
        aged(root)


def test_a_test_folder_keeps_every_video_in_numeric_order(tmp_path: Path, data: DataSettings) -> None:
    for name in ("10", "9", "00100", "1"):
        video(tmp_path / "t" / name, frames(2))
    (tmp_path / "t" / "11").mkdir()
    video(tmp_path / "t" / "12", frames(2), b"not an image")
    index = open_index(tmp_path / "t", labelled=False, settings=data)
    assert list(index.names) == ["1", "9", "10", "11", "12", "00100"]
    assert index.labels.tolist() == [-1] * 6
    assert index.frame_counts.tolist() == [2, 2, 2, 0, 2, 2]
    assert any("1 of 6 test videos" in note and "11 (no frames in it)" in note for note in index.notes)


def test_an_unreadable_test_video_stays(tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1", "2"):
        video(tmp_path / "t" / name, frames(2))
    if os.geteuid() == 0:  # root reads everything: let the listing fail as it would for others
        real = scanning._frames_in

        def denied(folder: str, *rest: object) -> list[str]:
            if folder.endswith("/2"):
                raise PermissionError(13, "Permission denied", folder)
            return real(folder, *rest)

        monkeypatch.setattr(scanning, "_frames_in", denied)
    else:
        (tmp_path / "t" / "2").chmod(0)
    index = open_index(tmp_path / "t", labelled=False, settings=data)
    assert index.frame_counts.tolist() == [2, 0]
    assert any("2 (cannot be read)" in note for note in index.notes)


def test_a_csv_of_folders(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d")
    outside = video(tmp_path / "far, away" / "x", frames(4))
    table = tmp_path / "d" / "list.csv"
    table.write_text(f'path,label\nwalk/clip_1,2\n./run/clip_0/,10\n"{outside}",2\n', encoding="utf-8")
    index = open_index(table, labelled=True, settings=data)
    assert index.classes == ["2", "10"]  # whole numbers by value
    assert index.labels.tolist() == [0, 1, 0]
    assert list(index.names) == ["walk/clip_1", "run/clip_0", str(outside)]
    assert index.frame_counts.tolist() == [3, 3, 4]
    assert index.frame_bytes(2, 3) == (outside / "0004.jpg").read_bytes()
    assert index.frame_bytes(0, 0) == (root / "walk/clip_1/0001.jpg").read_bytes()
    unlabelled = open_index(table, labelled=False, settings=data)
    assert unlabelled.labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,class\na,b\n", "no column label"),
        ("path,label\nrun/clip_0,run\n,walk\n", "line 3 has no path"),
        ("path,label\nrun/clip_0,run\nwalk/clip_0,\n", "line 3 has no label"),
        ("path,label\nrun/clip_0,run\nwalk/clip_0\n", "line 3 has no label"),
        ("path,label\nrun/clip_0,run\nrun/../run/clip_0,run\n", "line 3 names run/clip_0 again (first on line 2)"),
        ("path,label\n", "lists no videos"),
        ("path,label\nrun/clip_0,run\nwalk/gone,walk\n", "walk/gone (no such folder)"),
        ("path,label\nrun/clip_0,run\nrun/clip_1,run\n", "single class"),
    ],
)
def test_a_bad_csv_is_one_clear_line(tmp_path: Path, data: DataSettings, text: str, says: str) -> None:
    tree(tmp_path)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        open_index(tmp_path / "list.csv", labelled=True, settings=data)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_videos(tmp_path: Path, data: DataSettings) -> None:
    def fails(root: Path, labelled: bool = True) -> str:
        with pytest.raises(UserError) as error:
            open_index(root, labelled=labelled, settings=data)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such folder" in fails(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "no folders in it" in fails(tmp_path / "empty")
    (tmp_path / "list.txt").touch()
    assert "no CSV" in fails(tmp_path / "list.txt")
    (tree(tmp_path / "hollow") / "jump").mkdir()
    assert "have no videos (jump)" in fails(tmp_path / "hollow")
    tree(tmp_path / "one", classes=("run",))
    assert "single class (run)" in fails(tmp_path / "one")
    video(tmp_path / "flat" / "v1", frames(2))
    assert "one folder level is missing" in fails(tmp_path / "flat")
    video(tmp_path / "raw", ["a.avi"])
    assert "video files (one folder level is missing)" in fails(tmp_path / "raw")
    tree(tmp_path / "deep")
    assert "expected <video>/*.jpg" in fails(tmp_path / "deep", labelled=False)


def test_training_videos_without_a_good_frame(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d", videos=8)
    (root / "run" / "empty").mkdir()
    video(root / "run" / "text", frames(3), b"this is no image")
    video(root / "walk" / "cut", frames(2), jpeg()[:200])
    video(root / "walk" / "zero", frames(2), b"")
    video(root / "walk" / "last_one_good", frames(3), b"")
    (root / "walk" / "last_one_good" / "0003.jpg").write_bytes(jpeg())
    bad = {"run/empty": "no frames", "run/text": "decodes", "walk/cut": "decodes", "walk/zero": "decodes"}
    for _ in range(2):  # from the scan, and from the cache
        with pytest.raises(UserError) as error:
            open_index(root, labelled=True, settings=data)
        assert "4 of 21 videos" in str(error.value)
        assert "data.on_bad_video=skip" in str(error.value)
        for name in bad:
            assert name in str(error.value)
        aged(root)

    skip = DataSettings(cache=data.cache, on_bad_video="skip", max_damaged=0.5)
    index = open_index(root, labelled=True, settings=skip)
    assert index.skipped == list(bad)
    assert set(index.names).isdisjoint(bad)
    assert "walk/last_one_good" in set(index.names)
    assert len(index) == 17
    assert index.labels.tolist() == [0] * 8 + [1] * 9
    for i in range(len(index)):
        assert index.frame_bytes(i, 0) == (root / index.names[i] / "0001.jpg").read_bytes()
    assert any("4 of 21 videos were left out" in note for note in index.notes)

    with pytest.raises(UserError, match=r"19.0% of .* is damaged .*data.max_damaged"):
        open_index(root, labelled=True, settings=DataSettings(cache=data.cache, on_bad_video="skip"))


def test_more_bad_videos_than_a_line_can_name_are_listed_in_a_file(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d")
    names = [f"bad_{i}" for i in range(9)]
    for name in names:
        video(root / "run" / name, frames(1), b"x")
    with pytest.raises(UserError, match=r"9 of 13 videos .*bad_4 \(no frame decodes\) and 4 more") as error:
        open_index(root, labelled=True, settings=data)
    path = Path(str(error.value).split("listed in ")[1].split(")")[0])
    assert [line.split("\t")[0] for line in path.read_text().splitlines()] == [f"run/{name}" for name in names]


def test_a_class_that_loses_all_its_videos_is_an_error(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d", videos=20)
    video(root / "jump" / "v", frames(1), b"x")
    data.on_bad_video = "skip"
    with pytest.raises(UserError, match="no video of class jump"):
        open_index(root, labelled=True, settings=data)


def test_labels_by_given_classes(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d", classes=("walk", "run"))
    index = open_index(root, labelled=True, settings=data, classes=["walk", "sit", "run"])
    assert index.classes == ["walk", "sit", "run"]
    assert [(index.names[i], index.labels[i]) for i in (0, 3)] == [("run/clip_0", 2), ("walk/clip_1", 0)]
    with pytest.raises(UserError, match=r"1 classes that training does not know \(run\)"):
        open_index(root, labelled=True, settings=data, classes=["walk", "sit"])


def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("scanned")

    monkeypatch.setattr("vac_ddp.data.index.scan_root", never)


def test_an_unchanged_tree_is_not_scanned_again(
    tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = aged(tree(tmp_path / "d"))
    first = open_index(root, labelled=True, settings=data)
    no_scan(monkeypatch)
    again = open_index(root, labelled=True, settings=data)
    assert list(again.names) == list(first.names)
    assert again.labels.tolist() == first.labels.tolist()
    assert again.frame_bytes(3, 2) == first.frame_bytes(3, 2)
    with pytest.raises(AssertionError):
        open_index(root, labelled=False, settings=data)  # another kind of index


@pytest.mark.parametrize("change", ["video", "class", "frame", "gone"])
def test_a_changed_tree_is_scanned_again(tmp_path: Path, data: DataSettings, change: str) -> None:
    root = aged(tree(tmp_path / "d"))
    open_index(root, labelled=True, settings=data)
    if change == "video":
        video(root / "run" / "new", frames(2))
    elif change == "class":
        video(root / "jump" / "new", frames(2))
    elif change == "frame":
        video(root / "walk" / "clip_1", ["0004.jpg"])
    else:
        for path in (root / "run" / "clip_0").iterdir():
            path.unlink()
        (root / "run" / "clip_0").rmdir()
    index = open_index(root, labelled=True, settings=data)
    expected = {"video": [3, 3, 2, 3, 3], "class": [2, 3, 3, 3, 3], "frame": [3, 3, 3, 4], "gone": [3, 3, 3]}
    assert index.frame_counts.tolist() == expected[change]


def test_a_csv_that_changed_is_read_again(tmp_path: Path, data: DataSettings) -> None:
    tree(tmp_path)
    table = tmp_path / "list.csv"
    table.write_text("path,label\nrun/clip_0,a\nwalk/clip_0,b\n")
    os.utime(table, (1e9, 1e9))
    aged(tmp_path)
    assert len(open_index(table, labelled=True, settings=data)) == 2
    table.write_text("path,label\nrun/clip_0,a\nwalk/clip_0,b\nwalk/clip_1,b\n")
    assert len(open_index(table, labelled=True, settings=data)) == 3


def test_only_rescan_looks_at_every_video(tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "t"
    for i in range(400):
        (root / f"{i:04d}").mkdir(parents=True)
    video(root / "0399", frames(1))
    aged(root)
    open_index(root, labelled=False, settings=data)
    scan = read_scan(cache_path(root, labelled=False, settings=data))
    assert scan is not None
    looked: list[str] = []
    real = freshness.mtime_of
    monkeypatch.setattr(freshness, "mtime_of", lambda path: looked.append(path) or real(path))
    assert freshness.unchanged(scan, every=False)
    assert len(looked) == 1 + 256
    looked.clear()
    assert freshness.unchanged(scan, every=True)
    assert len(looked) == 1 + 400
    video(root / "0123", frames(1))
    data.rescan = True
    assert open_index(root, labelled=False, settings=data).frame_counts[123] == 1


def test_a_repaired_video_is_noticed_in_its_old_folder(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d")
    data.max_damaged = 0.1
    bad = root / "run" / "clip_0"
    for path in bad.iterdir():
        path.write_bytes(b"broken")
    aged(root)
    with pytest.raises(UserError, match="run/clip_0"):
        open_index(root, labelled=True, settings=data)
    with (bad / "0002.jpg").open("r+b") as stream:  # the folder keeps its time
        stream.write(jpeg())
    index = open_index(root, labelled=True, settings=data)
    assert len(index) == 4
    assert any("1 damaged frame" in note for note in index.notes)
    data.max_damaged = 0.05
    with pytest.raises(UserError, match=r"8.3% of .* is damaged"):
        open_index(root, labelled=True, settings=data)


@pytest.mark.parametrize("fresh", ["walk", "walk/clip_1"])
def test_a_tree_that_is_still_being_written_is_not_trusted(tmp_path: Path, data: DataSettings, fresh: str) -> None:
    root = aged(tree(tmp_path / "d"))
    now = time.time_ns()
    os.utime(root / fresh, ns=(now, now))
    open_index(root, labelled=True, settings=data)
    video(root / "walk" / "clip_1", ["0004.jpg"])
    os.utime(root / "walk" / "clip_1", (1e9, 1e9))
    os.utime(root / fresh, ns=(now, now))  # changed within one tick of a coarse clock
    assert open_index(root, labelled=True, settings=data).frame_counts.tolist() == [3, 3, 3, 4]


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "pickle"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, data: DataSettings, harm: str) -> None:
    root = aged(tree(tmp_path / "d"))
    open_index(root, labelled=True, settings=data)
    path = cache_path(root, labelled=True, settings=data)
    good = path.read_bytes()
    middle = len(good) // 2
    path.write_bytes(
        {
            "cut": good[:middle],
            "flip": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
            "empty": b"",
            "pickle": pickle.dumps("x"),
        }[harm]
    )
    assert len(open_index(root, labelled=True, settings=data)) == 4
    assert read_scan(path) is not None


def test_a_cache_of_another_version_is_made_again(
    tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = aged(tree(tmp_path / "d"))
    open_index(root, labelled=True, settings=data)
    monkeypatch.setattr("vac_ddp.data.index_file.VERSION", 999)
    assert read_scan(cache_path(root, labelled=True, settings=data)) is None
    open_index(root, labelled=True, settings=data)
    assert read_scan(cache_path(root, labelled=True, settings=data)) is not None


def test_other_ranks_read_what_rank_0_wrote(
    tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = aged(tree(tmp_path / "d"))
    run = tmp_path / "run" / "index.cache"
    with pytest.raises(UserError, match="rank 0"):
        open_index(root, labelled=True, settings=data, scan=False, cache_file=run)
    first = open_index(root, labelled=True, settings=data, cache_file=run)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()  # another machine: its cache folder knows nothing
    no_scan(monkeypatch)
    monkeypatch.setattr("vac_ddp.data.index.unchanged", lambda *_, **__: pytest.fail("looked at the tree"))
    other = open_index(root, labelled=True, settings=data, scan=False, cache_file=run)
    assert list(other.names) == list(first.names)
    assert other.frame_bytes(1, 1) == first.frame_bytes(1, 1)


def test_a_second_run_uses_the_cache_and_leaves_its_own_copy(
    tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = aged(tree(tmp_path / "d"))
    open_index(root, labelled=True, settings=data, cache_file=tmp_path / "run1" / "index")
    no_scan(monkeypatch)
    open_index(root, labelled=True, settings=data, cache_file=tmp_path / "run2" / "index")
    assert read_scan(tmp_path / "run2" / "index") is not None


def test_a_stale_copy_of_a_run_is_replaced(tmp_path: Path, data: DataSettings) -> None:
    root = aged(tree(tmp_path / "d"))
    run = tmp_path / "run" / "index"
    open_index(root, labelled=True, settings=data, cache_file=run)
    video(root / "run" / "new", frames(2))
    for folder in (root / "run", root / "run" / "new"):
        os.utime(folder, (1.1e9, 1.1e9))
    open_index(root, labelled=True, settings=data)  # another run: the cache is new, the copy is not
    assert len(open_index(root, labelled=True, settings=data, cache_file=run)) == 5
    assert len(open_index(root, labelled=True, settings=data, cache_file=run, scan=False)) == 5


def test_a_copy_of_another_root_is_not_used(tmp_path: Path, data: DataSettings) -> None:
    """A run that is resumed with data.train=ELSEWHERE brings the index of its old data with it."""
    old, new = aged(tree(tmp_path / "old")), aged(tree(tmp_path / "new", videos=3))
    (tmp_path / "old.csv").write_text("path,label\nold/run/clip_0,run\nold/walk/clip_1,walk\n")
    (tmp_path / "new.csv").write_text("path,label\nnew/run/clip_2,run\nnew/walk/clip_2,walk\n")
    os.utime(tmp_path / "old.csv", (1e9, 1e9))
    run = tmp_path / "run" / "index"
    for root, videos in ((old, 4), (new, 6), (tmp_path / "old.csv", 2), (tmp_path / "new.csv", 2), (old, 4)):
        index = open_index(root, labelled=True, settings=data, cache_file=run)
        assert len(index) == videos
        of = "new" if "new" in root.name else "old"
        assert index.base in (str(tmp_path / of), str(tmp_path)) and of in f"{index.base}/{index.names[0]}"
        assert list(open_index(root, labelled=True, settings=data, cache_file=run, scan=False).names) == list(
            index.names
        )
    as_test = tmp_path / "old" / "run"
    open_index(as_test, labelled=False, settings=data, cache_file=run)
    with pytest.raises(UserError):
        open_index(as_test, labelled=True, settings=data, cache_file=run)


def test_no_cache_folder_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings_ = DataSettings(cache=str(tmp_path / "file" / "cache"))
    assert len(open_index(tree(tmp_path / "d"), labelled=True, settings=settings_)) == 4
    with pytest.raises(UserError, match="cannot write the index"):
        open_index(tmp_path / "d", labelled=True, settings=settings_, cache_file=tmp_path / "file" / "x")


def test_an_index_travels_to_workers(tmp_path: Path, data: DataSettings) -> None:
    index = open_index(tree(tmp_path / "d"), labelled=True, settings=data)
    other = pickle.loads(pickle.dumps(index))
    with ThreadPoolExecutor(8) as pool:
        jobs = [(v, f) for v in range(4) for f in range(3)] * 20
        found = list(pool.map(lambda job: other.frame_bytes(*job), jobs))
    assert found == [index.frame_bytes(*job) for job in jobs]


def test_linked_folders_are_followed(tmp_path: Path, data: DataSettings) -> None:
    tree(tmp_path / "real")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "run").symlink_to(tmp_path / "real" / "run")
    video(tmp_path / "d" / "walk" / "v", frames(2))
    (tmp_path / "d" / "walk" / "linked").symlink_to(tmp_path / "real" / "walk" / "clip_0")
    index = open_index(tmp_path / "d", labelled=True, settings=data)
    assert list(index.names) == ["run/clip_0", "run/clip_1", "walk/linked", "walk/v"]


def made_scan(videos: int, root: Path) -> scanning.Scan:
    """What a scan of so many videos would find: one in twenty has a gap, one in a hundred irregular names."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, 400, videos))
    gaps, odd = rng.random(videos) < 0.05, rng.random(videos) < 0.01
    runs = np.where(odd, 20, np.where(gaps, 2, 1))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(runs)])
    total = int(starts[-1])
    frames = FrameNames(
        starts=starts,
        style=rng.integers(0, 3, total, dtype=np.int32),
        first=rng.integers(0, 1000, total),
        step=np.ones(total, np.int64),
        count=rng.integers(20, 300, total),
        prefixes=Texts.of(["", "frame_", "img"]),
        suffixes=Texts.of([".jpg", ".jpg", ".png"]),
        pads=np.array([4, 6, 1], np.int32),
    )
    return scanning.Scan(
        base=str(root),
        classes=[f"class_{i:03d}" for i in range(400)],
        labels=labels,
        names=Texts.of(f"class_{label:03d}/video_{i:07d}_abcdefghijk" for i, label in enumerate(labels.tolist())),
        frames=frames,
        states=np.zeros(videos, np.uint8),
        damaged=np.zeros(videos, np.int64),
        times=np.full(videos, 1, np.int64),
        watched={},
        strays=scanning.Strays(),
    )


def test_a_hundred_thousand_videos_stay_small(tmp_path: Path) -> None:
    made = made_scan(100_000, tmp_path)
    arrays = [made.labels, made.states, made.damaged, made.times, made.names.blob, made.names.offsets]
    arrays += [getattr(made.frames, name) for name in ("starts", "style", "first", "step", "count")]
    assert sum(array.nbytes for array in arrays) < 200 * 100_000


def test_the_real_clips(tmp_path: Path, data: DataSettings) -> None:
    train = open_index(shared("clips", "data_train"), labelled=True, settings=data)
    test = open_index(shared("clips", "data_test"), labelled=False, settings=data)
    assert (len(train), len(train.classes), int(train.frame_counts.sum())) == (83, 6, 1992)
    assert list(test.names) == [f"{i:05d}" for i in range(1, 32)]
    assert train.notes == test.notes == []


def test_a_file_that_does_not_say_its_size_is_read_to_its_end(tmp_path: Path) -> None:
    """As on some network file systems; those of /proc are such files."""
    assert Path("/proc/self/mounts").stat().st_size == 0
    assert _contents("/proc/self/mounts") == Path("/proc/self/mounts").read_bytes() != b""
    for size in (0, 1, 3 << 20):
        (tmp_path / "file").write_bytes(bytes(size))
        assert _contents(str(tmp_path / "file")) == bytes(size)
