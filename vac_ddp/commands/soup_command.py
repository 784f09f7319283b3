"""`vac soup RUN RUN... OUT`: the mean of the weights of several runs of one model ("model soup", Wortsman et al. 2022).

One model that costs what one costs, where an ensemble of views files costs the sum. It works for runs that were tuned
from the same weights; runs that began at different random weights have nothing in common to average.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from vac_ddp.arguments import ArgumentParser
from vac_ddp.errors import UserError
from vac_ddp.files import write_atomic

ABOUT = 'The mean of the weights of several runs of one model ("model soup", Wortsman et al. 2022).'


def main(argv: list[str]) -> int:
    """Read, check, average, write. Raises UserError where the runs do not fit together."""
    parser = ArgumentParser(prog="vac soup", description=ABOUT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories or best_<model>.pt files, two or more")
    parser.add_argument("out", metavar="OUT", help="a new folder (gets best_<model>.pt), or a new file ending in .pt")
    options = parser.parse_args(argv)
    if len(options.runs) < 2:
        raise UserError("a soup needs two runs or more, and the new folder behind them (see --help)")
    out = Path(options.out).expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already: name a new folder or file")
    import torch  # only once the arguments are good

    from vac_ddp.models.soup import soup
    from vac_ddp.models.weight_files import open_own

    made, notes = soup([open_own(run) for run in options.runs])
    path = out if out.suffix == ".pt" else out / f"best_{made['config']['model']['name']}.pt"
    write_atomic(path, lambda stream: torch.save(made, stream))
    for note in notes:
        print(note)
    print(f"{len(options.runs)} runs averaged: {path}")
    print(f"next: vac predict --weights {shlex.quote(str(path))} --data data_val")
    return 0
