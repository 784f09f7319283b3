"""Embedding: features equal timm's own, the same file from any number of ranks, nothing lost to a stop."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.support import environment, torchrun
from vac_ddp import cli, files
from vac_ddp import config as settings_io
from vac_ddp.commands import pack_command
from vac_ddp.data.index import open_index
from vac_ddp.data.split import make_split
from vac_ddp.embed import embed, main
from vac_ddp.errors import Findings, Interrupted, UserError
from vac_ddp.predicting import all_videos, embedding, part_files
from vac_ddp.predicting.embedding import ENCODER_SETTINGS
from vac_ddp.results.features_file import Features, read_features
from vac_ddp.scoring.scorer import Scorer
from vac_ddp.settings import DataSettings, ModelSettings

FRAMES, SIZE, WIDTH = 4, 32, 256
CLASSES = ["sit", "wave"]
VIDEOS = 13


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small timm model, settings, and 13 labelled videos of 3 recordings and different lengths."""
    folder = tmp_path_factory.mktemp("embed")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=0)
    torch.save(model.state_dict(), folder / "encoder.pth")
    (folder / "tiny.yaml").write_text(
        f"model: {{name: frame_vit, backbone: test_efficientnet, weights: {folder / 'encoder.pth'}}}\n"
        f"clip: {{frames: {FRAMES}, size: {SIZE}, sampling: segments}}\n"
        "data: {workers: 0, group_regex: '^(tape[0-9]+)_'}\n"
        "predict: {views: {windows: spread, count: 1}}\n"
    )
    rng = np.random.default_rng(0)
    for number in range(VIDEOS):
        video = folder / "data" / CLASSES[number % 2] / f"tape{number % 3}_{number:02}"
        video.mkdir(parents=True)
        for frame in range(int(rng.integers(2, 9))):
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(video / f"{frame + 1:04}.png")
    return folder


def arguments(place: Path, out: Path, *words: str, data: str = "data") -> list[str]:
    flags = ["--config", str(place / "tiny.yaml"), "--data", str(place / data), "--out", str(out)]
    return [*flags, f"data.cache={out.parent / 'cache'}", *words]


