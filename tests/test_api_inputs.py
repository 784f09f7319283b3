"""From Python: every form of x gives what `vac predict` gives for the same pixels; threads; models from elsewhere."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

import vac_ddp
from tests.support import environment
from tests.test_export import CLASSES, TINY, make_run
from tests.test_hf_adapter import tiny
from vac_ddp import UserError, cli
from vac_ddp.api import Classifier
from vac_ddp.export.run_export import export
from vac_ddp.results.features_file import read_features
from vac_ddp.settings import ClipSettings, ModelSettings, PredictSettings, ViewSettings

CLIP = ClipSettings(frames=4, size=16, short_side=20)
VIEWS = ViewSettings(windows="spread", count=2, crops=3, flip=True)
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and three videos as folders of frames without loss."""
    folder = tmp_path_factory.mktemp("forms")
    predict = PredictSettings(views=VIEWS)
    make_run(folder / "run", ModelSettings(name="videomae", **TINY), clip=CLIP, predict=predict)
    rng = np.random.default_rng(3)
    for number, name in enumerate(NAMES):
        target = folder / "test" / name
        target.mkdir(parents=True)
        for frame in range(9):
            coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((60 - number, 44)).save(target / f"{frame:04d}.png")
    for label, name in (("chew", "a"), ("climb", "b")):
        (folder / "labelled" / label).mkdir(parents=True)
        (folder / "labelled" / label / name).symlink_to(folder / "test" / name)
    for label in ("swim", "dive"):
        (folder / "strange" / label).mkdir(parents=True)
        (folder / "strange" / label / "a").symlink_to(folder / "test" / "a")
    (folder / "turned").mkdir()
    for path in (folder / "test" / "a").iterdir():  # lying on their side, as EXIF says
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(folder / "turned" / path.name, exif=exif)
    write_film(folder / "film.mkv")
    (folder / "mixed").mkdir()
    (folder / "mixed" / "film.mkv").symlink_to(folder / "film.mkv")
    (folder / "mixed" / "a").symlink_to(folder / "test" / "a")
    (folder / "list.csv").write_text("test/c\ntest/a\n")
    return folder


def film_frames() -> np.ndarray:
    """Frames that a prediction does not shrink: their short side is twice that of a clip."""
    coarse = np.random.default_rng(4).integers(0, 256, (9, 4, 5, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def write_film(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 40, 32, "bgr0"
        for pixels in film_frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode(None))


def film_as_jpeg() -> list[bytes]:
    """The frames as a prediction has them: JPEGs, as `vac extract` writes them."""
    return [simplejpeg.encode_jpeg(frame, quality=90, colorsubsampling="420") for frame in film_frames()]


@pytest.fixture(scope="module")
def wanted(place: Path) -> dict[str, np.ndarray]:
    """Name of each video -> the mean of the logits that `vac predict` writes for it, by numpy alone."""
    found = {}
    for data, videos in ((place / "test", 3), (place / "film.mkv", 1)):
        words = ["--run", str(place / "run"), "--data", str(data), "--out", str(place / f"out_{videos}")]
        settings = ["data.workers=0", f"data.cache={place / 'cache'}"]
        assert cli.main(["predict", "--nproc", "1", *words, *settings]) == 0
        with np.load(place / f"out_{videos}" / "views.npz") as file:
            assert file["logits"].shape == (videos, 12, 3)
            found |= dict(zip(file["ids"].tolist(), file["logits"].mean(axis=1), strict=True))
    assert list(found) == [*NAMES, "film"]
    return found


@pytest.fixture(scope="module")
def model(place: Path) -> Classifier:
    return vac_ddp.load(place / "run", device="cpu")


def images(place: Path, name: str) -> list[Image.Image]:
    return [Image.open(path) for path in sorted((place / "test" / name).iterdir())]


def array(place: Path, name: str) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images(place, name)])


