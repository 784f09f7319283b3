"""Files that grow by lines: what a full disk refuses is not lost."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from vac_ddp.errors import UserError
from vac_ddp.report.lines import Lines
from vac_ddp.report.tracker import Tracker
from vac_ddp.settings import LogSettings


class Disk:
    """A raw file on a disk with `room` bytes left."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        took = self.file.write(data[: self.room])
        self.room -= took
        return took

    def close(self) -> None:
        self.file.close()


def test_lines_are_whole_and_in_order_once_there_is_room_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path)
    assert not lines.write("first")
    lines._file = disk = Disk(path, room=3)
    assert lines.write("second")  # this is news
    assert "No space left" in lines.error
    assert not lines.write("third")  # and this is not
    assert path.read_text() == "first\nsec"
    disk.room = 1000
    assert not lines.write("größer")
    assert lines.error is None
    lines.close()
    assert path.read_text(encoding="utf-8") == "first\nsecond\nthird\ngrößer\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_stays_full_says_so() -> None:
    lines = Lines(Path("/dev/full"))
    assert lines.write("lost")
    assert lines.error == "No space left on device"
    lines.close()
    assert lines.error == "No space left on device"


def test_a_disk_without_room_for_the_lines_that_go_keeps_them_where_they_are(tmp_path: Path) -> None:
    metrics, discarded = tmp_path / "metrics.jsonl", tmp_path / "metrics.discarded.jsonl"
    metrics.write_text("".join(f'{{"kind": "train", "step": {step}}}\n' for step in range(9)))
    discarded.write_text('{"kind": "train", "step": 20}\n')
    before = metrics.read_bytes(), discarded.read_bytes()
    tracker = Tracker(tmp_path, LogSettings(), rank=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            tracker.rewind(3, epoch=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (metrics.read_bytes(), discarded.read_bytes()) == before
    assert tracker.rewind(3, epoch=1) == 5
    tracker.close(0)
    assert discarded.read_bytes() == before[1] + before[0][-5 * 29 :]
