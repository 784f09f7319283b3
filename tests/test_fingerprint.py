"""Results of a prediction are reused only where everything that changes a logit is the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support import REPO
from vac_ddp import checks, config
from vac_ddp.data.index import open_index
from vac_ddp.predict import main as predict_main
from vac_ddp.predicting.fingerprint import LATER, differences, fingerprint
from vac_ddp.results.logits_file import read_views
from vac_ddp.settings import Config, DataSettings

# Settings that a prediction may change and that change no logit, or by rounding alone.
WITHOUT_EFFECT = {
    "data.train", "data.val", "data.val_fraction", "data.fold", "data.group_by", "data.group_regex", "data.group_csv",
    "data.group_across_classes", "data.official_lists", "data.official_split",  # which videos: in the mark of the data
    "data.on_bad_video", "data.max_damaged", "data.rescan", "data.cache",
    "data.cache_gb", "data.balance", "data.limit",
    "data.workers", "data.prefetch", "predict.clips_per_gpu", "predict.save_every",
    "predict.average", "predict.answer",  # applied to the logits when they are read
}  # fmt: skip


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs, data and predictions of the first version."""
    shutil.copytree(REPO / "tests" / "fixtures" / "be24294", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "old"


def marks(data: Path, *words: str, **known: str) -> dict[str, str]:
    """The fingerprint of predicting `data` with the settings that the words mean."""
    settings = Config()
    for word in words:
        config.override(settings, word)
    index = open_index(data, labelled=False, settings=DataSettings(cache=str(data.parent / "cache")))
    known = {"weights": "w" * 64, "precision": "fp32", "device": "cpu", "version": "0"} | known
    return fingerprint(settings, index, **known)


def test_every_setting_that_changes_a_logit_is_in_the_fingerprint(old: Path) -> None:
    """What `vac predict` may change is either there or listed above; a new setting has to be put into one of them."""
    plain = marks(old / "data_test")
    changeable = {name for name in checks.leaves() if name.startswith(("predict.", "data.", "clip."))}
    recorded = {name for name in changeable if name in plain or name.removeprefix("predict.") in plain} | set(LATER)
    assert recorded | WITHOUT_EFFECT == changeable
    assert not recorded & WITHOUT_EFFECT


@pytest.mark.parametrize(
    "word", ["data.reduced_decode=false", "data.frame_pattern=a_*.jpg", "predict.compile=true",
             "clip.short_side=300", "predict.keep_tokens=0.5",
             "clip.short=repeat", "predict.views.flip=true", "predict.views.offsets=1"],
)  # fmt: skip
def test_a_difference_is_found_from_both_sides(old: Path, word: str) -> None:
    plain, other = marks(old / "data_test"), marks(old / "data_test", word)
    (there,), missing = differences(plain, other)
    (back,), _ = differences(other, plain)
    name = word.partition("=")[0].removeprefix("predict.views.").removeprefix("predict.")
    assert name in there
    assert name in back
    assert missing == []


def test_what_is_no_setting_counts_as_well(old: Path) -> None:
    plain = marks(old / "data_test")
    assert differences(plain, marks(old / "data_test")) == ([], [])
    for name, other in (
        ("precision", marks(old / "data_test", precision="bf16")),
        ("device", marks(old / "data_test", device="cuda")),
        ("weights", marks(old / "data_test", weights="v" * 64)),
        ("data", plain | {"data": marks(old / "data_train" / "class0")["data"]}),
        ("versions", plain | {"versions": "torch 1.0"}),
    ):
        (changed,), _ = differences(plain, other)
        assert changed.startswith(f"{name} (")


def test_a_key_that_one_side_lacks_is_a_difference(old: Path) -> None:
    plain = marks(old / "data_test")
    for name in plain:
        less = {key: value for key, value in plain.items() if key != name}
        if name != "format":
            assert len(differences(less, plain)[0]) == 1, name
        assert len(differences(plain, less)[0]) == 1, name
    assert differences({"data": plain["data"]}, plain)[0][0].startswith("weights (none there")


def test_a_removed_setting_counts_unless_its_value_was_harmless(old: Path) -> None:
    plain = marks(old / "data_test")
    for name in ("data.decode", "decode"):  # the first version recorded it under its last name alone
        stored = {key: value for key, value in plain.items() if key != "format" or name == "data.decode"}
        assert differences(stored | {name: "cpu"}, plain)[0] == []
        assert differences(stored | {name: "gpu"}, plain)[0] == ["data.decode (gpu there, none now)"]


def test_other_pictures_under_the_same_names_are_other_data(old: Path) -> None:
    before = marks(old / "data_test")
    for frame in (old / "data_test" / "1").glob("*.jpg"):
        shutil.copyfile(old / "data_test" / "2" / frame.name, frame)
    (changed,), _ = differences(before, marks(old / "data_test"))
    assert changed.startswith("frames (")


def test_a_second_prediction_with_another_setting_does_not_reuse_the_first(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run", "videomae", "--data", "data_test", "--out", "out", "data.cache=cache", "data.workers=0"]
    assert predict_main(words) == 0
    first = read_views(old / "out").logits
    capsys.readouterr()
    for word in ("data.reduced_decode=false", "predict.compile=false", "clip.short_side=20"):
        assert predict_main([*words, word]) == 2
        line = capsys.readouterr().err.strip()
        assert f"{word.partition('=')[0]} (" in line
        assert len(line.splitlines()) == 1
    assert predict_main(words) == 0
    assert "earlier version" not in capsys.readouterr().out
    np.testing.assert_array_equal(read_views(old / "out").logits, first)


def test_a_prediction_of_the_first_version_is_reused_with_one_line(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = old / "videomae" / "predictions" / "data_test"
    words = ["--run", "videomae", "--data", "data_test", "--out", str(out), "data.cache=cache", "data.workers=0"]
    before = (out / "views.npz").read_bytes()
    assert predict_main([*words, "data.reduced_decode=false"]) == 2
    assert "data.reduced_decode (True there, False now)" in capsys.readouterr().err
    assert predict_main(words) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "earlier version" in line]
    assert "data.reduced_decode" in line
    assert (out / "views.npz").read_bytes() == before
