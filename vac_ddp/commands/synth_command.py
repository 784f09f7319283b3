"""`vac synth OUT`: make a synthetic motion data set."""

from __future__ import annotations

import os
from pathlib import Path

from vac_ddp.arguments import ArgumentParser, number
from vac_ddp.data.synthetic import Recipe, make_dataset
from vac_ddp.errors import UserError

ABOUT = "Make a motion data set to try everything out; its classes differ in the order of their frames only."


def main(argv: list[str]) -> int:
    """Write the data set, or say that it is there. Raises UserError."""
    options = _parser().parse_args(argv)
    recipe = Recipe(
        set=options.set,
        videos_per_class=options.videos_per_class,
        test_per_class=options.test_per_class,
        clips_per_source=options.clips_per_source,
        seed=options.seed,
    )
    for name in ("videos_per_class", "test_per_class", "clips_per_source"):
        if getattr(recipe, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(recipe, name)}: must be at least 1")
    if recipe.seed < 0:
        raise UserError(f"--seed {recipe.seed}: must be at least 0")
    workers = options.workers or len(os.sched_getaffinity(0))
    print("\n".join(make_dataset(Path(options.out), recipe, workers=workers)))
    return 0


def _parser() -> ArgumentParser:
    default = Recipe()
    parser = ArgumentParser(prog="vac synth", description=ABOUT)
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to make, with data_train/, data_test/ and test_labels.csv in it")
    add(
        "--set",
        choices=("orders", "directions"),
        default=default.set,
        help="classes: orders of the same events (6, the default), or one-way motions (8)",
    )
    for name, meaning in (
        ("videos_per_class", "training videos of each class"),
        ("test_per_class", "test videos of each class"),
        ("clips_per_source", "videos of one class that share a look (ground, shape, colour, size)"),
        ("seed", "seed of everything that is drawn"),
    ):
        value = getattr(default, name)
        add(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N", help=f"{meaning} (default: {value})")
    add("--workers", type=number(int, low=0, high=1024), metavar="N", help="processes (default: the cores there are)")
    return parser
