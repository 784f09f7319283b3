"""What the launchers hand to torchrun is taken by its own parser, whichever torch is installed.

`launch/check_package.sh 'torch==2.11.*'` runs this file with the oldest torch, the fast tests with the newest.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, parse_args

from tests.support import REPO, environment
from vac_ddp.runtime.torchrun import save_time_words

HAS_SAVE_TIME = "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}

PARSE = """
import json, os, sys
from torch.distributed.run import config_from_args, parse_args
config, _, words = config_from_args(parse_args(sys.argv[1:]))
found = {"nodes": [config.min_nodes, config.max_nodes], "ranks": config.nproc_per_node, "id": config.run_id,
         "signals": config.signals_to_handle, "endpoint": config.rdzv_endpoint, "conf": config.rdzv_configs,
         "save": getattr(config, "shutdown_timeout", None), "words": words}
print("parsed " + json.dumps(found, default=str))
if os.environ.get("TOLD"):
    with open(os.environ["VAC_STATUS_FILE"], "w") as stream:
        json.dump({"status": int(os.environ["TOLD"]), "message": "told"}, stream, indent=1)
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def sbatch(tmp_path: Path, name: str, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a template as a job of one node would, with torchrun's parser in the place of torchrun."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (tmp_path / "parse.py").write_text(PARSE)
    real = shlex.quote(sys.executable)
    executable(
        bin_ / "srun",
        '#!/bin/sh\nwhile [ "$1" != bash ]; do shift; done\nSLURMD_NODENAME=n1 SLURM_NODEID=0 exec "$@"\n',
    )
    executable(bin_ / "scontrol", '#!/bin/sh\n[ "$2" = hostnames ] && echo n1\n')
    executable(
        bin_ / "python",
        '#!/bin/sh\n[ "$2" != vac_ddp.cli ] ||\n'
        '{ echo "vac $*"; flock -n "${LOCK:-/dev/null}" true || echo locked; exit; }\n'
        f'[ "$2" = torch.distributed.run ] || exec {real} "$@"\nshift 2\n'
        f'exec {real} {shlex.quote(str(tmp_path / "parse.py"))} "$@"\n',
    )
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "VAC_HOME": str(REPO)}
    return subprocess.run(
        ["bash", REPO / "slurm" / name, *words],
        env=environment(
            **slurm,
            SLURM_SUBMIT_DIR=str(tmp_path),
            VAC_PYTHON=str(bin_ / "python"),
            PATH=f"{bin_}{os.pathsep}{os.environ['PATH']}",
            **extra,
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("train.sh", ["a=b", "c=d"]), ("predict.sh", ["--run", "r", "c=d"]), ("embed.sh", ["--run", "r", "--steps"])],
)
def test_torchrun_takes_what_the_templates_say(tmp_path: Path, name: str, words: list[str]) -> None:
    done = sbatch(tmp_path, name, *words, VAC_RANKS="3", VAC_SAVE_TIME="77")
    lines = [line for line in done.stdout.splitlines() if line.startswith("parsed ")]
    assert len(lines) == 1, done.stderr
    found = json.loads(lines[0].removeprefix("parsed "))
    assert found["words"][-len(words) :] == words
    assert (found["nodes"], found["ranks"], found["id"]) == ([1, 1], 3, "7-0-1")
    assert "SIGUSR1" in found["signals"]
    assert found["save"] == (77 if HAS_SAVE_TIME else None)
    assert ("kills ranks 30 s after a signal" in done.stderr) == (not HAS_SAVE_TIME)


def started(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The module and words of every torchrun, one after the other."""
    lines = [line.removeprefix("parsed ") for line in done.stdout.splitlines() if line.startswith("parsed ")]
    return [json.loads(line)["words"] for line in lines]


def test_a_fold_is_trained_and_predicted_and_the_last_one_scores_all(tmp_path: Path) -> None:
    folders = [tmp_path / "a b" / f"fold{fold}of3_seed4" for fold in (1, 2, 3)]
    for folder in folders:
        (folder / "predictions" / "test").mkdir(parents=True)
        (folder / "predictions" / "test" / "views.npz").touch()
    words = ["train.epochs=2", f"run.dir={tmp_path / 'a b'}"]
    task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "3", "SEED": "4", "TEST": "x/test", "TOLD": "0"}
    lock = folders[0] / "predictions" / "test" / "views.npz"
    done = sbatch(tmp_path, "kfold.sh", *words, **task, LOCK=str(lock))
    assert done.returncode == 0, done.stdout + done.stderr
    train, val, test = started(done)
    assert train[-6:] == [*words, "seed=4", "data.fold=2/3", f"run.dir={folders[1]}", "run.resume=auto"]
    assert val[-4:] == ["--run", str(folders[1]), "--part", "val"]
    assert test[-4:] == ["--data", "x/test", "--out", str(folders[1] / "predictions" / "test")]
    scored, locked = done.stdout.splitlines()[-2:]
    assert scored.startswith("vac -m vac_ddp.cli ensemble --score-only --folds 3 --seeds 4 ")
    assert locked == "locked"  # another fold that ends at the same moment waits
    assert lock.read_bytes() == b""


def test_a_sweep_trains_its_combination(tmp_path: Path) -> None:
    grid = {"GRID": "optim.lr=1e-3,1e-4 seed=0,1", "TOLD": "0"}
    task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}
    done = sbatch(tmp_path, "sweep.sh", "run.dir=s", **task, **grid)
    own = ["optim.lr=1e-3", "seed=1", "run.dir=s/optim.lr=1e-3_seed=1", "run.resume=auto"]
    assert started(done)[0][-5:] == ["run.dir=s", *own]
    assert "done; optim.lr=1e-3 seed=0 is not yet" in done.stdout
    shutil.rmtree(tmp_path / "bin")
    done = sbatch(tmp_path, "sweep.sh", "run.dir=s", **(task | {"SLURM_ARRAY_TASK_MAX": "2"}), **grid)
    assert done.returncode == 2 and "sbatch --array=1-4" in done.stdout
    shutil.rmtree(tmp_path / "bin")
    done = sbatch(tmp_path, "sweep.sh", "train.epoch=3", **task, **grid)
    assert done.returncode == 2 and "train.epoch" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_count_of_restarts_that_is_none_is_one_line(tmp_path: Path) -> None:
    done = sbatch(tmp_path, "train.sh", SLURM_RESTART_COUNT="abc")
    assert done.returncode == 2
    assert done.stderr == "SLURM_RESTART_COUNT=abc in the environment is not a number of restarts: unset it\n"


def launcher() -> ModuleType:
    """launch/submitit_train.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("submitit_train_words", REPO / "launch" / "submitit_train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_takes_what_the_submitit_launcher_says(nodes: int) -> None:
    ranks = launcher().Ranks(commands=[], ranks=2, folder="", min_nodes=1)
    job: Any = SimpleNamespace(job_id="7", raw_job_id="7", num_nodes=nodes, hostnames=["n1"], hostname="n1", node=0)
    config, _, words = config_from_args(parse_args([*ranks._meeting(job, 0), "-m", "vac_ddp.train", "a=b"]))
    assert words[-2:] == ["vac_ddp.train", "a=b"]
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (1, nodes, 2)
    assert getattr(config, "shutdown_timeout", 300) == 300


def test_the_time_to_save_is_given_where_torchrun_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert save_time_words(77) == (["--shutdown-timeout=77"] if HAS_SAVE_TIME else [])
    assert ("kills ranks 30 s after a signal" in capsys.readouterr().err) == (not HAS_SAVE_TIME)
