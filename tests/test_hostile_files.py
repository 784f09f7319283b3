"""Files that hold something else than what was written: one line that names file, field, expected, found and remedy."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
import pytest
import torch

from tests.hostile_packs import attack, good_pack
from tests.support import REPO
from tests.test_weights import hf_directory, load
from vac_ddp import cli, train
from vac_ddp.commands.report_command import main as report
from vac_ddp.data.index import open_index
from vac_ddp.errors import UserError
from vac_ddp.predict import main as predict_main
from vac_ddp.results.logits_file import read_views
from vac_ddp.schema import Matching, Within, check, fault, stored_zip
from vac_ddp.settings import DataSettings
from vac_ddp.training.checkpoint import write_tensors

Change = Callable[[Any], Any]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of small finished runs with their data, in the working directory."""
    copy = tmp_path / "runs"
    ignore = shutil.ignore_patterns("lsvit", "frame_vit")
    shutil.copytree(REPO / "tests" / "fixtures" / "be24294", copy, ignore=ignore)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path))
    return copy


def refused(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> None:
    """Status 2, one line on stderr, and `words` in it."""
    said = capsys.readouterr().err
    assert (status, said.count("\n")) == (2, 1), said[-2000:]
    for word in words:
        assert word in said


def put(path: tuple[str | int, ...], value: Any) -> Change:
    """A function that sets the entry at `path` in nested dicts."""

    def change(content: Any) -> Any:
        node = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return content

    return change


def drop(name: str) -> Change:
    return lambda content: {key: value for key, value in content.items() if key != name}


# ---------------------------------------------------------------- the declarations


class Inner(TypedDict):
    size: Annotated[int, Within(low=1, high=9)]
    name: NotRequired[Annotated[str, Matching(pattern="[a-z]+", meaning="lower case")]]


class Outer(TypedDict):
    kind: Literal["a", "b"]
    parts: list[Inner]
    rate: float | None
    table: dict[str, tuple[int, int]]


GOOD = {"kind": "a", "parts": [{"size": 3}], "rate": None, "table": {"x": [1, 2]}, "later": 1}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("kind",), "c", 'kind: expected "a" or "b", found the text \'c\''),
        (("parts",), {}, "parts: expected a list (an object each), found an empty object"),
        (("parts", 0, "size"), 10, "parts[0].size: expected a whole number from 1 to 9, found 10"),
        (("parts", 0, "size"), True, "found true"),
        (("parts", 0, "size"), 3.0, "found 3.0"),
        (("parts", 0), {"name": "x"}, "parts[0].size: expected a whole number from 1 to 9, found nothing"),
        (("parts", 0, "name"), "X\n", "parts[0].name: expected lower case"),
        (("rate",), "1", "rate: expected a number or null"),
        (("table", "x"), [1], "table.x: expected a list of 2"),
        (("table",), {1: [1, 2]}, "table: key: expected text, found 1"),
        (("rate",), 10**500, ""),
        (("kind",), 10**500, "a number of 1661 bits"),
    ],
)
def test_what_a_declaration_says(path: tuple[str | int, ...], value: Any, words: str) -> None:
    content = json.loads(json.dumps(GOOD))
    assert fault(content, Outer) == ""
    found = fault(put(path, value)(content), Outer)
    assert words in found
    assert bool(words) == bool(found)
    if found:
        with pytest.raises(UserError, match=r"^f\.json: .*; get another$"):
            check(content, Outer, file="f.json", remedy="get another")


# ---------------------------------------------------------------- best files


def itself(content: Any) -> Any:
    content["model"] = content
    return content


def sparse(content: Any) -> Any:
    content["model"]["classifier.weight"] = content["model"]["classifier.weight"].to_sparse()
    return content


