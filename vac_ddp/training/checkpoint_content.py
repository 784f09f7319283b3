"""What a checkpoint must hold before a run resumes from it: its declared content, and tensors that fit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from vac_ddp.models.weight_files import SavedSettings
from vac_ddp.schema import Count, Sha256, Within, check, mismatch
from vac_ddp.training.optimization import Group

REMEDY = "give run.resume=PATH of another checkpoint, or start a new run.dir"

Positive = Annotated[int, Within(low=1, high=2**62)]
Seconds = Annotated[float, Within(low=0, high=1e12)]


class Hashes(TypedDict):
    """What a resumed run must find as it was, see `same_run`."""

    classes: Sha256
    split: Sha256
    frames: Sha256
    settings: Sha256


class BestRecord(TypedDict):
    """The best file at the time of a checkpoint."""

    epoch: Count
    bytes: Count
    sha256: Sha256


class Facts(TypedDict):
    """The JSON companion of a checkpoint; the first version wrote what is required here."""

    step: Count
    bytes: Count
    sha256: Sha256
    config: SavedSettings
    clips_per_gpu: Positive
    total_steps: Positive
    step_bound: NotRequired[Positive]
    torch: str
    threads: int
    device: str
    world_size: int
    hashes: NotRequired[Hashes]
    architecture: NotRequired[dict[str, Any]]
    head: NotRequired[str]
    device_memory: NotRequired[Count]
    replaced: NotRequired[dict[str, Any]]
    precision: NotRequired[str]
    best: NotRequired[BestRecord | None]


class PositionState(TypedDict):
    """`progress.Position`."""

    epoch: Count
    step_in_epoch: Count
    step: Count
    schedule_step: Count
    validation_due: bool
    stopped_early: bool


class StoppingState(TypedDict):
    """`early_stopping.Stopping`."""

    best: float | None
    best_epoch: Count | None
    since_best: Count


class TimeLimitState(TypedDict):
    """`time_limit.TimeLimit`."""

    seconds: Seconds
    total_steps: Positive | None
    step_s: Seconds
    end_s: Seconds
    validated_end_s: Seconds


class TallyState(TypedDict):
    """`progress.Tally`."""

    loss: float
    correct: float
    samples: Count


class TallyStates(TypedDict):
    """The two tallies of a training log."""

    since_line: TallyState
    since_epoch: TallyState


class MomentState(TypedDict):
    """What AdamW keeps of a parameter."""

    step: Tensor | float
    exp_avg: Tensor
    exp_avg_sq: Tensor


class GroupState(TypedDict):
    """A group of parameters, by their numbers."""

    params: list[int]
    lr: float
    lr_scale: float
    weight_decay: float


class OptimizerState(TypedDict):
    """AdamW's state dict."""

    state: dict[int, MomentState]
    param_groups: list[GroupState]


class State(TypedDict):
    """The tensors file of a checkpoint (`trainer.Trainer.state`)."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: OptimizerState
    scaler: dict[str, float | int] | None
    position: PositionState
    stopping: StoppingState
    tallies: TallyStates
    bad_in_row: Count
    random: Tensor
    wandb_id: NotRequired[str | None]
    time_limit: NotRequired[TimeLimitState | None]


def check_content(state: Any, facts: Any, path: Path) -> None:
    """Raise UserError where a checkpoint and its companion are not as declared, or not of one step."""
    check(facts, Facts, file=path.with_suffix(".json"), remedy=REMEDY)
    check(state, State, file=path, remedy=REMEDY)
    step = state["position"]["step"]
    if step != facts["step"]:
        raise mismatch(path, "position.step", str(facts["step"]), str(step), REMEDY)
    known = torch.get_rng_state()
    if state["random"].dtype != known.dtype or state["random"].shape != known.shape:
        raise mismatch(path, "random", f"{len(known)} bytes of a generator", _about(state["random"]), REMEDY)


def check_fits(state: Any, path: Path, model: nn.Module, groups: list[Group], *, averaged: bool) -> None:
    """Raise UserError where a checkpoint's tensors are not those of `model` and the optimizer's `groups`.

    averaged: whether the run keeps an EMA of the weights.
    """
    ours = model.state_dict()
    for part in ("model", "ema") if averaged else ("model",):
        theirs = state[part]
        if theirs is None:
            raise mismatch(path, part, "the EMA of the weights", "null", REMEDY)
        if other := sorted(ours.keys() ^ theirs.keys()):
            lacks = other[0] in ours
            words = ("a tensor", "nothing") if lacks else ("nothing of that name", "a tensor")
            raise mismatch(path, f"{part}.{other[0]}", *words, REMEDY)
        for name, tensor in theirs.items():
            _same(tensor, ours[name], path, f"{part}.{name}")
    trained = [parameter for group in groups for parameter in group["params"]]
    saved = state["optimizer"]
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if sizes != [len(group["params"]) for group in groups] or numbers != list(range(len(trained))):
        expected = f"{len(groups)} groups of {len(trained)} parameters together, numbered"
        raise mismatch(path, "optimizer.param_groups", expected, f"{len(sizes)} of {len(numbers)}", REMEDY)
    for number, entry in saved["state"].items():
        if not 0 <= number < len(trained):
            raise mismatch(path, "optimizer.state", f"numbers below {len(trained)}", str(number), REMEDY)
        for name in ("exp_avg", "exp_avg_sq"):
            _same(entry[name], trained[number], path, f"optimizer.state.{number}.{name}")


def _same(value: Any, ours: Tensor, path: Path, field: str) -> None:
    if not isinstance(value, Tensor) or value.shape != ours.shape or value.dtype != ours.dtype:
        raise mismatch(path, field, _about(ours), _about(value), REMEDY)


def _about(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of the shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
