"""The package without its repository: what is in sdist and wheel, what it imports, and that an installed one works."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.support import REPO, environment

IMPORT_ALL = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Absent())
import vac_ddp
names = ["vac_ddp"] + [module.name for module in pkgutil.walk_packages(vac_ddp.__path__, "vac_ddp.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""

BUILD = "from setuptools import build_meta; build_meta.build_{}('dist')"


def tracked(root: Path) -> list[str]:
    """The files that a clone of the repository has."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (root / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel made from it): the sdist from a clean copy, the wheel from nothing but the sdist."""
    clone = tmp_path_factory.mktemp("clone")
    for name in tracked(REPO):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, clone / name)

    def build(kind: str, where: Path) -> None:
        (where / "dist").mkdir()
        done = subprocess.run([sys.executable, "-c", BUILD.format(kind)], cwd=where, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    build("sdist", clone)
    (sdist,) = (clone / "dist").glob("*.tar.gz")
    elsewhere = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(elsewhere, filter="data")
    (unpacked,) = elsewhere.iterdir()
    build("wheel", unpacked)
    (wheel,) = (unpacked / "dist").glob("*.whl")
    return sdist, wheel


def test_wheel_holds_every_module_the_presets_and_the_marker(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[1]).namelist())
    wanted = {name for name in tracked(REPO) if name.startswith("vac_ddp/") and not name.endswith("/ruff.toml")}
    wanted |= {f"vac_ddp/{name}" for name in tracked(REPO) if name.startswith("configs/")}
    assert "vac_ddp/py.typed" in wanted
    assert "vac_ddp/configs/debug.yaml" in wanted
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_what_the_repository_holds(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked(REPO) if name not in (".gitignore",)} <= names


def needed(distribution: str) -> set[str]:
    """A distribution and what it requires without extras, and what these require."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    queue = [distribution]
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in required:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


def hard_requirements(wheel: Path) -> list[str]:
    """Names of what the wheel requires without extras."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", archive.read(name).decode(), re.MULTILINE)
    return [package for package, rest in lines if "extra ==" not in rest]


def test_every_module_is_imported_with_the_fewest_dependencies(built: tuple[Path, Path]) -> None:
    """Everything that is installed here and is not required, directly or not, is hidden."""
    there = set().union(*(needed(name) for name in hard_requirements(built[1])))
    owners = {
        top: {re.sub(r"[-_.]+", "-", owner).lower() for owner in distributions}
        for top, distributions in metadata.packages_distributions().items()
    }
    hidden = sorted(top for top, names in owners.items() if not names & there and top != "vac_ddp")
    assert {"pytest", "hypothesis", "onnx", "av"} <= set(hidden)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, ",".join(hidden)],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80


def test_slow_libraries_are_imported_only_where_they_are_used() -> None:
    slow = "transformers,timm,wandb,matplotlib,torchvision,av,submitit,onnx,soundfile,tensorboard,yaml"
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, slow],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.docs
def test_installed_elsewhere_it_makes_data_trains_and_predicts(built: tuple[Path, Path], tmp_path: Path) -> None:
    site, place = tmp_path / "site", tmp_path / "elsewhere"
    place.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(built[1])], check=True, timeout=120)
    environ = {**environment(PYTHONPATH=str(site)), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def vac(*words: str) -> str:
        done = subprocess.run(
            [str(site / "bin" / "vac"), *words], cwd=place, env=environ, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import vac_ddp; print(vac_ddp.__file__)"],
        cwd=place,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(where.strip()).is_relative_to(site)
    assert "vac COMMAND" in vac("--help")
    vac("synth", "data", "--videos-per-class", "4", "--test-per-class", "1")
    vac("train", "--debug", "data.train=data/data_train", "run.dir=run")
    vac("predict", "--run", "run", "--data", "data/data_test")
    with (place / "run" / "predictions" / "data_test" / "submission.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["id", "class"]
    assert sorted(row[0] for row in rows[1:]) == sorted(
        str(int(path.name)) for path in (place / "data/data_test").iterdir()
    )
    vac("train", "--config", "scratch_small", "--print-config")
