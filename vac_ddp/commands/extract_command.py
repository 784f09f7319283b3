"""`vac extract VIDEOS OUT`: video files to folders of JPEG frames, in the same tree: <class>/<video>/0001.jpg."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path

from vac_ddp.arguments import ArgumentParser, number
from vac_ddp.data.extraction import Options, extract
from vac_ddp.errors import DONE, FINDINGS
from vac_ddp.text import listed

NAMED = 20
MAX_RATE = 1000.0  # frames per second


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="vac extract",
        description="Cut video files into folders of JPEG frames. Folders that are there are not made again, damaged "
        "files get none.",
    )
    parser.add_argument("videos", type=Path, help="a video file, or a folder of them, in class folders or not")
    parser.add_argument("out", type=Path, help="where <class>/<video>/0001.jpg go")
    parser.add_argument(
        "--rate",
        type=number(float, above=0, high=MAX_RATE),
        help="frames per second (default: every frame of the file)",
    )
    parser.add_argument(
        "--short-side", type=number(int, low=1, high=16384), help="shrink frames whose short side is larger, in pixels"
    )
    parser.add_argument(
        "--quality",
        type=number(int, low=1, high=100),
        default=Options.quality,
        help="JPEG quality, 1 to 100 (%(default)s)",
    )
    parser.add_argument("--audio", action="store_true", help="write audio.wav (16 kHz, mono) where there is sound")
    parser.add_argument(
        "--keep-damaged", action="store_true", help="of damaged files too, write the frames that decode"
    )
    parser.add_argument(
        "--workers", type=number(int, low=0, high=1024), help="processes (default: one a core; 0: none but this)"
    )
    return parser


def main(argv: list[str]) -> int:
    """The command. Returns the exit status: 0, or 3 where files were damaged."""
    given = _parser().parse_args(argv)
    options = Options(**{option.name: getattr(given, option.name) for option in fields(Options)})
    workers = given.workers if given.workers is not None else len(os.sched_getaffinity(0))
    summary = extract(given.videos, given.out, options, workers=workers, progress=sys.stderr.isatty())
    print(f"extracted {summary.extracted} videos, {summary.frames} frames" + _there(summary.there))
    if summary.other:
        print(f"{len(summary.other)} files are no videos and were left alone: {listed(summary.other, 5)}")
    _print_files("are damaged and were left alone", [(o.name, o.problem or "") for o in summary.damaged])
    _print_files(
        "are damaged; the frames that decode are extracted",
        [(o.name, f"{o.frames} frames; {'; '.join(o.faults)}") for o in summary.faulty],
    )
    return FINDINGS if summary.damaged or summary.faulty else DONE


def _print_files(title: str, files: list[tuple[str, str]]) -> None:
    if files:
        print(f"{len(files)} files {title}:")
    for name, what in files[:NAMED]:
        print(f"  {name}: {what}")
    if len(files) > NAMED:
        print(f"  and {len(files) - NAMED} more")


def _there(count: int) -> str:
    return f"; {count} were there" if count else ""
