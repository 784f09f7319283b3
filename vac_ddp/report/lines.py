"""Files that grow line by line, also on a disk that is full for a while."""

from __future__ import annotations

from pathlib import Path


class Lines:
    """A text file that is appended to. What a full disk does not take is kept, and goes out before the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self.error: str | None = None  # why the newest lines are not in the file, while they are not

    def write(self, line: str = "") -> bool:
        """Append a line (without its end); nothing: try again what waits. Whether this made a new error."""
        before = self.error
        if line:
            self._waiting += f"{line}\n".encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]  # a part of a line may fit
            self.error = None
        except OSError as problem:
            self.error = problem.strerror or str(problem)
        return before is None and self.error is not None

    def close(self) -> None:
        """Try for the last time, and close."""
        self.write()
        self._file.close()
