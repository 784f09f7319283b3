"""Prediction on one rank and many: the same file, no view twice, nothing lost to a kill, the notebook's average."""

from __future__ import annotations

import csv
import ctypes
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.support import environment, torchrun, unpack
from tests.test_meters import FAULTS
from vac_ddp import api, files
from vac_ddp import config as settings_io
from vac_ddp.data.dataset import TestViews
from vac_ddp.data.index import open_index
from vac_ddp.data.loader import TestBatch
from vac_ddp.data.split import Split, write_split
from vac_ddp.errors import Findings, Interrupted, UserError
from vac_ddp.models import file_state, load_model
from vac_ddp.predict import main, predict
from vac_ddp.predicting import all_videos, part_files
from vac_ddp.results.logits_file import ViewsHead, log_prior, read_views
from vac_ddp.scoring.engine import scored_videos
from vac_ddp.scoring.scorer import Scorer
from vac_ddp.settings import ClipSettings, Config, DataSettings, ModelSettings, ViewSettings

CLASSES = ["climb", "pick", "sit", "wave", "zip"]
COUNTS = [4, 3, 2, 1, 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a small model whose weights are far from zero."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(clip=ClipSettings(frames=4, size=32), model=ModelSettings(weights=None, width=16, depth=2, heads=2))
    loaded = load_model(config.model, config.clip, CLASSES, seed=3)
    noise = torch.Generator().manual_seed(1)
    state = {name: t + 0.3 * torch.randn(t.shape, generator=noise) for name, t in file_state(loaded.model).items()}
    torch.save(
        {
            "model": state,
            "classes": CLASSES,
            "config": settings_io.to_dict(config),
            "metrics": {},
            "architecture": loaded.architecture,
            "class_counts": COUNTS,
        },
        folder / "best_videomae.pt",
    )
    return folder


def frames(folder: Path, seed: int, *, count: int | None = None, size: tuple[int, int] | None = None) -> None:
    """Frames of noise: 5 to 24 of them, of about 40 pixels."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    height, width = size or rng.integers(34, 50, 2).tolist()
    for number in range(count or int(rng.integers(5, 25))):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number + 1:04}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Test folders of 1, 2, 5 and 31 videos of different lengths, by their number."""
    root = tmp_path_factory.mktemp("data")
    for videos in (1, 2, 5, 31):
        for number in range(videos):
            frames(root / str(videos) / f"{number + 1:05}", number)
    return {videos: root / str(videos) for videos in (1, 2, 5, 31)}


def arguments(trained: Path, folder: Path, out: Path, *words: str) -> list[str]:
    flags = ["--run", str(trained), "--data", str(folder), "--out", str(out)]
    return [*flags, f"data.cache={out.parent / 'cache'}", "data.workers=0", *words]


# ---------------------------------------------------------------- what it computes


def test_the_mean_over_offsets_is_the_notebooks_loop(trained: Path, tmp_path: Path) -> None:
    """Decoded by Pillow, frame by frame, clip by clip: `logits += model(clip)` over the offsets, divided by three."""
    for number, count in enumerate((30, 12, 3)):
        frames(tmp_path / "data" / f"{number + 1:05}", number, count=count, size=(32, 32))
    predict(arguments(trained, tmp_path / "data", tmp_path / "out"))

    stored = torch.load(trained / "best_videomae.pt", weights_only=True)
    config = settings_io.from_dict(stored["config"], where="test")
    config.model.weights = str(trained)
    model = load_model(config.model, config.clip, CLASSES, seed=0).model.eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected, answers = [], []
    for folder in sorted((tmp_path / "data").iterdir(), key=lambda path: int(path.name)):
        files_of = sorted(folder.iterdir())
        total = torch.zeros(1, len(CLASSES))
        for offset in (0, 4, 8):
            clip = []
            for i in range(4):
                place = min(offset + i * 2, len(files_of) - 1)
                pixels = np.asarray(Image.open(files_of[place]).convert("RGB"), np.float32) / 255
                clip.append(((torch.tensor(pixels) - mean) / std).permute(2, 0, 1))
            with torch.no_grad():
                total += model(torch.stack(clip)[None])
        expected.append(total[0] / 3)
        answers.append((int(folder.name), CLASSES[int(total.argmax())]))
    views = read_views(tmp_path / "out")
    assert views.logits.shape == (3, 3, 5)
    np.testing.assert_allclose(views.logits.mean(axis=1), torch.stack(expected), atol=1e-6, rtol=0)
    with (tmp_path / "out" / "submission.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert rows == [["id", "class"], *[[str(number), name] for number, name in answers]]


class Sums(nn.Module):
    """A model whose logits say exactly what it saw: sums over the clip, weighted so that order and mirroring count."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        self.passes.append(len(clips))
        weights = torch.arange(clips[0].numel(), dtype=torch.float64).view_as(clips[0]).sqrt()
        return torch.stack([clips.double().sum((1, 2, 3, 4)), (clips * weights).sum((1, 2, 3, 4))], 1).float()


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 100])
def test_passes_of_any_size_give_every_video_its_own_views(at_once: int, flip: bool, pad: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    clips = [torch.randint(0, 256, (c, 2, 4, 4, 3), generator=rng, dtype=torch.uint8) for c in (3, 3, 3, 3, 3)]
    decoded = [True, True, False, True, True]
    batches = [
        TestBatch(
            clips=clips[i][None],
            places=torch.tensor([i]),
            videos=torch.tensor([10 + i]),
            labels=torch.tensor([-1]),
            decoded=torch.tensor([decoded[i]]),
        )
        for i in range(5)
    ]
    model = Sums()
    scorer = Scorer(
        model=model,
        device=torch.device("cpu"),
        autocast=None,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255,) * 3,
        flip=flip,
        clips_per_gpu=at_once,
        pad=pad,
    )
    found = list(scored_videos(scorer, batches))
    assert [(v.video, v.place) for v in found] == [(10 + i, i) for i in range(5)]
    assert max(model.passes) <= at_once
    views = 2 if flip else 1
    if pad and at_once % views == 0:
        assert set(model.passes) == {at_once}  # the last one is filled up
    elif at_once % views == 0:
        full = min(at_once, 12 * views)  # clips of different videos share a pass: only the last one is short
        assert set(model.passes[:-1]) <= {full}
    alone = Sums()
    for video, own, good in zip(found, clips, decoded, strict=True):
        if not good:
            assert video.outputs is None
            continue
        rows = []
        for clip in own.permute(0, 1, 4, 2, 3).float():
            rows += [alone(clip[None]), *([alone(clip.flip(-1)[None])] if flip else [])]
        np.testing.assert_allclose(video.outputs, torch.cat(rows), rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_batches_of_several_videos_come_out_video_by_video(at_once: int) -> None:
    """Of a video that cannot be decoded there is no row, and its neighbours keep theirs."""
    clips = torch.randint(0, 256, (7, 2, 2, 4, 4, 3), dtype=torch.uint8)
    decoded = torch.tensor([True, True, False, True, True, False, True])
    batches = [
        TestBatch(
            clips=clips[rows],
            places=torch.arange(7)[rows],
            videos=10 + torch.arange(7)[rows],
            labels=torch.full((7,), -1)[rows],
            decoded=decoded[rows],
        )
        for rows in (slice(0, 4), slice(4, 6), slice(6, 7))
    ]
    scorer = Scorer(
        model=Sums(), device=torch.device("cpu"), autocast=None, mean=(0.0,) * 3, std=(1 / 255,) * 3, flip=False,
        clips_per_gpu=at_once,
    )  # fmt: skip
    found = list(scored_videos(scorer, batches))
    assert [(v.place, v.video) for v in found] == [(i, 10 + i) for i in range(7)]
    for video, own, good in zip(found, clips, decoded.tolist(), strict=True):
        expected = Sums()(own.permute(0, 1, 4, 2, 3).float())
        assert (video.outputs is None) == (not good)
        if good:
            np.testing.assert_allclose(video.outputs, expected, rtol=1e-5)


def test_equal_windows_of_a_short_video_go_through_the_model_once(tmp_path: Path) -> None:
    for number, count in enumerate((2, 3, 40)):
        frames(tmp_path / "data" / str(number), number, count=count)
    settings = DataSettings(cache=str(tmp_path / "cache"))
    index = open_index(str(tmp_path / "data"), labelled=False, settings=settings)
    clip, views = ClipSettings(frames=4, stride=1, size=16), ViewSettings(windows="spread", count=5, crops=3, flip=True)
    dataset = TestViews(index, np.arange(3), clip, views, tolerant=True)

    def scored(batches: list[TestBatch]) -> tuple[list[np.ndarray], int]:
        model = Sums()
        scorer = Scorer(
            model=model, device=torch.device("cpu"), autocast=None, mean=(0.5,) * 3, std=(0.5,) * 3, flip=True,
            clips_per_gpu=7,
        )  # fmt: skip
        return [v.outputs for v in scored_videos(scorer, batches)], sum(model.passes)

    found, clips = scored([dataset[video] for video in range(3)])
    together = dataset.__getitems__([0, 1, 2])  # several videos in a batch: every view has its own clip
    expected, all_clips = scored([together])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (30, 2)
        np.testing.assert_array_equal(ours, theirs)
    assert (clips, all_clips) == ((1 + 1 + 5) * 3 * 2, 3 * 5 * 3 * 2)


def test_logits_that_are_not_finite_are_named_and_the_other_videos_are_scored(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are so large that a bright video overflows and a black one does not."""
    stored = torch.load(trained / "best_videomae.pt", weights_only=True)
    stored["model"]["videomae.embeddings.patch_embeddings.projection.weight"].fill_(1e37)
    stored["architecture"] |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    (tmp_path / "run").mkdir()
    torch.save(stored, tmp_path / "run" / "best_videomae.pt")
    for number, grey in enumerate((0, 255), start=1):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
        for frame in range(6):
            Image.new("RGB", (40, 40), (grey,) * 3).save(tmp_path / "data" / str(number) / f"{frame + 1:04}.png")
    with pytest.raises(Findings, match=r"1 of 2 videos have no frame .* or no finite logits.*: 2$"):
        predict(arguments(tmp_path / "run", tmp_path / "data", tmp_path / "out"))
    assert "2: its logits are not finite" in capsys.readouterr().out
    views = read_views(tmp_path / "out")
    assert views.failed.tolist() == [False, True]
    counts = np.maximum(np.array(COUNTS, float), 0.5)
    np.testing.assert_allclose(views.logits[1], [np.log(counts / counts.sum())] * 3, atol=1e-6)
    with pytest.raises(UserError, match="its logits are not finite"):
        predict(arguments(tmp_path / "run", tmp_path / "data" / "2", tmp_path / "one"))


def test_what_is_averaged_follows_the_setting_and_the_command_line(
    trained: Path, data: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vac_ddp.commands import score_command

    def written(out: str) -> np.ndarray:
        with (tmp_path / out / "scores.csv").open() as stream:
            rows = [dict(zip(row[1::2], map(float, row[2::2]), strict=True)) for row in list(csv.reader(stream))[1:]]
        return np.array([[row[name] for name in CLASSES] for row in rows])

    predict(arguments(trained, data[2], tmp_path / "probs", "predict.average=mean-probs"))
    predict(arguments(trained, data[2], tmp_path / "logits"))
    logits = read_views(tmp_path / "probs").logits.astype(np.float64)

    def softmax(values: np.ndarray) -> np.ndarray:
        return np.exp(values) / np.exp(values).sum(-1, keepdims=True)

    of_probs, of_logits = softmax(logits).mean(axis=1), softmax(logits.mean(axis=1))
    assert np.abs(of_probs - of_logits).max() > 1e-3  # the two do differ
    np.testing.assert_allclose(written("probs"), of_probs, atol=2e-6)
    np.testing.assert_allclose(written("logits"), of_logits, atol=2e-6)
    score_command.main([str(tmp_path / "probs"), "--out", str(tmp_path / "again")])
    np.testing.assert_allclose(written("again"), of_probs, atol=2e-6)
    score_command.main([str(tmp_path / "probs"), "--method", "mean-logits", "--out", str(tmp_path / "other")])
    np.testing.assert_allclose(written("other"), of_logits, atol=2e-6)
    for number, row in enumerate(api.load(trained).predict(data[2])):
        np.testing.assert_allclose(softmax(row.logits), of_logits[number], atol=2e-6)
    classifier = api.load(trained)
    classifier.config.predict.average = "mean-probs"
    for number, row in enumerate(classifier.predict(data[2])):
        np.testing.assert_allclose(softmax(row.logits), of_probs[number], atol=2e-6)


def test_views_crops_and_flips_are_what_the_table_says(trained: Path, data: dict[int, Path], tmp_path: Path) -> None:
    predict(arguments(trained, data[2], tmp_path / "all", "--views", "2x3+flip"))
    predict(arguments(trained, data[2], tmp_path / "some", "--views", "2x1"))
    every, some = read_views(tmp_path / "all"), read_views(tmp_path / "some")
    assert every.views.tolist() == [[w, c, f] for w in range(2) for c in range(3) for f in range(2)]
    middle = (every.views[:, 1] == 1) & (every.views[:, 2] == 0)
    np.testing.assert_allclose(every.logits[:, middle], some.logits, atol=1e-5)
    assert np.unique(every.logits[:, :, 0].round(5), axis=1).shape[1] > 8  # the views do differ


def test_labelled_folders_are_evaluated(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        frames(tmp_path / "val" / CLASSES[number % 3] / f"s{number // 6}_clip{number}", number)
    predict(arguments(trained, tmp_path / "val", tmp_path / "out", "data.group_regex=^(s.)_"))
    views = read_views(tmp_path / "out")
    labels = np.array([CLASSES.index(name.split("/")[0]) for name in views.ids])
    assert (views.labels == labels).all()
    assert len(set(views.sources)) == 2
    correct = views.logits.mean(axis=1).argmax(axis=1) == labels
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures["top1"] == pytest.approx(correct.mean())
    assert figures["mean_class"] == pytest.approx(np.mean([correct[labels == k].mean() for k in range(3)]))
    assert (figures["videos"], figures["sources"]) == (12, 2)
    assert figures["top1_low"] <= figures["top1"] <= figures["top1_high"]
    with (tmp_path / "out" / "confusion.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert rows[0][1:] == CLASSES
    assert sum(int(cell) for row in rows[1:] for cell in row[1:]) == 12
    assert f"top-1        {correct.mean():.4f}" in capsys.readouterr().out


def test_the_runs_own_validation_part(trained: Path, tmp_path: Path) -> None:
    """`--part val` scores the videos that split.csv says, and no other, with their sources as written there."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for number in range(12):
        frames(tmp_path / "train" / CLASSES[number % 3] / f"clip{number}", number)
    index = open_index(tmp_path / "train", labelled=True, settings=DataSettings(cache=str(tmp_path / "cache")))
    names, val = list(index.names), np.array([1, 4, 9])
    groups = [f"film{i % 4}" for i in range(12)]
    write_split(
        run / "split.csv",
        index,
        Split(train=np.setdiff1d(np.arange(12), val), val=val, groups=groups, grammar="test"),
    )
    common = [f"data.cache={tmp_path / 'cache'}", "data.workers=0"]
    predict([f"run.dir={run}", "--data", str(tmp_path / "train"), "--part", "val", *common])
    part = read_views(run / "predictions" / "val")
    assert part.ids == [names[i] for i in val]
    assert part.sources == [groups[i] for i in val]
    assert [CLASSES[label] for label in part.labels] == [name.split("/")[0] for name in part.ids]
    predict([f"run.dir={run}", f"data.train={tmp_path / 'train'}", "--part", "train", *common])
    assert len(read_views(run / "predictions" / "train").ids) == 9
    (run / "split.csv").unlink()
    with pytest.raises(UserError, match="cannot read the split"):
        predict([f"run.dir={run}", "--data", str(tmp_path / "train"), "--part", "val", *common])


def test_a_video_that_cannot_be_decoded_gets_the_prior(trained: Path, data: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(data[5], tmp_path / "data")
    for frame in (tmp_path / "data" / "00002").iterdir():
        frame.write_bytes(b"no picture")
    (tmp_path / "data" / "00007").mkdir()
    first = sorted((tmp_path / "data" / "00003").iterdir())[0]
    first.write_bytes(first.read_bytes()[:40])
    argv = arguments(trained, tmp_path / "data", tmp_path / "out")
    with pytest.raises(Findings, match=r"2 of 6 videos .* class prior: 00002, 00007"):
        predict(argv)
    views = read_views(tmp_path / "out")
    assert views.failed.tolist() == [False, True, False, False, False, True]
    assert views.damaged[2] >= 1
    shares = np.exp(views.logits[1].astype(np.float64))
    np.testing.assert_allclose(shares, [np.array([4, 3, 2, 1, 0.5]) / 10.5] * 3, rtol=1e-6)
    lines = (tmp_path / "out" / "submission.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["id", "1", "2", "3", "4", "5", "7"]
    assert lines[2] == "2,climb"
    with pytest.raises(Findings):  # and again when all is there already
        predict(argv)


def test_the_prior_without_counts_is_uniform() -> None:
    np.testing.assert_allclose(np.exp(log_prior(None, 4)), 0.25, rtol=1e-6)
    assert log_prior([1, 2], 2).dtype == np.float32


def test_one_folder_and_one_file(
    trained: Path, data: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(arguments(trained, data[5], tmp_path / "out"))
    with (tmp_path / "out" / "scores.csv").open() as stream:
        rows = list(csv.reader(stream))
    capsys.readouterr()
    predict(["--run", str(trained), "--data", str(data[5] / "00003")])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for _, name in printed] == rows[3][1::2]
    assert [float(share) for share, _ in printed] == pytest.approx([float(s) for s in rows[3][2::2]], abs=1e-4)


def test_a_video_file_is_unpacked_whole_and_upright(trained: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (11, 6, 8, 3), dtype=np.uint8)
    pictures = coarse.repeat(16, axis=1).repeat(16, axis=2)  # 96 x 128
    with av.open(str(tmp_path / "film.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "bgr0"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert unpack(tmp_path / "film.mkv", tmp_path / "frames", short_side=1000) == []
    unpacked = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames/film").iterdir())])
    assert unpacked.shape == pictures.shape
    assert np.abs(unpacked.astype(int) - pictures).mean() < 5  # colours at half the resolution
    unpack(tmp_path / "film.mkv", tmp_path / "small", short_side=48)
    assert Image.open(tmp_path / "small" / "film" / "0001.jpg").size == (64, 48)
    assert main(["--run", str(trained), "--data", str(tmp_path / "film.mkv")]) == 0
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    assert main(["--run", str(trained), "--data", str(tmp_path / "bad.mp4")]) == 2


# ---------------------------------------------------------------- what it refuses, and what it keeps


def test_bad_input_is_one_line(trained: Path, data: dict[int, Path], tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    sample.write_text("id,class\n1,x\n2,x\n9,x\n")
    twice = tmp_path / "twice"
    frames(twice / "1", 0, count=2)
    frames(twice / "01", 0, count=2)
    strange = tmp_path / "strange"
    frames(strange / "swim" / "a", 0, count=2)
    frames(strange / "wave" / "b", 0, count=2)
    folder, out = str(data[2]), str(tmp_path / "out")
    given = ["--run", str(trained), "--data", folder, "--out", out, f"data.cache={tmp_path}"]
    for argv, text in (
        (["--data", folder], "give one of --run"),
        (["--run", str(trained), "--weights", "x", "--data", folder], "give one of --run"),
        (["--run", str(tmp_path / "none"), "--data", folder], "no such file or directory"),
        (["--run", str(tmp_path), "--data", folder], "has no best_<model>.pt"),
        (["--weights", str(sample), "--data", folder], "is damaged or no PyTorch file"),
        (["--run", str(trained)], "give --data DIR, or --part val"),
        (["--run", str(trained), "--data", str(tmp_path / "none")], "no such data"),
        ([*given[:3], str(twice), *given[4:]], "both be id 1"),
        ([*given[:3], str(strange), *given[4:]], "swim"),
        ([*given, "--sample", str(sample)], "asks for the id '9'"),
        ([*given, "--sample", str(tmp_path / "none.csv")], "cannot read the sample file"),
        ([*given, "--views", "5y3"], "expected KxC"),
        ([*given, "predict.view.count=3"], "did you mean predict.views.count"),
        ([*given, "model.depth=3"], "a prediction has the run's setting"),
        ([*given, "predict.save_every=0"], "expected int, between 1 and"),
        ([*given, "stray"], "unknown argument stray"),
    ):
        with pytest.raises(UserError, match=text) as caught:
            predict(argv)
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*.*"))  # the gate closes before anything is computed


def test_what_is_there_is_kept_and_another_prediction_is_refused(
    trained: Path, data: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(trained, data[2], tmp_path / "out")
    predict(argv)
    before = (tmp_path / "out" / "views.npz").read_bytes()
    monkeypatch.setattr(all_videos, "scored_videos", None)  # a second run computes nothing
    predict(argv)
    assert (tmp_path / "out" / "views.npz").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["scores.csv", "submission.csv", "views.npz"]
    with pytest.raises(UserError, match=r"clip.stride \(2 there, 3 now\) changed"):
        predict([*argv, "clip.stride=3"])
    with pytest.raises(UserError, match="data "):
        predict(arguments(trained, data[5], tmp_path / "out"))
    assert (tmp_path / "out" / "views.npz").read_bytes() == before
    monkeypatch.undo()
    predict([*argv, "clip.stride=3", "--overwrite"])
    assert (tmp_path / "out" / "views.npz").read_bytes() != before


def test_a_submission_of_somebody_else_is_not_written_over(
    trained: Path, data: dict[int, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "submission.csv").write_text("mine")
    with pytest.raises(UserError, match=r"holds a submission.csv of something else"):
        predict(arguments(trained, data[1], tmp_path / "out"))
    assert (tmp_path / "out" / "submission.csv").read_text() == "mine"


def test_stopped_and_started_again_it_computes_the_rest(
    trained: Path, data: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A stop saves what is finished; of the parts one is damaged meanwhile, and named."""
    predict(arguments(trained, data[31], tmp_path / "whole"))
    argv = arguments(trained, data[31], tmp_path / "out", "predict.save_every=3")
    real, seen = all_videos.scored_videos, []

    def stopping_after(count: int):
        def score(scorer: Scorer, videos):
            for number, video in enumerate(real(scorer, videos)):
                seen.append(video.video)
                if number == count:
                    signal.raise_signal(signal.SIGTERM)
                yield video

        return score

    monkeypatch.setattr(all_videos, "scored_videos", stopping_after(9))
    with pytest.raises(Interrupted):
        predict(argv)
    saved = sorted((tmp_path / "out" / "parts").glob("part-*.npy"))
    assert [len(np.load(path)) for path in saved] == [3, 3, 3, 1]
    bad = bytearray(saved[1].read_bytes())
    bad[-5] ^= 1
    saved[1].write_bytes(bad)
    monkeypatch.setattr(all_videos, "scored_videos", stopping_after(1000))
    seen.clear()
    capsys.readouterr()
    predict(argv)
    assert seen == [3, 4, 5, *range(10, 31)]
    printed = capsys.readouterr().out
    assert f"{saved[1].name} is damaged" in printed
    assert "7 videos were there already" in printed
    whole, again = read_views(tmp_path / "whole"), read_views(tmp_path / "out")
    assert again.ids == whole.ids
    np.testing.assert_allclose(again.logits, whole.logits, atol=1e-5)


def test_parts_of_another_shape_or_with_a_video_twice_do_not_count(tmp_path: Path) -> None:
    kind = part_files.record_type({"logits": np.zeros((2, 3), np.float32)})
    records = np.zeros(2, kind)
    records["video"] = [4, 5]
    (tmp_path / "parts").mkdir()
    part_files.save_part(tmp_path, records)
    again = records.copy()
    again["video"] = [5, 6]
    part_files.save_part(tmp_path, again)
    part_files.save_part(tmp_path, np.zeros(1, part_files.record_type({"logits": np.zeros((1, 3), np.float32)})))
    said: list[str] = []
    found, done = part_files.read_parts(tmp_path, kind, 9, said.append)
    assert done.tolist() == [4, 5]
    assert len(found) == 1
    assert len(said) == 2


def test_parts_are_joined_in_the_order_of_the_videos_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_files, "CHUNK_BYTES", 100)  # two videos at a time
    rng = np.random.default_rng(0)
    kind = part_files.record_type({"logits": np.zeros((2, 3), np.float32), "steps": np.zeros((2, 7, 3), np.float16)})
    records = np.zeros(5, kind)
    records["video"], records["logits"] = [4, 0, 2, 3, 1], rng.normal(size=(5, 2, 3))
    records["steps"] = rng.normal(size=(5, 2, 7, 3))
    records["damaged"], records["failed"] = records["video"] * 10, records["video"] == 2
    names = [part_files.save_part(tmp_path, records[rows]) for rows in (slice(0, 3), slice(3, 5))]
    parts = [part_files.read_part(tmp_path, name, kind) for name in names]
    head = ViewsHead(
        ids=list("abcde"), classes=list("xyz"), views=np.zeros((2, 3), np.int64), labels=np.full(5, -1),
        sources=[""] * 5, damaged=np.zeros(5), failed=np.zeros(5, bool),
    )  # fmt: skip
    joined, blocks = part_files.joined(parts, head, kind)
    assert list(blocks) == ["logits", "steps"]
    for name, array in blocks.items():
        found = list(array)
        assert len(found) > 1
        assert found[0].dtype == records[name].dtype
        np.testing.assert_array_equal(np.concatenate(found), records[name][np.argsort(records["video"])])
    assert (joined.damaged.tolist(), joined.failed.tolist()) == (
        [0, 10, 20, 30, 40],
        [False, False, True, False, False],
    )
    for wrong in (parts[:1], [*parts, parts[1]]):
        with pytest.raises(RuntimeError, match="different"):
            part_files.joined(wrong, head, kind)
    data = bytearray((tmp_path / "parts" / names[0]).read_bytes())
    data[-1] ^= 1
    (tmp_path / "parts" / names[0]).write_bytes(data)
    with pytest.raises(OSError, match="not what was written"):
        part_files.read_part(tmp_path, names[0], kind)


# ---------------------------------------------------------------- many ranks

MANY = """
import sys
from pathlib import Path
from vac_ddp.predict import predict
from vac_ddp.predicting import part_files
from vac_ddp.runtime import distributed
part_files.CHUNK_BYTES = 700  # several chunks even of five videos
trained, out, *folders = sys.argv[1:]
for folder in folders:
    where = Path(out) / Path(folder).name
    predict(["--run", trained, "--data", folder, "--out", str(where), f"data.cache={out}/cache",
                     "data.workers=0", "predict.save_every=2"])
distributed.end(0)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_any_number_of_ranks_writes_the_same_file(
    ranks: int, trained: Path, data: dict[int, Path], tmp_path: Path
) -> None:
    (tmp_path / "many.py").write_text(MANY)
    folders = [str(folder) for folder in data.values()]
    done = torchrun(ranks, tmp_path / "many.py", trained, tmp_path / "many", *folders, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for videos, folder in data.items():
        predict(arguments(trained, folder, tmp_path / "one" / str(videos)))
        one, many = tmp_path / "one" / str(videos), tmp_path / "many" / str(videos)
        with np.load(one / "views.npz") as a, np.load(many / "views.npz") as b:
            assert a.files == b.files
            for name in a.files:
                if name == "logits":
                    np.testing.assert_allclose(a[name], b[name], atol=1e-5, rtol=0)
                else:
                    assert a[name].tobytes() == b[name].tobytes(), name
        assert (one / "submission.csv").read_bytes() == (many / "submission.csv").read_bytes()
        assert sorted(p.name for p in many.iterdir()) == ["scores.csv", "submission.csv", "views.npz"]


@pytest.mark.distributed
def test_an_error_on_one_rank_ends_all_in_one_line(trained: Path, data: dict[int, Path], tmp_path: Path) -> None:
    """Rank 1 cannot save: all ranks end with its line and status 2."""
    code = """
import os, sys
from vac_ddp.predict import main
from vac_ddp.predicting import part_files
if os.environ["RANK"] == "1":
    def save_part(out, records):
        raise OSError(28, "No space left on device")
    part_files.save_part = save_part
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "full.py").write_text(code)
    status = tmp_path / "status.json"
    argv = arguments(trained, data[31], tmp_path / "out", "predict.save_every=2")[2:]
    done = torchrun(
        2, tmp_path / "full.py", "--weights", trained, *argv, cwd=tmp_path, timeout=120, VAC_STATUS_FILE=str(status)
    )
    assert done.returncode == 1
    told = files.read_json(status)
    assert told["status"] == 2
    assert "cannot save to" in told["message"]
    assert "No space left on device" in told["message"]


@pytest.mark.distributed
def test_vac_predict_starts_the_ranks_itself(trained: Path, data: dict[int, Path], tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "vac_ddp.cli", "predict", "--nproc", "2"]
    words = arguments(trained, data[2], tmp_path / "out")
    done = subprocess.run([*argv, *words], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_views(tmp_path / "out").ids == ["00001", "00002"]
    words[words.index(str(data[2]))] = str(tmp_path / "none")
    done = subprocess.run([*argv, *words], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("vac: no such data")
    assert len(done.stderr.splitlines()) == 1


KILLS = '''
"""Start predictions of changing numbers of ranks by fork, kill all their processes at random moments, start again."""
import json, os, random, signal, socket, sys, time
from pathlib import Path
import numpy as np
import torch  # imported once: a fork is ready in no time
from vac_ddp.predict import main
from vac_ddp.predicting import all_videos, part_files, prediction
from vac_ddp.scoring.scorer import Scorer
from vac_ddp.training import trainer

trained, folder, out, log = sys.argv[1:]
rng = random.Random(int(os.environ["SEED"]))
real = Scorer.outputs


def slow(self, clips):
    time.sleep(0.05)  # so that a kill finds the work half done
    return real(self, clips)


Scorer.outputs = slow


def rank(number, world, port):
    os.environ.update(RANK=str(number), WORLD_SIZE=str(world), LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = open(log, "a")
    os._exit(main(["--run", trained, "--data", folder, "--out", out, f"data.cache={out}.cache",
                           "data.workers=0", "predict.save_every=1", "predict.clips_per_gpu=3"]))


def start(world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for number in range(world):
        pid = os.fork()
        if pid == 0:
            rank(number, world, port)
        pids.append(pid)
    return pids


def saved():
    found = {}
    for path in Path(out, "parts").glob("part-*.npy"):
        for video in np.load(path)["video"].tolist():
            assert video not in found, f"{video} is in two parts"
            found[video] = path.name
    return found


history, kills = [], 0
for attempt in range(100):
    before = saved() if Path(out, "parts").exists() else {}
    left = set(start(rng.choice([1, 2, 3])))
    # A random moment of the work: after so many more parts, and a little.
    wanted = len(before) + (0 if len(before) > 22 else rng.choice([0, 1, 1, 2]))
    while left:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        if kills < 10 and left and len(list(Path(out, "parts").glob("part-*.npy"))) >= wanted:
            if Path(out, "parts", "fingerprint.json").exists():
                time.sleep(rng.uniform(0, 0.04))
                break
        time.sleep(0.002)
    killed = bool(left)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    kills += killed
    history.append({"before": before, "killed": killed, "after": saved() if killed else None})
    if not killed:
        break
print(json.dumps({"kills": kills, "history": history}))
'''


@pytest.mark.distributed
def test_killed_at_random_moments_nothing_saved_is_computed_again(
    trained: Path, data: dict[int, Path], tmp_path: Path
) -> None:
    (tmp_path / "kills.py").write_text(KILLS)
    log = tmp_path / "log.txt"
    done = subprocess.run(
        [sys.executable, str(tmp_path / "kills.py"), str(trained), str(data[31]), str(tmp_path / "out"), str(log)],
        env=environment(SEED="5"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    history = told["history"]
    assert told["kills"] == 10, history
    for attempt in history:
        if attempt["killed"]:  # what was saved stays, in the same file: never made again
            assert attempt["before"].items() <= attempt["after"].items()
    last = history[-1]
    assert not last["killed"]
    assert len(last["before"]) > 0
    said = log.read_text()
    assert f"{31 - len(last['before'])} videos x 3 views" in said
    assert f"{len(last['before'])} videos were there already" in said
    predict(arguments(trained, data[31], tmp_path / "whole"))
    whole, pieced = read_views(tmp_path / "whole"), read_views(tmp_path / "out")
    assert pieced.ids == whole.ids
    np.testing.assert_allclose(pieced.logits, whole.logits, atol=1e-5)
    assert (tmp_path / "out" / "submission.csv").read_bytes() == (tmp_path / "whole" / "submission.csv").read_bytes()


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt")
@pytest.mark.parametrize("program", ["predict", "embed"])
def test_memory_that_is_freed_stays_on_a_cpu(
    program: str, trained: Path, data: dict[int, Path], tmp_path: Path
) -> None:
    """Afterwards 128 MiB are filled and freed without page faults, as in no process by itself (test_meters)."""

    def output(script: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *words], env=environment(), capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()[-1]

    if not int(output(FAULTS, "asked", "1", "0")):
        pytest.skip("this C library maps every tensor above 32 MiB: no setting changes that")
    run = f"import sys; from vac_ddp.{program} import main; assert main(sys.argv[4:]) == 0"
    size = str(128 << 20)
    assert int(output(f"{run}\n{FAULTS}", "plain", "1", size, *arguments(trained, data[1], tmp_path / "out"))) < 8
