"""Settings nobody should give: hostile YAML, words, and numbers that cannot be run. One line each, exit status 2."""

from __future__ import annotations

import functools
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sweep import VALUES, numeric_settings, sweep_together, sweep_words
from vac_ddp import checks, config
from vac_ddp.arguments import parse_settings
from vac_ddp.errors import Interrupted, UserError
from vac_ddp.runtime.exit_status import run_command
from vac_ddp.settings import Bounds, Config
from vac_ddp.settings_help import settings_text


def parsed(*words: str) -> Config:
    return parse_settings(list(words)).config


def refusal(*words: str) -> str:
    """The one line with which `words` are refused."""
    with pytest.raises(UserError) as caught:
        parsed(*words)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert len(line) < 1000
    return line


@pytest.fixture
def refused_file(tmp_path: Path) -> Callable[[str | bytes], str]:
    """A function that writes a settings file and returns the one line with which it is refused."""

    def refuse(content: str | bytes) -> str:
        path = tmp_path / "hostile.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return refusal(f"--config={path}").replace(str(path), "FILE")

    return refuse


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "${run.dir}", "${", "a ${b} c", "???", r"\d${x}"])
def test_nothing_is_interpolated(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "with.yaml"
    path.write_text(f"model: {{revision: '{text}'}}\nrun: {{dir: here}}\n", encoding="utf-8")
    read = config.read_yaml(path)
    assert read.model.revision == text
    path.write_text(config.to_yaml(read), encoding="utf-8")
    assert config.read_yaml(path) == read
    assert config.from_dict(config.to_dict(read), where="here") == read


def test_an_interpolated_number_is_refused(refused_file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "17")
    assert refused_file("seed: ${oc.env:SECRET}").startswith("FILE: seed=${oc.env:SECRET}: expected int")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: !!set {train, val}", "determine a constructor"),
        ("data: {? train, ? val}", "train=null: expected text"),
        ("null: 3", "unknown setting null"),
        ("train: {null: 3}", "unknown setting train.null"),
        ("train: {~: 3}", "unknown setting train.null"),
        ("? [a, b]\n: 3", "unhashable key"),
        ("seed: " + "9" * 400, "(400 characters): expected int"),
        ("seed: " + "9" * 5000, "(5000 characters): expected int"),
        ("optim: {lr: " + "9" * 5000 + "}", "expected float | null, above 0"),
        ("seed: " + "[" * 500 + "]" * 500, "nested too deeply"),
        ("seed: " + "[" * 100_000, "nested too deeply"),
        ("seed: " + "[" * 100 + "]" * 100, "seed=a list: expected int"),
        ("val: {offsets: {0: 1}}", "val.offsets=a mapping: expected list of int"),
        ("augment: {crop_scale: {low: 0.1, high: 1}}", "augment.crop_scale=a mapping: expected (float, float)"),
        ("val: {offsets: [[0]]}", "expected list of int"),
        ("val: {offsets: &a [*a]}", "expected list of int"),
        ("data: [1, 2]", "data is a group of settings"),
        ("train: {epochs: 1, epochs: 2}", "epochs is given twice"),
        ("seed: !!python/object/apply:os.system [date]", "determine a constructor"),
        ("seed: !!int ''", "determine a constructor"),
        ("run: {dir: !!timestamp x}", "determine a constructor"),
        ("run: {dir: !!binary aGk=}", "determine a constructor"),
        ("train: {epochs: true}", "train.epochs=true: expected int"),
        ("train: {epochs: null}", "train.epochs=null: expected int"),
        ("train: {compile: 1}", "expected true|false | null"),
        ("model: {weights: [a]}", "model.weights=a list: expected text | null"),
        ("a" * 900 + ": 3", "(900 characters)"),
        ('"a\\nb\\u2028c": 3', r"unknown setting a\nb\u2028c"),
        ('seed: "a\\r\\nb"', r"seed=a\r\nb: expected int"),
        (b"seed: \xff\xfe", "cannot be read as YAML"),
        (b"\x00\x00", "cannot be read as YAML"),
        (b"#" * (1 << 21), "larger than 1 MiB"),
        ("", "holds no settings"),
        ("seed", "holds no settings"),
        ("seed: *nowhere", "cannot be read as YAML"),
    ],
)
def test_hostile_yaml_is_refused_in_one_line(
    content: str | bytes, said: str, refused_file: Callable[[str | bytes], str]
) -> None:
    assert said in refused_file(content)


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_what_is_nested_too_deeply_does_not_depend_on_the_stack(
    limit: int, refused_file: Callable[[str | bytes], str]
) -> None:
    """Other libraries raise Python's limit."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        assert "nested too deeply" in refused_file("seed: " + "[" * 500 + "]" * 500)
    finally:
        sys.setrecursionlimit(before)


def test_text_is_text_whatever_yaml_would_make_of_it(tmp_path: Path) -> None:
    """Numbers, dates and truth values of YAML 1.1 stay as they are written in text settings, and null is null."""
    path = tmp_path / "plain.yaml"
    path.write_text(
        "run: {dir: 0012}\nmodel: {weights: ~, revision: 'null', backbone: 1e3}\n"
        "data: {train: 2024-01-01, val: yes, rescan: yes}\nbase: &b {epochs: 7}\n".replace("base: &b {epochs: 7}\n", "")
        + "train: {<<: {epochs: 7}, global_batch: 8}\n",
        encoding="utf-8",
    )
    read = config.read_yaml(path)
    assert (read.run.dir, read.model.weights, read.model.revision, read.model.backbone) == ("0012", None, "null", "1e3")
    assert (read.data.train, read.data.val, read.data.rescan) == ("2024-01-01", "yes", True)
    assert (read.train.epochs, read.train.global_batch) == (7, 8)


def test_settings_of_another_type_in_a_checkpoint_are_refused() -> None:
    for values, said in (
        ({"seed": [1]}, "seed=a list: expected int"),
        ({"data": {"train": {"a": 1}}}, "data.train=a mapping: expected text"),
        ({"train": {"epochs": "many"}}, "train.epochs=many: expected int"),
        ({"optim": {"betas": [0.9]}}, "optim.betas=a list: expected (float, float)"),
        ({"clip": 3}, "clip is a group of settings"),
    ):
        with pytest.raises(UserError) as caught:
            config.from_dict(values, where="best.pt")
        assert str(caught.value).startswith("best.pt: ")
        assert said in str(caught.value)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "word",
    ["a\nb", "a\nb=c", "train.epochs=1\n2", "--a\nb", "--config=a\rb", "model.name=x\u2028y", "data=\x1b[31m",
     "--views=\n", "train.epochs=" + "9" * 5000, "a" * 100_000, "--config=" + "a" * 300, "--config=" + "a/" * 4000,
     "\udcff=1", "seed=\udcff"],
)  # fmt: skip
def test_a_word_is_refused_in_one_line(word: str) -> None:
    refusal(word)


def test_exceptions_for_the_user_are_one_line_at_every_outlet(capsys: pytest.CaptureFixture[str]) -> None:
    def program(argv: list[str]) -> int:
        raise Interrupted(f"stopped at {argv[0]}", step=3) if argv[1:] else UserError(f"no file {argv[0]}")

    assert run_command(program, ["a\nb\u2029\x07\udcff"]) == 2
    assert capsys.readouterr().err == "vac: no file a\\nb\\u2029\\x07\\udcff\n"
    assert run_command(program, ["a\nb", "more"]) == 75
    assert capsys.readouterr().err == "vac: stopped at a\\nb\n"


# ---------------------------------------------------------------- numbers


def test_every_number_has_bounds_and_help_shows_them() -> None:
    text = settings_text(None, Config())
    assert len(numeric_settings()) > 60
    for name in numeric_settings():
        bounds = checks.leaves()[name].metadata["bounds"]
        assert bounds is not None, f"{name} is a number without bounds: give low=, high=, above= or below="
        assert bounds.low is not None or bounds.above is not None, f"{name} has no lower bound"
        assert bounds.high is not None or bounds.below is not None, f"{name} has no upper bound"
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name}  <")]
        assert line.endswith(f"({bounds})")


def test_bounds() -> None:
    half_open = Bounds(low=0, below=1)
    inside = (0, 0.5, -0.1, 1, float("nan"), float("inf"), float("-inf"))
    assert [n in half_open for n in inside] == [True, True, False, False, False, False, False]
    assert [n in Bounds(above=0) for n in (0, 1e-9, float("inf"))] == [False, True, False]
    assert 10**400 not in half_open
    assert str(half_open) == "at least 0 and below 1"
    assert str(Bounds(low=1, high=3)) == "between 1 and 3"
    assert str(Bounds(above=0, high=2)) == "above 0 and at most 2"


@pytest.mark.parametrize(
    "word",
    ["model.drop_path=1", "model.head_dropout=1", "val.count=0", "predict.views.offsets=", "predict.views.offsets=-1",
     "predict.views.offsets=0,-4", "data.workers=-1", "data.limit=0", "optim.lr=nan", "augment.crop_ratio=1,0",
     "augment.crop_ratio=2,1", "augment.crop_scale=nan,nan", "augment.crop_scale=0,0", "model.mlp_ratio=-1",
     "model.tubelet=-1", "optim.warmup_epochs=inf", "clip.short_side=8", "val.crops=2", "optim.min_lr=1",
     "augment.randaugment=rand-n99999999", "augment.randaugment=x", "data.fold=9/3",
     "data.val_fraction=1",
     "health.timeout_s=1e30", "model.std=0,1,1", "optim.betas=0.9,1", "seed=-1", "train.label_smoothing=1"],
)  # fmt: skip
def test_a_setting_that_cannot_run_is_refused_before_anything_is_opened(word: str) -> None:
    """The settings that were accepted and ended in a traceback, in NaN, or hours later."""
    from vac_ddp.training.objective import check_settings

    name, _, _ = word.partition("=")
    with pytest.raises(UserError) as caught:
        check_settings(parsed(word))
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_settings_that_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = ["model.weights=null", "model.size=small"]
    assert parsed(*scratch).model.size == "small"
    assert "model.width=96 both say" in refusal(*scratch, "model.width=96")
    assert "is of videomae" in refusal(*scratch, "model.name=lsvit")
    assert parsed(*scratch, "model.name=probe", "model.encoder=videomae").model.size == "small"
    assert "is of videomae" in refusal(*scratch, "model.name=probe")
    advice = "set model.name=probe model.encoder=videomae, or leave it out"
    for word in ("model.pooling=attentive", "model.pooling=statistics", "model.spatial_grid=2"):
        assert f"{word} is not of model.name=videomae: {advice}" in refusal(word)
        assert parsed(word, "model.name=probe", "model.encoder=videomae").model.name == "probe"
    assert parsed("model.pooling=attention").model.name == "videomae"  # never read there, as before
    assert "is of model.name=frame_vit" in refusal("model.name=probe", "model.pooling=transformer")
    for word in ("model.statistics=", "model.statistics=std,std"):
        assert "each once" in refusal("model.name=frame_vit", "model.pooling=statistics", word)
    assert "videomae has no BatchNorm" in refusal("model.batch_norm=batch")
    assert "would take more than 1 GiB" in refusal("clip.frames=1024", "clip.size=4096")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "below the number of ranks, 4" in refusal("train.global_batch=3")
    assert parsed("train.global_batch=4").train.global_batch == 4


@pytest.mark.parametrize("preset", ["quickstart", "hmdb51_videomae_base", "scratch_small", None])
def test_doctor_recommends_only_what_can_be_set(preset: str | None) -> None:
    from vac_ddp.doctor.advice import smaller_model

    words = [f"--config={preset}"] if preset else ["model.weights=null", "model.size=base"]
    recommended = re.findall(r"[a-z]+\.[a-z_]+=[^\s)]+", smaller_model(parsed(*words)))
    parsed(*words, *recommended)


def test_numbers_of_other_commands_have_bounds_too() -> None:
    from vac_ddp.commands import (
        audio_command,
        audit_command,
        ensemble_command,
        extract_command,
        pack_command,
        synth_command,
        train_command,
    )

    for main, words in (
        (extract_command.main, ["a", "b", "--rate=inf"]),
        (extract_command.main, ["a", "b", "--workers=-1"]),
        (audit_command.main, ["a", "--workers=0"]),
        (audit_command.main, [".", "data.val_fraction=nan"]),
        (pack_command.main, ["a", "b", "--shard-mib=-1"]),
        (synth_command.main, ["a", "--workers=-3"]),
        (audio_command.main, ["--data", "a", "--out", "b", "--lr=nan"]),
        (ensemble_command.main, ["--nproc=1", "--data", "a", "--folds", "9" * 30]),
        (train_command.main, ["--nproc", "²"]),
        (train_command.main, ["--nproc", "9" * 5000]),
    ):
        with pytest.raises(UserError) as caught:
            main(words)
        assert "expected" in str(caught.value) or "a number of ranks" in str(caught.value), words


def test_every_number_at_every_value_is_refused_or_runs_one_step(tmp_path: Path) -> None:
    """Accepted values share runs where they can (tests/long/settings.py gives each a run of its own)."""
    words = sweep_words()
    assert len(words) == len(numeric_settings()) * len(VALUES) > 500
    outcomes = sweep_together(words, tmp_path)
    assert outcomes.refused.keys() | outcomes.ran.keys() == set(words)
    assert set(outcomes.ran.values()) == {1}
    assert len(outcomes.ran) > 80
    for word, line in outcomes.refused.items():
        assert len(line.splitlines()) == 1, word
        assert word.partition("=")[0] in line, (word, line)


# ---------------------------------------------------------------- fuzz


def junk(rng: random.Random) -> str:
    """A value, good or bad."""
    return rng.choice(
        [*VALUES, "null", "~", "true", "yes", "auto", "-0", ".inf", "0x10", "1_0", "[0, 1]", "0,1", "{a: 1}", "[[1]]",
         "${oc.env:HOME}", "${", "!!set {a}", "!!int x", "&a [*a]", "*a", "'", '"a\\nb"', "|\n  x", "\u2028", "\x00",
         "9" * rng.choice([3, 400, 5000]), "[" * rng.choice([2, 600]), "1/5", "spread", "segments", "rand-m7-n4",
         "".join(chr(rng.randrange(0x250)) for _ in range(rng.randrange(9))), "1e-3", "0.5", "0.5,1", "2,0.1"]
    )  # fmt: skip


def case(rng: random.Random, path: Path) -> list[str]:
    """Words of a command line, one of them perhaps a settings file, written to `path`."""
    names = [*checks.leaves(), "data", "", "null", "a.b", "optim.LR", "train.epochs "]
    words = [f"{rng.choice(names)}{rng.choice(['=', '=', '=', '', '=='])}{junk(rng)}" for _ in range(rng.randrange(3))]
    if rng.random() < 0.7:
        lines = []
        for _ in range(rng.randrange(1, 5)):
            group, _, name = rng.choice(names).rpartition(".")
            line = f"{name}: {junk(rng)}"
            lines.append("".join(f"{part}: {{" for part in group.split(".") if part) + line + "}" * bool(group))
        text = "\n".join(lines)
        if rng.random() < 0.2:
            place = rng.randrange(len(text) + 1)
            text = text[:place] + chr(rng.randrange(1 << rng.choice([7, 11]))) + text[place + rng.randrange(3) :]
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        words.append(f"--config={path}")
    return words


def fuzz(cases: int, seed: int, path: Path) -> int:
    """Parse random settings: only UserError of one line, or settings that survive writing; how many were accepted."""
    accepted = 0
    for number in range(cases):
        rng = random.Random(f"{seed}/{number}")
        words = case(rng, path)
        line, read = "", None
        try:
            read = parsed(*words)
        except UserError as error:
            line = str(error)
        assert len(line.splitlines()) == (read is None), words
        assert len(line) < 2000, words
        if read is None:
            continue
        accepted += 1
        if accepted % 5 == 0:
            path.write_text(config.to_yaml(read), encoding="utf-8")
            assert config.read_yaml(path) == read, words
        assert config.from_dict(config.to_dict(read), where="x") == read, words
        for name in numeric_settings():
            value = functools.reduce(getattr, name.split("."), read)
            numbers = value if isinstance(value, list | tuple) else [value]
            assert all(n in checks.leaves()[name].metadata["bounds"] for n in numbers if isinstance(n, int | float))
    return accepted


def test_random_settings_and_yaml_are_accepted_or_refused_in_one_line(tmp_path: Path) -> None:
    accepted = fuzz(2000, 0, tmp_path / "fuzz.yaml")
    assert 100 < accepted < 1900
