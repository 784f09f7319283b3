"""`vac bundle OUT`: wheels and weights for a machine without internet."""

from __future__ import annotations

import shlex
from pathlib import Path

from vac_ddp.arguments import ArgumentParser
from vac_ddp.bundle import Target, make_bundle, source_tree, verify_bundle
from vac_ddp.errors import DONE, FINDINGS

HAS_TORCH = ("torch", "torchvision")
SHOWN = 10  # files


def main(argv: list[str]) -> int:
    """The command. Returns the exit status: 0, or 3 where --verify found something."""
    parser = ArgumentParser(
        prog="vac bundle", description="Collect wheels and weights in a folder, for a machine without internet."
    )
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="ID|FILE", help="hub ids, weight files, directories or runs"
    )
    parser.add_argument(
        "--without",
        nargs="*",
        default=list(HAS_TORCH),
        metavar="NAME",
        help="packages that the machine has (default: torch torchvision); no name: take everything along",
    )
    parser.add_argument("--no-deps", action="store_true", help="the wheel of vac_ddp alone")
    parser.add_argument("--python", metavar="X.Y", help="version of Python on the machine (default: as here)")
    parser.add_argument(
        "--platform", nargs="+", default=[], metavar="TAG", help="its tags, as manylinux_2_28_x86_64 (default: as here)"
    )
    parser.add_argument("--source", type=Path, help="repository or wheel of vac_ddp (default: as imported, or .)")
    parser.add_argument("--verify", action="store_true", help="check the bundle OUT against its manifest instead")
    options = parser.parse_args(argv)
    if options.verify:
        broken = verify_bundle(options.out)
        print(f"{options.out}: {'; '.join(broken) if broken else 'every file is as it was written'}")
        return FINDINGS if broken else DONE
    target = Target(
        python=options.python,
        platforms=tuple(options.platform),
        without=tuple(options.without),
        dependencies=not options.no_deps,
    )
    made = make_bundle(options.out, source=source_tree(options.source), weights=options.weights, target=target)
    sizes = sorted(made.sizes.items(), key=lambda item: -item[1])
    for name, size in sizes[:SHOWN]:
        print(f"  {size / 1e6:8.1f} MB  {name}")
    if rest := [size for _, size in sizes[SHOWN:]]:
        print(f"  {sum(rest) / 1e6:8.1f} MB  {len(rest)} smaller files")
    (wheels, wheel_bytes), (weights, weight_bytes) = made.total("wheels"), made.total("weights")
    print(
        f"{options.out}: {wheels} wheels, {wheel_bytes / 1e6:.1f} MB; {weights} files of weights, "
        f"{weight_bytes / 1e6:.1f} MB; hashes in manifest.json"
    )
    if made.left_out:
        print(f"left out, the machine must have them: {', '.join(made.left_out)}")
    if not options.no_deps:
        print("Pillow as it is: Pillow-SIMD is built from source, for a machine with a compiler")
    print(f"install with: pip install --no-index --find-links {shlex.quote(str(options.out / 'wheels'))} vac_ddp")
    return DONE