BEST: dict[str, tuple[Change, str]] = {
    "classes are a number": (put(("classes",), 3), "classes: expected a list"),
    "classes are numbers": (put(("classes",), [0, 1, 2]), "classes[0]: expected text, found 0"),
    "no classes": (put(("classes",), []), "classes: expected different class names"),
    "a class twice": (put(("classes",), ["a", "a", "b"]), "classes: expected different class names"),
    "settings are a list": (put(("config",), [1]), "config: expected an object"),
    "model settings are text": (put(("config", "model"), "videomae"), "config.model: expected an object"),
    "frames are a mapping": (put(("config", "clip", "frames"), {}), "clip.frames"),
    "architecture is a list": (put(("architecture",), [1]), "architecture: expected an object or null"),
    "width is text": (put(("architecture", "width"), "wide"), "architecture.width: expected a whole number"),
    "width is huge": (put(("architecture", "width"), 2**20), "architecture.width: expected 16, as the tensors show"),
    "depth is huge": (put(("architecture", "depth"), 10**6), "architecture.depth: expected a whole number from 1"),
    "grids are huge": (put(("architecture", "grids"), [[4096, 4096, 4096]]), "tokens"),
    "heads do not divide": (put(("architecture", "heads"), 3), "3 heads"),
    "mean is text": (put(("architecture", "mean"), "abc"), "architecture.mean: expected a list of 3"),
    "std is zero": (put(("architecture", "std"), [0.0, 1.0, 1.0]), "architecture.std[0]"),
    "metrics are a list": (put(("metrics",), [1]), "metrics: expected an object"),
    "counts are text": (put(("class_counts",), "many"), "class_counts: expected a list"),
    "weights are a list": (put(("model",), [1]), "model"),
    "a sparse tensor": (sparse, "model.classifier.weight: expected a dense tensor of numbers, found a sparse_coo one"),
    "a tensor without values": (
        put(("model", "classifier.weight"), torch.ones(3, 16, device="meta")),
        "found one on the device meta",
    ),
    "complex numbers": (put(("model", "x"), torch.ones(3, dtype=torch.complex64)), "found one of complex64"),
    "one value 10^15 times": (put(("model", "x"), torch.ones(1).expand(10**15)), "in repeated values"),
    "the weights are the file": (itself, "no tensors"),
    "another shape": (put(("model", "classifier.weight"), torch.ones(3, 17)), "has shape (3, 17)"),
    "a list": (lambda content: list(content), "holds a list"),
}


