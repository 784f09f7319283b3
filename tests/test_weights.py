"""Weights from every source, and what is refused: checked against Hugging Face's class and the official layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.test_videomae import TINY, clips, official_logits, official_state, randomise
from vac_ddp.errors import UserError
from vac_ddp.models import Loaded, build_model, file_state, load_model, weight_files
from vac_ddp.models.load_report import IMAGENET_MEAN
from vac_ddp.settings import ClipSettings, ModelSettings

CLASSES = ["climb_stairs", "jump", "ride_bike"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "num_frames": 4,
}


def load(weights: Path | str, classes: list[str] = CLASSES, clip: ClipSettings = TINY, **changes) -> Loaded:
    return load_model(ModelSettings(weights=str(weights), **changes), clip, classes, seed=0)


def hf_model(kind: str = "VideoMAEForVideoClassification", **changes):
    import transformers

    names = dict(enumerate(CLASSES))
    config = transformers.VideoMAEConfig(
        **{
            **SIZES,
            "decoder_hidden_size": 16,
            "decoder_num_attention_heads": 2,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 32,
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            **changes,
        }
    )
    return randomise(getattr(transformers, kind)(config)).eval()


def hf_directory(folder: Path, model=None) -> Path:
    (model or hf_model()).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change) -> Path:
    """Change the tensors of a directory; `change` gets and returns a dictionary."""
    path = folder / "model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path, metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@torch.no_grad()
def assert_same_logits(loaded: Loaded, twin) -> None:
    video = clips()
    ours, theirs = loaded.model(video), twin(video).logits
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def own_file(path: Path, loaded: Loaded, classes: list[str] = CLASSES, **changes) -> Path:
    content = {
        "model": file_state(loaded.model),
        "classes": classes,
        "config": {"model": {"name": "videomae"}},
        "metrics": {"top1": 0.5},
        "architecture": loaded.architecture,
    }
    torch.save({**content, **changes}, path)
    return path


def scratch(clip: ClipSettings = TINY, classes: list[str] = CLASSES) -> Loaded:
    settings = ModelSettings(weights=None, width=32, depth=2, heads=4)
    loaded = load_model(settings, clip, classes, seed=3)
    randomise(loaded.model)
    return loaded


# ---------------------------------------------------------------- Hugging Face directories


def test_the_directory_that_transformers_writes(tmp_path):
    twin = hf_model()
    folder = hf_directory(tmp_path, twin)
    assert any(name.endswith("attention.attention.q_bias") for name in load_file(folder / "model.safetensors"))
    loaded = load(folder)
    assert_same_logits(loaded, twin)
    report = loaded.report
    assert report.covered == 1.0
    assert (report.missing, report.unused) == ([], [])
    assert report.used == len(load_file(folder / "model.safetensors"))
    assert report.qv_biases == "arrived, 4"
    assert report.eps == "1e-12 in the blocks, 1e-05 before the classifier"
    assert report.head.startswith("kept, 3 classes")


def test_names_of_the_other_generation_and_a_bias_on_k(tmp_path):
    twin = hf_model()

    def newer(state: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {
            n.replace("attention.q_bias", "attention.query.bias").replace("attention.v_bias", "attention.value.bias"): t
            for n, t in state.items()
        }
        keys = {n.replace("key.weight", "key.bias"): torch.ones(32) for n in renamed if n.endswith("key.weight")}
        return renamed | keys

    loaded = load(rewrite(hf_directory(tmp_path, twin), newer))
    assert_same_logits(loaded, twin)
    assert len(loaded.report.unused) == 2
    assert all(name.endswith("key.bias") for name in loaded.report.unused)


def test_bin_files_and_several_shards(tmp_path):
    twin = hf_model()
    folder = hf_directory(tmp_path, twin)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_same_logits(load(folder), twin)
    (folder / "pytorch_model.bin").unlink()

    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: state[name].contiguous() for name in held}, folder / part)
    places = {name: part for part, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same_logits(load(folder), twin)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002"):
        load(folder)


def test_the_first_of_safetensors_and_bin_is_safetensors(tmp_path):
    folder = hf_directory(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"must not be opened")
    assert load(folder).report.file.endswith("model.safetensors")


@torch.no_grad()
def test_a_pre_training_directory_gives_the_backbone_and_mean_pooling(tmp_path):
    twin = hf_model("VideoMAEForPreTraining", use_mean_pooling=False)
    loaded = load(hf_directory(tmp_path, twin))
    model, report, video = loaded.model, loaded.report, clips()
    tokens = model.embed(video)
    for block in model.blocks:
        tokens = block(tokens)
    theirs = twin.videomae(video).last_hidden_state
    torch.testing.assert_close(twin.videomae.layernorm(tokens), theirs, atol=1e-5, rtol=0)
    logits = model(video)
    assert model.arch.pooling == "mean"
    assert logits.abs().max() < 1e-2
    assert report.missing == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert {n.split(".")[0] for n in report.unused} == {"decoder", "encoder_to_decoder", "mask_token", "videomae"}
    assert [n for n in report.unused if n.startswith("videomae")] == [
        "videomae.layernorm.bias",
        "videomae.layernorm.weight",
    ]
    assert "drawn" in report.head
    assert "videomae.layernorm is not used" in report.pooling


def test_a_classifier_trained_on_the_first_token_is_kept_as_it_is(tmp_path):
    twin = hf_model(use_mean_pooling=False)
    loaded = load(hf_directory(tmp_path, twin))
    assert_same_logits(loaded, twin)
    assert loaded.model.arch.pooling == "first"
    assert loaded.model.fc_norm.eps == twin.videomae.layernorm.eps
    assert "first token" in loaded.report.pooling
    twin.load_state_dict(file_state(loaded.model), strict=True)
    # with other classes there is no reason to stay with it
    assert load(tmp_path, ["a", "b"]).model.arch.pooling == "mean"


def test_a_config_without_biases_is_believed(tmp_path):
    twin = hf_model(qv_bias=False)
    loaded = load(hf_directory(tmp_path, twin))
    assert_same_logits(loaded, twin)
    assert "none in the source" in loaded.report.qv_biases


def test_the_report_says_whose_mean_and_std_they_are() -> None:
    settings = ModelSettings(weights=None, width=16, depth=1, heads=2, patch=8)
    given = dataclasses.replace(settings, mean=(0.34, 0.34, 0.34), std=(0.12, 0.12, 0.12))
    lines = ["\n".join(load_model(s, TINY, CLASSES, seed=0).report.lines()) for s in (settings, given)]
    assert "ImageNet's" in lines[0] and "of the settings" not in lines[0]
    assert "0.34" in lines[1] and "of the settings" in lines[1] and "ImageNet's" not in lines[1]


def test_settings_go_before_the_files_epsilon(tmp_path):
    folder = hf_directory(tmp_path)
    assert load(folder).model.blocks[0].norm1.eps == 1e-12
    loaded = load(folder, norm_eps=1e-6)
    assert loaded.model.blocks[0].norm1.eps == 1e-6
    assert loaded.report.eps.startswith("1e-06")


def test_half_precision_files_become_float32(tmp_path):
    loaded = load(hf_directory(tmp_path, hf_model().half()))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert any("float16" in note for note in loaded.report.notes)


def test_pre_processing_values_are_used(tmp_path):
    folder = hf_directory(tmp_path)
    assert load(folder).mean == IMAGENET_MEAN
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "size": {"shortest_edge": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    loaded = load(folder)
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert any("224" in note for note in loaded.report.notes)
    given = load(folder, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert (given.mean, given.std) == ((0.5,) * 3, (0.5,) * 3)
    (folder / "preprocessor_config.json").write_text('{"image_mean": "much"}')
    assert load(folder).mean == IMAGENET_MEAN
    (folder / "preprocessor_config.json").write_text('{"image_mean": [1, 2], "image_std": [1, 2]}')
    with pytest.raises(UserError, match="three numbers"):
        load(folder)


def test_the_hub_conversion_of_vit_small_gets_its_six_heads(tmp_path):
    changes = {"hidden_size": 384, "num_attention_heads": 16, "num_hidden_layers": 1, "intermediate_size": 64}
    folder = hf_directory(tmp_path, hf_model("VideoMAEForPreTraining", **changes))
    loaded = load(folder)
    assert loaded.model.arch.heads == 6
    assert any("16 heads" in note for note in loaded.report.notes)
    assert load(folder, heads=16).model.arch.heads == 16


# ---------------------------------------------------------------- the classifier


def test_rows_follow_the_names_of_the_classes(tmp_path):
    twin = hf_model()
    folder = hf_directory(tmp_path, twin)
    order = ["ride bike", "Climb Stairs", "jump"]
    loaded = load(folder, order)
    with torch.no_grad():
        ours, theirs = loaded.model(clips()), twin(clips()).logits
    torch.testing.assert_close(ours, theirs[:, [2, 0, 1]], atol=1e-5, rtol=0)
    assert "our order" in loaded.report.head


def test_other_classes_get_a_new_classifier(tmp_path):
    folder = hf_directory(tmp_path)
    for classes in (["a", "b", "c"], ["a", "b"]):
        loaded = load(folder, classes)
        assert loaded.model.head.weight.shape == (len(classes), 32)
        assert loaded.model.head.weight.std() < 1e-3
        assert loaded.report.missing == ["head.bias", "head.weight"]
        assert loaded.report.unused == ["classifier.bias", "classifier.weight"]
        assert 0.9 < loaded.report.covered < 1
        assert loaded.report.head.startswith(f"drawn for {len(classes)} classes")
    assert torch.equal(load(folder, ["a"]).model.head.weight, load(folder, ["a"]).model.head.weight)


# ---------------------------------------------------------------- official files


@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict"])
def test_official_fine_tuned_files(tmp_path, wrapper):
    model = scratch(ClipSettings(frames=16, size=224)).model
    state = official_state(model)
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "args": argparse.Namespace(num_frames=16)}
    torch.save(content, tmp_path / "k400.pth")
    loaded = load(tmp_path / "k400.pth", clip=ClipSettings(frames=16, size=224), heads=4)
    video = clips(ClipSettings(frames=16, size=224), batch=1)
    with torch.no_grad():
        ours = loaded.model(video)
        want = official_logits(state, video.transpose(1, 2), heads=4, eps=1e-6, head_eps=1e-6)
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=0)
    assert loaded.report.covered == 1.0
    assert loaded.report.eps == "1e-06 in the blocks, 1e-06 before the classifier"


@pytest.mark.parametrize("segments", [None, 2])
def test_official_files_say_for_which_clips_they_were_trained(tmp_path, segments):
    clip = ClipSettings(frames=8, size=64)
    state = official_state(scratch(clip).model)
    arguments = {"num_frames": 8} if segments is None else {"num_frames": 4, "num_segments": segments}
    torch.save({"module": state, "args": argparse.Namespace(input_size=64, **arguments)}, tmp_path / "k400.pth")
    loaded = load(tmp_path / "k400.pth", clip=clip, heads=4)
    video = clips(clip, batch=2)
    with torch.no_grad():
        want = official_logits(state, video.transpose(1, 2), heads=4, eps=1e-6, head_eps=1e-6)
        torch.testing.assert_close(loaded.model(video), want, atol=1e-5, rtol=0)
    assert not any("does not say for which clips" in note for note in loaded.report.notes)


def test_official_files_that_do_not_say_their_clips_are_noted(tmp_path):
    state = official_state(scratch(ClipSettings(frames=16, size=224)).model)
    torch.save({"model": state, "args": argparse.Namespace(input_size=224)}, tmp_path / "a.pth")
    (note,) = [n for n in load(tmp_path / "a.pth", heads=4).report.notes if "does not say for which clips" in n]
    assert note.endswith("assumed: 16 frames")


def test_official_pre_training_files(tmp_path):
    source = scratch().model
    state = {
        f"encoder.{name}": tensor
        for name, tensor in official_state(source).items()
        if not name.startswith(("head", "fc_norm"))
    }
    state |= {"encoder.norm.weight": torch.ones(32), "encoder.norm.bias": torch.zeros(32)}
    state |= {"decoder.blocks.0.attn.qkv.weight": torch.ones(3, 3), "mask_token": torch.zeros(1, 1, 16)}
    state |= {"encoder_to_decoder.weight": torch.ones(16, 32), "decoder.head.weight": torch.ones(4, 16)}
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "pt.pth")
    loaded = load(tmp_path / "pt.pth", heads=4)
    for name, tensor in loaded.model.state_dict().items():
        if not name.startswith(("head", "fc_norm")):
            assert torch.equal(tensor, source.state_dict()[name]), name
    assert len(loaded.report.unused) == 6
    assert loaded.report.qv_biases == "arrived, 4"
    assert "norm is not used" in loaded.report.pooling


def test_giants_patch_and_odd_mlp_are_read_from_the_file(tmp_path):
    settings = ModelSettings(weights=None, width=88, depth=1, heads=4, patch=14, mlp_ratio=48 / 11)
    model = randomise(build_model(settings, ClipSettings(frames=4, size=28), 3))
    torch.save({"module": official_state(model)}, tmp_path / "g.pth")
    with pytest.raises(UserError, match=r"model\.heads"):
        load(tmp_path / "g.pth", clip=ClipSettings(frames=4, size=28))
    arch = load(tmp_path / "g.pth", clip=ClipSettings(frames=4, size=28), heads=4).model.arch
    assert (arch.mlp, arch.patch, arch.grids) == (384, 14, ((8, 16, 16), (2, 2, 2)))


def test_a_learnt_position_table_is_not_dropped_in_silence(tmp_path):
    state = official_state(scratch().model)
    from vac_ddp.models.videomae import sincos_table

    torch.save({**state, "pos_embed": sincos_table(1568, 32)[None]}, tmp_path / "same.pth")
    assert "pos_embed" in load(tmp_path / "same.pth", heads=4).report.unused
    torch.save({**state, "pos_embed": torch.randn(1, 1568, 32)}, tmp_path / "learnt.pth")
    with pytest.raises(UserError, match="learnt position table"):
        load(tmp_path / "learnt.pth", heads=4)


# ---------------------------------------------------------------- other frame counts


def test_32_frames_from_16_frame_weights(tmp_path):
    folder = edit_config(hf_directory(tmp_path), num_frames=16, image_size=64)
    same = load(folder, clip=ClipSettings(frames=16, size=64))
    assert same.model.arch.grids == ((8, 4, 4),)
    longer = ClipSettings(frames=32, size=64)
    loaded = load(folder, clip=longer)
    assert loaded.model(clips(longer, batch=1)).shape == (1, 3)
    assert "interpolated to 16x4x4" in loaded.report.positions
    table = loaded.model.positions.view(16, 16, 32)
    between = same.model.positions.view(8, 16, 32)
    torch.testing.assert_close(table[1], 0.75 * between[0] + 0.25 * between[1], atol=1e-6, rtol=0)
    # the checkpoint remembers the way to its table, and another length starts from that one
    path = own_file(tmp_path / "best_videomae.pt", loaded)
    again = load(path, clip=longer)
    assert torch.equal(again.model.positions, loaded.model.positions)
    assert load(path, clip=ClipSettings(frames=8, size=64)).model.arch.grids == ((8, 4, 4), (16, 4, 4), (4, 4, 4))


# ---------------------------------------------------------------- our own checkpoints


@pytest.mark.parametrize("as_directory", [True, False])
def test_our_checkpoint_comes_back_bit_for_bit(tmp_path, as_directory):
    first = scratch()
    path = own_file(tmp_path / "best_videomae.pt", first)
    second = load(tmp_path if as_directory else path)
    assert second.architecture == first.architecture
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(first.model(clips()), second.model(clips()))
    source = weight_files.open_own(path)
    assert (source.classes, source.metrics) == (CLASSES, {"top1": 0.5})


def test_our_checkpoint_loads_into_hugging_faces_class_and_back(tmp_path):
    first = scratch()
    own_file(tmp_path / "best_videomae.pt", first)
    twin = hf_model(layer_norm_eps=1e-6)
    twin.load_state_dict(torch.load(tmp_path / "best_videomae.pt", weights_only=True)["model"], strict=True)
    assert_same_logits(first, twin)
    back = load(hf_directory(tmp_path / "hf", twin))
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, back.model.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(first.model(clips()), back.model(clips()))


def test_our_checkpoint_with_other_classes_keeps_all_but_the_classifier(tmp_path):
    first = scratch()
    path = own_file(tmp_path / "best_videomae.pt", first)
    loaded = load(path, ["wave", "jump"])
    assert torch.equal(loaded.model.fc_norm.weight, first.model.fc_norm.weight)
    assert loaded.report.missing == ["head.bias", "head.weight"]
    assert "1 in common" in loaded.report.head


@pytest.mark.parametrize("mean_pooling", [True, False])
def test_the_starting_notebooks_checkpoint(tmp_path, mean_pooling):
    twin = hf_model(hidden_size=64, num_attention_heads=1, num_frames=16, image_size=224, use_mean_pooling=mean_pooling)
    torch.save({"model": twin.state_dict(), "epoch": 7, "best_acc": 0.78}, tmp_path / "best_videomae.pt")
    clip = ClipSettings(frames=16, size=224)
    loaded = load(tmp_path / "best_videomae.pt", clip=clip)
    with torch.no_grad():
        video = clips(clip, batch=1)
        torch.testing.assert_close(loaded.model(video), twin(video).logits, atol=1e-5, rtol=0)
    assert "order is taken to be ours" in loaded.report.head
    with pytest.raises(UserError, match="no checkpoint of vac_ddp"):
        weight_files.open_own(tmp_path / "best_videomae.pt")


def test_a_checkpoint_of_another_kind_of_model_is_named(tmp_path):
    path = own_file(tmp_path / "best_lsvit.pt", scratch(), architecture={"name": "lsvit"})
    with pytest.raises(UserError, match=r"model\.name=lsvit"):
        load(path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("frame_vit", {"pooling": "attention"}), ("lsvit", {"smif": False})],
)
def test_checkpoints_of_the_timm_models_come_back(tmp_path, name, changes):
    sizes = {"backbone": "vit_tiny_patch16_224", "width": 32, "depth": 1, "heads": 2}
    clip = ClipSettings(frames=4, size=224)
    settings = ModelSettings(name=name, weights=None, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), **sizes, **changes)
    first = load_model(settings, clip, CLASSES, seed=1)
    randomise(first.model)
    config = {"model": dataclasses.asdict(settings)}
    path = own_file(tmp_path / f"best_{name}.pt", first, config=config)
    for weights in (path, tmp_path):
        second = load(weights, clip=clip, name=name, drop_path=0.1)
        assert second.mean == (0.5, 0.4, 0.3)
        assert all(torch.equal(t, second.model.state_dict()[n]) for n, t in first.model.state_dict().items())
    other = load(path, ["a", "b"], clip=clip, name=name)
    assert set(other.report.missing) == other.model.head_names()
    with pytest.raises(UserError, match=f"model.name={name}"):
        load(path, clip=clip)
    broken = {n: t for n, t in file_state(first.model).items() if "norm1" not in n}
    own_file(tmp_path / f"best_{name}.pt", first, config=config, model=broken)
    with pytest.raises(UserError, match=r"lacks .*norm1"):
        load(path, clip=clip, name=name)


def test_checkpoints_of_the_hf_adapter_come_back_without_their_source(tmp_path):
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = TimesformerConfig(**sizes, image_size=32, num_frames=4, patch_size=16)
    hf_directory(tmp_path / "hf", TimesformerForVideoClassification(config))
    first = load(tmp_path / "hf", name="hf")
    path = own_file(tmp_path / "best_hf.pt", first, config={"model": {"name": "hf", "weights": str(tmp_path / "hf")}})
    (tmp_path / "hf").rename(tmp_path / "gone")
    second = load(path, name="hf")
    assert all(torch.equal(t, second.model.state_dict()[n]) for n, t in first.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(first.model.eval()(clips()), second.model.eval()(clips()))


# ---------------------------------------------------------------- the report


def test_the_report_reads_and_is_plain_json(tmp_path):
    report = load(hf_directory(tmp_path), ["a", "b"]).report
    text = "\n".join(report.lines())
    for words in (
        "q, v biases",
        "arrived, 4",
        "drawn for 2 classes",
        "sha256",
        "1e-12",
        "0.485",
        "classifier.bias",
    ):
        assert words in text
    assert json.loads(json.dumps(report.as_dict()))["covered"] == report.covered
