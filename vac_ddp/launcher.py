"""run_training(): train from a notebook or a script, with the ranks in processes of their own."""

from __future__ import annotations

import os
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vac_ddp import errors, files
from vac_ddp.config import flatten
from vac_ddp.errors import Interrupted, UserError
from vac_ddp.report.lines import read_metrics

# `vac train` that is asked to save and end when the notebook's kernel is gone.
PROGRAM = """\
import signal, sys
from vac_ddp.runtime.parent import signal_when_parent_dies
signal_when_parent_dies(signal.SIGTERM)
from vac_ddp.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A training that is done.

    run: its directory, for `vac_ddp.load`; weights: its best_<model>.pt; step: optimizer steps; best_epoch and metrics
    (top1, loss, ...): of the best validation, None and empty without validation; status: the exit status, 0.
    """

    run: Path
    weights: Path
    step: int
    best_epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    status: int = errors.DONE


def run_training(
    config: Mapping[str, Any] | str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    nproc: int | None = None,
) -> TrainingResult:
    """Train as `vac train --nproc N` does, in processes of their own, and print their lines.

    config: settings as a dict, dotted ({"train.epochs": 5}) or nested ({"train": {"epochs": 5}}), or the name of a
    preset or the path of a YAML file; settings: a dict of settings over those of `config`; nproc: ranks, by default one
    per GPU, or one. With {"run.resume": "auto"} an earlier training of run.dir is resumed.

    Raises UserError for settings or data that cannot be used, Interrupted where the training was stopped by a signal
    and saved, RuntimeError where it failed; the messages are the lines that the command ends with. On KeyboardInterrupt
    (the stop button of a notebook) the ranks save and end first.
    """
    words = [] if nproc is None else ["--nproc", str(nproc)]
    if isinstance(config, str | Path):
        words.append(f"--config={config}")
    elif config is not None:
        words += _words(config)
    words += _words(settings or {})
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status.json"
        code = _run(words, status_file)
        told = files.read_json(status_file) if status_file.exists() else {}
    status, message = told.get("status", code), told.get("message") or f"vac train ended with status {code}"
    if status == errors.DONE:
        return _result(Path(told["run"]), told["step"])
    if status == errors.USER_ERROR:
        raise UserError(message)
    if status == errors.INTERRUPTED:
        raise Interrupted(message, step=told.get("step"), run=told.get("run"))
    raise RuntimeError(message)


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as `vac train` takes them. UserError for a name that is not a setting."""
    values = flatten(dict(settings), "settings")
    return [f"{name}={_text(value)}" for name, value in values.items()]


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _run(words: list[str], status_file: Path) -> int:
    """Run `vac train` and print what it says; its exit status. KeyboardInterrupt once it has ended after one."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(status_file),
        start_new_session=True,  # a key press reaches it once, by way of this process
    )
    stopped = False
    assert process.stdout is not None, "it is a pipe"
    while True:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
            status = process.wait()
            break
        except KeyboardInterrupt:  # the second one ends the ranks at once
            stopped = True
            process.send_signal(signal.SIGINT)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if stopped:
        raise KeyboardInterrupt
    return status


def _environment(status_file: Path) -> dict[str, str]:
    """Give this environment to a process that imports the same vac_ddp and writes its lines at once."""
    made = {**os.environ, "VAC_STATUS_FILE": str(status_file), "PYTHONUNBUFFERED": "1"}
    home = str(Path(__file__).resolve().parents[1])
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    if home not in installed:  # from a folder on sys.path
        made["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    return made


def _result(run: Path, step: int) -> TrainingResult:
    """What the files of a finished run say of it."""
    epochs = (line for line in reversed(read_metrics(run)) if line["kind"] == "epoch" and line.get("best"))
    best: dict[str, Any] = dict(next(epochs, {}))
    metrics = {name.removeprefix("val_"): value for name, value in best.items() if name.startswith("val_")}
    return TrainingResult(
        run=run,
        weights=next(run.glob("best_*.pt")),
        step=step,
        best_epoch=best.get("epoch") if metrics else None,
        metrics=metrics,
    )
