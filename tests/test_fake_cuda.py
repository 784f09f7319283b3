"""Tensors left on the CPU: parts of a step and of a prediction on fake CUDA tensors, which have a device and no values.

An operation on tensors of two devices is an error, as on a GPU. What cannot run here, for it needs values or CUDA:
the plan of an augmentation (host lists; its operations run below), tables of grey levels, backward passes (the autograd
engine asks for the device), autocast, GradScaler, reading counters and rows, pinned copies, events, streams. Tests
marked `gpu` have some of these, `benchmarks/gpu.sh` the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import CLASSES, Ours, our_training, settings_for
from tests.frame_data import random_batch
from vac_ddp.data import augment, pixels
from vac_ddp.data.batch import Batch
from vac_ddp.data.mixing import mix, soft_targets
from vac_ddp.data.normalization import normalize
from vac_ddp.data.randaugment import Op
from vac_ddp.models.compilation import zeros_loss
from vac_ddp.models.kept_tokens import kept_tokens
from vac_ddp.runtime.torch_compat import FakeTensorMode
from vac_ddp.scoring.engine import _Stream
from vac_ddp.scoring.scorer import Scorer
from vac_ddp.settings import Config
from vac_ddp.training.objective import Prepared
from vac_ddp.training.optimization import make_groups, make_optimizer
from vac_ddp.training.step_record import StepRecord

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF = (0.5,) * 3
VIT = {"width": 32, "depth": 2, "heads": 2, "patch": 16}
MODELS = {
    "videomae": {"drop_path": 0.2, "head_dropout": 0.3, **VIT},
    "lsvit": {"name": "lsvit", "drop_path": 0.2, **VIT},
    "lsvit, version 1": {"name": "lsvit", "lsvit_version": 1, **VIT},
    "frame_vit": {"name": "frame_vit", "drop_path": 0.2, "pooling": "attentive", **VIT},
    "convolutions": {"name": "frame_vit", "backbone": "test_efficientnet", "batch_norm": "batch"},
    "probe": {"name": "probe", "encoder": "frame_vit", **VIT},
}


@pytest.fixture
def fake() -> Iterator[Callable[[], object]]:
    """From the call to the end of the test, tensors have no values."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def settings(model: str = "videomae") -> Config:
    config = settings_for(MODELS[model], frames=4, size=32, clips=4, compile=False)
    config.train.ema_decay, config.optim.clip_norm, config.optim.fused = 0.9, 1.0, True
    config.augment.mixup, config.augment.cutmix = 0.8, 1.0
    return config


