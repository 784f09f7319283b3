"""Every command and every block of Python in the README and docs/ runs, made small, on data made for it."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import docs
from tests.support import REPO, environment
from vac_ddp import cli


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world of the pages, with a run of every name that a page takes for granted."""
    folder = docs.make_world(tmp_path_factory.mktemp("docs"))
    first = "vac train data.train=data_train run.dir=runs/first"
    status, said = in_child(folder, lambda: cli.main(docs.in_small(first)))
    assert status == 0, said
    return folder


def in_child(folder: Path, call: Callable[[], int | None]) -> tuple[int, str]:
    """Call in a process of its own in `folder`, with the libraries loaded here; (exit status, what it said)."""
    out = folder / ".said"

    def child() -> None:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(n, "w", closefd=False), line_buffering=True) for n in (1, 2)
        )
        os.chdir(folder)
        os.environ.update(environment(HOME=str(folder), XDG_CACHE_HOME=str(folder / ".cache")))
        status = 1
        try:
            status = call() or 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    import torch  # noqa: F401  # once, here, not in every child

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(240)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode if process.exitcode is not None else 1, out.read_text(encoding="utf-8", errors="replace")


def good(name: str, status: int) -> bool:
    """Whether a command ended as its page says: `vac audit` ends with 3 where it finds something."""
    return status == 0 or (name in ("audit", "extract") and status == 3)


@pytest.mark.docs
@pytest.mark.parametrize("page", docs.pages(), ids=lambda page: page.stem)
def test_commands_of_the_page_run(page: Path, world: Path, tmp_path: Path) -> None:
    for link in world.iterdir():  # runs and results of one page are its own; data is shared
        if link.name == "runs":
            (tmp_path / "runs").mkdir()
            (tmp_path / "runs" / "first").symlink_to(link / "first")
        elif not link.name.startswith("."):
            (tmp_path / link.name).symlink_to(link)
    made_by = "\n".join(command.text for command in docs.commands(page))
    prepare(tmp_path, world, page, made_by)
    ran = 0
    ranks = 2 if page.stem in ("README", "many-gpus") else 1
    for command in docs.commands(page):
        if docs.elsewhere(command.text):
            continue
        words = docs.in_small(command.text, ranks)
        status, said = in_child(tmp_path, lambda words=words: cli.main(words))
        assert good(words[0], status), f"{command}\nas: vac {' '.join(words)}\nended with {status}\n{said[-3000:]}"
        ran += 1
    for number, command in enumerate(docs.whole_inline_commands(page)):
        words = docs.in_small(command.text, 1)
        if words[0] in ("train", "probe") and not any(word.startswith(("run.dir=", "--help")) for word in words):
            words.append(f"run.dir=runs/inline{number}")
        status, said = in_child(tmp_path, lambda words=words: cli.main(words))
        assert good(words[0], status), f"{command}\nas: vac {' '.join(words)}\nended with {status}\n{said[-3000:]}"
        ran += 1
    blocks = "".join(code for _, code in docs.python_blocks(page))  # one after the other, as in a notebook
    if blocks:
        status, said = in_child(tmp_path, lambda: exec(compile(blocks, page.name, "exec"), {}))
        assert status == 0, f"{page.name}\n{said}"
    print(f"{page.name}: {ran} commands ran")


def prepare(folder: Path, world: Path, page: Path, commands: str) -> None:
    """What this page takes for granted and does not make itself."""
    if "run.dir=runs/first" in commands:
        (folder / "runs" / "first").unlink()
    for made in ("data_train", "data_test"):
        if re.search(rf"vac extract \S+ {made}\b", commands):
            (folder / made).unlink()
            shutil.copytree(world / made, folder / made)  # beside what is extracted now: one video is too few to train
    if "train.yaml" in commands and not re.search(r"vac init \S+( --out train\.yaml)?\n", commands + "\n"):
        words = ["init", "data_train"]
        status, said = in_child(folder, lambda: cli.main(words))
        assert status == 0, said
    if "runs/second" in commands and "run.dir=runs/second" not in commands:
        shutil.copytree(world / "runs" / "first", folder / "runs" / "second")


def test_every_command_is_run_or_listed_with_a_reason() -> None:
    used = set()
    for page in docs.pages():
        for command in docs.commands(page):
            reason = docs.elsewhere(command.text)
            if reason:
                used.add(reason)
            else:
                words = docs.in_small(command.text)
                assert words[0] in cli.COMMANDS, command
    assert used == set(docs.ELSEWHERE), f"reasons without a command: {set(docs.ELSEWHERE) - used}"


def test_no_command_hides_outside_of_what_is_read() -> None:
    """Every line of a block that names one of our programs is found as a command."""
    for page in docs.pages():
        found = " ".join(command.text for command in docs.commands(page))
        for number, language, line in docs.code_lines(page):
            text = line.strip().removeprefix("$ ")
            if language != "python" and re.match(r"(vac|torchrun|python -m vac_ddp)\s", text):
                begin = re.sub(r"\s+#.*$", "", text).removesuffix("\\").strip()
                assert begin in found, f"{page.name}:{number}: {line}"


def test_inline_commands_have_flags_that_exist() -> None:
    helps: dict[str, str] = {}
    seen = 0
    for page in docs.pages():
        for command in docs.inline_commands(page):
            text = command.text.replace("python -m vac_ddp.", "vac ")
            name = text.split()[1]
            if name in ("COMMAND",):
                continue
            assert name in cli.COMMANDS, command
            if name not in helps:
                stream = io.StringIO()
                with contextlib.redirect_stdout(stream), contextlib.suppress(SystemExit):
                    cli.main([name, "--help"])
                helps[name] = stream.getvalue()
            for flag in re.findall(r"\s(--[a-z-]+)", text):
                if flag not in ("--help", "--nproc"):
                    assert flag in helps[name], command
            seen += 1
    assert seen > 20


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (REPO / "vac_ddp").rglob("*.py"))
    source = re.sub(r"\"\s*\n\s*f?\"", "", source)
    page = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    heads = [
        head
        for line in re.findall(r"^\*\*(.+?)\*\*", page, re.MULTILINE | re.DOTALL)
        for head in re.findall(r"`([^`]+)`", line)
    ]
    assert len(heads) > 20
    for head in heads:
        if head.startswith("unrecognized arguments"):
            continue  # argparse says that, for torchrun
        for part in head.split("…"):
            words = " ".join(part.split()).strip()
            assert words in source, f"{head}: no message has {words!r}"


def test_links_lead_somewhere() -> None:
    for page in docs.pages():
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[\w-]+)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_settings_named_in_docs_exist() -> None:
    from vac_ddp import config

    groups = "|".join(sorted({name.split(".")[0] for name in config.leaves() if "." in name}))
    for page in docs.pages():
        used = set(re.findall(rf"(?<![\w/.])((?:{groups})\.[a-z_.]+)=", page.read_text(encoding="utf-8")))
        assert used <= set(config.leaves()), f"{page.name}: {used - set(config.leaves())}"
