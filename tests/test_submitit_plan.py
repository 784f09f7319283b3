"""launch/submitit_train.py without a cluster: which jobs it makes of a command line, and one on this machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.runs import Workplace
from tests.support import REPO, environment
from vac_ddp import errors
from vac_ddp.arguments import parse_settings
from vac_ddp.commands import job_plan
from vac_ddp.errors import UserError

SCRIPT = REPO / "launch" / "submitit_train.py"


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("submitit_train", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["submitit_train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_folds_and_seeds_are_the_members_of_an_ensemble(launcher: ModuleType) -> None:
    words = ["kfold", "--folds", "2", "--seeds", "0,3", "--data", "x/test", "--", "run.dir=runs/f", "train.epochs=2"]
    plan = launcher.make_plan(launcher.parse(words))
    members = job_plan.members(Path("runs/f"), folds=2, seeds=[0, 3])
    assert len(plan.jobs) == 4
    for commands, member in zip(plan.jobs, members, strict=True):
        (train, trained), (_, val), (predict, test) = commands
        assert (train, predict) == ("vac_ddp.train", "vac_ddp.predict")
        assert parse_settings(trained).config.run.dir == str(member.folder)
        assert trained[-4:] == list(member.words)
        assert val == ["--", "--run", str(member.folder), "--part", "val"]
        assert test[-1] == str(member.folder / "predictions" / "test")
    assert plan.finish[:2] == ["ensemble", "--score-only"] and plan.finish[-2:] == words[-2:]


def test_a_grid_is_every_combination_in_a_directory_of_its_own(launcher: ModuleType) -> None:
    words = ["sweep", "--grid", "optim.lr=1e-3,1e-4", "seed=0,1", "--", "run.dir=runs/s"]
    plan = launcher.make_plan(launcher.parse(words))
    found = [parse_settings(commands[0][1]).config for commands in plan.jobs]
    assert [(one.optim.lr, one.seed) for one in found] == [(1e-3, 0), (1e-3, 1), (1e-4, 0), (1e-4, 1)]
    assert plan.finish == ["table", *(one.run.dir for one in found)] and len(set(plan.finish)) == 5
    assert {one.run.resume for one in found} == {"auto"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--", "train.epoch=1"], "train.epoch"),
        (["train", "--cluster", "local", "--nodes", "2"], "--nodes 2"),
        (["kfold"], "--folds"),
        (["sweep", "--grid", "seed"], "--grid"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_submitted(launcher: ModuleType, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        launcher.make_plan(launcher.parse(words))


def test_what_the_cluster_is_asked_for(launcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = ["train", "--nodes", "3", "--gpus", "4", "--time", "30", "--partition", "gpu", "--min-nodes", "2"]
    options = launcher.parse([*words, "--slurm", "reservation=us", "--setup", "module load x", "--logs", str(tmp_path)])
    executor = launcher.make_executor(options)._executor
    assert executor.max_num_timeout == launcher.NEVER
    script = executor._make_submission_file_text("COMMAND", "id")
    for line in ("nodes=3", "ntasks-per-node=1", "gpus-per-node=4", "time=30", "partition=gpu", "signal=USR2@60",
                 "reservation=us", "open-mode=append"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert "#SBATCH --requeue\n" in script and "#SBATCH --no-kill\n" in script and "module load x" in script
    assert re.search(r"srun .*--kill-on-bad-exit=0 --cpus-per-task=8 --no-kill COMMAND", script)


@pytest.mark.fault
def test_folds_are_trained_and_scored_on_this_machine(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    words = [word for word in place.arguments("folds", "train.epochs=1", "data.workers=0") if "data.val=" not in word]
    (tmp_path / "data_val" / "class0").rename(tmp_path / "data_test")
    command = [sys.executable, str(SCRIPT), "kfold", "--cluster", "local", "--folds", "2", "--", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == errors.DONE, done.stdout + done.stderr
    assert done.stdout.count("ended with status 0") == 2
    assert "top-1 of 2 members: mean" in done.stdout and "deviation" in done.stdout
    assert (tmp_path / "folds" / "ensemble" / "submission.csv").exists()
    for member in job_plan.members(tmp_path / "folds", folds=2, seeds=[0]):
        assert (member.folder / "predictions" / "data_test" / "views.npz").exists()


def test_help_names_everything(launcher: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launcher.parse(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--cluster", "--nodes", "--gpus", "--grid", "--folds", "local", "debug"))
