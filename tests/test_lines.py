"""Files that grow by lines: what a full disk refuses is not lost."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from vac_ddp.report.lines import Lines


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
