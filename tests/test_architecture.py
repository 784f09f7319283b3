"""docs/architecture.md says what is there: the layers of the import contracts, and every module once."""

from __future__ import annotations

import importlib
import re
import tomllib

from tests.support import REPO

PAGE = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_drawing_has_the_layers_of_the_contract() -> None:
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    block = PAGE.split("## Layers", 1)[1].split("\n    ", 1)[1].split("\n\n", 1)[0]
    drawn = [re.split(r" {2,}", line.strip())[0] for line in block.splitlines()]
    assert drawn == layers


def test_every_file_is_listed_once() -> None:
    folder, listed = "", []
    for line in PAGE.split("## Files", 1)[1].splitlines():
        if match := re.fullmatch(r" {4}(\w+)/", line):
            folder = f"{match[1]}/"
        elif match := re.match(r"( +)(\w+\.py) +\S", line):
            listed.append((folder if len(match[1]) == 6 else "") + match[2])
    package = REPO / "vac_ddp"
    there = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(there)


def test_names_in_the_documentation_exist() -> None:
    pages = [REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"`(vac_ddp(?:\.\w+)+)", page.read_text(encoding="utf-8"))}
    assert named
    for name in named:
        module, _, rest = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), rest), name
