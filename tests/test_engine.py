"""Parts of the engine that need no other process, compared with formulas and with bytes on the disk."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from vac_ddp import files
from vac_ddp.errors import UserError, exit_status
from vac_ddp.report.tracker import Tracker
from vac_ddp.runtime.exit_status import run_entry_point
from vac_ddp.runtime.signals import Agreement, StopRequest
from vac_ddp.settings import LogSettings, RunSettings
from vac_ddp.training import checkpoint, health, run_directory
from vac_ddp.training.early_stopping import Stopping
from vac_ddp.training.ema import Ema


def test_stopping_counts_validations_since_the_best() -> None:
    stopping = Stopping(patience=2)
    seen = [stopping.update(value, epoch) for epoch, value in enumerate([0.5, 0.4, 0.6, 0.6, math.nan], start=1)]
    assert seen == [(True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (stopping.best, stopping.best_epoch) == (0.6, 3)
    again = Stopping(patience=None)
    again.restore(stopping.state())
    assert again.best == 0.6 and again.update(0.1, 6) == (False, False)


def test_ema_is_the_formula_and_leaves_out_bad_steps() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = Ema(model, decay=0.9)
    expected = [p.detach().double().clone() for p in model.parameters()]
    for step in range(200):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        bad = step % 7 == 3
        ema.update(model, step, torch.tensor(float(bad)))
        decay = min(0.9, (1 + step) / (10 + step))
        if not bad:
            expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for e, p in zip(expected, ema.module.parameters(), strict=True):
        assert torch.allclose(e.float(), p, atol=1e-5)


def test_a_signal_sets_a_flag_and_the_deadline_is_one() -> None:
    stop = StopRequest()
    stop.install()
    try:
        assert stop.wanted() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.wanted() == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted() == signal.SIGUSR1
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert StopRequest(deadline=time.time() - 1).wanted() == signal.SIGALRM
    assert StopRequest(deadline=time.time() + 1000).wanted() == 0


def test_agreement_is_read_one_call_later() -> None:
    agreement = Agreement(None)
    assert agreement.exchange(stop=15, save=False, save_failed=True).stop == 0
    second = agreement.exchange(stop=0, save=True, save_failed=False)
    assert (second.stop, second.save, second.save_failed) == (15, 0, 1)
    assert agreement.read().save == 1
    assert agreement.now(stop=0) == 0


def test_an_agreement_at_once_keeps_the_wishes_that_it_does_not_answer() -> None:
    agreement = Agreement(None)
    agreement.exchange(stop=0, save=True, save_failed=True)
    assert [agreement.now(stop=0), agreement.now(stop=0)] == [0, 0]  # as a validation asks several times
    later = agreement.exchange(stop=0, save=False, save_failed=False)
    assert (later.save, later.save_failed) == (1, 1)
    assert agreement.read().save_failed == 0  # told once


def test_slow_rank_is_told_from_noise() -> None:
    assert health.slow_ranks([1.0, 1.1, 3.5, 1.0], 2.0) == [2]
    assert health.slow_ranks([0.01, 0.04], 2.0) == []
    assert health.slow_ranks([5.0], 2.0) == []


def test_checkpoint_round_trip_keeps_the_newest(tmp_path: Path) -> None:
    writer = checkpoint.Writer(tmp_path, keep=2)
    for step in (1, 2, 3):
        writer.start(step, {"w": torch.full((3,), float(step))}, {"epoch": step}, best=None)
        saved = writer.join()
        assert saved is not None and saved.error is None
    assert [path.stem for path in checkpoint.numbered(tmp_path)] == ["step-00000002", "step-00000003"]
    path, state, facts = checkpoint.read_newest(tmp_path, print)
    assert path.stem == "step-00000003" and facts["epoch"] == 3
    assert torch.equal(state["w"], torch.full((3,), 3.0))
    assert facts["sha256"] == files.sha256(path) and facts["bytes"] == path.stat().st_size
    assert checkpoint.read_newest(tmp_path / "none", print) is None


def test_no_whole_checkpoint_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 5, {"w": torch.zeros(2)}, {})
    (tmp_path / "step-00000005.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        checkpoint.read_newest(tmp_path, lambda _: None)


def test_disk_space_is_checked(tmp_path: Path) -> None:
    checkpoint.check_space(tmp_path, 1)
    with pytest.raises(UserError, match="GB free and the checkpoints need"):
        checkpoint.check_space(tmp_path, 1 << 60)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    files.write_text(path, "old")

    def fails(stream: object) -> None:
        stream.write(b"half of the n")  # type: ignore[attr-defined]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        files.write_atomic(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_overwriting_that_cannot_start_gives_everything_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("old\n")
    (folder / "notes.txt").write_text("mine\n")
    run = run_directory.open_run(RunSettings(dir=str(folder), overwrite=True), {}, print)
    (folder / "metrics.jsonl").write_text("new\n")
    run.discard()
    assert (folder / "metrics.jsonl").read_text() == "old\n"
    assert {p.name for p in folder.iterdir()} == {"checkpoints", "metrics.jsonl", "notes.txt"}
    assert list(tmp_path.iterdir()) == [folder]
    run = run_directory.open_run(RunSettings(dir=str(folder), overwrite=True), {}, print)
    run.begin(print)
    run.discard()  # as at the end of every run
    run.lock.release()
    assert {p.name for p in folder.iterdir()} == {"notes.txt", "start.json"}
    (aside,) = run.discarded
    assert (aside / "metrics.jsonl").read_text() == "old\n"  # until the new run has a checkpoint


def test_rewind_moves_later_lines_aside(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, LogSettings(), rank=0)
    for step in (1, 2, 3):
        tracker.write("train", step, loss=float(step))
    (tmp_path / "metrics.jsonl").open("a").write('{"kind": "train", "st')  # cut off by a crash
    assert tracker.rewind(1, 0) == 2
    tracker.write("train", 2, loss=9.0)
    tracker.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in kept] == [(1, 1.0), (2, 9.0)]
    moved = [json.loads(line) for line in (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()]
    assert [line["step"] for line in moved] == [2, 3]


def test_cuda_out_of_memory_names_the_settings_that_shrink_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAC_STATUS_FILE", str(tmp_path / "status.json"))

    def program(argv: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    assert run_entry_point(program, []) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for name in ("train.clips_per_gpu", "clip.frames", "clip.size", "train.checkpointing"):
        assert name in said
    assert json.loads((tmp_path / "status.json").read_text())["status"] == 2


def test_exit_statuses() -> None:
    assert exit_status(None) == 0
    assert exit_status(UserError("x")) == 2
    assert exit_status(ValueError("x")) == 1
