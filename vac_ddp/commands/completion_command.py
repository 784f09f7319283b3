"""`vac completion bash|zsh`: shell completion for `vac`."""

from __future__ import annotations

from vac_ddp.arguments import ArgumentParser
from vac_ddp.settings_help import completion

ABOUT = 'Print the completion of vac for a shell. In ~/.bashrc or ~/.zshrc: eval "$(vac completion bash)", or zsh.'


def main(argv: list[str]) -> int:
    """Print the script."""
    from vac_ddp.cli import COMMANDS  # cli imports the commands by name

    parser = ArgumentParser(prog="vac completion", description=ABOUT)
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(completion(parser.parse_args(argv).shell, [*COMMANDS, "help"]), end="")
    return 0
