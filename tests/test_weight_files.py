"""Weight files that are incomplete, foreign, damaged or hostile, and the hub: one clear line, nothing executed."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_videomae import official_state
from tests.test_weights import assert_same_logits, edit_config, hf_directory, hf_model, load, rewrite, scratch
from vac_ddp.errors import UserError
from vac_ddp.models.torch_file import read_torch

# ---------------------------------------------------------------- what is refused


def drop(*endings: str):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.endswith(endings)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("attention.q_bias"), r"lacks 2: blocks\.0\.q_bias.*transformers"),
        (drop("attention.q_bias", "attention.v_bias"), r"lacks 4: blocks\.0\.q_bias.*transformers"),
        (drop("1.attention.attention.key.weight"), r"blocks\.1\.qkv\.weight"),
        (drop("classifier.bias"), r"head\.bias"),
        (lambda s: {**s, "videomae.embeddings.cls_token": torch.ones(1, 1, 32)}, "another architecture"),
        (lambda s: {**s, "videomae.encoder.layer.0.lambda_1": torch.ones(32)}, r"no place for 1: .*lambda_1"),
        (lambda s: {n: t * float("nan") if "fc_norm" in n else t for n, t in s.items()}, "not finite"),
        (lambda s: {n: t[:5] if n.endswith("1.output.dense.bias") else t for n, t in s.items()}, r"shape \(5,\)"),
        (lambda s: {"resnet.conv1.weight": torch.ones(3)}, "holds no VideoMAE.*resnet"),
    ],
)
def test_incomplete_and_foreign_tensors_are_refused_by_name(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        load(rewrite(hf_directory(tmp_path), change))


def test_official_files_without_q_biases_are_refused(tmp_path):
    torch.save(drop("q_bias")(official_state(scratch().model)), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"lacks 2: blocks\.0\.q_bias"):
        load(tmp_path / "x.pth", heads=4)


def test_other_models_and_sizes_are_refused(tmp_path):
    folder = hf_directory(tmp_path)
    for changes, words in (({"width": 64}, "width 64"), ({"size": "base"}, "width 768"), ({"patch": 8}, "patch 8")):
        with pytest.raises(UserError, match=words):
            load(folder, **changes)
    edit_config(folder, model_type="timesformer")
    with pytest.raises(UserError, match=r"timesformer.*model\.name=hf"):
        load(folder)


class Trap:
    """Unpickled by an unwary reader, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "bin"])
def test_code_in_a_file_is_not_run(tmp_path, form):
    trap = tmp_path / "sprung"
    content = {"model": official_state(scratch().model), "hello": Trap(trap)}
    path = tmp_path / "evil.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap(trap)))
    elif form == "bin":
        hf_directory(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(content, tmp_path / "pytorch_model.bin")
        path = tmp_path
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"run code|damaged or no PyTorch file") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_the_trap_is_one(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


DAMAGE = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "tail": lambda whole: whole[:-100],
    "noise": lambda whole: bytes(range(256)) * 40,
    "empty": lambda whole: b"",
    "page": lambda whole: b"<!doctype html><title>404</title>",
    "pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_damaged_files_give_one_line(tmp_path, kind, form):
    path = tmp_path / "w.pth" if form == "pth" else hf_directory(tmp_path) / "model.safetensors"
    if form == "pth":
        torch.save({"model": official_state(scratch().model)}, path)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(UserError) as caught:
        load(path if form == "pth" else tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    assert ("git-lfs" in message) == (kind == "pointer")


@pytest.mark.parametrize(
    ("content", "words"), [([torch.ones(2)], "holds a list"), ({"epoch": 3}, "no tensors, only epoch"), ({}, "nothing")]
)
def test_files_without_tensors_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "w.pth")


def test_damaged_json_gives_one_line(tmp_path):
    folder = hf_directory(tmp_path)
    (folder / "config.json").write_text('{"hidden_size": 3')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load(folder)


def test_an_index_cannot_lead_out_of_its_directory(tmp_path):
    folder = hf_directory(tmp_path / "hf")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="weight_map"):
        load(folder)


