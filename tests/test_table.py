"""`vac table`: runs written by hand, and the mean and deviation worked out beside."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from vac_ddp import cli
from vac_ddp import config as settings_io
from vac_ddp.commands import table_command
from vac_ddp.errors import UserError
from vac_ddp.settings import Config


def make_run(folder: Path, top1: list[float | None], *, rate: float = 1e-3, **settings: object) -> Path:
    """A run directory with one validation an epoch (None: an epoch without)."""
    config = Config()
    config.optim.lr, config.optim.base_lr = rate, None
    config.run.dir = str(folder)
    for name, value in settings.items():
        setattr(config, name, value)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(settings_io.to_yaml(config))
    lines = [{"kind": "train", "step": 1, "loss": 9.0}]
    for epoch, value in enumerate(top1, start=1):
        figures = {} if value is None else {"val_top1": value, "val_loss": 1 - value}
        lines.append({"kind": "epoch", "step": epoch, "epoch": epoch, **figures})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_seeds_of_one_setting_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = {(1e-3, 0): 0.5, (1e-3, 1): 0.7, (5e-4, 0): 0.25, (5e-4, 1): 0.25}
    runs = [
        make_run(tmp_path / f"{rate}-{seed}", [0.1, None, value, 0.2], rate=rate, seed=seed)
        for (rate, seed), value in best.items()
    ]
    made = table_command.lines([table_command.read_result(run) for run in runs])
    assert [line.words for line in made] == [("optim.lr=0.001",), ("optim.lr=0.0005",)]
    assert [line.top1 for line in made] == [(0.5, 0.7), (0.25, 0.25)]
    assert [line.loss for line in made] == [pytest.approx((0.5, 0.3)), (0.75, 0.75)]
    assert cli.main(["table", *map(str, runs), "--out", str(tmp_path / "table.csv")]) == 0
    said = capsys.readouterr().out
    assert f"0.6000 +- {statistics.stdev([0.5, 0.7]):.4f}" in said
    assert (tmp_path / "table.csv").read_text().splitlines()[1:] == [
        "optim.lr=0.001,2,0.600000,0.141421,0.400000",
        "optim.lr=0.0005,2,0.250000,0.000000,0.750000",
    ]


def test_one_run_has_no_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["table", str(make_run(tmp_path / "a", [0.5]))]) == 0
    assert "+-" not in capsys.readouterr().out.splitlines()[-1]


def test_what_is_no_trained_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        table_command.main([str(tmp_path)])
    with pytest.raises(UserError, match="not been validated"):
        table_command.main([str(make_run(tmp_path / "new", [None]))])