def by_hand(place: Path, video: Path) -> np.ndarray:
    """Features (T, D) of the middle frames of a video's segments, frame by frame, by Pillow and timm alone."""
    model = timm.create_model("test_efficientnet", num_classes=0).eval()
    model.load_state_dict(torch.load(place / "encoder.pth", weights_only=True))
    cfg = model.pretrained_cfg
    frames = sorted(video.iterdir())
    rows = []
    for segment in range(FRAMES):
        first, after = (i * len(frames) // FRAMES for i in (segment, segment + 1))
        pixels = torch.tensor(np.asarray(Image.open(frames[first + (after - first) // 2]), np.float32) / 255)
        pixels = (pixels - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
        with torch.no_grad():
            rows.append(model(pixels.permute(2, 0, 1)[None])[0])
    return torch.stack(rows).numpy()


def assert_equal(a: Features, b: Features, tolerance: float = 1e-6) -> None:
    """Identical in all but rounding: to `tolerance` of the norm of each video's features."""
    for name in ("ids", "groups", "classes", "about"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("labels", "damaged", "failed", "views"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("pooled", "steps"):
        x, y = (np.asarray(getattr(f, name), np.float64).reshape(len(f.ids), -1) for f in (a, b))
        assert (np.linalg.norm(x - y, axis=1) <= tolerance * np.linalg.norm(y, axis=1)).all(), name


# ---------------------------------------------------------------- what it computes


def test_features_are_those_of_timm_frame_by_frame(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(arguments(place, tmp_path / "out", "--steps")) == {"run": None, "step": None}
    found = read_features(tmp_path / "out")
    expected = np.stack([by_hand(place, place / "data" / name) for name in found.ids])
    assert found.steps is not None and found.steps.dtype == found.pooled.dtype == np.float32
    np.testing.assert_allclose(found.steps[:, 0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.pooled[:, 0], expected.mean(axis=1), rtol=1e-4, atol=1e-5)
    assert [CLASSES[label] for label in found.labels] == [name.split("/")[0] for name in found.ids]
    assert found.groups == [name.split("/")[1].split("_")[0] for name in found.ids]
    assert found.about["weights"] == files.sha256(place / "encoder.pth")
    assert found.about["settings"]["clip"]["frames"] == FRAMES
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["features.npz"]
    printed = capsys.readouterr().out
    assert f"features     {tmp_path / 'out' / 'features.npz'} (pooled 13 x 1 x 256, steps 13 x 1 x 4 x 256" in printed
    assert f"encoder      frame_vit, 4 x 256 features; weights {place / 'encoder.pth'}" in printed

    embed(arguments(place, tmp_path / "half", "--dtype", "float16"))
    half = read_features(tmp_path / "half")
    assert half.steps is None
    np.testing.assert_array_equal(half.pooled, found.pooled.astype(np.float16))


def test_views_stand_as_the_table_says(place: Path, tmp_path: Path) -> None:
    """A mirrored view is the view of mirrored frames."""
    for video in (place / "data").glob("*/*"):
        target = tmp_path / "mirrored" / video.relative_to(place / "data")
        target.mkdir(parents=True)
        for frame in video.iterdir():
            Image.fromarray(np.asarray(Image.open(frame))[:, ::-1]).save(target / frame.name)
    embed(arguments(place, tmp_path / "two", "--views", "2x1+flip"))
    embed(arguments(place, tmp_path / "flipped", "--views", "2x1", "--data", str(tmp_path / "mirrored")))
    two, flipped = read_features(tmp_path / "two"), read_features(tmp_path / "flipped")
    assert two.views.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    np.testing.assert_allclose(two.pooled[:, [1, 3]], flipped.pooled, rtol=1e-4, atol=1e-5)
    assert np.abs(two.pooled[:, 0] - two.pooled[:, 1]).max() > 1e-3


def test_the_groups_are_those_of_a_training_split(place: Path, tmp_path: Path) -> None:
    index = open_index(place / "data", labelled=True, settings=DataSettings(cache=str(tmp_path)))
    for words in ([], ["data.group_by=none"], ["data.group_regex=null"], ["data.group_across_classes=false"]):
        embed(arguments(place, tmp_path / "out", "--overwrite", *words))
        settings = DataSettings(group_regex="^(tape[0-9]+)_")
        for word in words:
            name, value = word.removeprefix("data.").split("=")
            setattr(settings, name, {"null": None, "false": False}.get(value, value))
        found = read_features(tmp_path / "out")
        assert found.ids == list(index.names)
        assert found.groups == make_split(index, settings, seed=0).groups


def test_unlabelled_listed_and_packed_videos_have_the_same_features(place: Path, tmp_path: Path) -> None:
    embed(arguments(place, tmp_path / "tree", "--steps"))
    tree = read_features(tmp_path / "tree")
    (tmp_path / "test").mkdir()
    for name in tree.ids:
        (tmp_path / "test" / name.split("/")[1]).symlink_to(place / "data" / name)
    lines = [f"{place / 'data' / name},{name.split('/')[0]}" for name in tree.ids]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    assert pack_command.main([str(place / "data"), str(tmp_path / "pack")]) in (0, None)
    for data, labelled in (("test", False), ("list.csv", True), ("pack", True)):
        embed(arguments(place, tmp_path / f"of_{data}", "--steps", "--data", str(tmp_path / data)))
        found = read_features(tmp_path / f"of_{data}")
        order = [[name.split("/")[-1] for name in found.ids].index(name.split("/")[1]) for name in tree.ids]
        np.testing.assert_allclose(found.steps[order], tree.steps, rtol=1e-5, atol=1e-6)
        assert [found.groups[i] for i in order] == tree.groups
        assert found.labels[order].tolist() == (tree.labels.tolist() if labelled else [-1] * VIDEOS)
        assert found.classes == (CLASSES if labelled else [])


def test_a_run_gives_the_features_of_its_encoder(place: Path, tmp_path: Path) -> None:
    """Trained with rates of zero a run has the encoder that it started from; its classifier plays no part."""
    words = ["train.epochs=1", "train.global_batch=4", "optim.lr=1e-30", "optim.base_lr=null", "optim.min_lr=0",
             "optim.weight_decay=0", f"data.train={place / 'data'}", f"data.cache={tmp_path / 'cache'}"]  # fmt: skip
    assert cli.main(["train", "--config", str(place / "tiny.yaml"), f"run.dir={tmp_path / 'run'}", *words]) == 0
    embed(arguments(place, tmp_path / "out", "--steps"))
    status = embed(["--run", str(tmp_path / "run"), "--data", str(place / "data"), "--steps"])
    assert status == {"run": str(tmp_path / "run"), "step": None}
    a, b = read_features(tmp_path / "run" / "features" / "data"), read_features(tmp_path / "out")
    assert a.ids == b.ids and a.groups == b.groups
    np.testing.assert_allclose(a.steps, b.steps, rtol=1e-4, atol=1e-5)
    assert a.about["weights"] == files.sha256(tmp_path / "run" / "best_frame_vit.pt")


def test_weights_that_are_drawn_are_told_apart_by_their_seed(place: Path, tmp_path: Path) -> None:
    embed(arguments(place, tmp_path / "out", "model.weights=null", "seed=1"))
    embed(arguments(place, tmp_path / "out", "model.weights=null", "seed=1"))
    with pytest.raises(UserError, match=r"is of another embedding: weights .* changed"):
        embed(arguments(place, tmp_path / "out", "model.weights=null", "seed=2"))


# ---------------------------------------------------------------- what it refuses, and what it keeps


def test_bad_input_is_one_line(place: Path, tmp_path: Path) -> None:
    out, config = str(tmp_path / "out"), str(place / "tiny.yaml")
    video = next((place / "data" / "wave").iterdir())
    given = arguments(place, tmp_path / "out")
    for argv, text in (
        (["--out", out], "give one of --run DIR and --config FILE"),
        (["--run", "x", "--config", config, "--out", out], "give one of --run DIR and --config FILE"),
        (["--config", config], "give --out DIR"),
        (["--config", config, "--out", "features.npz"], "give a folder, features.npz is written to it"),
        (["--run", str(tmp_path / "none")], "no such file or directory"),
        (["--config", "none_such", "--out", out], "none_such"),
        ([*given, "--data", str(tmp_path / "none")], "no such data"),
        ([*given, "--data", str(video)], "is one video: give a folder of videos"),
        ([*given, "optim.lr=1"], "optim.lr=1: an embedding does not use it"),
        ([*given, "model.backbones=1"], "did you mean model.backbone"),
        ([*given, "--views", "5y3"], "expected KxC"),
        ([*given, "--dtype", "int8"], "invalid choice"),
        ([*given, "stray"], "unknown argument stray"),
        ([*given, "data.group_by=hmdb51"], "data.group_by=hmdb51 does not tell the source of 13 of 13 videos"),
    ):
        with pytest.raises(UserError, match=text) as caught:
            embed(argv)
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*.npz"))


def test_what_is_there_is_kept_and_other_features_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(place, tmp_path / "out")
    embed(argv)
    before = (tmp_path / "out" / "features.npz").read_bytes()
    monkeypatch.setattr(all_videos, "scored_videos", None)  # a second call computes nothing
    embed(argv)
    for words, text in (
        (["--steps"], r"steps \(no there, yes now\) changed"),
        (["--dtype", "float16"], r"dtype \(float32 there, float16 now\)"),
        (["clip.frames=5"], r"clip.frames \(4 there, 5 now\)"),
        (["model.mean=0.5,0.5,0.5"], r"model.mean \(0.485 0.456 0.406 there, 0.5 0.5 0.5 now\)"),
        (["model.spatial_grid=1", "model.norm_eps=1e-3"], r"model.norm_eps \(None there, 0.001 now\)"),
    ):
        with pytest.raises(UserError, match=f"is of another embedding: {text}"):
            embed([*argv, *words])
    assert (tmp_path / "out" / "features.npz").read_bytes() == before
    monkeypatch.undo()
    embed([*argv, "--steps", "--overwrite"])
    assert read_features(tmp_path / "out").steps is not None


def test_features_of_other_settings_are_told_apart_for_a_probe(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes features by rounding alone does not count; encoder, clips, views and data do."""
    embed(arguments(place, tmp_path / "out", "--steps", "--dtype", "float16"))
    features = read_features(tmp_path / "out")
    features.about["fingerprint"] |= {"device": "cuda", "precision": "bf16", "versions": "vac_ddp 0"}

    def check(*words: str, classes: list[str] | None = None) -> None:
        config = settings_io.read_yaml(place / "tiny.yaml")
        for word in [f"data.cache={tmp_path / 'cache'}", *words]:
            settings_io.override(config, word)
        index = open_index(place / "data", labelled=True, settings=config.data, classes=classes)
        request = embedding.Request(data=place / "data", config=config, out=tmp_path)
        embedding.check_features(features, request, index, torch.device("cpu"))

    check()
    check("model.pooling=attentive", "optim.lr=1e-3", "train.epochs=3")
    for word, text in (
        ("clip.frames=8", "clip.frames (4 there, 8 now)"),
        ("predict.views.count=2", "views.count (1 there, 2 now)"),
        ("model.weights=null", "weights ("),
        ("model.std=0.5,0.5,0.5", "model.std (0.229 0.224 0.225 there, 0.5 0.5 0.5 now)"),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            check(word)
    with pytest.raises(UserError, match="names or classes of the videos changed"):
        check(classes=["sit", "stand", "wave"])


# Settings of the group model that change no feature, or that the weights' hash, mean and std stand for.
WITHOUT_EFFECT = {
    "name", "encoder", "weights", "revision", "mean", "std", "drop_path", "head_dropout", "head_init_scale", "pooling",
    "statistics", "queries", "batch_norm",
}  # fmt: skip


def test_every_setting_that_changes_a_feature_is_in_the_fingerprint() -> None:
    """A new setting of models has to be put into one of the two."""
    names = {field.name for field in dataclasses.fields(ModelSettings)}
    assert set(ENCODER_SETTINGS) | WITHOUT_EFFECT == names
    assert not set(ENCODER_SETTINGS) & WITHOUT_EFFECT


def test_a_video_without_features_is_named_and_zero(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = sorted((place / "data").glob("*/*"))
    for video in videos:
        shutil.copytree(video, tmp_path / "data" / video.name)
    names = sorted(video.name for video in videos)
    for frame in (tmp_path / "data" / names[2]).iterdir():
        frame.write_bytes(b"not an image")
    argv = arguments(place, tmp_path / "out", "--steps", "--data", str(tmp_path / "data"))
    with pytest.raises(Findings, match=f"1 videos have no frame that can be decoded.*: {names[2]}$"):
        embed(argv)
    found = read_features(tmp_path / "out")
    assert found.failed.tolist() == [i == 2 for i in range(VIDEOS)]
    assert found.damaged[2] > 0
    assert not found.pooled[2].any() and not found.steps[2].any() and found.pooled[3].any()
    with pytest.raises(Findings):  # and again when all is there already
        embed(argv)


def test_what_float16_cannot_hold_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Scorer.outputs
    monkeypatch.setattr(Scorer, "outputs", lambda self, clips: real(self, clips) * 1e12)
    with pytest.raises(Findings, match="13 videos have no frame that can be decoded, or no finite features"):
        embed(arguments(place, tmp_path / "half", "--dtype", "float16"))
    assert "its features are not finite; try train.precision=fp32, and --dtype float32" in capsys.readouterr().out
    embed(arguments(place, tmp_path / "whole"))
    assert not read_features(tmp_path / "whole").failed.any()


def test_interrupted_five_times_nothing_is_computed_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(arguments(place, tmp_path / "whole", "--steps"))
    argv = arguments(place, tmp_path / "out", "--steps", "predict.save_every=2")
    real, computed = all_videos.scored_videos, []

    def stopping(scorer: Scorer, videos):
        for number, video in enumerate(real(scorer, videos)):
            computed.append(video.video)
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield video

    monkeypatch.setattr(all_videos, "scored_videos", stopping)
    for start in range(1, 6):
        with pytest.raises(Interrupted):
            embed(argv)
        assert len(computed) == 2 * start
    monkeypatch.setattr(all_videos, "scored_videos", lambda *a: (computed.append(v.video) or v for v in real(*a)))
    embed(argv)
    assert sorted(computed) == list(range(VIDEOS))
    assert_equal(read_features(tmp_path / "out"), read_features(tmp_path / "whole"))


# ---------------------------------------------------------------- many ranks


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_features(ranks: int, place: Path, tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    words = arguments(place, tmp_path / "many", "--steps", "predict.save_every=2")
    done = torchrun(ranks, "-m", "vac_ddp.embed", *words, cwd=tmp_path, VAC_STATUS_FILE=str(status))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(status.read_text()) == {"status": 0, "message": "done", "run": None, "step": None}
    embed(arguments(place, tmp_path / "one", "--steps"))
    assert_equal(read_features(tmp_path / "many"), read_features(tmp_path / "one"))


def test_vac_embed_checks_before_it_starts_ranks(place: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "vac_ddp.cli", "embed", "--nproc", "2"]
    words = arguments(place, tmp_path / "out", "--data", str(tmp_path / "none"))
    done = subprocess.run([*argv, *words], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("vac: no such data") and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------- memory


def test_parts_are_joined_without_the_features_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one block is in memory, and no part stays mapped (100,000 videos: tests/long/features.py)."""
    from tests.long.features import join

    monkeypatch.setattr(part_files, "CHUNK_BYTES", 1 << 20)
    peak, size = join(tmp_path, videos=600, steps=16, width=768, each=50)
    assert size > 14 << 20
    assert peak < 4 << 20
    assert main([]) == 2
