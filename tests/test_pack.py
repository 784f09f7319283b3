from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support import shared
from tests.test_index import aged, frames, jpeg, no_scan, tree, video
from vac_ddp.commands.pack_command import main
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.pack_writer import pack, verify
from vac_ddp.data.split import make_split, read_split, write_split
from vac_ddp.errors import UserError
from vac_ddp.settings import DataSettings


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    return DataSettings(cache=str(tmp_path / "cache"))


def varied(root: Path) -> Path:
    """Frames of many sizes and names: an empty file, a gap, a PNG that is none, names with odd characters."""
    tree(root, videos=3)
    video(root / "run" / "a!b #[1]", ["1.jpg", "2.JPG", "10.png"], b"png?" * 9)
    (root / "run" / "a!b #[1]" / "1.jpg").write_bytes(jpeg(3, 64, 48))
    (root / "walk" / "clip_1" / "0002.jpg").write_bytes(b"")
    video(root / "walk" / "long", frames(200))
    return root


def same(one: Index, other: Index) -> None:
    assert list(one.names) == list(other.names)
    assert one.classes == other.classes
    assert one.labels.tolist() == other.labels.tolist()
    assert one.frame_counts.tolist() == other.frame_counts.tolist()
    for v in range(len(one)):
        for f in range(one.frame_counts[v]):
            assert one.frame_name(v, f) == other.frame_name(v, f)
            assert one.frame_bytes(v, f) == other.frame_bytes(v, f)


@pytest.mark.parametrize("shard_bytes", [1, 3000, 1 << 30])
def test_a_packed_set_is_the_folder_byte_for_byte(tmp_path: Path, data: DataSettings, shard_bytes: int) -> None:
    root = varied(tmp_path / "d")
    done = pack(root, tmp_path / "p", settings=data, shard_bytes=shard_bytes)
    folder, packed = (open_index(path, labelled=True, settings=data) for path in (root, tmp_path / "p"))
    same(folder, packed)
    assert (done.videos, done.frames) == (8, int(folder.frame_counts.sum()))
    shards = sorted((tmp_path / "p").glob("shard-*.bin"))
    assert len(shards) == done.shards
    if shard_bytes == 1:
        assert len(shards) == done.frames - 1  # one file each, none for the empty frame
    assert sum(path.stat().st_size for path in shards) == done.bytes
    assert done.bytes == sum(
        (root / folder.frame_name(v, f)).stat().st_size for v in range(8) for f in range(folder.frame_counts[v])
    )
    if shard_bytes == 3000:
        assert len(shards) > 3
        assert all(path.stat().st_size <= max(3000, 200 + len(jpeg(0, 64, 48))) for path in shards)
    with pytest.raises(IndexError):
        packed.frame_bytes(0, 3)


def test_a_packed_test_set(tmp_path: Path, data: DataSettings) -> None:
    root = tmp_path / "t"
    for name in ("10", "9", "1"):
        video(root / name, frames(3))
    (root / "11").mkdir()
    pack(root, tmp_path / "p", settings=data)
    same(open_index(root, labelled=False, settings=data), open_index(tmp_path / "p", labelled=False, settings=data))
    assert open_index(tmp_path / "p", labelled=False, settings=data).frame_counts.tolist() == [3, 3, 3, 0]
    with pytest.raises(UserError, match="without classes"):
        open_index(tmp_path / "p", labelled=True, settings=data)


def test_a_labelled_set_can_be_read_without_its_labels(tmp_path: Path, data: DataSettings) -> None:
    pack(tree(tmp_path / "d"), tmp_path / "p", settings=data)
    index = open_index(tmp_path / "p", labelled=False, settings=data)
    assert index.labels.tolist() == [-1] * 4
    assert index.classes == []
    assert index.names[0] == "run/clip_0"


def test_a_packed_csv(tmp_path: Path, data: DataSettings) -> None:
    tree(tmp_path / "d")
    (tmp_path / "d" / "list.csv").write_text("path,label\nwalk/clip_1,b\nrun/clip_0,a\n")
    pack(tmp_path / "d" / "list.csv", tmp_path / "p", settings=data)
    same(
        open_index(tmp_path / "d" / "list.csv", labelled=True, settings=data),
        open_index(tmp_path / "p", labelled=True, settings=data),
    )


