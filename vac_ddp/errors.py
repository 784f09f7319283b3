"""What a program says to its user, and the exit statuses scripts may rely on."""

from __future__ import annotations

import errno

DONE = 0
FAILED = 1
USER_ERROR = 2
FINDINGS = 3
INTERRUPTED = 75


class UserError(Exception):
    """Something the user must change. The message is one line: what is wrong, where, and the remedy."""


class Findings(Exception):
    """The work is done, and there is something in it that the user should look at (exit status 3)."""


class Interrupted(Exception):
    """Stopped by a signal after saving; starting the same command again goes on (exit status 75)."""

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


def plain(error: BaseException) -> BaseException:
    """`error`, or the UserError that it stands for: a name that no file can have is the user's to change."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        name = str(error.filename)
        shown = name if len(name) <= 120 else f"{name[:60]}...{name[-40:]}"
        return UserError(f"{shown}: {(error.strerror or '').lower()} ({len(name)} characters): give another name")
    if isinstance(error, ValueError) and "null byte" in str(error):
        return UserError("a file name has a zero byte in it: give another name")
    return error


def exit_status(error: BaseException | None) -> int:
    """The exit status that stands for `error` (None: it went well)."""
    if error is None:
        return DONE
    for kind, status in ((UserError, USER_ERROR), (Findings, FINDINGS), (Interrupted, INTERRUPTED)):
        if isinstance(error, kind):
            return status
    return FAILED