@pytest.mark.parametrize("name", BEST)
def test_best_files(runs: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, words = BEST[name]
    content = torch.load("videomae/best_videomae.pt", weights_only=True)
    torch.save(change(content), "best_other.pt")
    status = cli.main(["predict", "--weights", "best_other.pt", "--data", "data_test", "--out", "out"])
    refused(capsys, status, "best_other.pt", words)


def test_a_compressed_best_file_is_not_unpacked(tmp_path: Path) -> None:
    import zipfile

    torch.save({"model": {"x": torch.zeros(1 << 20)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 14
    stored_zip(tmp_path / "plain.pt", remedy="none")
    with pytest.raises(UserError, match=r"bomb\.pt: .*expected an uncompressed member"):
        load(tmp_path / "bomb.pt")


# ---------------------------------------------------------------- checkpoints


def moments(content: Any) -> Any:
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 2)
    return content


def first_name(content: Any) -> str:
    return next(iter(content["model"]))


STATE: dict[str, tuple[Change, str]] = {
    **{
        f"without {name}": (drop(name), f"{name}: expected")
        for name in ("model", "ema", "optimizer", "scaler", "position", "stopping", "tallies", "bad_in_row", "random")
    },
    "a list": (lambda content: [content], "holds a list"),
    "model is a list": (put(("model",), [1]), "model: expected an object"),
    "model is empty": (put(("model",), {}), "model."),
    "another shape": (lambda c: put(("model", first_name(c)), torch.zeros(2))(c), "of the shape (2,)"),
    "another type": (lambda c: put(("model", first_name(c)), c["model"][first_name(c)].double())(c), "float64"),
    "no average": (put(("ema",), None), "ema: expected the EMA"),
    "no groups": (put(("optimizer", "param_groups"), []), "optimizer.param_groups: expected"),
    "no moments": (put(("optimizer", "state", 0), {}), "optimizer.state.0.step: expected"),
    "moments of another shape": (moments, "optimizer.state.0.exp_avg: expected"),
    "a parameter too many": (lambda c: put(("optimizer", "state", 999), c["optimizer"]["state"][0])(c), "999"),
    "step is text": (put(("position", "step"), "5"), "position.step: expected a whole number from 0"),
    "another step": (put(("position", "step"), 4), "position.step: expected 5, found 4"),
    "tallies are a list": (put(("tallies",), []), "tallies: expected an object"),
    "a short generator": (put(("random",), torch.zeros(3, dtype=torch.uint8)), "random: expected"),
}

COMPANION: dict[str, tuple[Change, str]] = {
    **{f"without {name}": (drop(name), f"{name}: expected") for name in ("step", "bytes", "sha256", "config")},
    **{f"without {name}": (drop(name), f"{name}: expected") for name in ("clips_per_gpu", "total_steps", "threads")},
    "a list": (lambda facts: [facts], "expected an object, found a list of 1"),
    "no clips": (put(("clips_per_gpu",), 0), "clips_per_gpu: expected a whole number from 1, found 0"),
    "settings are a list": (put(("config",), []), "config: expected an object"),
    "steps are text": (put(("total_steps",), "many"), "total_steps: expected a whole number from 1"),
}


@pytest.mark.parametrize(("part", "name"), [*(("pt", n) for n in STATE), *(("json", n) for n in COMPANION)])
def test_checkpoints(runs: Path, capsys: pytest.CaptureFixture[str], part: str, name: str) -> None:
    path = next(Path("interrupted/checkpoints").glob("*.pt")).resolve()
    facts = json.loads(path.with_suffix(".json").read_text())
    if part == "pt":
        change, words = STATE[name]
        content = torch.load(path, weights_only=True)
        facts["bytes"], facts["sha256"] = write_tensors(path, change(content))
    else:
        change, words = COMPANION[name]
        facts = change(facts)
    path.with_suffix(".json").write_text(json.dumps(facts))
    status = train.main(["--config=settings.yaml", "run.dir=interrupted", f"run.resume={path}", "data.workers=0"])
    refused(capsys, status, f"{path.stem}.{part}", words)


# ---------------------------------------------------------------- logits files


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


LOGITS: dict[str, tuple[Change, str]] = {
    **{f"without {name}": (drop(name), f"{name}: expected an array, found nothing") for name in ("logits", "ids")},
    **{f"without {name}": (drop(name), f"{name}: expected an array") for name in ("labels", "about", "classes")},
    "NaN": (lambda a: {**a, "logits": a["logits"] * np.nan}, "logits: expected finite numbers"),
    "text for logits": (lambda a: {**a, "logits": a["logits"].astype(str)}, "logits: expected an array of the type f"),
    "two dimensions": (lambda a: {**a, "logits": a["logits"][:, 0]}, "logits: expected the shape"),
    "fewer ids": (lambda a: {**a, "ids": a["ids"][:-1]}, "ids: expected the shape"),
    "an id twice": (lambda a: {**a, "ids": a["ids"][[0] * len(a["ids"])]}, "ids: expected different names"),
    "ids that are written alike": (
        lambda a: {**a, "ids": np.array(["a\n", "a\\n", *a["ids"][2:]])},
        "ids: expected different names",
    ),
    "no views": (lambda a: {**a, "logits": a["logits"][:, :0], "views": a["views"][:0]}, "views: expected at least"),
    "a label too high": (lambda a: {**a, "labels": a["labels"] + 99}, "labels: expected numbers below"),
    "a label too low": (lambda a: {**a, "labels": a["labels"] - 99}, "labels: expected values from -1"),
    "views of two columns": (lambda a: {**a, "views": a["views"][:, :2]}, "views: expected the shape"),
    "about is no JSON": (lambda a: {**a, "about": np.array("{")}, "about: expected JSON"),
    "about is a list": (lambda a: {**a, "about": np.array("[1]")}, "about: expected an object"),
    "a fingerprint of numbers": (
        lambda a: {**a, "about": np.array('{"format": 1, "fingerprint": {"data": 1}}')},
        "fingerprint.data: expected text",
    ),
    "nested lists": (lambda a: {**a, "about": np.array("[" * 10**5)}, "nested"),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_files(runs: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, words = LOGITS[name]
    np.savez("views.npz", **change(arrays(Path("videomae/predictions/data_test/views.npz"))))
    refused(capsys, cli.main(["score", "views.npz", "--out", "scored"]), "views.npz: ", words)
    assert not Path("scored").exists()


def test_a_logits_file_takes_no_more_memory_than_it_has_bytes(runs: Path) -> None:
    good = arrays(Path("videomae/predictions/data_test/views.npz"))
    np.savez_compressed("packed.npz", **{**good, "logits": np.zeros((1000, 100, 100), np.float32)})
    with pytest.raises(UserError, match="expected an uncompressed member"):
        read_views("packed.npz")
    np.savez("claims.npz", **good)
    data, shape = Path("claims.npz").read_bytes(), str(good["logits"].shape).encode()
    claimed = b"(99999999, 99999, 9)"
    place = data.index(shape)
    padded = data[:place] + claimed + data[place + len(claimed) :]
    Path("claims.npz").write_bytes(padded.replace(claimed + b"}", claimed + b"}", 1))
    with pytest.raises(UserError, match=r"claims\.npz"):
        read_views("claims.npz")


# ---------------------------------------------------------------- a run's other files


BROKEN = ["{", "[1]", '{"kind": 3, "step": 1}', '{"kind": "epoch", "step": 1}', "\0\0\0", "3", "[" * 10**5]


def break_metrics(path: Path, *broken: str) -> None:
    """Put broken lines behind the second one."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], *broken, *lines[2:]]) + "\n")


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_of_metrics_is_named(runs: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    break_metrics(Path("interrupted/metrics.jsonl"), line)
    for command in ("table", "runs"):
        status = cli.main([command, "interrupted"])
        said = "".join(capsys.readouterr())
        assert status in (2, 3), command
        assert "metrics.jsonl line 3: " in said
        assert "expected" in said


def test_a_resumed_run_moves_broken_lines_aside(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("interrupted/metrics.jsonl")
    break_metrics(path, *BROKEN)
    words = ["--config=settings.yaml", "model.name=videomae", "run.dir=interrupted", "run.resume=auto"]
    assert train.main([*words, "data.workers=0"]) == 0
    said = capsys.readouterr().out
    for number, line in enumerate(BROKEN, start=3):
        assert f"metrics.jsonl line {number}: " in said
        assert line in Path("interrupted/metrics.discarded.jsonl").read_text().splitlines()
    steps = [json.loads(text)["step"] for text in path.read_text().splitlines() if '"train"' in text]
    assert steps == list(range(1, 10))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("split.csv", "video,class\n", "first line must be"),
        ("split.csv", "video,class,source,part\na,b,c\n", "line 2"),
        ("split.csv", "video,class,source,part\n" + f"{'x' * 140000},b,c,val\n", "line 2"),
        ("classes.json", "{", "classes.json is damaged: expected JSON"),
        ("classes.json", '{"a": 1}', "classes.json: expected a list (text each), found an object with a"),
        ("classes.json", "[1, 2]", "classes.json: [0]: expected text, found 1"),
        ("classes.json", "[" * 10**5, "hundreds of nested lists"),
        ("load_report.json", "[]", "load_report.json: expected an object"),
        ("load_report.json", '{"mean": [{"a": 1}]}', "load_report.json: mean[0]: expected"),
    ],
)
def test_the_report_of_a_run_with_a_broken_file(runs: Path, name: str, text: str, words: str) -> None:
    (runs / "videomae" / name).write_text(text)
    with pytest.raises(UserError) as caught:
        report(["videomae", "--no-predict"])
    assert words in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_of_another_prediction(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "out" / "parts").mkdir(parents=True)
    (runs / "out" / "parts" / "fingerprint.json").write_text("[1]")
    status = predict_main(["--run", "videomae", "--data", "data_test", "--out", "out"])
    refused(capsys, status, "fingerprint.json: expected an object", "--overwrite")


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", 3, "model_type: expected text"),
        ("num_frames", "16", "num_frames: expected a whole number"),
        ("image_size", {"height": 3}, "image_size: expected"),
        ("num_attention_heads", 0, "num_attention_heads: expected a whole number from 1"),
        ("num_attention_heads", True, "found true"),
        ("id2label", [1], "id2label: expected an object"),
        ("id2label", {"0": 1}, "id2label.0: expected text"),
        ("layer_norm_eps", None, "layer_norm_eps: expected a number"),
        ("qkv_bias", "yes", "qkv_bias: expected true or false"),
        ("architectures", "x", "architectures: expected a list"),
    ],
)
def test_hub_config(tmp_path: Path, field: str, value: Any, words: str) -> None:
    folder = hf_directory(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match=r"config\.json") as caught:
        load(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "places", [None, [], {"a": 3}, {"a": "../x.safetensors"}, {"a": ".."}, {"a": "b/c"}, {"a": ""}]
)
def test_hub_shards(tmp_path: Path, places: Any) -> None:
    folder = hf_directory(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match="weight_map"):
        load(folder)


# ---------------------------------------------------------------- packed sets


def test_packed_sets_with_random_faults(tmp_path: Path) -> None:
    good = good_pack(tmp_path)
    came = Counter(attack(good, tmp_path / "bad", np.random.default_rng(seed)) for seed in range(500))
    assert came["refused"] > 300
    assert came["read"] > 10


@pytest.mark.parametrize("name", ["../data/run/clip_0/0001.jpg", "/etc/passwd", "a/b", "..", "", "a\0b"])
def test_shards_outside_the_folder(tmp_path: Path, name: str) -> None:
    for path, data in good_pack(tmp_path).items():
        (tmp_path / "good" / path).write_bytes(data)
    mark = tmp_path / "good" / "pack.json"
    facts = json.loads(mark.read_text())
    facts["shards"][0]["file"] = name
    mark.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"shards\[0\]\.file: expected the name of a file in that folder"):
        open_index(tmp_path / "good", labelled=True, settings=DataSettings())


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [(-1, 10**15, "offsets from 0 to"), (3, 10**15, "never fall"), (0, -1, "offsets from 0"), (2, -5, "never fall")],
)
def test_offsets_that_lead_elsewhere(tmp_path: Path, place: int, value: int, words: str) -> None:
    good_pack(tmp_path)
    path = tmp_path / "good" / "offsets.npy"
    offsets = np.load(path)
    offsets[place] = value
    np.save(path, offsets)
    with pytest.raises(UserError, match=rf"offsets\.npy: expected .*{words}"):
        open_index(tmp_path / "good", labelled=True, settings=DataSettings())
