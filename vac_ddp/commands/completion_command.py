"""`vac completion bash|zsh`: shell completion for `vac`."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from vac_ddp.arguments import ArgumentParser
from vac_ddp.settings_help import completion

ABOUT = 'Print the completion of vac for a shell. In ~/.bashrc or ~/.zshrc: eval "$(vac completion bash)", or zsh.'
PROGRAMS = ("embed", "predict", "probe")  # commands that are entry points of `python -m` as well


def main(argv: list[str]) -> int:
    """Print the script."""
    parser = ArgumentParser(prog="vac completion", description=ABOUT)
    parser.add_argument("shell", choices=("bash", "zsh"))
    modules = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    names = [name.removesuffix("_command") for name in modules if name.endswith("_command")]
    print(completion(parser.parse_args(argv).shell, sorted([*names, *PROGRAMS, "help"])), end="")
    return 0
