"""What a run says while it goes on: a console, log.txt, metrics.jsonl, and W&B and TensorBoard where asked."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from vac_ddp.files import read_json_lines, write_text
from vac_ddp.settings import LogSettings


class Tracker:
    """Writes for rank 0; on the other ranks every call does nothing but `say` with `everywhere=True`.

    metrics.jsonl is whole lines of JSON objects with `kind` (train, val, event), `step` and figures.
    """

    def __init__(self, folder: Path | None, settings: LogSettings, *, rank: int, total_steps: int = 0) -> None:
        self.settings, self.rank, self.total_steps = settings, rank, total_steps
        self.folder = folder if rank == 0 else None
        self._log: TextIO | None = None
        self._metrics: TextIO | None = None
        self._bar: Any = None
        self._wandb: Any = None
        self._board: Any = None
        self.wandb_id: str | None = None
        if self.folder is not None:
            self._log = (self.folder / "log.txt").open("a", encoding="utf-8")
            self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")

    # ------------------------------------------------------------ lines

    def say(self, text: str, *, everywhere: bool = False) -> None:
        """One line for people. Rank 0's goes to the log file as well; other ranks speak only where asked to."""
        if self.rank != 0:
            if everywhere:
                print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True)
            return
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self._log.flush()

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """One line of metrics.jsonl, and the same figures to W&B and TensorBoard."""
        if self._metrics is None:
            return
        plain = {k: (None if isinstance(v, float) and v != v else v) for k, v in figures.items()}
        self._metrics.write(json.dumps({"kind": kind, "step": step, **plain}, ensure_ascii=False) + "\n")
        self._metrics.flush()
        numbers = {k: v for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{k}": v for k, v in numbers.items()} | {"step": step})
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def rewind(self, step: int) -> int:
        """Move the lines behind `step` to metrics.discarded.jsonl; returns how many. For a run that is resumed."""
        if self.folder is None or self._metrics is None:
            return 0
        path = self.folder / "metrics.jsonl"
        self._metrics.close()
        kept, behind = [], []
        for line in read_json_lines(path):
            (kept if line["step"] <= step else behind).append(json.dumps(line, ensure_ascii=False) + "\n")
        if behind:
            with (self.folder / "metrics.discarded.jsonl").open("a", encoding="utf-8") as stream:
                stream.writelines(behind)
                stream.flush()
                os.fsync(stream.fileno())
        write_text(path, "".join(kept))
        self._metrics = path.open("a", encoding="utf-8")
        return len(behind)

    # ------------------------------------------------------------ progress

    def progress(self, phase: str, total: int, done: int = 0) -> None:
        """Begin the progress bar of a phase, on a terminal and on rank 0 only."""
        self.end_progress()
        wanted = self.settings.progress if self.settings.progress is not None else sys.stderr.isatty()
        if self.rank == 0 and wanted:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=phase, leave=False, dynamic_ncols=True, unit="step")

    def advance(self, **shown: float) -> None:
        """One step forward; `shown` are the newest figures, where there are any."""
        if self._bar is not None:
            if shown:
                self._bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
            self._bar.update()

    def end_progress(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # ------------------------------------------------------------ services

    def connect(self, config: dict[str, Any], name: str, wandb_id: str | None) -> None:
        """Start W&B (under the id of a resumed run) and TensorBoard. Training goes on where they cannot be had."""
        if self.folder is None:
            return
        if self.settings.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.folder / "tensorboard"))
            except ImportError:
                self.say("TensorBoard is not installed (pip install tensorboard): its files are not written")
        if self.settings.wandb == "disabled":
            return
        import wandb

        try:
            self._wandb = wandb.init(
                project=self.settings.wandb_project,
                name=name,
                id=wandb_id,
                resume="allow",
                config=config,
                dir=str(self.folder),
                mode=self.settings.wandb,
                settings=wandb.Settings(init_timeout=8, console="off"),
            )
            self.wandb_id = self._wandb.id
        except (wandb.errors.Error, OSError) as error:
            self.say(f"W&B cannot be reached, going on without it ({' '.join(str(error).split())[:120]})")

    def artifact(self, path: Path) -> None:
        """Hand the best weights to W&B, where log.wandb_artifact asks for it."""
        if self._wandb is not None and self.settings.wandb_artifact and path.exists():
            self._wandb.log_artifact(str(path), name=f"{self._wandb.id}-best", type="model")

    def close(self) -> None:
        """Flush and close everything."""
        self.end_progress()
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()
        for stream in (self._log, self._metrics):
            if stream is not None:
                stream.close()
        self._log = self._metrics = None