# ---------------------------------------------------------------- where there is nothing


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "none.pt", "no such file"),
        (lambda d: d, "neither a run"),
        (lambda d: [(d / "best_a.pt").touch(), (d / "best_b.pt").touch(), d][2], "name one of them"),
        (lambda d: [(d / "config.json").write_text("{}"), d][1], "none of model.safetensors"),
    ],
)
def test_nothing_there(tmp_path, make, words):
    with pytest.raises(UserError, match=words):
        load(make(tmp_path))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_id_without_a_network_says_what_to_do(offline):
    with pytest.raises(UserError, match=r"hf download MCG-NJU/videomae-base --local-dir DIR.*model\.weights=null"):
        load("MCG-NJU/videomae-base")
    with pytest.raises(UserError, match="no hub id"):
        load("not a hub id")


def test_a_hub_id_is_taken_from_the_local_cache(offline):
    repository = offline / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    twin = hf_model()
    hf_directory(repository / "snapshots" / ("a" * 40), twin)
    loaded = load("someone/tiny")
    assert_same_logits(loaded, twin)
    assert loaded.report.source == "someone/tiny"
    assert "revision aaaa" in loaded.report.kind


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository on this machine, with the answers that huggingface_hub's client asks for."""
    from huggingface_hub import constants

    folder, sha = tmp_path / "served", "b" * 40

    class Answer(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:4] == ["api", "models", "someone", "tiny"]:
                listed = [{"rfilename": path.name} for path in folder.iterdir()]
                body = json.dumps({"id": "someone/tiny", "sha": sha, "siblings": listed}).encode()
            elif parts[:3] == ["someone", "tiny", "resolve"] and (folder / parts[-1]).exists():
                body = (folder / parts[-1]).read_bytes()
            else:
                code = "EntryNotFound" if "tiny" in parts else "RepoNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", sha)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_downloaded_once_and_a_wrong_name_is_said(hub):
    twin = hf_model()
    hf_directory(hub, twin)
    (hub / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}')
    loaded = load("someone/tiny")
    assert_same_logits(loaded, twin)
    assert loaded.mean == (0.1, 0.2, 0.3)
    assert "revision bbbb" in loaded.report.kind
    with pytest.raises(UserError, match="hub has no such model"):
        load("someone/else")
    (hub / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load("someone/tiny")


class Harmful:
    """Pickles as a call."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return self.call[0], tuple(self.call[1:])


def test_numbers_of_numpy_beside_the_tensors_are_read_and_nothing_else(tmp_path: Path) -> None:
    """As official checkpoints have them; what numpy itself would build from a pickle is never called."""
    path = tmp_path / "a.pth"
    numbers = [np.float64(81.2), np.float32(1.5), np.int64(-3), np.bool_(True), np.float16(2)]
    arguments = argparse.Namespace(lr=np.float64(5e-4), model="vit")
    torch.save({"model": {"w": torch.ones(2)}, "best": numbers, "args": arguments}, path)
    read = read_torch(path)
    assert read["best"] == [number.item() for number in numbers]
    assert {type(number) for number in read["best"]} == {float, int, bool}
    assert read["args"].lr == 5e-4
    scalar = np.float64(0).__reduce__()[0]
    ran = tmp_path / "ran"
    for harm in (
        Harmful(os.system, f"touch {ran}"),
        Harmful(scalar, np.dtype("O"), b"x" * 8),
        Harmful(scalar, np.dtype("f8"), b"x" * 4),
        Harmful(scalar, np.dtype("V1000000000"), b""),
        np.array([object()], object),
    ):
        torch.save({"model": {"w": torch.ones(2)}, "x": harm}, path)
        with pytest.raises(UserError) as caught:
            read_torch(path)
        assert "\n" not in str(caught.value)
    assert not ran.exists()
