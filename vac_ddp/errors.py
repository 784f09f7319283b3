"""What a program says to its user, and the exit statuses scripts may rely on."""

from __future__ import annotations

import errno
import re
import signal
from dataclasses import dataclass, field

DONE = 0
FAILED = 1
USER_ERROR = 2
FINDINGS = 3
INTERRUPTED = 75
CTRL_C = 130
TERMINATED = 143


# What would break a line or could not be written: control characters, line separators, lone surrogates.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """`text` with control characters, line separators and lone surrogates escaped as in Python: one printable line."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class Message(Exception):
    """An exception whose text is for the user: one line, whatever names and values it quotes.

    `args[0]` is the text as it was given (the DataLoader puts the traceback of its process there).
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class UserError(Message):
    """Something the user must change. The message is one line: what is wrong, where, and the remedy."""


class Findings(Message):
    """The work is done, and there is something in it that the user should look at (exit status 3)."""


class Interrupted(Message):
    """Stopped by a signal after saving; starting the same command again goes on (exit status 75).

    step, run: where training stopped, and its run directory; for the status file.
    """

    def __init__(self, message: str, *, step: int | None = None, run: str | None = None) -> None:
        super().__init__(message)
        self.step, self.run = step, run


class Stopped(KeyboardInterrupt):
    """Stopped by Ctrl-C (exit status 130) or SIGTERM (143) while there was nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}, there was nothing to save")
        self.number = number


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why a run ends: the exit status and the text of an error, and the rank that met it.

    gone: ranks that did not answer, where that is the error; the message names them.
    """

    rank: int
    status: int
    message: str
    gone: list[int] = field(default_factory=list)


def plain(error: BaseException) -> BaseException:
    """`error`, or the UserError that it stands for: a name that no file can have is the user's to change."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        name = str(error.filename)
        shown = name if len(name) <= 120 else f"{name[:60]}...{name[-40:]}"
        return UserError(f"{shown}: {(error.strerror or '').lower()} ({len(name)} characters): give another name")
    if isinstance(error, ValueError) and "null byte" in str(error):
        return UserError("a file name has a zero byte in it: give another name")
    if isinstance(error, RuntimeError) and str(error) == "Could not determine home directory.":
        return UserError("a path begins with ~, and there is no home directory (HOME is not set): give a full path")
    return error


def reason(error: BaseException) -> str:
    """What went wrong with one item, for a list of them: the message, with its type where that is not ours."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, UserError):
        return error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def exit_status(error: BaseException | None) -> int:
    """The exit status that stands for `error` (None: it went well)."""
    if error is None:
        return DONE
    if isinstance(error, Stopped):
        return 128 + error.number
    for kind, status in (
        (UserError, USER_ERROR),
        (Findings, FINDINGS),
        (Interrupted, INTERRUPTED),
        (KeyboardInterrupt, CTRL_C),
    ):
        if isinstance(error, kind):
            return status
    return FAILED
