"""Folds, seeds and sweeps as jobs: for `vac ensemble`, slurm/kfold.sh, slurm/sweep.sh and launch/submitit_train.py.

`python -m vac_ddp.commands.job_plan kfold|sweep ... -- WORDS` prints a plan for bash.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vac_ddp.arguments import ArgumentParser, parse_settings
from vac_ddp.errors import UserError
from vac_ddp.results.logits_file import NAME

Command = tuple[str, list[str]]  # a module for `python -m`, and its words


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run of several: its directory, and the settings in which it differs from the others."""

    folder: Path
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The commands of each job; what exists when it is done; the `vac` command that puts all results together."""

    jobs: list[list[Command]]
    names: list[str] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)


def seeds_of(text: str) -> list[int]:
    """The seeds in "0,1,2". UserError where it is none of these."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text}: expected whole numbers with commas, as 0,1,2") from None


def members(base: Path, *, folds: int | None, seeds: Sequence[int]) -> list[Member]:
    """The runs, seed by seed and fold by fold. UserError for fewer than two folds, or a seed given twice."""
    if folds is not None and folds < 2:
        raise UserError(f"--folds {folds}: at least 2, or leave it out for members that differ by their seed only")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {','.join(map(str, seeds))}: a seed is there twice, and would give the same member")
    made = []
    for seed in seeds:
        for fold in range(1, folds + 1) if folds else [None]:
            folder = base / (f"fold{fold}of{folds}_seed{seed}" if fold else f"seed{seed}")
            words = [f"seed={seed}", *([f"data.fold={fold}/{folds}"] if fold else [])]
            made.append(Member(folder=folder, words=(*words, f"run.dir={folder}", "run.resume=auto")))
    return made


def prediction_folder(member: Member, data: str) -> Path:
    """Where a member's prediction of the test folder goes."""
    name = Path(data).expanduser().resolve().name
    return member.folder / "predictions" / ("test" if name == "val" else name)  # val: the member's own part


def member_commands(member: Member, words: Sequence[str], data: str, *, validated: bool = True) -> list[Command]:
    """`vac` commands of a member: train, predict its validation part if it has one, predict the test folder.

    words: the settings of all members.
    """
    predict = ["--run", str(member.folder), *(word for word in words if word.startswith("predict."))]
    return [
        ("train", [*words, *member.words]),
        *([("predict", [*predict, "--part", "val"])] if validated else []),
        ("predict", [*predict, "--data", data, "--out", str(prediction_folder(member, data))]),
    ]


def train_module() -> str:
    """What jobs train with; tests put another module in its place."""
    return os.environ.get("VAC_MODULE", "vac_ddp.train")


def run_dir(words: Sequence[str]) -> Path:
    """Where these settings put their run; UserError for settings that training would refuse."""
    return Path(parse_settings(list(words)).config.run.dir).expanduser()


def kfold(words: Sequence[str], *, folds: int, seeds: str, data: str) -> Plan:
    """A job for each fold of each seed; the members of an ensemble."""
    planned = members(run_dir(words), folds=folds, seeds=seeds_of(seeds))
    modules = {"train": (train_module(), []), "predict": ("vac_ddp.predict", ["--"])}
    how = ["--score-only", "--folds", str(folds), "--seeds", seeds, "--data", data, "--nproc", "1"]
    return Plan(
        jobs=[
            [(modules[name][0], [*modules[name][1], *given]) for name, given in member_commands(member, words, data)]
            for member in planned
        ],
        results=[prediction_folder(member, data) / NAME for member in planned],
        names=[" ".join(member.words[:2]) for member in planned],
        finish=["ensemble", *how, *words],
    )


def sweep(words: Sequence[str], axes: Sequence[str]) -> Plan:
    """A job for each combination of the values in `axes`, as optim.lr=1e-4,5e-4; the last setting changes fastest."""
    if not axes or not all("=" in axis for axis in axes):
        raise UserError("a sweep needs settings with values, as optim.lr=1e-4,5e-4 (--grid of submitit_train.py, GRID)")
    settings = [(name, values.split(",")) for name, _, values in (axis.partition("=") for axis in axes)]
    chosen = [
        [f"{name}={value}" for (name, _), value in zip(settings, combination, strict=True)]
        for combination in itertools.product(*(values for _, values in settings))
    ]
    folders = [run_dir([*words, *own]) / "_".join(own).replace("/", "-") for own in chosen]
    return Plan(
        jobs=[
            [(train_module(), [*words, *own, f"run.dir={folder}", "run.resume=auto"])]
            for own, folder in zip(chosen, folders, strict=True)
        ],
        results=[folder / "trained" for folder in folders],
        names=[" ".join(own) for own in chosen],
        finish=["table", *map(str, folders)],
    )


def as_bash(plan: Plan) -> str:
    """Arrays for slurm/kfold.sh and slurm/sweep.sh; a job is lines that call the functions of slurm/common.sh."""
    jobs = [
        "\n".join(f"start_ranks {shlex.join([module, *words])}\nmay_go_on" for module, words in j) for j in plan.jobs
    ]
    arrays = {"jobs": jobs, "names": plan.names, "results": map(str, plan.results), "finish": plan.finish}
    return "\n".join(f"{name}=({shlex.join(values)})" for name, values in arrays.items())


def main(argv: list[str]) -> int:
    """Print a plan for bash."""
    place = argv.index("--")
    parser = ArgumentParser(prog="job_plan", description="Print a plan for slurm/kfold.sh or slurm/sweep.sh.")
    parser.add_argument("what", choices=("kfold", "sweep"))
    parser.add_argument("--folds", type=int)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--data", default="data_test")
    parser.add_argument("--grid", nargs="*", default=[])
    options = parser.parse_args(argv[:place])
    words = argv[place + 1 :]
    if options.what == "sweep":
        print(as_bash(sweep(words, options.grid)))
    else:
        print(as_bash(kfold(words, folds=options.folds, seeds=options.seeds, data=options.data)))
    return 0


if __name__ == "__main__":
    from vac_ddp.runtime.exit_status import run_command

    sys.exit(run_command(main, sys.argv[1:]))
