"""docs/kaggle.ipynb from an empty folder to a submission, by nbclient: from a bundle, on the CPU, without network."""

from __future__ import annotations

import csv
import json
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.runs import make_videos
from tests.support import REPO, environment
from vac_ddp import cli

NOTEBOOK = REPO / "docs" / "kaggle.ipynb"

# Small clips and a few epochs; the limit is one minute, the epochs are fewer than fit.
SETTINGS = {
    **{"clip.frames": 4, "clip.size": 32, "data.group_by": "none", "augment.repeats": 1, "augment.randaugment": ""},
    **{"augment.erase": 0.0, "augment.mixup": 0.0, "augment.cutmix": 0.0, "model.drop_path": 0.0},
    **{
        "model.head_dropout": 0.0,
        "train.global_batch": 8,
        "train.epochs": 15,
        "train.patience": None,
        "optim.lr": 0.003,
        "data.workers": 1,
    },
    **{"predict.views.count": 2, "augment.crop_scale": (0.5, 1.0)},
}

# Imported by every process of the environment: a connection that leaves the machine is refused and written down.
NO_NETWORK = """\
import os, socket

def _guard(name):
    real = getattr(socket.socket, name)
    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            with open(os.environ["VAC_TEST_CALLS"], "a") as stream:
                stream.write(f"{address}\\n")
            raise OSError(101, "Network is unreachable")
        return real(self, address)
    setattr(socket.socket, name, connect)

_guard("connect")
_guard("connect_ex")
"""


def make_environment(folder: Path) -> Path:
    """A virtual environment with what is installed here but for vac_ddp, and without network; its Python."""
    venv.create(folder)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (folder / "packages").mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("vac_ddp", "__editable__")):
            (folder / "packages" / path.name).symlink_to(path)
    (site / "no_network.py").write_text(NO_NETWORK, encoding="utf-8")
    (site / "environment.pth").write_text(f"{folder / 'packages'}\nimport no_network\n", encoding="utf-8")
    return folder / "bin" / "python"


def make_weights(folder: Path) -> None:
    """A small VideoMAE of Hugging Face's class, with random weights."""
    import torch
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = VideoMAEForVideoClassification(VideoMAEConfig(image_size=32, num_frames=4, use_mean_pooling=True, **sizes))
    model.save_pretrained(folder)


@pytest.mark.docs
def test_from_an_empty_folder_to_a_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient  # with ipykernel in the extra `test`
    import nbformat

    given, working = tmp_path / "input", tmp_path / "working"
    working.mkdir()
    make_videos(given / "data_train", videos=8)
    made = make_videos(tmp_path / "test", videos=3)
    (given / "data_test").mkdir()
    labels = {}
    for number, video in enumerate(sorted(made.glob("*/*"))):
        labels[str(number)] = video.parent.name
        video.rename(given / "data_test" / f"{number:05d}")
    make_weights(tmp_path / "tiny-videomae")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # setuptools of this environment, no network
    bundle = tmp_path / "bundle"
    assert cli.main(["bundle", str(bundle), "--no-deps", "--weights", str(tmp_path / "tiny-videomae")]) == 0

    python = make_environment(tmp_path / "env")
    kernel = tmp_path / "jupyter" / "kernels" / "bundle"
    kernel.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    settings = environment(PYTHONPATH="", VAC_TEST_CALLS=str(tmp_path / "calls"), HOME=str(tmp_path))
    extra = {name: value for name, value in settings.items() if not name.startswith("PIP_")}
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "bundle", "language": "python"}))
    for name, value in {**extra, "JUPYTER_PATH": str(tmp_path / "jupyter"), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    for name in settings.keys() - extra.keys():
        monkeypatch.delenv(name)

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    places = {"INPUT": given, "BUNDLE": bundle, "WORKING": working, "WEIGHTS": bundle / "weights" / "tiny-videomae"}
    lines = [f"{name} = Path({str(path)!r})" for name, path in places.items()]
    defined = [line.split(" = ")[0] for line in parameters.source.splitlines() if " = " in line]
    assert set(defined) == {*places, "PREVIOUS", "MINUTES", "PRESET", "SETTINGS"}
    parameters.source += "\n" + "\n".join([*lines, "MINUTES = 1", f"SETTINGS = {SETTINGS!r}"])
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="bundle", resources={"metadata": {"path": str(working)}}
    ).execute()

    assert any((tmp_path / "env" / "lib").rglob("vac_ddp/launcher.py")), "the bundle was not installed"
    assert not (tmp_path / "calls").exists(), (tmp_path / "calls").read_text()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "\x1b" not in said and "\r" not in said
    assert "best weights" in said and "time limit    1 min" in said and "submission" in said
    with (working / "submission.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["id", "class"]
    assert sorted(row[0] for row in rows) == sorted(labels)
    assert all(label in ("class0", "class1", "class2") for _, label in rows)
    right = sum(labels[name] == label for name, label in rows)
    assert right >= 6, rows  # of 9; chance is 3
