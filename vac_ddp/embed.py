"""Embed: `vac embed [--nproc N] --run DIR | --config FILE --data DIR --out DIR [group.name=value ...]`, or torchrun.

As for `vac_ddp.predict`, write `torchrun ... -m vac_ddp.embed -- --run DIR` with the torchrun of Python before 3.12.8.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vac_ddp.runtime.monitor import end_imports_quietly

    end_imports_quietly()

import sys
import time
from pathlib import Path
from typing import Any

from vac_ddp import config as settings_io
from vac_ddp.arguments import (
    OF_AN_ENCODER,
    EmbeddingOptions,
    change_settings,
    parse_embedding,
    take_nproc,
)
from vac_ddp.checks import OF_A_RUN
from vac_ddp.data.data_kind import kind_of
from vac_ddp.errors import Findings, UserError
from vac_ddp.runtime.exit_status import run_command, run_entry_point
from vac_ddp.runtime.torchrun import run_ranks
from vac_ddp.settings import Config
from vac_ddp.text import listed

NAMED = 5


def embed(argv: list[str]) -> dict[str, Any] | None:
    """Parse, open, embed. Returns facts for the status file; raises Findings for videos without features."""
    options = parse_embedding(argv)
    config, run = _settings(options)
    data = options.data or Path(config.data.train).expanduser()
    kind = _kind(data)
    out = options.out or Path(run or "") / "features" / data.resolve().name
    from vac_ddp.predicting import embedding  # here: torch, only once the arguments are good
    from vac_ddp.runtime import distributed
    from vac_ddp.runtime.signals import StopRequest, end_of_allocation, save_by

    device = distributed.start(timeout_s=config.health.start_timeout_s)
    end = distributed.broadcast_object(end_of_allocation() if distributed.is_main() else None)
    stop = StopRequest(save_by(end, config.checkpoint.before_end_s, now=time.time()))
    request = embedding.Request(
        data=data,
        config=config,
        out=out,
        steps=options.steps,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    failed = embedding.embed_folder(request, device, labelled=kind == "labelled", stop=stop)
    if failed:
        raise Findings(
            f"{len(failed)} videos have no frame that can be decoded, or no finite features, and are zeros in {out}: "
            f"{listed(failed, NAMED)}"
        )
    return {"run": run, "step": None}


def _settings(options: EmbeddingOptions) -> tuple[Config, str | None]:
    """The settings of the run or file with what the command line changes, and the run's directory."""
    if options.config is not None:
        config = settings_io.read_yaml(settings_io.find_config(options.config))
        change_settings(config, options, allowed=OF_AN_ENCODER, refusal="an embedding does not use it")
        return config, None
    from vac_ddp.models.weight_files import open_own

    source = open_own(Path(options.run or "").expanduser())
    config = settings_io.from_dict(source.config or {}, where=str(source.path))
    change_settings(config, options, allowed=OF_A_RUN, refusal="an embedding has the run's setting")
    config.model.weights = str(source.path)
    return config, str(source.path.parent)


def _kind(data: Path) -> str:
    kind = kind_of(data)
    if kind in ("video file", "frames"):
        raise UserError(f"{data} is one video: give a folder of videos, a packed set or a CSV with --data")
    return kind


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit statuses are in `errors`."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--nproc" for word in argv):
        return run_command(_start_ranks, argv)
    return run_entry_point(embed, argv)


def _start_ranks(argv: list[str]) -> int:
    """Check what one process can check, then start the ranks."""
    ranks, rest = take_nproc(argv)
    options = parse_embedding(rest)
    config, _ = _settings(options)
    _kind(options.data or Path(config.data.train).expanduser())
    return main(rest) if ranks == 1 else run_ranks("vac_ddp.embed", rest, ranks)


if __name__ == "__main__":
    sys.exit(main())
