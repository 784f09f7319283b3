"""Writes down the signals that reach it: `probe.py FOLDER ROLE [COMMAND...]`, a line `<ROLE> <SIGNAL>` in FOLDER/seen.

The command is started first, as a batch script starts srun and a task processes of its own. It is ready when
FOLDER/ready.<ROLE>.<pid> is there, and ends when its command ends or FOLDER/end is there; SIGKILL is seen by its
absence from the living.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Listen until the end."""
    folder, role = Path(sys.argv[1]), sys.argv[2]
    seen = os.open(folder / "seen", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def note(number: int, frame: FrameType | None) -> None:
        os.write(seen, f"{role} {signal.Signals(number).name[3:]}\n".encode())

    for number in WATCHED:
        signal.signal(number, note)
    command = subprocess.Popen(sys.argv[3:]) if len(sys.argv) > 3 else None
    (folder / f"ready.{role}.{os.getpid()}").touch()
    while not (folder / "end").exists() and (command is None or command.poll() is None):
        time.sleep(0.05)


if __name__ == "__main__":
    main()
