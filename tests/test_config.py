"""Settings from YAML and the command line, and the one line that a mistake gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vac_ddp import config
from vac_ddp.arguments import parse_settings
from vac_ddp.errors import UserError
from vac_ddp.settings import Config
from vac_ddp.settings_help import settings_text
from vac_ddp.training import same_run


def parsed(*words: str) -> Config:
    return parse_settings(list(words)).config


@pytest.mark.parametrize("text", ["00012", "", "[a", "${x}", "a=b=c", "null ", "yes", "1e3", "# no comment", "ü\\n"])
def test_text_settings_are_taken_as_they_are(text: str, tmp_path: Path) -> None:
    settings = parsed(f"run.dir={text}")
    assert settings.run.dir == text
    path = tmp_path / "saved.yaml"
    path.write_text(config.to_yaml(settings), encoding="utf-8")
    assert config.read_yaml(path) == settings
    assert config.from_dict(config.to_dict(settings), where="here") == settings


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.epochs=7", 7),
        ("train.clips_per_gpu=4", 4),
        ("train.clips_per_gpu=auto", "auto"),
        ("train.ema_decay=null", None),
        ("train.ema_decay=0.99", 0.99),
        ("train.compile=false", False),
        ("augment.crop_scale=[0.5,1]", (0.5, 1.0)),
        ("augment.crop_scale=0.5, 1", (0.5, 1.0)),
        ("predict.views.offsets=[0, 4]", [0, 4]),
        ("val.offsets=[]", []),
        ("data.on_bad_video=skip", "skip"),
        ("model.weights=null", None),
    ],
)
def test_values_are_read_by_the_type_of_their_setting(word: str, expected: object) -> None:
    settings: object = parsed(word)
    for name in word.partition("=")[0].split("."):
        settings = getattr(settings, name)
    assert settings == expected
    assert type(settings) is type(expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.epoch=3"], "unknown setting train.epoch: did you mean train.epochs?"),
        (["epochs=3"], "train.epochs"),
        (["train.epochs=x"], "train.epochs=x: expected int"),
        (["train.epochs=1.5"], "expected int"),
        (["train.compile=maybe"], "expected true|false | null"),
        (["data.on_bad_video=ignore"], "expected error|skip"),
        (["augment.crop_scale=1,2,3"], "expected (float, float)"),
        (["data=x"], "data is a group of settings"),
        (["--confg"], "did you mean --config?"),
        (["words"], "'words' is not a setting"),
        (["--config", "nowhere.yaml"], "no settings file nowhere.yaml"),
        (["--config"], "expected one argument"),
        (["optim.lr=1", "optim.base_lr=1"], "exactly one"),
        (["optim.base_lr=null"], "exactly one"),
        (["train.global_batch=7", "augment.repeats=2"], "a multiple of augment.repeats=2"),
        (["train.clips_per_gpu=0"], "expected int | auto, between 1 and"),
        (["augment.flip=2"], "augment.flip=2.0: expected float, between 0 and 1"),
        (["data.fold=1/5", "data.val=x"], "exclude each other"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {epochs: many}", "train.epochs"),
        ("train: {epoch: 3}", "did you mean train.epochs?"),
        ("train: 3", "train is a group of settings"),
        ("- a", "holds no settings"),
        ("a: [", "cannot be read as YAML"),
        ("data: {on_bad_video: x}", "expected error|skip"),
        ("optim: {lr: 1, base_lr: 2}", "exactly one"),
    ],
)
def test_mistakes_in_a_file_name_the_file(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parsed("--config", str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("train: {epochs: 3, patience: 5}\noptim: {lr: 0.1}\n", encoding="utf-8")
    settings = parsed("--config", str(path), "train.epochs=4")
    assert (settings.train.epochs, settings.train.patience, settings.train.global_batch) == (4, 5, 64)
    assert (settings.optim.lr, settings.optim.base_lr) == (0.1, None)
    assert parsed("--config", str(path), "optim.base_lr=1").optim.lr is None


def test_a_removed_setting_is_accepted_where_its_value_was_harmless(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("data:\n  decode: cpu\n  prefetch: 3\n")
    old = config.to_dict(config.read_yaml(file))
    assert old["data"]["prefetch"] == 3
    assert "decode" not in old["data"]
    found = config.from_dict({"data": old["data"] | {"decode": "cpu"}}, where="best.pt")
    config.override(found, "data.decode=cpu")
    assert config.to_dict(found) == old
    assert same_run.check_settings({"config": {"data": old["data"] | {"decode": "cpu"}}}, old, file) == []


def test_a_removed_setting_of_another_value_is_one_line(tmp_path: Path) -> None:
    file, old = tmp_path / "old.yaml", {"data": {"decode": "gpu"}}
    file.write_text("data:\n  decode: gpu\n")
    found = Config()
    for where, read in (
        (f"{file}: ", lambda: config.read_yaml(file)),
        ("best.pt: ", lambda: config.from_dict(old, where="best.pt")),
        ("", lambda: config.override(found, "data.decode=gpu")),
        (f"{file}: ", lambda: same_run.check_settings({"config": old}, config.to_dict(found), file)),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value).startswith(f"{where}data.decode=gpu: this setting was removed; frames are")


def test_help_lists_every_setting_with_type_default_and_meaning() -> None:
    text = settings_text(None, Config())
    for name, field in config.leaves().items():
        (line,) = [n for n, line in enumerate(text.splitlines()) if line.startswith(f"  {name}  <")]
        assert field.metadata["help"] in text.splitlines()[line + 1]
        assert " = " in text.splitlines()[line]
    assert "train.max_steps  <int | null>  = null" in text


def test_every_setting_is_used_somewhere() -> None:
    """A setting that is accepted and ignored would be a lie: its name occurs outside settings.py and config.py."""
    root = Path(config.__file__).parent
    code = "".join(p.read_text() for p in root.rglob("*.py") if p.name not in ("settings.py", "config.py"))
    ignored = [name for name in config.leaves() if f".{name.rsplit('.', 1)[-1]}" not in code]
    assert ignored == []


def test_defaults_are_not_shared_between_configs() -> None:
    first = Config()
    first.predict.views.offsets.append(99)
    assert Config().predict.views.offsets == [0, 4, 8]
    assert dataclasses.asdict(Config()) == dataclasses.asdict(parsed())
