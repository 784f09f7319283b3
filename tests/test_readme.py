"""The README says what is there: its presets, its commands, its exit statuses."""

from __future__ import annotations

import re

from tests.support import REPO
from vac_ddp import cli, config, errors

README = (REPO / "README.md").read_text(encoding="utf-8")


def test_presets_are_listed() -> None:
    named = set(re.findall(r"`(\w+)`", README.split("| preset | what it is |", 1)[1].split("\n\n", 1)[0]))
    assert {path.stem for path in (REPO / "configs").glob("*.yaml")} <= named


def test_commands_exist() -> None:
    used = set(re.findall(r"(?:^ {4}|`|\$ )vac ([a-z]+)", README, re.MULTILINE))
    assert used
    assert used <= set(cli.COMMANDS)


def test_settings_exist() -> None:
    groups = "|".join(sorted({name.split(".")[0] for name in config.leaves() if "." in name}))
    used = set(re.findall(rf"(?<![\w/.])((?:{groups})\.[a-z_.]+)=", README))
    assert used
    assert used <= set(config.leaves())


def test_exit_statuses_are_those_of_the_code() -> None:
    table = README.split("| status | meaning |", 1)[1].split("\n\n", 1)[0]
    listed = {int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert listed == {errors.DONE, errors.USER_ERROR, errors.FINDINGS, errors.INTERRUPTED}


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"@[A-Z]+@", README)
