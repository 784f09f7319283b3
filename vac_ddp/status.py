"""How a program ends: one line for its user, an exit status, and a JSON file for scripts.

torchrun turns every worker's status into 1, so rank 0 also writes {status, message, run, step} to $VAC_STATUS_FILE.
With VAC_STATUS_ONLY=1 beside it, an end that all ranks agree on and that starting again would not change (done,
interrupted, findings, an error of the user's) is told by that file only and is 0 for torchrun: it restarts nothing and
prints no page.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from vac_ddp import distributed, errors, files
from vac_ddp.text import escape_output

WRAPPED = re.compile(r"^vac_ddp\.errors\.UserError: (.*)", re.MULTILINE | re.DOTALL)


def run_door(program: Callable[[list[str]], dict[str, Any] | None], argv: list[str]) -> int:
    """Run a program that may be one of many ranks; returns or leaves the process with its exit status.

    program: takes the arguments, returns facts for the status file (`run`, `step`) or None. What it raises becomes one
    line, on rank 0 or on the rank that failed first; a failure of ours keeps its traceback. With --debug nothing is
    caught.
    """
    escape_output()
    if "--debug" in argv and not distributed.under_torchrun():
        program(argv)
        return errors.DONE
    error: BaseException | None = None
    facts: dict[str, Any] = {}
    try:
        facts = program(argv) or {}
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else errors.FAILED
    except (Exception, KeyboardInterrupt) as caught:
        error = _plain(caught)
        facts = getattr(caught, "facts", {})
    status = errors.exit_status(error)
    message = "done" if error is None else " ".join(str(error).split()) or type(error).__name__
    if status == errors.FAILED:
        _say_failure(error, message)
    elif error is not None and (distributed.is_main() or getattr(error, "own", False)):
        print(f"vac: {message}", file=sys.stderr, flush=True)
    _write_status(status, message, facts | ({"step": error.step} if isinstance(error, errors.Interrupted) else {}))
    together = status != errors.FAILED and not getattr(error, "own", False)
    if together and "VAC_STATUS_FILE" in os.environ and os.environ.get("VAC_STATUS_ONLY") == "1":
        distributed.end(errors.DONE)
        return errors.DONE
    if status in (errors.DONE, errors.INTERRUPTED, errors.FINDINGS):
        distributed.end(status)
    elif distributed.active():
        # The others may be inside a collective: leaving the group in good order would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _plain(error: BaseException) -> BaseException:
    """A user error as it was raised in a loader process, without the traceback that the loader put into its text."""
    plain = errors.plain(error)
    if isinstance(error, errors.UserError) and (inner := WRAPPED.search(error.args[0])):
        plain = errors.UserError(inner.group(1).strip())
    elif type(error).__name__ == "OutOfMemoryError":
        plain = errors.UserError(
            "CUDA out of memory: lower train.clips_per_gpu (train.global_batch is kept by accumulation), clip.frames "
            "or clip.size, or raise train.checkpointing"
        )
    if plain is not error:  # out of memory is met by one rank alone, what a loader says may be known to all
        plain.own = getattr(error, "own", not isinstance(error, errors.UserError))  # type: ignore[attr-defined]
    return plain


def _say_failure(error: BaseException | None, message: str) -> None:
    first = distributed.first_cause()
    where = f"rank {distributed.rank()}: " if distributed.under_torchrun() else ""
    distributed.report_cause(f"{where}{message}")
    if first and first != f"{where}{message}":
        print(f"vac: {where}ends because of {first}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        print(f"vac: {where}{message}", file=sys.stderr, flush=True)


def _write_status(status: int, message: str, facts: dict[str, Any]) -> None:
    path = os.environ.get("VAC_STATUS_FILE")
    if path and distributed.is_main():
        told = distributed.first_cause() if status == errors.FAILED else None
        files.write_json(path, {"status": status, "message": told or message, "run": None, "step": None, **facts})
