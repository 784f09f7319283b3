"""Every shell script is clean for shellcheck, and the sbatch scripts have what they share."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import REPO

TEMPLATES = ("train", "predict", "kfold", "sweep")


def shell_scripts() -> list[Path]:
    """Scripts by their ending or their first line, tracked or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    found = []
    for name in listed.stdout.splitlines():
        path = REPO / name
        if path.suffix == ".sh" or (not path.suffix and path.is_file() and path.read_bytes()[:2] == b"#!"):
            found.append(path)
    return found


def test_shellcheck_is_clean() -> None:
    if shutil.which("shellcheck") is None and not os.environ.get("CI"):
        pytest.skip("no shellcheck (apt-get install shellcheck)")
    scripts = shell_scripts()
    assert {f"slurm/{name}.sh" for name in TEMPLATES} | {".ci/run", "tests/slurm/cluster.sh"} <= {
        path.relative_to(REPO).as_posix() for path in scripts
    }
    done = subprocess.run(["shellcheck", "-x", *map(str, scripts)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def directives(name: str) -> dict[str, str]:
    """The #SBATCH lines of a template."""
    words = [line.split(None, 1)[1] for line in (REPO / "slurm" / f"{name}.sh").read_text().splitlines()
             if line.startswith("#SBATCH ")]  # fmt: skip
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_can_be_interrupted(name: str) -> None:
    found = directives(name)
    assert found["--signal"] == "B:USR1@60" and found["--open-mode"] == "append" and "--requeue" in found
    assert found["--ntasks-per-node"] == "1" and "%" in found["--output"]
    assert ("--array" in found) == (name in ("kfold", "sweep"))
    assert os.access(REPO / "slurm" / f"{name}.sh", os.X_OK)


def test_a_template_outside_of_slurm_says_how_to_start_it() -> None:
    environment = {"PATH": os.environ["PATH"], "VAC_HOME": str(REPO)}
    done = subprocess.run(["bash", REPO / "slurm" / "train.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "start it with sbatch" in done.stderr
