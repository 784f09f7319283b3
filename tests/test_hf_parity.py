"""Pixels and features of Hugging Face's video classifiers against transformers' own processors and classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_hf_adapter import CLIP, KINDS, tiny
from vac_ddp.data.frames import resize_crop, view_boxes
from vac_ddp.data.normalization import normalize
from vac_ddp.errors import UserError
from vac_ddp.models import weight_files
from vac_ddp.models.build import load_model, rebuild_model
from vac_ddp.models.hf_adapter import build_hf
from vac_ddp.models.load_report import file_state, load_file_state
from vac_ddp.models.processor import normalization_of, size_notes
from vac_ddp.settings import ClipSettings, ModelSettings

CLASSES = ["a", "b", "c"]
PLAIN = {"do_resize": False, "do_center_crop": False}
PROCESSORS = {
    "timesformer": ("TimesformerVideoProcessor", {"image_mean": [0.45] * 3, "image_std": [0.225] * 3}),
    "timesformer image": ("VideoMAEImageProcessor", {"image_mean": [0.45] * 3, "image_std": [0.225] * 3}),
    "vivit": ("VivitVideoProcessor", {}),
    "vivit image": ("VivitImageProcessor", {}),
    "vivit no offset": ("VivitImageProcessor", {"offset": False, "image_std": [0.3, 0.4, 0.5]}),
    "vivit not normalized": ("VivitImageProcessor", {"do_normalize": False}),
    "vivit only rescaled": ("VivitImageProcessor", {"rescale_factor": 1 / 100, "offset": False, "do_normalize": False}),
    "vjepa2": ("VJEPA2VideoProcessor", {}),
    "vjepa2 not rescaled": ("VJEPA2VideoProcessor", {"do_rescale": False}),
    "videoprism": ("LlavaOnevisionVideoProcessor", {"do_normalize": False}),
    "videoprism normalized": ("LlavaOnevisionVideoProcessor", {"do_normalize": True}),
}


def source_of(folder) -> weight_files.Source:
    return weight_files.open_source(str(folder))


def pixels_of(processor, video: torch.Tensor, **options) -> torch.Tensor:
    """What a processor of transformers makes of a video (T, H, W, 3) uint8: (1, T, 3, S, S)."""
    if "Video" in type(processor).__name__ and "Image" not in type(processor).__name__:
        made = processor(list(video.permute(0, 3, 1, 2)[None]), return_tensors="pt", **options)
    else:
        made = processor([Image.fromarray(frame) for frame in video.numpy()], return_tensors="pt", **options)
    values = next(value for name, value in made.items() if name.startswith("pixel_values"))
    return values.float()


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_equal_those_of_the_processor(tmp_path, case):
    import transformers

    name, values = PROCESSORS[case]
    processor = getattr(transformers, name)(**values)
    kind = case.split(" ")[0]
    tiny(kind).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    video = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    theirs = pixels_of(processor, video, **PLAIN)
    mean, std = normalization_of(source_of(tmp_path))
    ours = normalize(video[None], mean, std, torch.float32)
    torch.testing.assert_close(ours, theirs.view(ours.shape), rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    wanted = ModelSettings(name="hf", weights=str(tmp_path))
    loaded = build_hf(wanted, CLIP, 5, seed=0)
    assert (loaded.mean, loaded.std) == (mean, std)
    assert loaded.report.normalisation == "of the source's pre-processing"


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [("vivit", 0.75, 0.25), ("videoprism", 0.0, 1.0), ("timesformer", None, None), ("vjepa2", None, None)],
)
def test_without_a_processor_the_class_decides(tmp_path, kind, mean, std):
    tiny(kind).save_pretrained(tmp_path)
    wanted = (None, None) if mean is None else ((mean,) * 3, (std,) * 3)
    assert normalization_of(source_of(tmp_path)) == wanted
    report = build_hf(ModelSettings(name="hf", weights=str(tmp_path)), CLIP, 5, seed=0).report
    assert report.normalisation == ("ImageNet's; the source does not say" if mean is None else
                                    "of the class's pre-processing")  # fmt: skip


def test_a_rescale_factor_that_is_no_number_is_refused(tmp_path):
    tiny("vivit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"rescale_factor": "1/255"}')
    with pytest.raises(UserError, match=r"preprocessor_config.json: rescale_factor"):
        source_of(tmp_path)


@pytest.mark.parametrize(
    ("clip", "processor", "words"),
    [
        (ClipSettings(size=16), {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}, "side=18"),
        (ClipSettings(size=16, short_side=18), {"size": {"shortest_edge": 18}, "crop_size": 16}, None),
        (ClipSettings(size=16), {"size": {"shortest_edge": 18}, "crop_size": {"height": 24, "width": 24}}, "makes 24"),
        (ClipSettings(size=16), {"size": {"height": 16, "width": 16}}, "aspect ratio"),
        (ClipSettings(size=16), {"size": {"height": 24, "width": 24}}, "makes 24 pixels, clips here have 16"),
        (ClipSettings(size=16), {"size": {"shortest_edge": 16}, "do_center_crop": False, "crop_size": 24}, None),
        (ClipSettings(size=16), {"size": 16, "crop_size": 16}, None),
        (ClipSettings(size=16), {}, None),
    ],
)
def test_other_sizes_than_the_processor_s_are_named(tmp_path, clip, processor, words):
    tiny("vjepa2").save_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(processor))
    notes = size_notes(source_of(tmp_path), clip)
    assert (len(notes) == 1 and words in notes[0]) if words else notes == []


@pytest.mark.parametrize(("kind", "short"), [("timesformer", 32), ("vivit", 36), ("vjepa2", 36)])
def test_frames_resized_and_cropped_as_by_the_processor(kind, short):
    import transformers

    values = {"size": {"shortest_edge": short}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False}
    processor = getattr(transformers, PROCESSORS[kind][0])(**values)
    rows, columns = torch.meshgrid(torch.linspace(0, 6, 64), torch.linspace(0, 9, 96), indexing="ij")
    frame = 127 + 100 * torch.stack((rows.sin(), columns.cos(), (rows - columns).sin()), dim=-1)
    video = frame.to(torch.uint8).expand(4, -1, -1, -1)
    theirs = pixels_of(processor, video).view(4, 3, 32, 32).permute(0, 2, 3, 1)
    theirs = (theirs + 1) * 127.5 if kind == "vivit" else theirs * 255

    def difference(short_side: int) -> float:
        ours = torch.empty(4, 32, 32, 3, dtype=torch.uint8)
        resize_crop(video, view_boxes(64, 96, size=32, short_side=short_side, crops=1)[0], ours)
        return float((ours - theirs).abs().mean())

    assert difference(short) < 2.5  # crops begin at whole pixels, here before the resampling, there after it
    assert difference(68 - short) > 2 * difference(short)


def load(folder, **changes):
    return load_model(ModelSettings(weights=str(folder), **{"name": "hf", **changes}), CLIP, CLASSES, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_means_of_the_last_hidden_state(tmp_path, kind):
    net = tiny(kind).eval()
    net.save_pretrained(tmp_path)
    model = load(tmp_path).model.eval()
    clips = torch.randn(2, 4, 3, 16, 16)
    steps = model.steps(clips)
    assert steps.shape[1:] == model.step_shape == ((2 if kind in ("vivit", "vjepa2") else 4), 24)
    base = getattr(net, net.base_model_prefix)
    tokens = base(**{net.main_input_name: clips}).last_hidden_state
    patches = tokens[:, -steps.shape[1] * 4 :]  # 2 x 2 patches a step, after the class token where there is one
    torch.testing.assert_close(steps.mean(1), patches.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_regions_of_steps_are_where_their_pixels_are(tmp_path, kind):
    tiny(kind).save_pretrained(tmp_path)
    model = load(tmp_path, spatial_grid=2).model
    for name, parameter in model.named_parameters():  # no token reads another one
        if name.endswith(("attention.o_proj.weight", "attention.proj.weight", "attention.output.dense.weight")):
            parameter.data.zero_()
    clips = torch.randn(1, 4, 3, 16, 16, requires_grad=True)
    count, width = model.step_shape
    assert width == 4 * 24
    weights, frames = torch.randn(24), 4 // count
    for step in range(count):
        for region in range(4):
            features = model.steps(clips)[0, step, 24 * region : 24 * (region + 1)]
            (gradient,) = torch.autograd.grad((features * weights).sum(), clips)
            where = torch.zeros(4, 2, 2, dtype=torch.bool)
            where[frames * step : frames * (step + 1), region // 2, region % 2] = True
            found = gradient[0].abs().amax(1).unflatten(1, (2, 8)).unflatten(3, (2, 8)).amax((2, 4)) > 0
            assert torch.equal(found, where)


def test_a_grid_finer_than_the_patches_is_refused(tmp_path):
    tiny("vjepa2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"spatial_grid=3: the encoder's map is 2 x 2"):
        load(tmp_path, spatial_grid=3)


@pytest.mark.parametrize(("frames", "steps", "unread"), [(8, 4, 0), (7, 3, 1), (1, 1, 0)])
def test_frames_that_fill_no_tubelet_are_named(tmp_path, frames, steps, unread):
    tiny("vjepa2").save_pretrained(tmp_path)
    clip = ClipSettings(frames=frames, size=16)
    loaded = build_hf(ModelSettings(name="hf", weights=str(tmp_path)), clip, 5, seed=0)
    clips = torch.randn(1, frames, 3, 16, 16)
    assert loaded.model.steps(clips).shape == (1, *loaded.model.step_shape) == (1, steps, 24)
    assert [note for note in loaded.report.notes if "no tubelet" in note] == (
        [f"the last {unread} of {frames} frames fill no tubelet: the model does not see them"] if unread else []
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_on_an_encoder_of_transformers(tmp_path, kind):
    net = tiny(kind)
    base = getattr(net, net.base_model_prefix)
    (base if kind in ("vjepa2", "videoprism") else net).save_pretrained(tmp_path)  # the former come without classifier
    whole = load(tmp_path).model
    loaded = load(tmp_path, name="probe", encoder="hf", pooling="statistics", drop_path=0.3)
    probe = loaded.model.train()
    clips, noise = torch.randn(2, 4, 3, 16, 16), torch.rand(2, probe.noise_size)
    torch.testing.assert_close(probe.steps(clips), whole.steps(clips), rtol=0, atol=0)
    probe(clips, noise).square().sum().backward()
    for name, parameter in probe.named_parameters():
        assert parameter.grad is not None, name
        assert not any(part in name for part in ("predictor", "pooler", "net.head", "classifier")), name
        assert 0 <= probe.depth_of(name) < probe.num_depths
    assert [name for name in loaded.report.missing if name.startswith("encoder.")] == []
    settings = ModelSettings(name="probe", encoder="hf", pooling="statistics", weights="gone")
    architecture = json.loads(json.dumps(loaded.architecture))
    again = rebuild_model(settings, CLIP, CLASSES, architecture, seed=1).model
    load_file_state(again, file_state(probe))
    assert torch.equal(again.eval()(clips), probe.eval()(clips))
