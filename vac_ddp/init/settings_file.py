"""Write settings with comments that fit a data set, as YAML that is checked, and name the commands that use them."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from pathlib import Path

from vac_ddp import config as settings_io
from vac_ddp import files
from vac_ddp.checks import check
from vac_ddp.data.index import open_index
from vac_ddp.data.split import make_split
from vac_ddp.errors import UserError
from vac_ddp.init.dataset_metadata import Metadata, inspect
from vac_ddp.init.recipes import (
    data_group,
    finetune_groups,
    probe_groups,
    small_groups,
    text,
    tuned_groups,
    wants_probe,
)
from vac_ddp.init.time_estimate import time_line
from vac_ddp.init.weights_choice import Weights, choose_weights, recognize_weights
from vac_ddp.settings import Config, DataSettings


@dataclass(kw_only=True)
class Asked:
    """What `vac init` was asked: gpus, None for those of this machine; weights, None for the best to be had here."""

    data: str
    out: Path
    test: str | None = None
    gpus: int | None = None
    weights: str | None = None
    backbone: str | None = None
    frame_pattern: str | None = None


@dataclass(kw_only=True)
class Written:
    """What was found and is in the file, as lines for people, and the commands that come next."""

    lines: list[str]
    commands: list[list[str]]


def write_settings(asked: Asked) -> Written:
    """Write settings for the data to `asked.out`, checked as `vac train` or `vac probe` will check them.

    Nothing is written where a run with them would be refused: then a UserError says why.
    """
    settings = DataSettings(frame_pattern=asked.frame_pattern)
    index = open_index(asked.data, labelled=True, settings=settings)
    metadata = inspect(asked.data, index, asked.frame_pattern)
    names = _gpu_names()
    gpus = len(names) if asked.gpus is None else asked.gpus
    if asked.weights == "null":
        weights = Weights(name=None, why="as --weights says")
    elif asked.weights is not None:
        weights = recognize_weights(asked.weights, asked.backbone)
    else:
        weights = choose_weights(gpus, len(index))
    probe = wants_probe(weights, gpus=gpus, videos=len(index))
    data = data_group(metadata, weights, probe=probe)
    split = make_split(index, _read(data, asked.out).data, seed=Config().seed)
    train = max(1, len(split.train))
    run = _run_directory(metadata, probe=probe)
    groups = [data, *_groups(metadata, weights, probe=probe, train=train), f"run:\n  dir: {text(run)}\n"]
    config = _read("\n".join(groups), asked.out)
    check(config)
    lines = summary(metadata, weights, "as --gpus says" if asked.gpus is not None else ", ".join(names[:1]), gpus)
    time = time_line(
        config, probe=probe, gpus=gpus, videos=len(index), train=train, decode_s=metadata.decode_s
    )  # fmt: skip
    lines += [f"time         {time}"]
    if not probe:
        lines += [f"split        {len(split.train)} videos to train on, {len(split.val)} to validate"]
    lines += metadata.notes
    program = "probe" if probe else "train"
    head = "".join(f"# {line}\n" for line in ["Written by `vac init`. Found:", *(f"  {x}" for x in lines)])
    head += f"# Use: vac {program} --config {asked.out}; every setting and its meaning: vac {program} --help\n\n"
    files.write_text(asked.out, head + "\n".join(groups))
    return Written(lines=lines, commands=_commands(asked, program, run))


def _groups(metadata: Metadata, weights: Weights, *, probe: bool, train: int) -> list[str]:
    if probe:
        return probe_groups(metadata, weights)
    if weights.family == "probe":
        return finetune_groups(metadata, weights)
    return tuned_groups(metadata, weights, train=train) if weights.name else small_groups(metadata, train=train)


def summary(metadata: Metadata, weights: Weights, gpu: str, gpus: int) -> list[str]:
    """What was found, for people; the same lines begin the file."""
    few, many = min(metadata.counts), max(metadata.counts)
    middle = round(statistics.median(metadata.lengths))
    grouping, example = metadata.grouping, f"{metadata.example} -> {metadata.grouping.groups[0]}"
    groups = f"{len(set(grouping.groups))} by group_by={grouping.grammar}, e.g. {example}"
    if grouping.grammar == "none":
        groups = f"not inferred from names like {metadata.example}: every video is a group of its own"
    return [
        f"classes      {len(metadata.classes)}, {few} to {many} videos each, {metadata.videos} in all",
        f"lengths      {min(metadata.lengths)} to {max(metadata.lengths)} frames, half of them {middle} or more",
        f"frames       short side {min(metadata.short_sides)} to {max(metadata.short_sides)} pixels",
        f"groups       {groups}",
        f"GPUs         {gpus}" + (f" ({gpu})" if gpu else ""),
        f"weights      {weights.name or 'none, from scratch'} ({weights.why})",
    ]


def _read(yaml: str, out: Path) -> Config:
    """The settings that the text means, as `vac train` will read them."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        files.write_text(beside, yaml)
        return settings_io.read_yaml(beside)
    finally:
        beside.unlink(missing_ok=True)


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _run_directory(metadata: Metadata, *, probe: bool) -> str:
    where = Path(metadata.data).expanduser().resolve()
    name = where.parent.name if where.stem in ("train", "data_train") else where.stem
    return f"runs/{name or where.stem}{'_probe' if probe else ''}"


def _test_folder(asked: Asked) -> str | None:
    """The test folder: as asked, or a folder named data_test or test beside the data. UserError where it is missing."""
    if asked.test is not None:
        if not Path(asked.test).expanduser().exists():
            raise UserError(f"--test {asked.test}: no such file or directory")
        return asked.test
    beside = [Path(asked.data).expanduser().with_name(name) for name in ("data_test", "test")]
    return next((str(folder) for folder in beside if folder.is_dir()), None)


def _commands(asked: Asked, program: str, run: str) -> list[list[str]]:
    """Audit, training or probe, prediction, and after a probe the settings for fine-tuning from it."""
    test = _test_folder(asked)
    ranks = ["--nproc", str(asked.gpus)] if (asked.gpus or 0) > 1 else []
    commands = [
        ["vac", "audit", asked.data, "--config", str(asked.out), *(["--test", test] if test else [])],
        ["vac", program, *ranks, "--config", str(asked.out)],
    ]
    if test:
        commands += [["vac", "predict", *ranks, "--run", run, "--data", test]]
    if program == "probe":
        machine = ["--gpus", str(asked.gpus)] if asked.gpus is not None else []
        commands += [["vac", "init", asked.data, *machine, "--weights", run, "--out", "finetune.yaml"]]
    return commands
