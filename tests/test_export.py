from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import shared
from tests.test_hf_adapter import tiny
from vac_ddp import config as settings_io
from vac_ddp.commands.export_command import main
from vac_ddp.errors import UserError
from vac_ddp.export import hugging_face, onnx_file
from vac_ddp.export.comparison import compare, random_clips
from vac_ddp.export.run_export import Options, export
from vac_ddp.files import whole_folder, write_json
from vac_ddp.models import file_state, load_model
from vac_ddp.settings import ClipSettings, Config, ModelSettings, PredictSettings

CLASSES = ["brush_hair", "chew", "climb"]
TINY = {"weights": None, "width": 16, "depth": 2, "heads": 2, "patch": 8, "head_init_scale": 50.0}
CLIP = ClipSettings(frames=4, size=16)


def make_run(
    folder: Path,
    model: ModelSettings,
    *,
    clip: ClipSettings = CLIP,
    predict: PredictSettings | None = None,
    data: str = "nowhere",
    cache_format: str = "jpeg",
    change=None,
) -> Path:
    """A run directory with a best checkpoint, as training leaves it."""
    config = Config(clip=clip, model=model, predict=predict or PredictSettings())
    config.data.train, config.optim.lr, config.optim.base_lr = data, 1e-3, None
    config.data.cache_format = cache_format
    loaded = load_model(model, clip, CLASSES, seed=0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if change is not None:
        change(loaded)
    folder.mkdir(parents=True)
    content = {
        "model": file_state(loaded.model),
        "classes": CLASSES,
        "config": settings_io.to_dict(config),
        "metrics": {"top1": 0.625, "top5": 1.0, "loss": 1.25},
        "architecture": loaded.architecture,
    }
    torch.save(content, folder / f"best_{model.name}.pt")
    write_json(folder / "classes.json", CLASSES)
    rows = ["video,class,source,part", *(f"chew/v{i},chew,s{i},{'val' if i < 2 else 'train'}" for i in range(7))]
    (folder / "split.csv").write_text("\n".join(rows) + "\n")
    return folder


def frames_folder(root: Path, *, videos: int = 2, frames: int = 9, size: tuple[int, int] = (60, 48)) -> Path:
    """Videos of random pictures, as <class>/<video>/0001.jpg."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        for video in range(videos):
            folder = root / name / f"v{video}"
            folder.mkdir(parents=True)
            for frame in range(frames):
                coarse = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
                stream = io.BytesIO()
                Image.fromarray(coarse).resize(size).save(stream, "JPEG")
                (folder / f"{frame + 1:04d}.jpg").write_bytes(stream.getvalue())
    return root


def ours(run: Path):
    source = next(run.glob("best_*.pt"))
    model = ModelSettings(name="videomae", weights=str(source))
    return load_model(model, CLIP, CLASSES, seed=0).model.eval()


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_videomae_goes_to_hugging_face_and_back(tmp_path, no_cache, capsys):
    from transformers import AutoImageProcessor, AutoModelForVideoClassification

    data = frames_folder(tmp_path / "data")
    model = ModelSettings(name="videomae", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), **TINY)
    clip = ClipSettings(frames=4, size=16, short_side=20)
    run = make_run(tmp_path / "run", model, clip=clip, data=str(data))
    out = tmp_path / "out"
    assert main([str(run), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "check.json",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "vac_ddp.yaml",
        "video_preprocessor_config.json",
    ]
    assert "on 4 real clips" in capsys.readouterr().out
    net = AutoModelForVideoClassification.from_pretrained(out).eval()
    assert net.config.id2label == dict(enumerate(CLASSES))
    assert net.config.label2id == {name: i for i, name in enumerate(CLASSES)}
    before = torch.load(run / "best_videomae.pt", weights_only=True)["model"]
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    clips = torch.randn(3, 4, 3, 16, 16)
    first = ours(run)
    torch.testing.assert_close(net(clips).logits, first(clips), rtol=1e-5, atol=1e-6)
    back = load_model(ModelSettings(name="videomae", weights=str(out)), CLIP, CLASSES, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(back.model.parameters(), first.parameters(), strict=True))
    assert torch.equal(back.model.eval()(clips), first(clips))
    assert back.mean == (0.1, 0.2, 0.3)
    processor = AutoImageProcessor.from_pretrained(out)
    assert type(processor).__name__.startswith("VideoMAEImageProcessor")
    picture = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    pixels = processor([picture] * 4, return_tensors="pt")["pixel_values"]
    mean, std = np.reshape([0.1, 0.2, 0.3], (3, 1, 1)), np.reshape([0.4, 0.5, 0.6], (3, 1, 1))
    expected = (picture[2:18, 4:20].transpose(2, 0, 1) / 255 - mean) / std
    assert pixels.shape == (1, 4, 3, 16, 16)
    np.testing.assert_allclose(pixels[0, 3], expected, rtol=0, atol=1e-5)


def test_the_card_tells_of_the_run(tmp_path):
    run = make_run(tmp_path / "run", ModelSettings(name="videomae", **TINY))
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\npipeline_tag: video-classification\nlibrary_name: transformers\n")
    for text in (
        "| top-1 accuracy | 0.6250 |",
        "On 2 validation videos",
        "`nowhere` (5 train, 2 val)",
        "`brush_hair`, `chew`, `climb`",
        "20% held out",
        "lr: 0.001",
        "4 frames (every 2. frame)",
        "not compared on real clips: nowhere is not here",
    ):
        assert text in card, text
    assert str(tmp_path) not in card


def test_the_pipeline_puts_the_same_class_on_top(tmp_path):
    """With 16 frames of real clips as an array (T, H, W, C)."""
    from transformers import pipeline

    from vac_ddp.data.dataset import TestViews
    from vac_ddp.data.frames import decode_frame
    from vac_ddp.data.index import open_index
    from vac_ddp.data.normalization import normalize
    from vac_ddp.settings import DataSettings, ViewSettings

    clip = ClipSettings(frames=16, stride=1, size=32)
    data = shared("clips", "data_test")
    index = open_index(data, labelled=False, settings=DataSettings(cache=str(tmp_path / "cache")))
    videos = [v for v in range(len(index)) if index.frame_counts[v] >= 16][:6]
    views = TestViews(index, np.array(videos), clip, ViewSettings(windows="offsets", offsets=[0]), tolerant=True)
    pixels = views.__getitems__(range(len(videos))).clips.flatten(0, 1)

    def logits_of(loaded) -> torch.Tensor:
        with torch.no_grad():
            return loaded.model.eval()(normalize(pixels, loaded.mean, loaded.std, torch.float32))

    def even(loaded) -> None:
        """No class is on top in all clips."""
        with torch.no_grad():
            loaded.model.head.bias -= logits_of(loaded).mean(0)

    run = make_run(tmp_path / "run", ModelSettings(name="videomae", **TINY), clip=clip, change=even)
    export(run, tmp_path / "out", Options(data=str(data)))
    classify = pipeline("video-classification", model=str(tmp_path / "out"))
    logits = logits_of(load_model(ModelSettings(name="videomae", weights=str(run)), clip, CLASSES, seed=0))
    tops = set()
    for video, expected in zip(videos, logits, strict=True):
        frames = np.stack([decode_frame(index.frame_bytes(video, frame), tolerant=True) for frame in range(16)])
        answer = classify(frames)
        assert answer[0]["label"] == CLASSES[int(expected.argmax())]
        assert answer[0]["score"] == pytest.approx(expected.softmax(0).max().item(), abs=0.02)
        tops.add(answer[0]["label"])
    assert len(tops) > 1


@pytest.mark.parametrize(
    ("name", "pooling", "why"),
    [
        ("lsvit", "mean", "no class for LSViT"),
        ("frame_vit", "transformer", "no class for FrameViT"),
        ("probe", "statistics", "cannot pool features over time"),
        ("probe", "attentive", "cannot pool features over time"),
    ],
)
def test_other_models_are_refused_for_hugging_face_and_go_to_onnx(tmp_path, name, pooling, why):
    pytest.importorskip("onnxruntime")
    encoder = "videomae" if pooling == "attentive" else "frame_vit"
    grid = 2 if name == "probe" else 1
    model = ModelSettings(name=name, pooling=pooling, encoder=encoder, spatial_grid=grid, **TINY)
    run = make_run(tmp_path / "run", model)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=rf"{why}.*--onnx"):
        export(run, out)
    assert not out.exists()
    lines = export(run, out, Options(onnx=True))
    assert any("no Hugging Face model" in line for line in lines)
    assert not (out / "config.json").exists()
    assert json.loads((out / "classes.json").read_text()) == CLASSES
    clips = torch.randn(5, 4, 3, 16, 16)
    model = load_model(ModelSettings(name=name, weights=str(run)), CLIP, CLASSES, seed=0).model.eval()
    torch.testing.assert_close(onnx_file.logits_of(out)(clips), model(clips), rtol=1e-4, atol=1e-5)


def test_interpolated_positions_are_refused_for_hugging_face(tmp_path):
    pytest.importorskip("onnxruntime")
    donor = make_run(tmp_path / "donor", ModelSettings(name="videomae", **TINY))
    longer = ModelSettings(name="videomae", weights=str(donor / "best_videomae.pt"))
    run = make_run(tmp_path / "run", longer, clip=ClipSettings(frames=8, size=16))
    with pytest.raises(UserError, match="cannot be interpolated"):
        export(run, tmp_path / "out")
    lines = export(run, tmp_path / "out", Options(onnx=True))
    assert any(line.startswith("onnxruntime: logits within") for line in lines)
    assert (tmp_path / "out" / "model.onnx").exists()


def test_a_run_that_began_from_an_official_file_is_exported_with_the_difference_of_eps(tmp_path):
    from transformers import AutoModelForVideoClassification

    from tests.test_videomae import official_logits, official_state

    narrow = ModelSettings(name="videomae", **TINY)
    donor = load_model(narrow, CLIP, CLASSES, seed=0).model
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        donor.blocks[-1].fc2.weight.mul_(0.01)  # a small variance before the classifier, where its eps counts
        donor.patch_embed.weight.mul_(0.01)
    arguments = argparse.Namespace(num_frames=4, input_size=16)
    torch.save({"module": official_state(donor), "args": arguments}, tmp_path / "official.pth")
    official = ModelSettings(name="videomae", weights=str(tmp_path / "official.pth"), heads=2)
    run = make_run(tmp_path / "run", official)
    lines = export(run, tmp_path / "out")
    (said,) = [line for line in lines if "LayerNorm eps 1e-05" in line]

    net = AutoModelForVideoClassification.from_pretrained(tmp_path / "out").eval()
    assert net.config.layer_norm_eps == 1e-6
    content = torch.load(run / "best_videomae.pt", weights_only=True)
    model = load_model(ModelSettings(name="videomae", weights=str(run)), CLIP, CLASSES, seed=0).model.eval()
    clips = random_clips((2, 4, 3, 16, 16))
    with torch.no_grad():
        state, video = official_state(model), clips.transpose(1, 2)
        want = official_logits(state, video, heads=2, eps=1e-6, head_eps=1e-6)
        theirs = official_logits(state, video, heads=2, eps=1e-6, head_eps=1e-5)
        torch.testing.assert_close(model(clips), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(clips).logits, theirs, rtol=1e-4, atol=1e-5)
        assert float(re.search(r"by up to (\S+)", said)[1]) == pytest.approx(
            float((want - theirs).abs().max()), rel=0.1
        )
    in_memory = AutoModelForVideoClassification.from_config(net.config).eval()
    in_memory.load_state_dict(content["model"])  # what the README says of best_videomae.pt: the same difference
    with torch.no_grad():
        assert torch.equal(in_memory(clips).logits, net(clips).logits)
    assert said in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["timesformer", "vivit", "vjepa2", "videoprism"])
def test_models_of_transformers_go_back(tmp_path, kind):
    from transformers import AutoModelForVideoClassification

    tiny(kind).save_pretrained(tmp_path / "hub")
    wanted = ModelSettings(name="hf", weights=str(tmp_path / "hub"), head_init_scale=50.0)
    run = make_run(tmp_path / "run", wanted)
    lines = export(run, tmp_path / "out", Options(onnx=kind == "vivit"))
    net = AutoModelForVideoClassification.from_pretrained(tmp_path / "out").eval()
    assert net.config.id2label == dict(enumerate(CLASSES))
    trained = load_model(ModelSettings(name="hf", weights=str(run)), CLIP, CLASSES, seed=0)
    model = trained.model.eval()
    clips = torch.randn(2, 4, 3, 16, 16)
    theirs = net(**{net.main_input_name: clips}).logits.flatten(1)
    torch.testing.assert_close(theirs, model(clips), rtol=1e-5, atol=1e-6)
    assert any("onnxruntime" in line for line in lines) == (kind == "vivit")
    again = load_model(ModelSettings(name="hf", weights=str(tmp_path / "out")), CLIP, CLASSES, seed=0)
    assert again.mean == pytest.approx(trained.mean)  # what the processor that was written makes of pixels
    assert again.std == pytest.approx(trained.std)
    assert not any("pre-processing" in note for note in again.report.notes) or kind == "vjepa2"


def test_what_exists_stays(tmp_path):
    run = make_run(tmp_path / "run", ModelSettings(name="videomae", **TINY))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        export(run, out)
    assert (out / "mine.txt").read_text() == "mine"


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", ModelSettings(name="videomae", **TINY))
    before = sorted(tmp_path.iterdir())

    def another_eps(folder, model, *rest):
        write(folder, model, *rest)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))

    write = hugging_face.write_model
    monkeypatch.setattr(hugging_face, "write_model", another_eps)
    with pytest.raises(RuntimeError, match="logits differ"):
        export(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_other_weights_are_noticed(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    run = make_run(tmp_path / "run", ModelSettings(name="videomae", **TINY))
    write = hugging_face.write_model

    def slip(folder, model, *rest):
        write(folder, model, *rest)
        state = load_file(folder / "model.safetensors")
        name = next(name for name in state if name.endswith("q_bias") or name.endswith("query.bias"))
        save_file({**state, name: state[name] + 1e-9}, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(hugging_face, "write_model", slip)
    with pytest.raises(RuntimeError, match="other weights"):
        export(run, tmp_path / "out")


def test_comparison_has_a_limit():
    model = torch.nn.Linear(3, 2)
    probe = [("a probe", torch.randn(4, 3))]
    assert "within 0.0e+00" in compare(model, model, probe, what="itself")[0]
    with pytest.raises(RuntimeError, match="a probe"):
        compare(model, lambda clips: model(clips) + 1e-2, probe, what="another")
    with pytest.raises(RuntimeError, match="nan"):
        compare(model, lambda clips: model(clips) * float("nan"), probe, what="another")


def test_a_directory_is_whole_or_absent(tmp_path):
    out = tmp_path / "deep" / "out"

    def fail() -> None:
        with whole_folder(out) as folder:
            (folder / "half").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(out.parent.iterdir()) == []
    with whole_folder(out) as folder:
        (folder / "all").write_text("all")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["all"]


def test_foreign_files_and_wrong_words(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        export(tmp_path / "nothing", tmp_path / "out")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "bare.pt")
    with pytest.raises(UserError, match="no checkpoint of vac_ddp"):
        export(tmp_path / "bare.pt", tmp_path / "out")
    with pytest.raises(UserError, match="see --help"):
        main([str(tmp_path)])
    run = make_run(tmp_path / "run", ModelSettings(name="videomae", **TINY))
    with pytest.raises(UserError, match="no such directory"):
        main([str(run), str(tmp_path / "out"), "--data", str(tmp_path / "gone")])
