"""Writing files and folders: behind links, never over a device, on a full disk, after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import Workplace
from tests.support import REPO, environment
from vac_ddp.cli import main
from vac_ddp.errors import UserError
from vac_ddp.files import WriteError, whole_folder, write_atomic, write_text
from vac_ddp.results.logits_file import ViewsHead, write_views

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="extra test: only root can make a device and mount")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of its own (root), or a skip that says why."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("extra test: a small file system needs the right to mount (root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def views_file(path: Path, videos: int, classes: int = 3) -> Path:
    """A labelled logits file of so many videos."""
    head = ViewsHead(
        ids=[f"video-{i:06d}" for i in range(videos)],
        classes=[f"class{i}" for i in range(classes)],
        views=np.zeros((1, 3), np.int64),
        labels=np.arange(videos) % classes,
        sources=[""] * videos,
        damaged=np.zeros(videos, np.int64),
        failed=np.zeros(videos, bool),
        about={},
    )
    write_views(path, head, [np.random.default_rng(0).normal(size=(videos, 1, classes)).astype(np.float32)])
    return path


# ---------------------------------------------------------------- single files


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_written(there: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "kept" / "real.txt", tmp_path / "link.txt"
    if there:
        target.parent.mkdir()
        target.write_text("old")
    link.symlink_to(Path("kept") / "real.txt")
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert files_in(tmp_path) == ["kept", "kept/real.txt", "link.txt"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a folder", pytest.param("device", marks=needs_root)])
def test_only_regular_files_are_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if kind == "device":
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 7))  # as /dev/full
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        folder = path if kind == "folder" else tmp_path / "folder"
        folder.mkdir()
        if folder != path:
            path.symlink_to(folder)
    before = os.lstat(path)
    with pytest.raises(UserError, match=f"cannot write {path}: it is a"):
        write_text(path, "text")
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)


def test_what_cannot_be_written_is_one_line_and_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "below"
    with pytest.raises(WriteError, match=f"^cannot write {path}: Not a directory$") as caught:
        write_text(path, "text")
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, OSError)
    assert caught.value.strerror == "Not a directory"


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    write_text(small_disk / "file", "old")
    state = {"weight": torch.zeros(100_000)}
    for write in (lambda stream: stream.write(b"x" * 100_000), lambda stream: torch.save(state, stream)):
        with pytest.raises(WriteError, match="No space left on device"):
            write_atomic(small_disk / "file", write)
        assert files_in(small_disk) == ["file"]
        assert (small_disk / "file").read_text() == "old"


def test_names_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("f" * 255, "ä" * 127):
        write_text(tmp_path / name, "text")
        with whole_folder(tmp_path / f"d{name[1:]}") as folder:
            (folder / "file").write_text("text")
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(WriteError, match="File name too long"), whole_folder(tmp_path / ("d" * 256)):
        pass


# ---------------------------------------------------------------- folders


def test_files_take_their_places_together_in_a_folder_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "logits").write_text("kept")
    (out / "scores").write_text("old")

    def fail() -> None:
        with whole_folder(out) as folder:
            (folder / "scores").write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (out / "scores").read_text() == "old"
    with whole_folder(out) as folder:
        (folder / "scores").write_text("new")
        (folder / "deep").mkdir()
        (folder / "deep" / "more").write_text("more")
    assert files_in(tmp_path) == ["out", "out/deep", "out/deep/more", "out/logits", "out/scores"]
    assert (out / "scores").read_text() == "new"


KILLED = """
import sys
from pathlib import Path
from vac_ddp.files import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_command_left_is_removed_by_the_next_start(there: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(out)],
            cwd=REPO,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return process, Path(process.stdout.readline().strip())

    (killed, left), (alive, kept) = start(), start()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (left / "half").exists()
    with whole_folder(tmp_path / "another") as folder:  # of another command: not its business
        (folder / "file").write_text("")
    assert left.exists()
    with whole_folder(out) as folder:
        (folder / "file").write_text("whole")
    assert not left.exists()
    assert (kept / "half").exists()
    alive.kill()
    alive.communicate()
    assert (out / "file").read_text() == "whole"


# ---------------------------------------------------------------- commands on a full disk


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert len(said) == 1, said
    return said[0]


def test_score_on_a_full_disk_writes_nothing(small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The submission alone would fit."""
    views = views_file(tmp_path / "views.npz", 1500)
    for out in (small_disk, small_disk / "new"):
        assert main(["score", str(views), "--no-table", "--out", str(out)]) == 2
        assert one_line(capsys) == f"vac: cannot write {out / 'scores.csv'}: No space left on device"
        assert files_in(small_disk) == []


def test_plot_on_a_full_disk_writes_nothing(small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [f'{{"kind": "train", "step": {i}, "lr": {i}, "clips_per_s": 1.0}}\n' for i in range(30)]
    (run / "metrics.jsonl").write_text("".join(lines))
    (small_disk / "ballast").write_bytes(b"x" * 60_000)
    assert main(["plot", str(run), "--out", str(small_disk / "curves.png")]) == 2
    assert one_line(capsys) == f"vac: cannot write {small_disk / 'curves.png'}: No space left on device"
    assert files_in(small_disk) == ["ballast"]


FULL = """
import sys
from pathlib import Path
from vac_ddp.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fault
def test_folder_commands_on_a_full_disk_leave_nothing(small_disk: Path, tmp_path: Path) -> None:
    """export, soup, extract, pack and synth, each with an output larger than the disk."""
    place = Workplace(tmp_path / "place")
    done = place.alone("one", "train.epochs=1", "data.workers=0", "model.width=64")
    assert done.returncode == 0, done.stderr
    shutil.copytree(place.folder / "one", place.folder / "two")
    videos = tmp_path / "videos"
    videos.mkdir()
    made = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc2=d=2:s=320x240", "-c:v", "mpeg4"]
    subprocess.run([*made, str(videos / "clip.mp4")], check=True)
    for words in (
        ["export", "one", str(small_disk / "out")],
        ["soup", "one", "two", str(small_disk / "soup.pt")],
        ["pack", "data_train", str(small_disk / "out")],
        ["synth", str(small_disk / "out"), "--videos-per-class", "2", "--test-per-class", "1"],
        ["extract", str(videos), str(small_disk), "--workers", "0"],
    ):
        done = place.python("-c", FULL, *words)
        said = [line for line in done.stderr.splitlines() if line.startswith("vac: ")]
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        assert len(said) == 1, done.stderr
        assert "No space left on device" in said[0]
        assert [name for name in files_in(small_disk) if name != ".extract.json"] == [], words
