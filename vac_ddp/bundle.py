"""What a machine without internet needs: wheels of this package and its dependencies, weights, and their hashes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from vac_ddp import files
from vac_ddp.errors import UserError
from vac_ddp.schema import Count, Sha256, Within, read_json
from vac_ddp.version import VERSION

MANIFEST, WHEELS, WEIGHTS = "manifest.json", "wheels", "weights"
TREE = ("vac_ddp", "configs", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")  # what a wheel takes
BESIDE = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


class FileEntry(TypedDict):
    """A file of a bundle."""

    bytes: Count
    sha256: Sha256


class Manifest(TypedDict):
    """manifest.json of a bundle."""

    format: Annotated[int, Within(low=1, high=1)]
    vac_ddp: str
    left_out: list[str]
    files: dict[str, FileEntry]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The machine that a bundle is for. python: X.Y, platforms: pip's tags; by default as here. without: it has these.

    dependencies: whether to collect them at all.
    """

    python: str | None = None
    platforms: Sequence[str] = ()
    without: Sequence[str] = ()
    dependencies: bool = True

    def options(self) -> list[str]:
        """For pip."""
        words = ["--only-binary=:all:"]
        if self.python is not None:
            words.append(f"--python-version={self.python}")
        return words + [f"--platform={tag}" for tag in self.platforms]

    def markers(self, extra: str) -> dict[str, str]:
        """What environment markers are evaluated with, beside what holds here."""
        version = {} if self.python is None else {"python_version": self.python, "python_full_version": self.python}
        return {"extra": extra, **version}


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What was collected: bytes by file; names of the packages that were left out."""

    sizes: dict[str, int]
    left_out: list[str] = field(default_factory=list)

    def total(self, folder: Literal["wheels", "weights"]) -> tuple[int, int]:
        """(files, bytes) of one of its folders."""
        found = [size for name, size in self.sizes.items() if name.startswith(f"{folder}/")]
        return len(found), sum(found)


def make_bundle(out: Path, *, source: Path, weights: Sequence[str], target: Target) -> Bundle:
    """Collect wheels and weights in `out`, which must not exist or be empty; it is whole, or not there.

    source: the tree of this package, or its wheel. weights: hub ids, files, Hugging Face directories or runs. Raises
    UserError, also where pip or the hub cannot get something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: give the name of a new or empty folder")
    with files.whole_folder(out) as folder:
        for name in (WHEELS, WEIGHTS):
            (folder / name).mkdir()
        for asked in weights:  # the cheaper mistakes first
            _add_weights(asked, folder / WEIGHTS)
        wheel = _own_wheel(source, folder / WHEELS)
        left_out = _add_dependencies(wheel, folder / WHEELS, target) if target.dependencies else []
        entries: dict[str, FileEntry] = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest = {"format": 1, "vac_ddp": VERSION, "left_out": left_out, "files": entries}
        files.write_json(folder / MANIFEST, manifest)
    return Bundle(sizes={name: int(entry["bytes"]) for name, entry in entries.items()}, left_out=left_out)


def verify_bundle(folder: Path) -> list[str]:
    """What of a bundle is missing or not as it was written. UserError where there is none."""
    try:
        manifest = read_json(folder / MANIFEST, Manifest, remedy="make the bundle again")
    except OSError as error:
        raise UserError(f"{folder} is no bundle: cannot read {MANIFEST} ({error.strerror})") from None
    broken = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            broken.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"] or files.sha256(path) != entry["sha256"]:
            broken.append(f"{name} is damaged")
    return broken


def source_tree(given: Path | None) -> Path:
    """Find what the wheel of this package is made from: `given`, the tree it was imported from, or this directory."""
    candidates = [given] if given is not None else [Path(__file__).resolve().parents[1], Path.cwd()]
    for path in candidates:
        if path.suffix == ".whl" and path.is_file():
            return path
        if all((path / name).exists() for name in TREE):
            return path
    raise UserError(
        f"{given or 'here'}: neither the repository of vac_ddp nor its wheel: start in the repository, or give "
        "--source DIR or FILE.whl"
    )