def tensor(place: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(array(place, name)).permute(0, 3, 1, 2)


FORMS: dict[str, tuple[Callable[[Path], Any], list[tuple[str, str]]]] = {  # x, and (name, video) of each answer
    "folder of frames": (lambda p: p / "test" / "a", [("a", "a")]),
    "its path as text": (lambda p: str(p / "test" / "a"), [("a", "a")]),
    "folder of videos": (lambda p: p / "test", [("a", "a"), ("b", "b"), ("c", "c")]),
    "labelled folder": (lambda p: p / "labelled", [("chew/a", "a"), ("climb/b", "b")]),
    "csv": (lambda p: p / "list.csv", [("test/c", "c"), ("test/a", "a")]),
    "numpy": (lambda p: array(p, "b"), [("0", "b")]),
    "numpy with other strides": (lambda p: array(p, "b")[:, :, :, ::-1].copy()[..., ::-1], [("0", "b")]),
    "torch": (lambda p: tensor(p, "c"), [("0", "c")]),
    "images": (lambda p: images(p, "a"), [("0", "a")]),
    "turned images": (lambda p: [Image.open(path) for path in sorted((p / "turned").iterdir())], [("0", "a")]),
    "tuple of images": (lambda p: tuple(images(p, "a")), [("0", "a")]),
    "video file": (lambda p: p / "film.mkv", [("film", "film")]),
    "folder of files and folders": (lambda p: p / "mixed", [("a", "a"), ("film", "film")]),
    "its frames": (lambda p: np.stack([simplejpeg.decode_jpeg(data) for data in film_as_jpeg()]), [("0", "film")]),
    "list of files": (lambda p: [p / "film.mkv", p / "test" / "a"], [("film", "film"), ("a", "a")]),
    "list of paths": (lambda p: [p / "test" / "c", str(p / "test" / "a")], [("c", "c"), ("a", "a")]),
    "list of one": (lambda p: [array(p, "b")], [("0", "b")]),
    "mixed list": (
        lambda p: [tensor(p, "c"), p / "test" / "b", images(p, "a"), p / "labelled", array(p, "a"), p / "test" / "c"],
        [("0", "c"), ("b", "b"), ("2", "a"), ("chew/a", "a"), ("climb/b", "b"), ("4", "a"), ("c", "c")],
    ),
    "a name twice": (
        lambda p: [p / "test" / "a", p / "labelled" / "chew" / "a", p / "test" / "b"],
        [("PLACE/test/a", "a"), ("PLACE/labelled/chew/a", "a"), ("b", "b")],
    ),
    "a video twice": (
        lambda p: [p / "test" / "a", p / "test" / "a"],
        [("PLACE/test/a", "a"), ("PLACE/test/a", "a")],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_logits_of_vac_predict(
    place: Path, model: Classifier, wanted: dict[str, np.ndarray], form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, expected = FORMS[form]
    x = make(place)
    before = sorted(path for path in place.rglob("*"))
    found = model.predict(x, top=2)
    assert sorted(path for path in place.rglob("*")) == before
    assert capfd.readouterr() == ("", "")  # nothing was printed, nothing was redirected
    assert [video.name for video in found] == [name.replace("PLACE", str(place)) for name, _ in expected]
    for video, (_, name) in zip(found, expected, strict=True):
        assert video.logits.dtype == np.float32
        np.testing.assert_allclose(video.logits, wanted[name], rtol=0, atol=1e-5)
        shares = np.exp(wanted[name] - wanted[name].max())
        best = int(shares.argmax())
        assert (video.label, video.top[0].label) == (CLASSES[best], CLASSES[best])
        assert video.probability == pytest.approx(float(shares[best] / shares.sum()), abs=1e-5)
        assert (len(video.top), video.failed, video.faults) == (2, False, [])


def test_without_loss_a_video_file_gives_the_logits_of_its_pixels(place: Path) -> None:
    model = vac_ddp.load(place / "run", "data.cache_format=png", device="cpu")
    pixels = film_frames()
    forms = [pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2), list(map(Image.fromarray, pixels))]
    found = model.predict([place / "film.mkv", place / "mixed", *forms])
    assert [video.name for video in found] == [f"{place}/film.mkv", "a", f"{place}/mixed/film", "2", "3", "4"]
    films = [video.logits for video in found if video.name != "a"]
    assert all(np.abs(logits - films[-1]).max() <= 1e-5 for logits in films)
    (lossy,) = vac_ddp.load(place / "run", device="cpu").predict(place / "film.mkv")
    assert np.abs(lossy.logits - films[-1]).max() > 1e-4


def test_videos_differ(wanted: dict[str, np.ndarray]) -> None:
    """The table above would not notice a wrong video otherwise."""
    pairs = itertools.combinations(wanted.values(), 2)
    assert min(np.abs(one - other).max() for one, other in pairs) > 1e-2


def test_eight_threads_share_one_model(place: Path, model: Classifier) -> None:
    forms = [*(make(place) for make, _ in FORMS.values())]
    alone = [model.predict(x, views="2x3+flip" if number % 2 else "1x1") for number, x in enumerate(forms)]
    features = model.embed(place / "test").numpy()

    def work(thread: int) -> list[Any]:
        order = [(thread + number) % len(forms) for number in range(len(forms))]
        found = {number: model.predict(forms[number], views="2x3+flip" if number % 2 else "1x1") for number in order}
        assert np.array_equal(model.embed(place / "test").numpy(), features)
        return [found[number] for number in range(len(forms))]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, range(8)):
            for videos, single in zip(found, alone, strict=True):
                assert [v.name for v in videos] == [v.name for v in single]
                assert all(np.array_equal(v.logits, w.logits) for v, w in zip(videos, single, strict=True))


def test_one_pass_at_a_time(place: Path, model: Classifier) -> None:
    held: list[bool] = []
    hook = model.model.register_forward_pre_hook(lambda *_: held.append(model.scorer.lock.locked()))
    try:
        model.predict(place / "test", views="1x1")
        model(torch.zeros(1, 4, 3, 16, 16))
    finally:
        hook.remove()
    assert held == [True, True]


def test_loader_processes_give_the_same(place: Path, model: Classifier) -> None:
    x = FORMS["mixed list"][0](place)
    alone, helped = model.predict(x), model.predict(x, workers=2)
    assert [v.name for v in alone] == [v.name for v in helped]
    assert all(np.array_equal(v.logits, w.logits) for v, w in zip(alone, helped, strict=True))


# ---------------------------------------------------------------- other questions


def test_features_are_those_of_vac_embed(place: Path, model: Classifier) -> None:
    words = ["--run", str(place / "run"), "--data", str(place / "test"), "--out", str(place / "features"), "--steps"]
    assert cli.main(["embed", "--nproc", "1", *words, "data.workers=0", f"data.cache={place / 'cache'}"]) == 0
    file = read_features(place / "features" / "features.npz")
    assert file.steps is not None
    found = model.embed(place / "test", steps=True)
    assert [video.name for video in found] == file.ids
    np.testing.assert_allclose(found.numpy(), file.pooled, rtol=0, atol=1e-5)
    for video, steps in zip(found, file.steps, strict=True):
        assert video.steps is not None
        np.testing.assert_allclose(video.steps, steps, rtol=0, atol=1e-5)
    (alone,) = model.embed(array(place, "b"))
    np.testing.assert_allclose(alone.pooled, file.pooled[1], rtol=0, atol=1e-5)
    assert alone.steps is None


def test_clips_go_through_the_network(place: Path, model: Classifier) -> None:
    pixels = torch.randint(0, 256, (3, 4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    clips = (pixels / 255 - mean) / std
    logits = model(clips)
    assert (logits.dtype, logits.requires_grad) == (torch.float32, False)
    with torch.no_grad():
        torch.testing.assert_close(logits, model.model(clips), rtol=0, atol=0)
    video = pixels[0].to(torch.uint8).contiguous()
    for setting, value in (("short_side", 16), ("stride", 1)):
        setattr(model.config.clip, setting, value)
    try:
        (found,) = model.predict(video, views="1x1")  # these very pixels: one window, one crop
    finally:
        model.config.clip.short_side, model.config.clip.stride = CLIP.short_side, CLIP.stride
    np.testing.assert_allclose(found.logits, logits[0], rtol=0, atol=1e-5)


def test_results_read_well(place: Path, model: Classifier) -> None:
    found = model.predict(place / "test", top=2)
    first = found[0]
    assert repr(first) == f"Prediction(name='a', label={first.label!r}, probability={first.probability:.4f})"
    label, probability = first.top[0]
    assert (label, probability) == (first.label, first.probability)
    again = pickle.loads(pickle.dumps(found))
    assert ([repr(video) for video in again], again.notes) == ([repr(video) for video in found], found.notes)
    told = json.loads(json.dumps(found.to_dict()))
    assert [video["name"] for video in told] == list(NAMES)
    assert told[0] == {
        "name": "a",
        "label": label,
        "probability": probability,
        "top": [{"label": pair.label, "probability": pair.probability} for pair in first.top],
        "failed": False,
        "faults": [],
    }
    frame = pytest.importorskip("pandas", reason="needs pandas (the extra test)") and found.to_pandas()
    assert list(frame.columns) == ["name", "label", "probability", "failed"]
    assert frame["label"].tolist() == [video.label for video in found]
    assert repr(model) == f"<Classifier {str(place / 'run')!r}: videomae, 3 classes, clips of 4 x 16 x 16, on cpu>"
    assert repr(model.embed(place / "test" / "a")[0]) == "Embedding(name='a', 12 views of 16 features)"


def test_without_pandas_it_is_one_line(place: Path, model: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        model.predict(place / "test").to_pandas()


def test_damage_is_named_and_every_video_gets_an_answer(place: Path, model: Classifier, tmp_path: Path) -> None:
    for name in ("half", "none"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for frame in range(5):
            image = array(place, "a")[frame]
            Image.fromarray(image).save(tmp_path / "data" / name / f"{frame}.png")
    (tmp_path / "data" / "half" / "0.png").write_bytes(b"no image")
    for path in (tmp_path / "data" / "none").iterdir():
        path.write_bytes(b"")
    (tmp_path / "data" / "notes.txt").write_text("stray")
    half, none = found = model.predict(tmp_path / "data")
    assert any("notes.txt" in note for note in found.notes)
    assert not half.failed
    assert [line.split(":")[0] for line in half.faults] == ["damaged frame half/0.png"]
    assert none.failed
    assert none.faults
    np.testing.assert_allclose(none.logits, np.full(3, -math.log(3)), rtol=1e-6)
    again = model.predict([tmp_path / "data" / "half", place / "test" / "b", tmp_path / "data" / "half"])
    assert [video.faults == half.faults for video in again] == [False, False, False]  # named by its path here
    assert [len(video.faults) for video in again] == [1, 0, 1]
    np.testing.assert_allclose(again[0].logits, half.logits, rtol=0, atol=1e-5)


def test_a_damaged_file_ends_no_other_videos_work(place: Path, model: Classifier, tmp_path: Path) -> None:
    data = (place / "film.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "page.mp4").write_bytes(b"<!DOCTYPE html>")
    cut, page, whole = model.predict([tmp_path / "cut.mkv", tmp_path / "page.mp4", place / "film.mkv"])
    assert (cut.failed, page.failed, whole.failed, whole.faults) == (False, True, False, [])
    assert cut.faults
    assert len(page.faults) == 1
    assert "page.mp4 cannot be read as a video" in page.faults[0]
    with pytest.raises(UserError, match=re.escape(page.faults[0])):
        model.predict(tmp_path / "page.mp4")
    (alone,) = model.predict(tmp_path / "cut.mkv")
    assert (alone.faults, alone.logits.tolist()) == (cut.faults, cut.logits.tolist())


ERRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (lambda p: p / "nothing", "no such data: .*nothing"),
    "nothing there, in a list": (lambda p: [p / "test" / "a", p / "nothing"], "no such data: .*nothing"),
    "an empty list": (lambda p: [], "x is an empty list: expected a path"),
    "an empty list in a list": (lambda p: [[]], r"x\[0\] is a list that holds nothing"),
    "a list of lists of paths": (lambda p: [[p / "test"]], r"x\[0\] is a list that holds PosixPath"),
    "images and paths": (lambda p: [*images(p, "a")[:1], p / "test"], r"x\[0\] is one image, not a video"),
    "one image": (lambda p: images(p, "a")[0], "x is one image, not a video: give the images of a video as a list"),
    "None": (lambda p: None, "x is of type NoneType: expected a path"),
    "a generator": (lambda p: (p / "test").iterdir(), "x is of type .*: expected a path"),
    "floats": (
        lambda p: array(p, "a") / np.float32(255),
        r"of float32: expected uint8.*\(x \* 255\)\.round\(\)\.astype",
    ),
    "floats of torch": (lambda p: tensor(p, "a") / 255, r"of float32: expected uint8.*\.round\(\)\.to\(torch\.uint8\)"),
    "large integers": (
        lambda p: [array(p, "a").astype(np.int64)],
        r"x\[0\] is a numpy array .* of int64: .*give x\[0\]",
    ),
    "texts": (lambda p: np.array(["a", "b"]), "x is a numpy array .* of <U1"),
    "one frame": (lambda p: array(p, "a")[0], r"shape \(44, 60, 3\): expected \(T, H, W, 3\); stack"),
    "channels first": (lambda p: array(p, "a").transpose(0, 3, 1, 2), r"give x\.transpose\(0, 2, 3, 1\)"),
    "channels last": (lambda p: tensor(p, "a").permute(0, 2, 3, 1), r"give x\.permute\(0, 3, 1, 2\)"),
    "grey": (lambda p: array(p, "a")[..., :1], "give three channels"),
    "a batch": (lambda p: array(p, "a")[None], r"expected \(T, H, W, 3\); give a list of its videos"),
    "a batch of torch": (lambda p: tensor(p, "a")[None], r"expected \(T, 3, H, W\); give a list of its videos"),
    "no frames": (lambda p: np.zeros((0, 8, 8, 3), np.uint8), "a video needs at least one frame"),
    "no pixels": (lambda p: torch.zeros(4, 3, 0, 8, dtype=torch.uint8), "its frames have no pixels"),
    "a file that is none": (lambda p: p / "run" / "classes.json", "is a file and no CSV"),
    "unknown classes": (lambda p: p / "strange", "classes that training does not know \\(dive, swim\\)"),
    "a zero byte": (lambda p: "a\0b", r"no such data: a\\x00b"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_no_video_is_one_line(place: Path, model: Classifier, case: str) -> None:
    make, said = ERRORS[case]
    with pytest.raises(UserError, match=said) as caught:
        model.predict(make(place))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


def test_other_mistakes_are_one_line(place: Path, model: Classifier) -> None:
    for call, said in (
        (lambda: model.predict(place / "test", top=0), "top=0: expected a number of classes from 1"),
        (lambda: model.predict(place / "test", top="all"), "top=all"),  # type: ignore[arg-type]
        (lambda: model.predict(place / "test", views=5), "expected KxC"),  # type: ignore[arg-type]
        (lambda: model(torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8)), "clips are torch.uint8: expected normalized"),
        (lambda: model(np.zeros((1, 4, 3, 16, 16), np.float32)), "clips are ndarray"),  # type: ignore[arg-type]
        (lambda: model(torch.zeros(4, 3, 16, 16)), r"expected \(B, T, C, H, W\) = \(B, 4, 3, 16, 16\)"),
        (lambda: vac_ddp.load(place / "run", "clip.strde=3"), "did you mean clip.stride"),
        (lambda: vac_ddp.load(place / "run", "optim.lr=3"), "this can change predict., data., clip."),
        (lambda: vac_ddp.load(place / "run", "clip.short_side=8"), "is below clip.size=16"),
        (lambda: vac_ddp.load(place / "run", "predict.keep_tokens=0.5").embed(place / "test"), "features are of all"),
        (lambda: vac_ddp.load(place / "nothing" / "there" / "at-all"), "no such file or directory"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------- models from elsewhere


@pytest.mark.parametrize("kind", ["videomae", "official", "timesformer", "vjepa2"])
def test_an_exported_directory_and_its_run_agree(place: Path, tmp_path: Path, kind: str) -> None:
    predict = PredictSettings(views=VIEWS, average="mean-probs")
    settings = ModelSettings(name="videomae", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), **TINY)
    if kind == "official":  # its LayerNorm before the classifier has another epsilon than transformers' class
        from vac_ddp.models.load_report import Loaded

        def change(loaded: Loaded) -> None:
            loaded.model.arch = dataclasses.replace(loaded.model.arch, head_eps=1e-2)

        run = make_run(tmp_path / "run", settings, clip=CLIP, predict=predict, change=change)
    elif kind == "videomae":
        run = make_run(tmp_path / "run", settings, clip=CLIP, predict=predict)
    else:
        tiny(kind).save_pretrained(tmp_path / "hub")
        settings = ModelSettings(name="hf", weights=str(tmp_path / "hub"), head_init_scale=50.0)
        run = make_run(tmp_path / "run", settings, clip=CLIP, predict=predict)
    export(run, tmp_path / "out")
    x = [place / "test", array(place, "b")]
    first, again = vac_ddp.load(run), vac_ddp.load(tmp_path / "out")
    assert again.classes == first.classes
    ours, theirs = first.predict(x), again.predict(x)
    for one, other in zip(ours, theirs, strict=True):
        assert one.name == other.name
        np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-5)
    assert np.ptp([video.logits for video in ours], axis=0).max() > 1e-3


def test_a_hub_id_is_taken_from_the_local_cache(place: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its variables once."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": {0: "swim", 1: "dive"}, "label2id": {"swim": 0, "dive": 1}}
    torch.manual_seed(0)
    config = VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, **sizes, **labels)
    net = VideoMAEForVideoClassification(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    repository, revision = tmp_path / "hub" / "models--someone--swimmers", "b" * 40
    net.save_pretrained(repository / "snapshots" / revision)
    processor = {"image_mean": [0.1] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 18}, "crop_size": 16}
    (repository / "snapshots" / revision / "preprocessor_config.json").write_text(json.dumps(processor))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    script = (
        "import sys, numpy, torch, vac_ddp\n"
        "model = vac_ddp.load('someone/swimmers', 'clip.stride=1')\n"
        "video = torch.from_numpy(numpy.load('video.npy'))\n"
        "(found,) = model.predict(video, views='1x1')\n"
        "print(*found.logits.tolist(), model.config.clip.short_side, model.classes, sep='|')\n"
        "for name in ('someone/divers', 'no such thing', 'runs/none'):\n"
        "    try: vac_ddp.load(name)\n"
        "    except vac_ddp.UserError as error: print(error)\n"
    )
    pixels = torch.randint(0, 256, (4, 3, 18, 18), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    np.save(tmp_path / "video.npy", pixels.numpy())
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, divers, thing, none = done.stdout.splitlines()
    *logits, short_side, classes = first.split("|")
    crop = pixels[None, :, :, 1:17, 1:17] / 255
    with torch.no_grad():
        expected = net((crop - 0.1) / 0.5).logits[0]  # the middle of the frames, by transformers' class itself
    np.testing.assert_allclose([float(value) for value in logits], expected, rtol=0, atol=1e-5)
    assert (short_side, classes) == ("18", "['swim', 'dive']")
    assert "someone/divers is no file or directory here, not in the local cache" in divers
    assert "hf download someone/divers --local-dir DIR" in divers
    assert "model.weights" not in divers
    assert "no such file or directory" in thing
    assert "runs/none is no file or directory here" in none


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, **sizes, **decoder, decoder_intermediate_size=16)
    VideoMAEForPreTraining(config).save_pretrained(tmp_path / "pretrained")
    with pytest.raises(UserError, match="no classifier"):
        vac_ddp.load(tmp_path / "pretrained")
    net = VideoMAEForVideoClassification(config)
    net.save_pretrained(tmp_path / "old")
    os.remove(tmp_path / "old" / "model.safetensors")  # noqa: PTH107
    torch.save(net.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, not as safetensors"):
        vac_ddp.load(tmp_path / "old")


def test_the_package_shows_what_it_has() -> None:
    shown = dir(vac_ddp)
    assert {"load", "Classifier", "Prediction", "UserError", "__version__"} <= set(shown)
    assert not {"importlib", "sys", "types", "warnings"} & set(shown)
    for name in shown:
        thing = getattr(vac_ddp, name)
        assert name == "__version__" or (thing.__doc__ or "").strip(), name
    for call, names in (
        (vac_ddp.load, ["run", "settings", "device"]),
        (Classifier.predict, ["self", "x", "top", "views", "workers"]),
        (Classifier.embed, ["self", "x", "views", "steps", "workers"]),
    ):
        assert list(inspect.signature(call).parameters) == names
