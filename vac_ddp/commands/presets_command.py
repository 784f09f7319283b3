"""`vac presets [show NAME]`: the presets, or the settings of one."""

from __future__ import annotations

from vac_ddp.arguments import ArgumentParser
from vac_ddp.settings_help import presets, show_preset

ABOUT = "List the presets, or show the settings of one as YAML, to copy and change."


def main(argv: list[str]) -> int:
    """Print them. Raises UserError for an unknown preset."""
    parser = ArgumentParser(prog="vac presets", description=ABOUT)
    parser.add_argument("action", nargs="?", choices=("show",), help="show the preset NAME")
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of a preset")
    options = parser.parse_args(argv)
    if options.action and options.name is None:
        parser.error("give the name of a preset: vac presets show NAME")
    if options.name is not None:
        print(show_preset(options.name), end="")
        return 0
    for name, about in presets().items():
        print(f"{name:<25}{about}")
    return 0
