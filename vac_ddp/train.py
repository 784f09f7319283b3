"""Train: `torchrun --nproc_per_node=4 -m vac_ddp.train [--config FILE] [group.name=value ...]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vac_ddp.errors import USER_ERROR, UserError
from vac_ddp.runtime.exit_status import run_entry_point

ABOUT = "Fine-tune a video classifier on frame folders, on one CPU core or many GPUs."


def train(argv: list[str]) -> dict[str, Any] | None:
    """Parse, build, run, close. Returns the run directory and the last step."""
    from vac_ddp.arguments import parse_settings  # not above: Ctrl-C is answered before anything slow is imported

    command = parse_settings(argv, program="vac_ddp.train", about=ABOUT)
    from vac_ddp.runtime import distributed  # torch: only once the settings are known to be good
    from vac_ddp.training.data_setup import debug_data
    from vac_ddp.training.finish import finish
    from vac_ddp.training.objective import check_settings
    from vac_ddp.training.trainer import open_trainer

    check_settings(command.config)
    if command.debug:
        _check_debug_directory(Path(command.config.run.dir))
    device = distributed.start(timeout_s=command.config.health.start_timeout_s)
    if command.debug:
        debug_data(command.config, command.given)
    with open_trainer(command.config, device, debug=command.debug, notes=command.notes) as trainer:
        trainer.run()
        finish(trainer, report=not command.debug)
        return {"run": str(trainer.session.folder), "step": trainer.position.step}


def _check_debug_directory(folder: Path) -> None:
    """End with one line and status 2, also under --debug, where --debug would replace what is no debug run."""
    from vac_ddp.training import run_directory

    try:
        run_directory.check_debug(folder)
    except UserError as error:
        print(f"vac: {error}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR) from None


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit statuses are in `errors`."""
    return run_entry_point(train, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
