"""What the launchers hand to torchrun is taken by its own parser, whichever torch is installed.

`launch/check_package.sh 'torch==2.11.*'` runs this file with the oldest torch, the fast tests with the newest.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
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
import json, sys
from torch.distributed.run import config_from_args, parse_args
config, _, words = config_from_args(parse_args(sys.argv[1:]))
found = {"nodes": [config.min_nodes, config.max_nodes], "ranks": config.nproc_per_node, "id": config.run_id,
         "signals": config.signals_to_handle, "endpoint": config.rdzv_endpoint, "conf": config.rdzv_configs,
         "save": getattr(config, "shutdown_timeout", None), "words": words}
print("parsed " + json.dumps(found, default=str))
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
        f'#!/bin/sh\n[ "$2" = torch.distributed.run ] || exec {real} "$@"\nshift 2\n'
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


@pytest.mark.parametrize(("name", "words"), [("train.sh", ["a=b", "c=d"]), ("predict.sh", ["--run", "r", "c=d"])])
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
