"""`vac settings [WORD]`: all settings, or those about a word."""

from __future__ import annotations

from vac_ddp.arguments import ArgumentParser
from vac_ddp.settings_help import settings_text, with_preset

ABOUT = "List settings with type, default, bounds and meaning: all of them, or those with WORD in name or meaning."


def main(argv: list[str]) -> int:
    """Print them. Raises UserError where no setting has the word."""
    parser = ArgumentParser(prog="vac settings", description=ABOUT)
    parser.add_argument("word", nargs="?", metavar="WORD", help="part of a name or meaning, such as lr or crop")
    parser.add_argument("--config", metavar="FILE|PRESET", help="show the values of this file or preset")
    options = parser.parse_args(argv)
    print(settings_text(options.word, with_preset(options.config)))
    return 0
