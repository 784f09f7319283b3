"""Train as `python -m vac_ddp.train` does, and let one thing go wrong, told by $FAULT as `what key=value ...`.

The product has no switches for this: places of it are wrapped here. A fault happens once a rank, in the first attempt
(the file $FAULT_DONE says that it has happened).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vac_ddp import train
from vac_ddp.errors import UserError
from vac_ddp.runtime import distributed
from vac_ddp.scoring import scorer
from vac_ddp.training import checkpoint, objective, step, trainer

WHAT, *PAIRS = os.environ["FAULT"].split()
KEYS = dict(pair.split("=") for pair in PAIRS)
AT = int(KEYS.get("step", -1))
RANK = KEYS.get("rank", "all")
MINE = RANK == "all" or int(RANK) == distributed.rank()
DONE = Path(os.environ["FAULT_DONE"])


def due() -> bool:
    """Whether it happens here and now, and has not happened before."""
    mark = DONE.with_name(f"{DONE.name}.{distributed.rank()}")
    if not MINE or mark.exists():
        return False
    mark.touch()
    return True


def descendants(root: int) -> list[int]:
    """Every process below `root`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


@contextlib.contextmanager
def received(number: int) -> Iterator[None]:
    """Wait until the signal has come back from the agent: the steps until then would depend on its speed."""
    before, seen = signal.getsignal(number), []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if callable(before):
            before(number, frame)

    signal.signal(number, note)
    yield
    while not seen:
        time.sleep(0.01)
    signal.signal(number, before)


def strike() -> None:
    """Do what WHAT says to this process, its agent, or all of them."""
    own, agent = os.getpid(), os.getppid()
    name, _, whom = WHAT.partition(":")
    if name == "fill":
        fill()
        return
    if name == "block":
        block(whom)
        return
    if name == "raise":
        raise UserError("a fault of this rank alone")
    number = getattr(signal, name)
    if whom == "agent":
        with received(number):
            os.kill(agent, number)
    elif whom == "twice":
        os.kill(own, number)
        os.kill(own, number)
    elif whom == "group":  # torchrun, the ranks and their loader processes, the loaders first
        for pid in reversed(descendants(agent)):
            os.kill(pid, number)
    else:
        os.kill(own, number)


def block(library: str) -> None:
    """Never come back from libc: as CDLL with the interpreter's lock given up, as PyDLL with it held."""
    lock = getattr(ctypes, library)(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(64)  # zeros: an open mutex, whose second lock no signal interrupts
    lock(mutex)
    lock(mutex)


def fill() -> None:
    """Use up the disk of the run; KEYS["free"] says at which step it is given back."""
    folder = Path(next(word for word in sys.argv if word.startswith("run.dir=")).partition("=")[2])
    filler = folder.resolve() / "filler"
    for thread in threading.enumerate():
        if thread.name == "checkpoint":  # the save in flight is whole, whatever the speed of the disk
            thread.join()
    with filler.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"x" * 65536)
        except OSError:
            pass

    def give_back(stepper: step.Stepper, batches: Any, **named: Any) -> None:
        if named["step"] == int(KEYS["free"]):
            filler.unlink(missing_ok=True)

    wrap(step.Stepper, "run", give_back)


def wrap(holder: Any, name: str, before: Any) -> None:
    """Call `before(*arguments)` in front of a function."""
    original = getattr(holder, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        before(*arguments, **named)
        return original(*arguments, **named)

    setattr(holder, name, wrapped)


def at_step(stepper: step.Stepper, batches: Any, **named: Any) -> None:
    if named["step"] == AT and due():
        strike()


def at_end_of_epoch(running: trainer.Trainer, *_: Any, **__: Any) -> None:
    """Between the line of an epoch and its checkpoint, when that of its last step is written."""
    where = running.position
    if where.step == AT and where.step_in_epoch == 0 and not where.validation_due:
        running.saver.join()
        if due():
            strike()


pieces = 0


def at_second_piece(stepper: step.Stepper, *_: Any, **__: Any) -> None:
    global pieces
    pieces += 1
    if pieces == 2 * AT and due():
        strike()


def spoil(kind: str) -> None:
    """Make the numbers of this rank bad in some steps: nan (its clips), overflow (its losses)."""
    steps = {AT} if "steps" not in KEYS else set(map(int, KEYS["steps"].split(",")))
    now = {"step": -1}
    run, prepare, losses = step.Stepper.run, objective.Classification.prepare, objective.Classification.losses

    def watched(self: step.Stepper, *arguments: Any, **named: Any) -> None:
        now["step"] = named["step"]
        run(self, *arguments, **named)

    def spoiled(self: objective.Classification, batch: Any) -> objective.Prepared:
        made = prepare(self, batch)
        if MINE and now["step"] in steps:
            made.clips[0] = float("nan")
        return made

    def overflowing(self: objective.Classification, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return losses(self, logits, targets) * (float("inf") if MINE and now["step"] in steps else 1.0)

    step.Stepper.run = watched
    if kind == "nan":
        objective.Classification.prepare = spoiled
    else:
        objective.Classification.losses = overflowing


def slow() -> None:
    """This rank takes three times as long for its forward passes."""
    forward = step.Stepper.forward

    def slowed(self: step.Stepper, *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = forward(self, *arguments)
        if MINE:
            time.sleep(2 * (time.perf_counter() - begun) + 0.4)
        return result

    step.Stepper.forward = slowed


def arm() -> None:
    """Put the fault in its place."""
    place = KEYS.get("at", "step")
    if WHAT in ("nan", "overflow"):
        spoil(WHAT)
    elif WHAT == "slow":
        slow()
    elif place == "step":
        wrap(step.Stepper, "run", at_step)
    elif place == "piece":
        wrap(step.Stepper, "_forward_piece", at_second_piece)
    elif place == "validation":
        wrap(scorer, "normalize", lambda *_a, **_k: due() and strike())
    elif place == "setup":
        wrap(trainer, "make_stepper", lambda *_a, **_k: due() and strike())
    elif place == "save":
        wrap(checkpoint, "write_tensors", lambda path, _s: f"{AT:08d}" in path.name and due() and strike())
    elif place == "epoch":
        wrap(trainer.Trainer, "save", at_end_of_epoch)
    elif place == "rename":
        replace = Path.replace

        def killed(self: Path, target: Any) -> Path:
            if f"step-{AT:08d}.pt" in str(target) and due():
                strike()
            return replace(self, target)

        Path.replace = killed
    else:
        raise ValueError(os.environ["FAULT"])


if __name__ == "__main__":
    arm()
    sys.exit(train.main())
