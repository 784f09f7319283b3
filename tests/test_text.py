"""Names that cannot be printed, and names that no file can have, at every input and output."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.make_runs import SETTINGS, make_frames
from tests.support import shared
from vac_ddp import cli, files, train
from vac_ddp.data.index import open_index
from vac_ddp.errors import UserError
from vac_ddp.predict import main as predict_main
from vac_ddp.report import html
from vac_ddp.report.lines import Lines
from vac_ddp.results.logits_file import read_views
from vac_ddp.results.submission import submission_after
from vac_ddp.settings import DataSettings
from vac_ddp.text import escape_output, escaped, printable, printable_values

KOREAN = os.fsdecode("걷기".encode("cp949"))  # bytes that are not UTF-8
WRITTEN = r"\udcb0ȱ\udce2"

# ---------------------------------------------------------------- the escape


def original(text: str) -> str:
    """The name that `escaped` wrote as `text`."""
    letters = {"t": "\t", "n": "\n", "r": "\r"}
    return re.sub(
        r"\\([tnr]|x[0-9a-f]{2}|u[0-9a-f]{4})", lambda code: letters.get(code[1]) or chr(int(code[1][1:], 16)), text
    )


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("walk", "walk"),
        ("naïve ß 걷기 😀", "naïve ß 걷기 😀"),
        (KOREAN, WRITTEN),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("a\0b\x1b[31m\x7f", r"a\x00b\x1b[31m\x7f"),
        ("a\x85\u2028b", r"a\x85\u2028b"),
        (r"C:\data", r"C:\data"),
        (r"C:\new\x41", r"C:\x5cnew\x5cx41"),
        ("\\\n", r"\\n"),
    ],
)
def test_how_names_are_written(name: str, written: str) -> None:
    assert escaped(name) == written
    assert original(written) == name
    assert printable(written) == written


@given(st.text(alphabet=st.one_of(st.sampled_from("\\xunrt0159af\n\r\t\0\udcb0\ud800\u2028"), st.characters())))
def test_every_name_can_be_got_back(name: str) -> None:
    written = escaped(name)
    assert original(written) == name
    assert written.isprintable() or not name.isprintable() or any(c.isspace() for c in name) or written == name
    assert len(written.splitlines()) <= 1
    written.encode("utf-8")


def test_every_output_writes_them_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_text(tmp_path / "a.txt", KOREAN)
    lines = Lines(tmp_path / "log.txt")
    lines.write(KOREAN)
    lines.close()
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    escape_output()
    print(KOREAN, flush=True)
    printed = stream.buffer.getvalue().decode()
    shown = [(tmp_path / "a.txt").read_text(), (tmp_path / "log.txt").read_text(), printed, html.text(KOREAN)]
    shown += [str(UserError(KOREAN)), printable_values({"a": [KOREAN]})["a"][0]]
    assert {text.strip() for text in shown} == {WRITTEN}
    files.write_json(tmp_path / "a.json", {"path": KOREAN})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": KOREAN}
    assert WRITTEN in (tmp_path / "a.json").read_text()


# ---------------------------------------------------------------- from end to end


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders whose classes and videos cannot be printed, and small settings, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    classes = [KOREAN, "a\rb", 'c\nd,"e"', r"f\x41"]
    for part, videos in (("data_train", 4), ("data_val", 2)):
        make_frames(Path(part), [f"{name}/v{KOREAN}{video}" for name in classes for video in range(videos)])
    make_frames(Path("data_test"), ["1", KOREAN, "a\nb"])
    Path("settings.yaml").write_text(SETTINGS)
    return classes


def test_odd_names_train_resume_predict_score_and_report(odd: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config=settings.yaml", "run.dir=run", "data.workers=0", "log.wandb=disabled"]
    assert train.main([*words, "train.epochs=2"]) == 0
    assert train.main([*words, "train.epochs=2", "run.resume=auto"]) == 0
    written = sorted(map(escaped, odd))
    assert sorted(json.loads(Path("run/classes.json").read_text())) == written
    assert sorted(torch.load("run/best_videomae.pt", weights_only=True)["classes"]) == written
    rows = Path("run/split.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 4 * len(odd)
    assert any(row.startswith(f"{WRITTEN}/v{WRITTEN}0,{WRITTEN},") for row in rows)
    assert predict_main(["--run", "run", "--data", "data_test", "--out", "out"]) == 0
    ids = read_views("out").ids
    assert sorted(map(original, ids)) == sorted(path.name for path in Path("data_test").iterdir())
    sample = Path("out/submission.csv").read_text(encoding="utf-8")
    assert [line.split(",")[0] for line in sample.splitlines()[1:]] == ["1", WRITTEN, r"a\nb"]
    for command in (
        ["predict", "--run", "run", "--data", "data_test", "--out", "again", "--sample", "out/submission.csv"],
        ["score", "out", "--out", "scored", "--sample", "out/submission.csv"],
        ["report", "run"],
        ["runs", "."],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
    assert Path("scored/submission.csv").read_text(encoding="utf-8") == sample
    page, log = (Path("run", name).read_text(encoding="utf-8") for name in ("report.html", "log.txt"))
    assert WRITTEN in page
    assert "\r" not in page + log


def test_a_packed_set_and_a_list_have_the_same_names(odd: list[str]) -> None:
    settings = DataSettings(cache="cache")
    folder = open_index("data_train", labelled=True, settings=settings)
    assert cli.main(["pack", "data_train", "packed"]) == 0
    packed = open_index("packed", labelled=True, settings=settings)
    assert (list(packed.names), packed.classes) == (list(folder.names), folder.classes)
    assert [packed.frame_bytes(v, 0) for v in range(16)] == [folder.frame_bytes(v, 0) for v in range(16)]
    rows = [
        f'"data_train/{name}/v{KOREAN}{v}","{name}"\n'.replace('d,"e"', 'd,""e""') for name in odd for v in range(4)
    ]
    Path("list.csv").write_bytes(os.fsencode("path,label\n" + "".join(rows)))
    listed = open_index("list.csv", labelled=True, settings=settings)
    assert listed.classes == folder.classes
    assert sorted(listed.names) == sorted(f"data_train/{name}" for name in folder.names)


@pytest.mark.fault
def test_korean_zip_from_end_to_end(tmp_path: Path) -> None:
    """The real case: a zip of Korean Windows, every command in a process of its own with a strict output encoding."""
    for name in ("common", "c11_surrogate"):
        shutil.copytree(shared("cases", name), tmp_path / name)
    place = tmp_path / "c11_surrogate"
    settings = "model.weights=null model.width=16 model.depth=1 model.heads=2 clip.size=32 clip.frames=4 " \
        "train.epochs=1 train.global_batch=8 data.workers=0 data.cache=../cache optim.warmup_epochs=0"  # fmt: skip
    subprocess.run([sys.executable, "make.py"], cwd=place, check=True)
    for command in (
        ["train", "data.train=data_train", "run.dir=run", *settings.split()],
        ["train", "data.train=list.csv", "run.dir=listed", *settings.split()],
        ["predict", "--run", "run", "--data", "data_test", "--out", "out"],
        ["score", "out", "--out", "scored"],
        ["report", "run"],
        ["export", "run", "exported"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "vac_ddp.cli", *command],
            cwd=place,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode in (0, 3), (command, done.stderr)
        assert "Traceback" not in done.stderr
    assert WRITTEN in (place / "scored" / "submission.csv").read_text(encoding="utf-8")


# ---------------------------------------------------------------- names that no file can have

LONG = "x" * 300
COMMANDS = [
    ["init", LONG],
    ["train", f"data.train={LONG}"],
    ["train", "--config", LONG],
    ["predict", "--run", LONG, "--data", "data_test"],
    ["predict", "--weights", LONG, "--data", "data_test"],
    ["predict", "--run", "run", "--data", LONG],
    ["score", LONG],
    ["ensemble", "--folds", "2", "--data", LONG, f"run.dir={LONG}"],
    ["audio", LONG],
    ["soup", LONG, LONG, "out"],
    ["report", LONG],
    ["table", LONG],
    ["runs", LONG],
    ["plot", LONG],
    ["synth", LONG],
    ["doctor", LONG],
    ["audit", LONG],
    ["extract", LONG, "out"],
    ["pack", LONG, "out"],
    ["export", LONG, "out"],
]
NAMES = ("data.train", "data.val", "run.dir", "run.resume", "model.weights", "data.official_lists", "data.group_csv")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words)[:30].replace("x" * 8, "x"))
def test_commands_given_a_name_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("data_test").mkdir()
    status = cli.main(command)
    said = capsys.readouterr().err
    assert (status, said.count("\n")) == (2, 1), said
    assert "xxx" in said or "--help" in said


@pytest.mark.parametrize("name", NAMES)
def test_settings_given_a_name_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    make_frames(tmp_path / "data_train", [f"class{label}/v{video}" for label in range(2) for video in range(4)])
    words = ["model.weights=null", "model.size=small", "clip.size=32", "run.dir=run", f"{name}={LONG}"]
    status = train.main([word for word in words if not (name == "model.weights" and word.startswith("model.s"))][-5:])
    said = capsys.readouterr().err
    assert (status, said.count("\n")) == (2, 1), said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in (".cache", "run")) == ["data_train"]


def test_a_zero_byte_in_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["runs", "a\0b"], ["predict", "--run", "a\0b", "--data", "d"], ["train", "data.train=a\0b"]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_sample_with_a_zero_byte() -> None:
    with pytest.raises(UserError, match=r"a\\x00b") as caught:
        submission_after("id,class\na\0b,x\n", ["1"], ["run"])
    assert str(caught.value).isprintable()
    kept = submission_after("id,class,note\n1,x,a\0b\n", ["1"], ["run"])
    assert kept == "id,class,note\n1,run,a\0b\n"


@pytest.mark.parametrize(("length", "words"), [(1001, "a class name of 1001 characters"), (140000, "line 2")])
def test_a_label_without_end(tmp_path: Path, length: int, words: str) -> None:
    make_frames(tmp_path, ["v1", "v2"])
    (tmp_path / "list.csv").write_text(f"path,label\nv1,{'y' * length}\nv2,b\n")
    with pytest.raises(UserError, match=words) as caught:
        open_index(tmp_path / "list.csv", labelled=True, settings=DataSettings(cache=str(tmp_path)))
    assert len(str(caught.value)) < 600
