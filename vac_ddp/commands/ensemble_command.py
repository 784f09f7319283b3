"""`vac ensemble --folds K --seeds 0,1 ...`: train the members, predict with each, and score their views together.

Every member is a run of its own in a process of its own, started as `vac train run.resume=auto`: the same command
started again goes on where it was, and a member that is finished is not trained again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vac_ddp import errors
from vac_ddp.arguments import ArgumentParser, Namespace, number, parse_settings, take_nproc
from vac_ddp.commands import job_plan, score_command, train_command
from vac_ddp.commands.job_plan import Command, Member
from vac_ddp.data.data_kind import kind_of
from vac_ddp.errors import Interrupted, UserError
from vac_ddp.files import write_text
from vac_ddp.results import averaging, ensemble, evaluation, submission
from vac_ddp.results.logits_file import Views, read_views
from vac_ddp.runtime.children import children
from vac_ddp.settings import Config

ABOUT = "Train grouped folds and seeds, predict with every member, and score their views together."
OWN = ("seed", "data.fold", "run.resume", "run.overwrite")  # settings that the members get from here


def main(argv: list[str]) -> int:
    """Train, predict and score all members; returns the exit status. Raises UserError and Interrupted."""
    ranks, rest = take_nproc(argv)
    options, words = _parse(rest)
    config = parse_settings(words, program="vac ensemble", about=ABOUT).config
    seeds = job_plan.seeds_of(options.seeds) if options.seeds else [config.seed]
    members = job_plan.members(Path(config.run.dir).expanduser(), folds=options.folds, seeds=seeds)
    validated = _check(options, config, [*words, *members[0].words], ranks)
    out = Path(options.out) if options.out else Path(config.run.dir) / "ensemble"
    status = errors.DONE
    if not options.score_only:
        commands = [job_plan.member_commands(member, words, options.data, validated=validated) for member in members]
        status = _run_members(members, commands, ranks)
    if status not in (errors.DONE, errors.FINDINGS):
        return status
    files = [read_views(member.folder / "predictions" / "val") for member in members] if validated else []
    score_command.main(_score_words(options, members, out, [str(file.path) for file in files]))
    if files:
        _summarise(members, files, out, averaging.method_for(files, options.method))
    return status


def _run_members(members: Sequence[Member], commands: Sequence[Sequence[Command]], ranks: int) -> int:
    """Run the commands of all members; 0 or 3, or the status of one that failed. Raises Interrupted."""
    findings = errors.DONE
    with children() as run:
        for number, (member, own) in enumerate(zip(members, commands, strict=True), start=1):
            print(f"member {number} of {len(members)}: {member.folder}", flush=True)
            for program, words in own:
                status = run([program, "--nproc", str(ranks), *words])
                if status == errors.INTERRUPTED:
                    raise Interrupted(f"{member.folder} was interrupted: the same command goes on from there")
                if status not in (errors.DONE, errors.FINDINGS):
                    print(f"vac: {member.folder}: vac {program} ended with status {status}", file=sys.stderr)
                    return status if status > 0 else 128 - status
                findings |= status
    return findings


def _parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """The flags of `vac ensemble` itself, and the words for `vac train`."""
    parser = ArgumentParser(
        prog="vac ensemble",
        description=ABOUT,
        epilog="--config FILE, run.dir=DIR and every other group.name=value are those of vac train, for all members; "
        "--nproc N: ranks of a member.",
    )
    add = parser.add_argument
    add(
        "--folds",
        type=number(int, low=2, high=1000),
        metavar="K",
        help="K members a seed, each with one of K grouped folds held out",
    )
    add("--seeds", metavar="S,S,...", help="seeds of the members (default: the setting `seed`)")
    add("--data", default="data_test", metavar="DIR", help="the test folder (default: data_test)")
    add("--method", choices=averaging.METHODS, help="what is averaged (default: predict.average of the predictions)")
    add("--choose", choices=("mean", "greedy", "fit"), default="mean", help="weights of the members: equal, or chosen "
        "on the validation data that all share (data.val=DIR)")  # fmt: skip
    add("--temperature", action="store_true", help="fit a temperature for each member on its validation part")
    add("--sample", metavar="CSV", help="write the submission after the rows of this sample_submission.csv")
    add("--out", metavar="DIR", help="where the results go (default: RUN.DIR/ensemble)")
    add("--score-only", action="store_true", help="the members were trained and predicted elsewhere (slurm/kfold.sh)")
    options, words = parser.parse_known_args(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name in OWN:
            raise UserError(f"{word}: the members of an ensemble get {name} from --seeds, --folds and their run.dir")
        if name == "run.dir" and not value:
            raise UserError("run.dir= names no directory")
    return options, words


def _check(options: Namespace, config: Config, first: list[str], ranks: int) -> bool:
    """Everything that can be told before hours of training; returns whether members have a validation part."""
    if kind_of(Path(options.data).expanduser()) not in ("test", "labelled"):
        raise UserError(f"--data {options.data} is one video: an ensemble scores a folder of videos")
    if options.sample:
        submission.read_sample(options.sample)
    if options.choose != "mean" and not config.data.val:
        raise UserError(f"--choose {options.choose}: members that hold out different videos share none to choose on; "
                        "set data.val=DIR, or leave it out")  # fmt: skip
    train_command.check_first(first, ranks)
    data = config.data
    validated = bool(data.val or options.folds or data.official_lists or data.fold or data.val_fraction > 0)
    if options.temperature and not validated:
        raise UserError("--temperature needs a validation part: data.val_fraction is 0")
    return validated


def _score_words(options: Namespace, members: Sequence[Member], out: Path, validation: list[str]) -> list[str]:
    """The words of the `vac score` that puts the members together."""
    words = [str(job_plan.prediction_folder(member, options.data)) for member in members]
    words += ["--no-table", "--out", str(out), *(["--method", options.method] if options.method else [])]
    words += ["--sample", options.sample] if options.sample else []
    words += [f"--{options.choose}", *validation] if options.choose != "mean" else []
    return words + (["--temperature-from", *validation] if options.temperature else [])


def _summarise(members: Sequence[Member], files: Sequence[Views], out: Path, method: averaging.Method) -> None:
    """Print the members' validation accuracy and that of all of them pooled, and write it under `out`."""
    found = [
        evaluation.evaluate(averaging.average_views(f.logits, method=method), f.labels, f.classes, f.sources)
        for f in files
    ]
    width = max(len(member.folder.name) for member in members)
    table = ["member,videos,top1,mean_class,loss"]
    print(f"\n{'validation':<{width}}  videos   top-1   mean class   loss")
    for member, one in zip(members, found, strict=True):
        m = one.metrics
        print(f"{member.folder.name:<{width}}  {m.count:>6}  {m.top1:.4f}       {m.mean_class:.4f}  {m.loss:.4f}")
        table.append(f"{member.folder.name},{m.count},{m.top1:.6f},{m.mean_class:.6f},{m.loss:.6f}")
    top1 = [one.metrics.top1 for one in found]
    spread = f", deviation {np.std(top1, ddof=1):.4f}" if len(top1) > 1 else ""
    print(f"top-1 of {len(top1)} members: mean {np.mean(top1):.4f}{spread}\n")
    pooled = ensemble.pool(files, method=method)
    whole = evaluation.evaluate(pooled.scores, pooled.labels, files[0].classes, pooled.sources)
    print("every held-out video, by the members that did not train on it")
    print("\n".join(evaluation.lines(whole)))
    write_text(out / "members.csv", "\n".join(table) + "\n")
    evaluation.write_evaluation(out / "held_out", whole)
