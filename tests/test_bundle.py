"""`vac bundle`: real pip on a folder of small wheels, no network; installed from the bundle, the package works."""

from __future__ import annotations

import json
import shutil
import subprocess
import venv
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.support import REPO, environment
from vac_ddp import cli, files
from vac_ddp.errors import UserError

# A package index: name, version, requirements. torch needs what nobody else does, timm needs torch.
INDEX = {
    "torch": ("99.0", ["nvidia-cuda", "sympy", "numpy"]),
    "torchvision": ("99.0", ["torch", "pillow"]),
    "nvidia-cuda": ("1.0", []),
    "sympy": ("1.0", []),
    "timm": ("99.0", ["torch", "torchvision", "huggingface_hub"]),
    "transformers": ("99.0", ["tokenizers", 'sympy; extra == "extra"', 'sympy; python_version < "3"']),
    "tokenizers": ("1.0", ["huggingface_hub"]),
    "huggingface_hub": ("1.0", []),
    **{
        name: ("99.0", [])
        for name in ("safetensors", "pyyaml", "simplejpeg", "pillow", "numpy", "scikit-learn", "matplotlib", "tqdm")
    },
    "wandb": ("99.0", []),
    "submitit": ("99.0", []),
}


def make_wheel(folder: Path, name: str, version: str, requires: Sequence[str]) -> None:
    """A wheel without code, by the binary distribution format."""
    stem = f"{name.replace('-', '_')}-{version}"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Provides-Extra: extra"]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        info = f"{stem}.dist-info"
        archive.writestr(f"{info}/METADATA", "\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    for name, (version, requires) in INDEX.items():
        make_wheel(folder, name, version, requires)
    return folder


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def vac(index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`vac bundle WORDS` in this process, with a folder of wheels as all that pip has."""
    alone = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_EXTRA_INDEX_URL": "", "PIP_CONSTRAINT": ""}
    for name, value in {**alone, "PIP_NO_BUILD_ISOLATION": "0"}.items():
        monkeypatch.setenv(name, value)

    def run(*words: str | Path, links: Path = index) -> Done:
        monkeypatch.setenv("PIP_FIND_LINKS", str(links))
        status = cli.main(["bundle", *map(str, words)])
        return Done(status, *capsys.readouterr())

    return run


def one_line(done: Done) -> str:
    """The only line of a user error."""
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_bundle_holds_what_the_machine_lacks(vac: Callable[..., Done], tmp_path: Path) -> None:
    import torch

    weights = tmp_path / "small.safetensors"
    save_file({"a": torch.arange(4.0)}, weights)
    done = vac(tmp_path / "out", "--weights", weights)
    assert done.returncode == 0, done.stderr
    wheels = {path.name.partition("-")[0] for path in (tmp_path / "out" / "wheels").iterdir()}
    absent = {"torch", "torchvision", "nvidia-cuda", "sympy"}
    assert wheels == {name.replace("-", "_") for name in {*INDEX, "vac_ddp"} - absent}
    assert (tmp_path / "out" / "weights" / weights.name).read_bytes() == weights.read_bytes()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["left_out"] == sorted(absent)
    there = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(manifest["files"]) == there - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry == {
            "bytes": (tmp_path / "out" / name).stat().st_size,
            "sha256": files.sha256(tmp_path / "out" / name),
        }
    assert f"{len(wheels)} wheels" in done.stdout and "left out, the machine must have them: nvidia-cuda" in done.stdout
    assert "Pillow-SIMD" in done.stdout
    assert not (REPO / "build").exists()

    assert "every file is as it was written" in vac(tmp_path / "out", "--verify").stdout
    (tmp_path / "out" / "weights" / weights.name).write_bytes(b"cut")
    (tmp_path / "out" / "wheels" / "tokenizers-1.0-py3-none-any.whl").unlink()
    found = vac(tmp_path / "out", "--verify")
    assert found.returncode == 3
    assert "wheels/tokenizers-1.0-py3-none-any.whl is missing" in found.stdout
    assert f"weights/{weights.name} is damaged" in found.stdout


@pytest.mark.docs
def test_installed_from_the_bundle_it_runs(vac: Callable[..., Done], tmp_path: Path) -> None:
    """With everything along, into an empty environment; the packages of this one stand in for what the wheels lack."""
    assert vac(tmp_path / "out", "--without").returncode == 0
    assert (tmp_path / "out" / "wheels" / "torch-99.0-py3-none-any.whl").exists()
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    links = tmp_path / "out" / "wheels"
    clean = {"PIP_CONFIG_FILE": "/dev/null", "PIP_EXTRA_INDEX_URL": "", "PIP_CONSTRAINT": "", "PYTHONPATH": ""}
    command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", links, "vac_ddp"]
    done = subprocess.run(command, env=environment() | clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = [tmp_path / "env" / "bin" / "vac", "--version"]
    assert subprocess.run(asked, env=environment() | clean, capture_output=True, text=True).stdout.strip() == "0.1.0"


def test_mistakes_are_one_line_and_leave_nothing(vac: Callable[..., Done], tmp_path: Path) -> None:
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "pip install failed" in one_line(vac(out, links=empty))
    assert "nothing.pth: no such file" in one_line(vac(out, "--weights", tmp_path / "nothing.pth"))
    assert "neither the repository" in one_line(vac(out, "--source", empty))
    assert list(tmp_path.iterdir()) == [empty]
    (out / "old").mkdir(parents=True)
    assert "is there already" in one_line(vac(out))
    assert "is no bundle" in one_line(vac(out, "--verify"))


def test_weights_of_a_hub_id_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what belongs to them; offline and not in the cache it is one line."""
    import torch
    from huggingface_hub import constants

    from vac_ddp.bundle import _add_weights

    cache, revision = tmp_path / "cache", "0" * 40
    snapshot = cache / "models--some--model" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(revision)
    (snapshot / "config.json").write_text('{"model_type": "videomae"}')
    (snapshot / "preprocessor_config.json").write_text("{}")
    (snapshot / "README.md").write_text("not needed")
    save_file({"a": torch.zeros(3)}, snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "weights").mkdir()
    _add_weights("some/model", tmp_path / "weights")
    names = {path.name for path in (tmp_path / "weights" / "some--model").iterdir()}
    assert names == {"config.json", "preprocessor_config.json", "model.safetensors"}
    with pytest.raises(UserError, match="not in the local cache"):
        _add_weights("some/other", tmp_path / "weights")
    run = tmp_path / "copy"
    shutil.copytree(snapshot, run)
    _add_weights(str(run), tmp_path / "weights")
    assert files.sha256(tmp_path / "weights" / "copy" / "model.safetensors") == files.sha256(run / "model.safetensors")
