"""`vac probe`: a run that predicts, scores, reports and exports as any other, from any number of ranks, resumable."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vac_ddp
from tests.support import torchrun
from vac_ddp import cli
from vac_ddp.commands import export_command, report_command
from vac_ddp.embed import embed
from vac_ddp.errors import Interrupted, UserError
from vac_ddp.predict import predict
from vac_ddp.probe import main, probe
from vac_ddp.probing import linear
from vac_ddp.report.run_reader import read_run
from vac_ddp.results.features_file import read_features
from vac_ddp.results.logits_file import read_views
from vac_ddp.results.metrics import classification_metrics

SIZE = 32
CLASSES = ["sit", "turn", "wave"]
VIDEOS = 36
FILES = [
    "best_probe.pt",
    "classes.json",
    "config.yaml",
    "features",
    "index.cache",
    "load_report.json",
    "log.txt",
    "metrics.jsonl",
    "report.html",
    "run.lock",
    "split.csv",
    "validation.npz",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small timm model, settings, and 36 labelled videos of 6 recordings; colours hint at classes."""
    folder = tmp_path_factory.mktemp("probe")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=0)
    torch.save(model.state_dict(), folder / "encoder.pth")
    (folder / "tiny.yaml").write_text(
        "model: {name: probe, encoder: frame_vit, backbone: test_efficientnet, "
        f"weights: {folder / 'encoder.pth'}}}\n"
        f"clip: {{frames: 4, size: {SIZE}, sampling: segments}}\n"
        f"data: {{workers: 0, group_regex: '^(tape[0-9]+)_', val_fraction: 0, cache: {folder / 'cache'}}}\n"
        "probe: {folds: 3, repeats: 2, statistics: [mean, mean+std], ridge: [10, 1000], logistic: [0.01]}\n"
        "predict: {views: {windows: spread, count: 1}}\n"
    )
    rng = np.random.default_rng(0)
    for number in range(VIDEOS):
        label = number % 3
        video = folder / "data" / CLASSES[label] / f"tape{number // 6}_{number:02}"
        video.mkdir(parents=True)
        colour = np.eye(3)[label] * 25 + rng.normal(size=3) * 20
        for frame in range(5):
            pixels = (rng.integers(0, 150, (SIZE, SIZE, 3)) + colour).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(video / f"{frame + 1:04}.png")
    return folder


