"""The help screens of all commands. `python -m tests.help_screens` writes them to `tests/fixtures/help`."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from tests.support import REPO
from vac_ddp import cli

FOLDER = REPO / "tests" / "fixtures" / "help"


def screens() -> dict[str, str]:
    """File name -> what `vac`, `vac COMMAND --help` and the lists of settings and presets print, 80 columns wide."""
    asked = {"vac.txt": ["--help"], "presets_list.txt": ["presets"], "settings_warm-up.txt": ["settings", "warm-up"]}
    asked |= {f"{command}.txt": [command, "--help"] for command in cli.COMMANDS}
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        return {name: _printed(words) for name, words in asked.items()}
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _printed(words: list[str]) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.suppress(SystemExit):
        cli.main(words)
    return stream.getvalue()


def main(folder: Path = FOLDER) -> None:
    """Write them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.txt"):
        path.unlink()
    for name, text in screens().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
