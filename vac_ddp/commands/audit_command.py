"""`vac audit DATA [--test DIR]`: what in a data set would spoil a result, before a GPU is spent on it."""

from __future__ import annotations

from pathlib import Path

from vac_ddp.arguments import ArgumentParser, number
from vac_ddp.audit.audit_text import as_text
from vac_ddp.audit.dataset_audit import audit
from vac_ddp.checks import check_bounds
from vac_ddp.config import find_config, override, read_yaml
from vac_ddp.errors import DONE, FINDINGS
from vac_ddp.files import write_json
from vac_ddp.settings import Config


def main(argv: list[str]) -> int:
    """The command. Returns the exit status: 0, or 3 where something would spoil a result."""
    parser = ArgumentParser(
        prog="vac audit",
        description="Look for leaks, damage, duplicates and shortcut features in a data set.",
    )
    parser.add_argument("data", help="<class>/<video>/*.jpg, a packed set, or a CSV (path,label)")
    parser.add_argument("settings", nargs="*", metavar="data.X=Y", help="settings of the split, as in training")
    parser.add_argument("--test", metavar="DIR", help="the test folder <video>/*.jpg, a packed set, or a CSV (path)")
    parser.add_argument("--config", metavar="FILE", help="take the settings of the split from this preset or file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON, too")
    parser.add_argument(
        "--workers", type=number(int, low=1, high=1024), help="threads that decode (default: the cores)"
    )
    options = parser.parse_args(argv)
    config = read_yaml(find_config(options.config)) if options.config else Config()
    for text in options.settings:
        override(config, text)
    check_bounds(config, ("data.",))
    config.data.train = options.data
    report = audit(config, test=options.test, workers=options.workers)
    print(as_text(report))
    if options.json:
        write_json(options.json, report)
    return FINDINGS if report["findings"] else DONE
