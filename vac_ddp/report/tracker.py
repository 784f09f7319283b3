"""What a run says while it goes on: a console, log.txt, metrics.jsonl, and W&B and TensorBoard where asked."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.files import write_bytes, write_json, write_text
from vac_ddp.report import services
from vac_ddp.report.lines import Lines, metrics_line, read_metrics
from vac_ddp.report.terminal import fitted, start_bar
from vac_ddp.schema import Count, json_lines, read_json
from vac_ddp.settings import LogSettings
from vac_ddp.text import printable, printable_values

if TYPE_CHECKING:
    from PIL.Image import Image

COMPLETE = "wandb/complete.json"


class Complete(TypedDict):
    """wandb/complete.json: how many lines of metrics.jsonl the W&B run of this id has for sure."""

    id: str
    lines: Count


class Tracker:
    """Writes for rank 0; on the other ranks every call does nothing but `say` with `everywhere=True`.

    These go to logs/rank-<rank>.txt, and to the console where it is no terminal: that belongs to rank 0 alone.
    metrics.jsonl is whole lines of JSON objects with `kind` (train, val, event), `step` and figures.
    """

    def __init__(self, folder: Path | None, settings: LogSettings, *, rank: int, total_steps: int = 0) -> None:
        self.settings, self.rank, self.total_steps = settings, rank, total_steps
        self.folder = folder if rank == 0 else None
        self._log: Lines | None = None
        self._metrics: Lines | None = None
        self._bar: Any = None
        self._shown = ""
        self._wandb: Any = None
        self._board: Any = None
        self.wandb_id: str | None = None
        if self.folder is not None:
            self._log = Lines(self.folder / "log.txt")
            self._metrics = Lines(self.folder / "metrics.jsonl")
        elif folder is not None:
            self._log = _rank_log(folder / "logs" / f"rank-{rank}.txt")
            self.note(f"host {platform.node()}, process {os.getpid()}")

    # ------------------------------------------------------------ lines

    def say(self, text: str, *, everywhere: bool = False, fit: bool = True) -> None:
        """One line for people. Rank 0's goes to the log file as well; other ranks speak only where asked to.

        fit: break it between words where a terminal is narrower; not for commands, which people copy.
        """
        if self.rank != 0:
            if everywhere:
                self.note(text)
                if self._log is None or not sys.stderr.isatty():
                    print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True)
            return
        if self._bar is not None:
            self._bar.clear()
        print(fitted(text) if fit and sys.stdout.isatty() else text, flush=True)
        if self._bar is not None:
            self._bar.refresh()
        self.note(text)

    def note(self, text: str) -> None:
        """Lines for this rank's log file alone."""
        if self._log is not None:
            who = f"rank {self.rank}: " if self.rank else ""
            if news := self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {who}{text}"):
                print(f"{who}{self._log.path}: {news}", file=sys.stderr, flush=True)

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """One line of metrics.jsonl, and the same figures to W&B and TensorBoard."""
        if self._metrics is None:
            return
        plain = {k: (None if isinstance(v, float) and v != v else v) for k, v in figures.items()}
        if news := self._metrics.write(json.dumps({"kind": kind, "step": step, **plain}, ensure_ascii=False)):
            self.say(f"{self._metrics.path}: {news}")
        row = _numbers(kind, figures)
        if self._wandb is not None:
            self._log_row(row, step)
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def rewind(self, step: int, epoch: int) -> int:
        """Move the lines behind `step`, and those of epochs after `epoch`, to metrics.discarded.jsonl; how many.

        For a run that is resumed there. The end of an epoch has the number of its last step: a run that was killed
        between its line and its checkpoint has that line still to write.
        """
        if self.folder is None or self._metrics is None:
            return 0
        path = self.folder / "metrics.jsonl"
        self._metrics.close()
        kept: list[str] = []
        behind: list[str] = []
        for number, text in json_lines(path):
            line, problem = metrics_line(text)
            if line is None:
                self.say(f"{path} line {number}: {problem}; moved to metrics.discarded.jsonl")
            stays = (
                line is not None and line["step"] <= step and not (line["kind"] == "epoch" and line["epoch"] > epoch)
            )
            (kept if stays else behind).append(text)
        if behind:
            discarded = self.folder / "metrics.discarded.jsonl"
            earlier = discarded.read_bytes() if discarded.exists() else b""
            write_bytes(discarded, earlier + "".join(behind).encode("utf-8", "surrogateescape"))
        write_text(path, "".join(kept))
        self._metrics = Lines(path)
        return len(behind)

    # ------------------------------------------------------------ progress

    def progress(self, phase: str, total: int, done: int = 0, *, unit: str = "clips") -> None:
        """Begin the progress bar of a phase of `total` units, on a terminal and on rank 0 only."""
        self.end_progress()
        wanted = self.settings.progress if self.settings.progress is not None else sys.stderr.isatty()
        if self.rank == 0 and wanted:
            self._bar = start_bar(phase, total, done, unit)
            if unit == "clips":
                self._bar.set_postfix_str(self._shown)  # what the epoch before ended with, until there is news

    def advance(self, count: int = 1, **shown: float) -> None:
        """`count` units forward; `shown` are the newest figures, where there are any."""
        if self._bar is not None:
            if shown:
                short = {"accuracy": "acc"}
                self._shown = " ".join(f"{short.get(name, name)} {value:.3f}" for name, value in shown.items())
                self._bar.set_postfix_str(self._shown, refresh=False)
            self._bar.update(count)

    def end_progress(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # ------------------------------------------------------------ services

    def connect(self, config: dict[str, Any], name: str, wandb_id: str | None, step: int = 0) -> None:
        """Start W&B (under the id of a resumed run) and TensorBoard. Training goes on where they cannot be had.

        step: from which a resumed run goes on.
        """
        self.wandb_id = wandb_id
        config, name = printable_values(config), printable(name)
        if self.folder is None:
            return
        if self.settings.tensorboard:
            try:
                self._board = services.start_board(self.folder, step)
            except services.Unavailable as error:
                self.say(f"going on without TensorBoard: {error}")
        if self.settings.wandb != "disabled":
            kept = self.folder / "wandb_id"  # of an attempt that was killed before its first checkpoint
            if wandb_id is None and kept.exists():
                wandb_id = kept.read_text(encoding="utf-8").strip()
            try:
                self._wandb = services.start_wandb(self.settings, self.folder, config, name, wandb_id)
                self.wandb_id = self._wandb.id
                write_text(kept, f"{self.wandb_id}\n")
                self.say(f"W&B: {services.where_to_look(self._wandb, self.settings)}", fit=False)
                self._catch_up()
            except services.Unavailable as error:
                self.say(f"going on without W&B: {error}; every figure is in metrics.jsonl")

    def _catch_up(self) -> None:
        """Send W&B the lines of metrics.jsonl that it may not have: it loses what is in its buffers when it is killed.

        The lines that it surely has are counted in wandb/complete.json when a run ends in good order.
        """
        assert self.folder is not None, "rank 0"
        lines, told = read_metrics(self.folder), self.folder / COMPLETE
        known = None
        try:
            known = read_json(told, Complete, remedy="all figures are sent again") if told.exists() else None
        except UserError as error:
            self.say(str(error))
        sure = min(len(lines), known["lines"]) if known and known["id"] == self.wandb_id else 0
        write_json(told, {"id": self.wandb_id, "lines": sure})
        for line in lines[sure:]:
            row = _numbers(line["kind"], {k: v for k, v in line.items() if k not in ("kind", "step")})
            self._log_row(row, line["step"])

    def _log_row(self, row: dict[str, float], step: int) -> None:
        self._to_wandb(lambda: self._wandb.log(row | {"step": step}))

    def picture(self, name: str, image: Image, step: int, caption: str = "") -> None:
        """Show a picture in W&B and TensorBoard."""
        if self._wandb is not None:
            import wandb

            self._to_wandb(lambda: self._wandb.log({name: wandb.Image(image, caption=caption), "step": step}))
        if self._board is not None:
            self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            if caption:
                self._board.add_text(name, caption, step)

    @property
    def shows_pictures(self) -> bool:
        """Whether there is anybody to show them to."""
        return self._wandb is not None or self._board is not None

    def _to_wandb(self, send: Callable[[], Any]) -> None:
        try:
            send()
        except Exception as error:  # its service process may be gone: training does not end for it
            self._wandb = None
            self.say(f"going on without W&B: {' '.join(str(error).split())[:120]}; every figure is in metrics.jsonl")

    def artifact(self, path: Path) -> None:
        """Hand the best weights to W&B, where log.wandb_artifact asks for it."""
        if self._wandb is not None and self.settings.wandb_artifact and path.exists():
            name = f"{self._wandb.id}-best"
            self._to_wandb(lambda: self._wandb.log_artifact(str(path), name=name, type="model"))

    def close(self, status: int = 0) -> None:
        """Flush and close everything. status: the exit status that the run will have."""
        self.end_progress()
        if self._wandb is not None:
            self._to_wandb(lambda: self._wandb.finish(exit_code=status))
            if self._wandb is not None and self.folder is not None and (self.folder / "metrics.jsonl").exists():
                sent = sum(1 for _ in json_lines(self.folder / "metrics.jsonl"))
                write_json(self.folder / COMPLETE, {"id": self.wandb_id, "lines": sent})
        if self._board is not None:
            self._board.close()
        for lines in (self._metrics, self._log):
            if lines is not None:
                lines.close()
                if lines.error:
                    print(f"{lines.path}: {lines.error}, its last lines are lost", file=sys.stderr, flush=True)
        self._log = self._metrics = None


def _rank_log(path: Path) -> Lines | None:
    """The log of another rank than 0; None where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Lines(path)
    except OSError:
        return None


def _numbers(kind: str, figures: dict[str, Any]) -> dict[str, float]:
    """The figures of a line that are numbers, under the names that services show."""
    good = {k: v for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"{kind}/{name}": value for name, value in good.items()}