def test_bad_videos_are_bad_in_the_packed_set_too(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d", videos=20)
    video(root / "run" / "bad", frames(2), b"no image")
    (root / "walk" / "hollow").mkdir()
    pack(root, tmp_path / "p", settings=data)
    with pytest.raises(UserError, match=r"2 of 42 videos .*run/bad \(no frame decodes\), walk/hollow \(no frames"):
        open_index(tmp_path / "p", labelled=True, settings=data)
    skip = DataSettings(cache=data.cache, on_bad_video="skip")
    same(open_index(root, labelled=True, settings=skip), open_index(tmp_path / "p", labelled=True, settings=skip))


def test_classes_and_splits_work_alike(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d", videos=6)
    pack(root, tmp_path / "p", settings=data)
    index = open_index(tmp_path / "p", labelled=True, settings=data, classes=["walk", "sit", "run"])
    assert index.labels.tolist() == [2] * 6 + [0] * 6
    folder = open_index(root, labelled=True, settings=data)
    split = make_split(folder, data, seed=0)
    write_split(tmp_path / "split.csv", folder, split)
    packed = open_index(tmp_path / "p", labelled=True, settings=data)
    assert read_split(tmp_path / "split.csv", packed).val.tolist() == split.val.tolist()
    part = packed.take(np.array([7, 2]))
    assert part.frame_bytes(0, 1) == folder.frame_bytes(7, 1)
    assert part.frame_bytes(1, 2) == folder.frame_bytes(2, 2)


def read_in_child(index: Index, jobs: list[tuple[int, int]], answers) -> None:
    answers.put([index.frame_bytes(*job) for job in jobs])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_and_threads_share_a_packed_set(tmp_path: Path, data: DataSettings, start: str) -> None:
    root = varied(tmp_path / "d")
    pack(root, tmp_path / "p", settings=data, shard_bytes=4000)
    index, folder = (open_index(path, labelled=True, settings=data) for path in (tmp_path / "p", root))
    jobs = [(v, f) for v in range(len(index)) for f in range(index.frame_counts[v])]
    expected = [folder.frame_bytes(*job) for job in jobs]
    index.frame_bytes(0, 0)  # files are open before the fork
    context = multiprocessing.get_context(start)
    answers = context.Queue()
    children = [context.Process(target=read_in_child, args=(index, jobs, answers)) for _ in range(2)]
    for child in children:
        child.start()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda job: index.frame_bytes(*job), jobs * 5)) == expected * 5
    assert [answers.get(timeout=60) for _ in children] == [expected] * 2
    for child in children:
        child.join()
    again = pickle.loads(pickle.dumps(index))
    assert again.frame_bytes(*jobs[-1]) == expected[-1]


def open_files() -> int:
    """Files this process has open, by the kernel's list."""
    listing = Path("/proc/self/fd")
    if not listing.exists():
        pytest.skip("no /proc here")
    return len(list(listing.iterdir()))