def _own_wheel(source: Path, wheels: Path) -> Path:
    if source.suffix == ".whl":
        return Path(shutil.copy(source, wheels))
    with tempfile.TemporaryDirectory() as folder:  # setuptools leaves folders beside what it builds
        for name in TREE:
            copy: Any = shutil.copytree if (source / name).is_dir() else shutil.copyfile
            copy(source / name, Path(folder) / name)
        _pip("wheel", "--no-deps", f"--wheel-dir={wheels}", folder)
    return next(wheels.glob("vac_ddp-*.whl"))


def _add_dependencies(wheel: Path, wheels: Path, target: Target) -> list[str]:
    """Download what the wheel needs; names of the packages that were left out, with what they alone need."""
    with tempfile.TemporaryDirectory() as folder:
        report, nowhere = Path(folder) / "report.json", Path(folder) / "installed"  # pip wants one for another platform
        words = ("--dry-run", "--ignore-installed", f"--target={nowhere}", f"--report={report}")
        _pip("install", *words, *target.options(), str(wheel))
        resolved = {_name(item["metadata"]["name"]): item["metadata"] for item in files.read_json(report)["install"]}
    needed = _needed(resolved, target)
    own = _name("vac_ddp")
    pinned = [f"{name}=={resolved[name]['version']}" for name in needed if name != own]
    if pinned:
        _pip("download", "--no-deps", f"--dest={wheels}", *target.options(), *pinned)
    return sorted(set(resolved) - set(needed))


def _needed(resolved: dict[str, Any], target: Target) -> list[str]:
    """Names that this package needs on the target, without those that it has and what only they need."""
    from packaging.requirements import Requirement

    present = {_name(name) for name in target.without}
    needed: dict[str, None] = {}
    queue = [(_name("vac_ddp"), "")]
    seen = set(queue)
    while queue:
        name, extra = queue.pop()
        needed[name] = None
        for line in resolved[name].get("requires_dist", []):
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate(target.markers(extra)):
                continue
            wanted = [(_name(requirement.name), inside) for inside in ("", *requirement.extras)]
            new = [pair for pair in wanted if pair[0] in resolved and pair[0] not in present and pair not in seen]
            seen.update(new)
            queue += new
    return sorted(needed)


def _add_weights(asked: str, folder: Path) -> None:
    """Copy weights, after a look at whether they are whole. One file keeps its name, several get a folder."""
    from vac_ddp.models.weight_files import open_source  # torch: not for --help

    source = open_source(asked)
    here = source.path.parent
    found = [source.path]
    if source.hf_config is not None:
        if source.path.suffix == ".json":
            found += [here / name for name in sorted(set(files.read_json(source.path)["weight_map"].values()))]
        found += [here / name for name in BESIDE if (here / name).exists()]
    path = Path(asked).expanduser()
    name = path.resolve().name if path.exists() else asked.replace("/", "--")
    into = folder if len(found) == 1 else folder / name
    if any((into / path.name).exists() for path in found):
        raise UserError(f"--weights {asked}: the bundle has a file of that name already; rename one of them")
    into.mkdir(exist_ok=True)
    for path in found:
        shutil.copyfile(path, into / path.name)


def _name(text: str) -> str:
    """A package's name as it is compared."""
    return text.lower().replace("_", "-").replace(".", "-")


def _pip(*words: str) -> None:
    """Run pip; UserError with its own reason where it fails."""
    options = ("--quiet", "--disable-pip-version-check", "--no-input", "--retries=1", "--timeout=15")
    done = subprocess.run([sys.executable, "-m", "pip", words[0], *options, *words[1:]], capture_output=True, text=True)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise UserError(f"{sys.executable} has no pip: run {sys.executable} -m ensurepip")
    lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    network = any(word in done.stderr for word in ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError"))
    why = (
        "the package index cannot be reached"
        if network
        else (lines or done.stderr.splitlines() or [f"exit status {done.returncode}"])[0]
    )
    raise UserError(f"pip {words[0]} failed: {why}")