def arguments(place: Path, run: Path, *words: str) -> list[str]:
    return [f"--config={place / 'tiny.yaml'}", f"data.train={place / 'data'}", f"run.dir={run}", *words]


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished probe run."""
    folder = tmp_path_factory.mktemp("runs") / "probe"
    probe(arguments(place, folder))
    return folder


def metrics(run: Path) -> dict[str, list[dict]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {kind: [line for line in lines if line["kind"] == kind] for kind in ("probe", "selected", "speed")}


def test_a_probe_leaves_a_run_directory(run, capsys):
    assert sorted({path.name for path in run.iterdir()} | {"run.lock"}) == FILES
    said = metrics(run)
    assert [line["probe"] for line in said["probe"]] == ["ridge", "logistic", "k-NN"]
    [selected] = said["selected"]
    views = read_views(run / "validation.npz")
    figures = classification_metrics(views.logits[:, 0], views.labels, views.classes)
    assert selected["val_top1"] == figures.top1
    assert 0.4 < selected["accuracy"] < 1
    assert len(selected["folds"]) == 6
    assert len(views.ids) == VIDEOS
    assert {row.split(",")[3] for row in (run / "split.csv").read_text().splitlines()[1:]} == {"train"}
    state = read_run(run, "probe")
    assert (state.state, state.best.top1) == ("done", figures.top1)
    assert state.settings["model.pooling"] == "statistics"
    log = (run / "log.txt").read_text()
    assert re.search(r"selected +\S+ (penalty|C)=\S+ +0\.\d{4} ± 0\.\d{4}", log)
    assert log.rstrip().endswith(f"vac predict --run {run} --data data_test")
    page = (run / "report.html").read_text()
    assert "<h2>Probes</h2>" in page
    assert "No epoch" not in page
    assert cli.main(["runs", str(run.parent)]) == cli.main(["table", str(run)]) == 0


def test_frames_and_cached_features_give_the_same_predictions(place, run, tmp_path):
    predict(["--run", str(run), "--data", str(place / "data"), "--out", str(tmp_path / "out")])
    views = read_views(tmp_path / "out")
    features = read_features(run / "features" / "data")
    saved = torch.load(run / "best_probe.pt", weights_only=True)
    x = features.steps[:, 0].astype(np.float64)
    parts = {"mean": x.mean(axis=1), "std": x.std(axis=1)}
    pooled = np.concatenate([parts[name] for name in saved["config"]["model"]["statistics"]], axis=1)
    expected = pooled @ saved["model"]["head.weight"].double().numpy().T + saved["model"]["head.bias"].numpy()
    assert views.ids == features.ids
    np.testing.assert_allclose(views.logits[:, 0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_load_report_and_score_know_a_probe(place, run, tmp_path):
    video = next((place / "data" / "wave").iterdir())
    [said] = vac_ddp.load(run).predict(video)
    predict(["--run", str(run), "--data", str(place / "data"), "--out", str(tmp_path / "out")])
    views = read_views(tmp_path / "out")
    logits = views.logits[views.ids.index(f"wave/{video.name}"), 0].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose([dict(said.top)[name] for name in CLASSES], expected, atol=1e-5)
    assert report_command.main([str(run)]) in (0, None)
    assert cli.main(["score", str(tmp_path / "out")]) == 0


def test_a_probe_exports_to_onnx(run, tmp_path):
    pytest.importorskip("onnx")
    assert export_command.main([str(run), str(tmp_path / "out"), "--onnx"]) == 0
    assert (tmp_path / "out" / "model.onnx").exists()


def test_a_fold_is_held_out_as_in_training(place, tmp_path):
    run = tmp_path / "run"
    probe(arguments(place, run, "data.fold=2/3", "probe.probes=[ridge]"))
    views = read_views(run / "validation.npz")
    assert 0 < len(views.ids) < VIDEOS
    predict(["--run", str(run), "--part", "val", "--out", str(tmp_path / "out")])
    again = read_views(tmp_path / "out")
    order = [again.ids.index(name) for name in views.ids]
    np.testing.assert_allclose(views.logits, again.logits[order], rtol=1e-4, atol=1e-4)
    saved = torch.load(run / "best_probe.pt", weights_only=True)
    assert sum(saved["class_counts"]) == VIDEOS - len(views.ids)


def test_videos_without_features_are_named_in_both_splits(place, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    probe(arguments(place, tmp_path / "whole", f"data.train={data}", "data.fold=1/3"))
    rows = [row.split(",") for row in (tmp_path / "whole" / "split.csv").read_text().splitlines()[1:]]
    lost = {part: next(row[0] for row in rows if row[3] == part) for part in ("train", "val")}
    for name in lost.values():
        for frame in (data / name).iterdir():
            frame.write_bytes(b"not an image")
    run = tmp_path / "damaged"
    probe(arguments(place, run, f"data.train={data}", "data.fold=1/3"))
    log = (run / "log.txt").read_text()
    for name in lost.values():
        assert f"1 videos without features are left out: {name}" in log
    whole, damaged = (set(read_views(tmp_path / name / "validation.npz").ids) for name in ("whole", "damaged"))
    assert whole - damaged == {lost["val"]}


def test_features_of_another_embedding_are_used_after_a_check(place, run, tmp_path):
    out = tmp_path / "features"
    embed(["--config", str(place / "tiny.yaml"), "--data", str(place / "data"), "--out", str(out), "--steps"])
    probe(arguments(place, tmp_path / "run", f"probe.features={out}"))
    assert not (tmp_path / "run" / "features").exists()
    assert metrics(tmp_path / "run")["selected"][0]["val_loss"] == metrics(run)["selected"][0]["val_loss"]
    with pytest.raises(UserError, match="has other features"):
        probe(arguments(place, tmp_path / "other", f"probe.features={out}", "clip.frames=3"))
    assert not (tmp_path / "other").exists()


def test_attentive_probes_make_a_run(place, tmp_path):
    run = tmp_path / "run"
    words = ["probe.probes=[attentive]", "probe.attentive_steps=20", "probe.repeats=1", "model.queries=2"]
    probe(arguments(place, run, *words, "probe.attentive_positions=false"))
    predict(["--run", str(run), "--data", str(place / "data"), "--out", str(tmp_path / "out")])
    saved = torch.load(run / "best_probe.pt", weights_only=True)
    assert saved["config"]["model"]["pooling"] == "attentive"
    assert saved["architecture"]["positions"] is False
    x = read_features(run / "features" / "data").steps[:, 0].astype(np.float64)
    scores = np.einsum("hd,vtd->vht", saved["model"]["pool.query"].numpy(), x) / np.sqrt(x.shape[2])
    weights = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
    pooled = np.einsum("vht,vtd->vhd", weights, x).reshape(len(x), -1)
    expected = pooled @ saved["model"]["head.weight"].numpy().T + saved["model"]["head.bias"].numpy()
    found = read_views(tmp_path / "out").logits[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_another_model_becomes_the_encoder(place, tmp_path, capsys):
    probe(arguments(place, tmp_path / "run", "model.name=frame_vit", "probe.probes=[ridge]", "probe.repeats=1"))
    assert "model.name=frame_vit is the encoder: model.name=probe" in capsys.readouterr().out


def test_the_encoder_of_a_run_is_probed_with_its_own_settings(place, run, tmp_path):
    again, words = tmp_path / "run", [f"model.weights={run}", "model.backbone=vit_small_patch16_224"]
    probe(arguments(place, again, *words))
    assert read_run(again, "").settings["model.backbone"] == "test_efficientnet"
    for name, folder in (("one", run), ("two", again)):
        predict(["--run", str(folder), "--data", str(place / "data"), "--out", str(tmp_path / name)])
    one, two = (read_views(tmp_path / name).logits for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)
    assert main(arguments(place, again, *words, "run.resume=auto")) == 0


def test_a_finished_probe_is_not_selected_again(place, run, capsys):
    before = (run / "best_probe.pt").stat().st_mtime_ns
    assert main(arguments(place, run, "run.resume=auto")) == 0
    assert "holds this probe already" in capsys.readouterr().out
    assert (run / "best_probe.pt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"another|other settings \(probe\.folds\)"):
        probe(arguments(place, run, "run.resume=auto", "probe.folds=4"))
    with pytest.raises(UserError, match="holds a run already"):
        probe(arguments(place, run))


def test_a_probe_that_was_stopped_goes_on_from_its_features(place, run, tmp_path, monkeypatch):
    folder, reduce = tmp_path / "run", linear.reduce

    def stopping(x: np.ndarray) -> linear.Reduced:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)
        return reduce(x)

    monkeypatch.setattr(linear, "reduce", stopping)
    with pytest.raises(Interrupted, match=r"SIGTERM while probes were selected; the features are saved"):
        probe(arguments(place, folder))
    assert (folder / "interrupted.json").exists()
    with pytest.raises(
        UserError, match=r"clip\.frames.* changed; give another run\.dir, or run\.overwrite=true to discard"
    ):
        probe(arguments(place, folder, "run.resume=auto", "clip.frames=3"))
    monkeypatch.setattr(linear, "reduce", reduce)
    features = folder / "features" / "data" / "features.npz"
    before = features.stat().st_mtime_ns
    probe(arguments(place, folder, "run.resume=auto"))
    assert features.stat().st_mtime_ns == before
    assert not (folder / "interrupted.json").exists()
    assert metrics(folder)["selected"][0]["val_loss"] == metrics(run)["selected"][0]["val_loss"]


def test_overwriting_a_probe_discards_it(place, tmp_path):
    folder, words = tmp_path / "run", ("probe.probes=[ridge]", "probe.repeats=1")
    probe(arguments(place, folder, *words))
    probe(arguments(place, folder, *words, "clip.frames=2", "run.overwrite=true"))
    assert read_features(folder / "features" / "data").steps.shape[2] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.distributed
def test_two_ranks_select_the_same_probe(place, run, tmp_path):
    folder = tmp_path / "run"
    done = torchrun(2, "-m", "vac_ddp.probe", *arguments(place, folder), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (torch.load(path / "best_probe.pt", weights_only=True)["model"] for path in (run, folder))
    np.testing.assert_allclose(two["head.weight"].numpy(), one["head.weight"].numpy(), rtol=1e-3, atol=1e-5)
    assert done.stdout.count("best weights") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["probe.folds=7"], "probe.folds=7"),
        (["probe.probes=[]"], "probe.probes is empty"),
        (["run.resume=x.pt"], "a probe has no checkpoints"),
        (["probe.statistics=[median]"], "median: expected some of"),
    ],
)
def test_settings_that_make_no_probe_are_one_line(place, tmp_path, words, said, capsys):
    assert main(arguments(place, tmp_path / "run", *words)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "best_probe.pt").exists()