def test_more_shards_than_are_kept_open(tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vac_ddp.data.pack._MAX_OPEN", 2)
    root = tree(tmp_path / "d")
    pack(root, tmp_path / "p", settings=data, shard_bytes=1)
    before = open_files()
    packed = open_index(tmp_path / "p", labelled=True, settings=data)
    same(open_index(root, labelled=True, settings=data), packed)
    assert open_files() <= before + 3  # two shards, the offsets
    del packed
    assert open_files() <= before


def test_a_packed_set_needs_no_cache_and_no_scan(
    tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tree(tmp_path / "d"), tmp_path / "p", settings=data)
    no_scan(monkeypatch)
    for scan in (True, False):
        settings = DataSettings(cache=str(tmp_path / "nowhere"))
        assert len(open_index(tmp_path / "p", labelled=True, settings=settings, scan=scan)) == 4
    assert not (tmp_path / "nowhere").exists()


def test_where_a_set_may_be_written(tmp_path: Path, data: DataSettings) -> None:
    root = tree(tmp_path / "d")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    for out, says in ((tmp_path / "used", "is not empty"), (root / "p", "lies inside"), (root / "run", "is not empty")):
        with pytest.raises(UserError, match=says):
            pack(root, out, settings=data)
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["x"]
    (tmp_path / "free").mkdir()
    pack(root, tmp_path / "free", settings=data)
    with pytest.raises(UserError, match="is not empty"):
        pack(root, tmp_path / "free", settings=data)
    with pytest.raises(UserError, match="packed already"):
        pack(tmp_path / "free", tmp_path / "again", settings=data)
    with pytest.raises(UserError, match="no such folder"):
        pack(tmp_path / "gone", tmp_path / "again", settings=data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "d", "free", "used"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_pack_leaves_nothing(
    tmp_path: Path, data: DataSettings, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("vac_ddp.data.pack_writer.write_json", fails)  # the last file
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        pack(tree(tmp_path / "d"), tmp_path / "p", settings=data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "d"]


@pytest.mark.parametrize("name", ["pack.json", "index.npz", "offsets.npy", "shard-00000.bin"])
def test_a_damaged_set_is_refused(tmp_path: Path, data: DataSettings, name: str) -> None:
    pack(tree(tmp_path / "d"), tmp_path / "p", settings=data)
    assert verify(tmp_path / "p") == []
    path = tmp_path / "p" / name
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    with pytest.raises(UserError):
        open_index(tmp_path / "p", labelled=True, settings=data)
    if name != "pack.json":
        path.unlink()
        with pytest.raises(UserError, match="is missing"):
            open_index(tmp_path / "p", labelled=True, settings=data)
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert verify(tmp_path / "p") == [f"{name} has changed"]


def test_a_set_of_a_later_format_is_refused(tmp_path: Path, data: DataSettings) -> None:
    pack(tree(tmp_path / "d"), tmp_path / "p", settings=data)
    mark = tmp_path / "p" / "pack.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        open_index(tmp_path / "p", labelled=True, settings=data)


def test_frames_that_vanish_while_packing_are_named(
    tmp_path: Path, data: DataSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    root = aged(tree(tmp_path / "d"))
    open_index(root, labelled=True, settings=data)
    gone = root / "walk" / "clip_0" / "0002.jpg"
    gone.unlink()
    os.utime(gone.parent, (1e9, 1e9))  # unseen by the cached index
    status = main([str(root), str(tmp_path / "p"), "--cache", str(data.cache)])
    said = capsys.readouterr().out
    assert status == 3
    assert "1 frames could not be read" in said
    assert "walk/clip_0/0002.jpg" in said
    packed = open_index(tmp_path / "p", labelled=True, settings=data)
    assert packed.frame_bytes(2, 1) == b""
    assert packed.frame_bytes(2, 2) == (root / "walk/clip_0/0003.jpg").read_bytes()


def test_the_command(tmp_path: Path, data: DataSettings, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "d")
    cache = ["--cache", str(data.cache)]
    assert main([str(tmp_path / "d"), str(tmp_path / "p"), *cache]) == 0
    assert "packed 4 videos, 12 frames" in capsys.readouterr().out
    assert main([str(tmp_path / "p"), "--verify"]) == 0
    assert main([str(tmp_path / "d" / "run"), str(tmp_path / "q"), *cache]) == 0  # by a look: no classes
    assert json.loads((tmp_path / "q" / "pack.json").read_text())["labelled"] is False
    for wrong in ([], [str(tmp_path / "d")], ["a", "b", "--frames"], ["a", "b", "--shard-mib", "x"]):
        with pytest.raises(UserError, match="--help"):
            main(wrong)


def test_the_real_clips(tmp_path: Path, data: DataSettings) -> None:
    for part, labelled in (("data_train", True), ("data_test", False)):
        root = shared("clips", part)
        pack(root, tmp_path / part, settings=data, shard_bytes=4 << 20)
        same(
            open_index(root, labelled=labelled, settings=data),
            open_index(tmp_path / part, labelled=labelled, settings=data),
        )
