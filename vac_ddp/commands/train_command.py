"""`vac train [--nproc N] ...`: check settings and data, then train in this process or under torchrun."""

from __future__ import annotations

from vac_ddp import checks
from vac_ddp.arguments import parse_settings, take_nproc
from vac_ddp.runtime.torchrun import run_ranks


def main(argv: list[str]) -> int:
    """`vac train`: in this process for one rank, under torchrun for several."""
    ranks, rest = take_nproc(argv)
    if ranks == 1 or "--debug" in rest or {"-h", "--help", "--print-config"} & set(rest):
        from vac_ddp import train

        return train.main(rest)
    check_first(rest, ranks)
    return run_ranks("vac_ddp.train", rest, ranks)


def check_first(argv: list[str], ranks: int) -> None:
    """Settings and data as rank 0 will read them, so that a mistake is one line and not that of every rank."""
    command = parse_settings(argv)
    checks.check(command.config, ranks=ranks)
    from vac_ddp.training.objective import check_settings

    check_settings(command.config)
    from vac_ddp.data.index import open_index
    from vac_ddp.data.split import make_split

    index = open_index(command.config.data.train, labelled=True, settings=command.config.data)
    make_split(index, command.config.data, seed=command.config.seed)
    if command.config.data.val:
        open_index(command.config.data.val, labelled=True, settings=command.config.data, classes=index.classes)