def move(module: nn.Module) -> None:
    """Fake parameters and buffers on CUDA in place of the real ones; other tensors stay where they are."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(p, device=CUDA), requires_grad=p.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty_like(buffer, device=CUDA))


def on_cuda(config: Config, fake: Callable[[], object]) -> tuple[Ours, Batch]:
    """The stepper that the CPU has, its parts moved, and a batch as the loader gives it."""
    ours = our_training(config, CPU)
    batch = random_batch(config, ours.stepper.model.noise_size, 4)
    fake()
    stepper = ours.stepper
    stepper.device = stepper.objective.device = CUDA
    move(stepper.model)
    if stepper.ema is not None:
        move(stepper.ema.module)
    stepper.optimizer = make_optimizer(make_groups(stepper.model, config.optim, 0), config.optim, lr=0.1)
    return ours, batch.to(CUDA, non_blocking=True)


def clips_of(batch: Batch) -> Tensor:
    assert batch.clips.device == CUDA
    return normalize(batch.clips, HALF, HALF, torch.float32)


def record() -> StepRecord:
    return StepRecord(
        step=0,
        samples=[],
        losses=[],
        correct=[],
        norm=torch.zeros(()),
        found_inf=torch.zeros(()),
        lr=0.1,
        busy=(0.0, 0.0),
        marks=[],
    )


def test_a_tensor_left_behind_is_found(fake: Callable[[], object]) -> None:
    fake()
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(3, device=CUDA) + torch.empty(3)


@pytest.mark.parametrize("model", MODELS)
def test_forward_loss_and_prediction(model: str, fake: Callable[[], object]) -> None:
    config = settings(model)
    ours, batch = on_cuda(config, fake)
    stepper, kept = ours.stepper, record()
    targets = torch.empty(4, len(CLASSES), device=CUDA)
    piece = Prepared(clips=clips_of(batch), noise=batch.noise, targets=targets, samples=batch.samples)
    stepper.objective.class_weights = torch.empty(len(CLASSES), device=CUDA)
    loss = stepper._forward_piece(piece[slice(0, 2)], kept)
    assert {t.device for t in (loss, *kept.losses, *kept.correct)} == {CUDA}
    assert stepper.zero_weight_pass().device == CUDA
    assert zeros_loss(stepper.model, config.clip, 3, CUDA, None).device == CUDA
    stepper.model.eval()
    scorer = Scorer(
        model=stepper.model, device=CUDA, autocast=None, mean=HALF, std=HALF, flip=True, clips_per_gpu=4, pad=True
    )
    for steps in (False, True):
        scorer.steps = steps
        assert _Stream(scorer)._pass(batch.clips[:3]).device == CUDA


@pytest.mark.parametrize("policy", ["random", "motion"])
def test_some_tokens(policy: str, fake: Callable[[], object]) -> None:
    config = settings()
    ours, batch = on_cuda(config, fake)
    model = ours.stepper.model
    model.train_tokens = model.eval_tokens = kept_tokens(model, 0.5, policy, setting="train.keep_tokens")
    noise = torch.empty(4, model.noise_size, device=CUDA)
    assert model(clips_of(batch), noise).device == CUDA
    if policy == "motion":
        assert model.eval()(clips_of(batch)).device == CUDA


@pytest.mark.parametrize("fused", [True, False])
def test_the_end_of_a_step(fused: bool, fake: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("convolutions")
    config.optim.fused = fused
    stepper = on_cuda(config, fake)[0].stepper
    for parameter in stepper.model.parameters():
        parameter.grad = torch.empty_like(parameter)
    kept = record()
    if not fused:  # the plain optimizer asks whether to step, for which it needs a value
        monkeypatch.setattr(Tensor, "__bool__", lambda _: False)
    stepper._update(kept)
    assert kept.norm.device == kept.found_inf.device == CUDA
    state = stepper.optimizer.state
    assert len(state) == sum(1 for _ in stepper.model.parameters())
    assert {s[name].device for s in state.values() for name in ("exp_avg", "exp_avg_sq")} == {CUDA}


def test_mixing_and_targets(fake: Callable[[], object]) -> None:
    config = settings()
    _, batch = on_cuda(config, fake)
    for moved in (False, True):
        params = {name: value.to(CUDA) for name, value in batch.params.items()} if moved else batch.params
        clips, keep = mix(clips_of(batch), params["partner"], params)
        assert clips.device == keep.device == CUDA
    labels = batch.labels
    assert soft_targets(labels, labels[params["partner"]], keep, 5, 0.1).device == CUDA


@pytest.mark.parametrize("rows", [[1], [0, 2, 3]])
def test_augmentation(rows: list[int], fake: Callable[[], object]) -> None:
    """Every operation on one clip and on several, as `augment_clips` does them."""
    fake()
    planar = torch.empty(4, 4, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    host = {"values": torch.empty(4, 2), "affine": torch.empty(4, 2, 3)}
    done = [*pixels.MEASURED, *pixels.ENHANCED, Op.RESAMPLE]
    for kind in done:
        augment._operate(planar, kind, rows, [0] * len(rows), host)
    assert {Op.INVERT, *pixels.FIXED, *done} >= {*Op} - {Op.NONE, *range(Op.ROTATE, Op.RESAMPLE)}
    augment._replace(planar, rows, pixels.lookup, torch.empty(len(rows), 1, 1, 256, dtype=torch.uint8))
    augment._replace(planar, rows, lambda part: part.flip(-2))
    clips = normalize(planar.permute(0, 1, 3, 4, 2), torch.empty(3), torch.empty(3), torch.bfloat16)
    boxes = [[2, 3, 4, 5] if row in rows else [0, 0, 0, 0] for row in range(4)]
    augment._erase(clips, boxes, [7] * 4)
    assert clips.device == CUDA and clips.dtype == torch.bfloat16
