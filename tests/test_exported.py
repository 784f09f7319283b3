"""What receivers of an exported directory use: the card's code, check.json, file modes, ONNX in one file, the hub."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import subprocess
import sys
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import vac_ddp
from tests.test_export import CLASSES, CLIP, TINY, frames_folder, make_run
from vac_ddp import files
from vac_ddp.commands.export_command import main
from vac_ddp.errors import Findings, UserError
from vac_ddp.export import onnx_file
from vac_ddp.export.run_export import Options, export
from vac_ddp.models import load_model
from vac_ddp.settings import ClipSettings, ModelSettings, PredictSettings, ViewSettings

SIZE = (36, 28)  # of frames: below twice the clip's, where no JPEG is decoded at a reduced size
PLAIN = ModelSettings(name="videomae", **TINY)
VIEWS = {
    "offsets": (CLIP, PredictSettings()),
    "spread": (
        ClipSettings(frames=4, size=16, short_side=20, short="repeat"),
        PredictSettings(views=ViewSettings(windows="spread", count=3, crops=3, flip=True), average="mean-probs"),
    ),
    "centre": (
        ClipSettings(frames=4, size=16, stride=3),
        PredictSettings(views=ViewSettings(windows="spread", count=1)),
    ),
    "segments": (
        ClipSettings(frames=4, size=16, sampling="segments"),
        PredictSettings(views=ViewSettings(windows="spread", count=2)),
    ),
    "official_phases": (
        ClipSettings(frames=4, size=16, sampling="segments"),
        PredictSettings(views=ViewSettings(windows="official_phases", count=2)),
    ),
}


def codes(card: Path) -> list[str]:
    """The programs of a card."""
    return re.findall(r"```python\n(.*?)\n```", card.read_text(), re.DOTALL)


def video_file(path: Path, *, frames: int = 12, aspect: float = 1) -> Path:
    """Write a small video file of random pictures whose pixels are `aspect` times as wide as they are high."""
    import av

    rng = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.sample_aspect_ratio = Fraction(aspect)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for _ in range(frames):
            coarse = rng.integers(0, 255, (7, 9, 3), np.uint8).repeat(4, 0).repeat(4, 1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(coarse, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.mark.parametrize("views", VIEWS)
def test_the_code_of_the_card_answers_as_we_do(tmp_path, monkeypatch, views):
    """By transformers and by ONNX Runtime, on frames that are shorter and longer than a clip, and on a video file."""
    pytest.importorskip("onnxruntime")
    clip, predict = VIEWS[views]
    run = make_run(tmp_path / "run", PLAIN, clip=clip, predict=predict, cache_format="png")
    export(run, tmp_path / "out", Options(onnx=True))
    long = frames_folder(tmp_path / "long", videos=1, frames=23, size=SIZE) / "chew" / "v0"
    short = frames_folder(tmp_path / "short", videos=1, frames=3, size=SIZE) / "chew" / "v0"
    model = vac_ddp.load(run, device="cpu")
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["classify.py"])
    programs = codes(tmp_path / "out" / "README.md")
    assert len(programs) == 2
    assert not any("vac_ddp" in program for program in programs)
    for program in programs:
        scope: dict = {}
        exec(compile(program, "classify.py", "exec"), scope)
        for video in (long, short, video_file(tmp_path / "clip.mp4", aspect=1.25)):
            (ours,) = model.predict(video, top=3)
            theirs = scope["classify"](str(video))
            assert sorted(name for name, _ in theirs) == sorted(CLASSES)
            # Rounding of pixels, and of the conversion of colours.
            assert dict(theirs) == pytest.approx(dict(ours.top), abs=0.01)


def test_the_code_of_the_card_runs_as_printed(tmp_path):
    """As a program of its own, without this package, on a video file and on frames."""
    run = make_run(tmp_path / "run", PLAIN, cache_format="png")
    export(run, tmp_path / "out")
    (program,) = codes(tmp_path / "out" / "README.md")
    (tmp_path / "out" / "classify.py").write_text(program)
    (tmp_path / "out" / "vac_ddp.py").write_text("raise ImportError('this package is not there')\n")
    frames = frames_folder(tmp_path / "data", videos=1, size=SIZE) / "chew" / "v0"
    video = video_file(tmp_path / "clip.mp4")
    asked = subprocess.run(
        [sys.executable, "classify.py", str(video), str(frames)],
        cwd=tmp_path / "out",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr
    lines = [line.split() for line in asked.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(video)] * 3 + [str(frames)] * 3
    model = vac_ddp.load(run, device="cpu")
    for path, printed in ((video, lines[:3]), (frames, lines[3:])):
        (ours,) = model.predict(path)
        assert printed[0][2] == ours.top[0][0]
        assert float(printed[0][1]) == pytest.approx(ours.top[0][1], abs=0.02)


def test_a_rotated_video_is_upright_in_the_code_of_the_card(tmp_path, monkeypatch):
    """Its pictures are those of our reader, which is tested against ffmpeg's program."""
    from vac_ddp.data.video_reader import VideoFile

    av = pytest.importorskip("av")
    export(make_run(tmp_path / "run", PLAIN), tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["classify.py"])
    scope: dict = {}
    exec(codes(tmp_path / "out" / "README.md")[0], scope)
    plain = video_file(tmp_path / "plain.mp4", frames=2)
    data = bytearray(plain.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track, behind version, times, ids, duration, layer, volume
    assert int.from_bytes(data[at : at + 4], "big") == 1 << 16
    quarter = [0, 1 << 16, 0, -(1 << 16), 0, 0, SIZE[1] << 16, 0, 1 << 30]
    data[at : at + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in quarter)
    (tmp_path / "turned.mp4").write_bytes(data)
    with av.open(str(tmp_path / "turned.mp4")) as container:
        assert next(container.decode(video=0)).rotation in (-90, 90)
    ours = next(VideoFile(path=tmp_path / "turned.mp4").frames())
    theirs = np.asarray(next(scope["frames_of"](tmp_path / "turned.mp4")))
    assert theirs.shape == ours.shape == (*SIZE, 3)
    assert np.abs(theirs.astype(int) - ours.astype(int)).mean() < 3


def test_damage_of_an_exported_directory_is_found(tmp_path, capsys):
    out = tmp_path / "out"
    export(make_run(tmp_path / "run", PLAIN), out)
    (out / "README.md").write_text("edited by its owner")
    assert main(["--check", str(out)]) == 0
    assert "transformers: logits of 2 random clips within" in capsys.readouterr().out
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\x3f")
    with pytest.raises(Findings, match=r"model\.safetensors differs from what was exported"):
        main(["--check", str(out)])
    content = json.loads((out / "check.json").read_text())
    content["files"]["model.safetensors"] = files.sha256(out / "model.safetensors")
    (out / "check.json").write_text(json.dumps(content))
    with pytest.raises(Findings, match="logits differ by"):  # as with a version that computes something else
        main(["--check", str(out)])
    (out / "model.safetensors").unlink()
    with pytest.raises(Findings, match=r"model\.safetensors is missing"):
        main(["--check", str(out)])
    content["shape"] = [2, 1 << 20, 3, 1 << 12, 1 << 12]
    (out / "model.safetensors").write_bytes(b"")
    content["files"] = {}
    (out / "check.json").write_text(json.dumps(content))
    with pytest.raises(Findings, match="too large"):
        main(["--check", str(out)])
    (out / "check.json").unlink()
    with pytest.raises(UserError, match=r"has no check\.json: give a directory that `vac export` wrote"):
        main(["--check", str(out)])


def test_all_files_are_as_readable_as_the_umask_says(tmp_path):
    pytest.importorskip("onnxruntime")
    before = os.umask(0o022)
    try:
        export(make_run(tmp_path / "run", PLAIN), tmp_path / "out", Options(onnx=True))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize("half", [False, True])
def test_onnx_is_one_file_for_any_number_of_clips(tmp_path, half):
    onnxruntime = pytest.importorskip("onnxruntime")
    run = make_run(tmp_path / "run", PLAIN)
    export(run, tmp_path / "out", Options(onnx=True, half=half))
    (tmp_path / "alone").mkdir()
    for name in ("model.onnx", "classes.json"):
        (tmp_path / "out" / name).rename(tmp_path / "alone" / name)
    parameters = sum(p.numel() for p in load_model(PLAIN, CLIP, CLASSES, seed=0).model.parameters())
    weights = parameters * (2 if half else 4)
    assert weights < (tmp_path / "alone" / "model.onnx").stat().st_size < weights + 400_000
    session = onnxruntime.InferenceSession(tmp_path / "alone" / "model.onnx")
    assert [value.type for value in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2
    model = load_model(ModelSettings(name="videomae", weights=str(run)), CLIP, CLASSES, seed=0).model.eval()
    for count in (1, 5):
        clips = torch.randn(count, 4, 3, 16, 16)
        logits = onnx_file.logits_of(tmp_path / "alone")(clips)
        ours = model(clips).detach()
        torch.testing.assert_close(logits, ours, rtol=0, atol=(2e-2 if half else 1e-4) * float(ours.abs().max()))


def test_words_of_the_command(tmp_path, monkeypatch):
    run, out = str(make_run(tmp_path / "run", PLAIN)), str(tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    for words, line in {
        (): "give RUN and OUT, or --check DIR",
        (run,): "give RUN and OUT, or --check DIR",
        (run, out, "--check", out): "give RUN and OUT, or --check DIR",
        (run, out, "--fp16"): "--fp16 is an option of --onnx",
        (run, out, "--license", "Apache 2.0"): "--license Apache 2.0: expected an identifier of the hub",
        (run, out, "--push", "model"): "--push model: expected USER/NAME",
    }.items():
        with pytest.raises(UserError, match=re.escape(line)):
            main(list(words))
    assert not Path(out).exists()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="--push needs a token"):
        main([run, out, "--push", "user/model"])
    assert not Path(out).exists()


class Hub(BaseHTTPRequestHandler):
    """What an upload needs of the hub: a repository is made, files are announced and sent, a commit ends it."""

    stored: ClassVar[dict[str, bytes]] = {}
    objects: ClassVar[dict[str, bytes]] = {}
    answer: ClassVar[int] = 200

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        self.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def do_POST(self) -> None:
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else self.chunks()
        if self.headers.get("Authorization") != "Bearer hf_test" or self.answer != 200:
            self.reply({"error": "not yours"}, status=self.answer if self.answer != 200 else 401)
        elif self.path == "/api/repos/create":
            self.reply({"url": f"{self.root}/user/model", "name": "user/model", **json.loads(body)})
        elif self.path == "/api/models/user/model/preupload/main":
            names = [one["path"] for one in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".onnx")) else "regular" for name in names}
            found = [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]
            self.reply({"files": found})
        elif self.path == "/user/model.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            made = [
                {**one, "actions": {"upload": {"href": f"{self.root}/lfs/{one['oid']}", "header": {}}}}
                for one in wanted
            ]
            self.reply({"transfer": "basic", "objects": made})
        elif self.path == "/api/models/user/model/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.stored[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    self.stored[value["path"]] = self.objects[value["oid"]]
            self.reply({"commitUrl": f"{self.root}/user/model/commit/1", "commitOid": "1", "hookOutput": ""})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        else:
            self.reply({}, status=404)

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def reply(self, content: dict, *, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub():
    """A local server in the hub's place."""
    Hub.stored, Hub.objects, Hub.answer = {}, {}, 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_export_is_uploaded_to_the_hub(tmp_path, hub):
    """By huggingface_hub, in a process whose hub is a local server; every file arrives byte for byte."""
    run, out = make_run(tmp_path / "run", PLAIN), tmp_path / "out"
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)

    def vac(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "vac_ddp.cli", "export", *words, "--push", "user/model"]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    Hub.answer = 403
    refused = vac(str(run), str(out))
    assert refused.returncode == 2, refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert f"is whole: try again by `vac export --check {out} --push user/model`" in refused.stderr
    Hub.answer = 200
    pushed = vac("--check", str(out))
    assert pushed.returncode == 0, pushed.stderr
    assert f"uploaded: {hub}/user/model/commit/1" in pushed.stdout
    assert Hub.stored == {path.name: path.read_bytes() for path in out.iterdir()}
    assert 'folder = snapshot_download("user/model")' in Hub.stored["README.md"].decode()
