"""`vac pack DATA OUT`: the frames of many videos in few large files, for file systems that dislike small ones."""

from __future__ import annotations

import shlex
from pathlib import Path

from vac_ddp.arguments import ArgumentParser, number
from vac_ddp.data.pack_writer import pack, verify
from vac_ddp.errors import DONE, FINDINGS
from vac_ddp.settings import DataSettings

_NAMED = 5


def main(argv: list[str]) -> int:
    """The command. Returns the exit status: 0, or 3 where frames could not be read or a check failed."""
    parser = ArgumentParser(
        prog="vac pack", description="Pack the frames of a data set into few large files, byte for byte."
    )
    parser.add_argument("data", type=Path, help="<class>/<video>/*.jpg, <video>/*.jpg, or a CSV")
    parser.add_argument("out", type=Path, nargs="?", help="folder to write; must not exist or be empty")
    parser.add_argument("--verify", action="store_true", help="check the packed set DATA against its hashes instead")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--labelled", dest="labelled", action="store_true", default=None, help="DATA has class folders")
    kind.add_argument("--unlabelled", dest="labelled", action="store_false", help="DATA has none (default: by a look)")
    parser.add_argument(
        "--shard-mib",
        type=number(int, low=1, high=10**6),
        default=1024,
        help="size of the large files, in MiB (%(default)s)",
    )
    parser.add_argument(
        "--workers", type=number(int, low=1, high=1024), default=8, help="threads that read (%(default)s)"
    )
    parser.add_argument("--frame-pattern", metavar="X", help="data.frame_pattern, where folders hold other pictures")
    parser.add_argument("--cache", help="folder of cached indexes (default: ~/.cache/vac_ddp)")
    options = parser.parse_args(argv)
    if options.verify:
        broken = verify(options.data)
        print(f"{options.data}: {'; '.join(broken) if broken else 'every file is as it was written'}")
        return FINDINGS if broken else DONE
    if options.out is None:
        parser.error("the folder to write is missing: vac pack DATA OUT")
    done = pack(
        options.data,
        options.out,
        labelled=options.labelled,
        settings=DataSettings(cache=options.cache, frame_pattern=options.frame_pattern),
        shard_bytes=options.shard_mib << 20,
        workers=options.workers,
    )
    print(f"packed {done.videos} videos, {done.frames} frames, {done.bytes / 1e6:.1f} MB into {done.shards} files")
    if done.unreadable:
        some = ", ".join(done.unreadable[:_NAMED])
        print(f"{len(done.unreadable)} frames could not be read and are empty in the packed set: {some}")
    out = shlex.quote(str(options.out))
    print(f"use it as data.train={out} or --data {out}")
    return FINDINGS if done.unreadable else DONE
