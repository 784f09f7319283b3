"""A soup is the mean of the weights, loads and predicts; what does not fit together is one line."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from vac_ddp import config as settings_io
from vac_ddp.commands.soup_command import main
from vac_ddp.errors import UserError
from vac_ddp.models import file_state, load_model
from vac_ddp.models.soup import mean_state
from vac_ddp.settings import ClipSettings, Config, ModelSettings

CLASSES = ["climb", "pick", "wave"]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three runs of one small model, each at weights of its own."""
    config = Config(clip=ClipSettings(frames=4, size=32), model=ModelSettings(weights=None, width=16, depth=1, heads=2))
    config.model.weights = None
    folders = []
    for number in range(3):
        loaded = load_model(config.model, config.clip, CLASSES, seed=number)
        content = {
            "model": file_state(loaded.model),
            "classes": CLASSES,
            "config": settings_io.to_dict(config),
            "metrics": {"top1": 0.5},
            "architecture": loaded.architecture,
            "class_counts": [number, 1, 2],
        }
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        torch.save(content, folder / "best_videomae.pt")
        folders.append(folder)
    return folders


def changed(run: Path, **values: object) -> None:
    path = run / "best_videomae.pt"
    content = torch.load(path, weights_only=True)
    for name, value in values.items():
        at = content
        *groups, last = name.split("__")
        for group in groups:
            at = at[group]
        at[last] = value
    torch.save(content, path)


def test_a_soup_is_the_mean_and_loads(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, runs), str(tmp_path / "soup")]) == 0
    made = torch.load(tmp_path / "soup" / "best_videomae.pt", weights_only=True)
    parts = [torch.load(run / "best_videomae.pt", weights_only=True)["model"] for run in runs]
    for name, tensor in made["model"].items():
        by_hand = (parts[0][name].double() + parts[1][name].double() + parts[2][name].double()) / 3
        assert torch.equal(tensor, by_hand.float()), name
    assert made["class_counts"] == [3, 3, 6]
    config = settings_io.from_dict(made["config"], where="soup")
    config.model.weights = str(tmp_path / "soup")
    loaded = load_model(config.model, config.clip, CLASSES, seed=0)
    assert loaded.report.missing == []
    logits = loaded.model.eval()(torch.randn(2, 4, 3, 32, 32))
    assert logits.shape == (2, 3)
    assert "began at different weights" in capsys.readouterr().out


def test_a_soup_of_one_run_twice_is_that_run(runs: list[Path], tmp_path: Path) -> None:
    main([str(runs[0]), str(runs[0] / "best_videomae.pt"), str(tmp_path / "same.pt")])
    made = torch.load(tmp_path / "same.pt", weights_only=True)["model"]
    own = torch.load(runs[0] / "best_videomae.pt", weights_only=True)["model"]
    assert all(torch.equal(made[name], own[name]) for name in own)


def test_whole_numbers_have_no_mean() -> None:
    a, b = {"steps": torch.tensor(3)}, {"steps": torch.tensor(4)}
    assert mean_state([a, copy.deepcopy(a)], ["a", "b"])["steps"].item() == 3
    with pytest.raises(UserError, match="has no mean"):
        mean_state([a, b], ["a", "b"])
    with pytest.raises(UserError, match="lacks"):
        mean_state([a, a | {"more": torch.ones(1)}], ["a", "b"])


def test_what_does_not_fit_together_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    for values, text in (
        ({"classes": ["climb", "pick", "swim"]}, "the class swim is in one of them only"),
        ({"classes": ["pick", "climb", "wave"]}, "their order differs"),
        ({"config__clip__frames": 8}, "clip.frames is 4"),
        ({"config__model__name": "lsvit"}, "model.name is videomae"),
        ({"architecture__mean": [0.5, 0.5, 0.5]}, "mean is"),
        ({"model__classifier.bias": torch.zeros(4)}, "classifier.bias is"),
    ):
        kept = (runs[1] / "best_videomae.pt").read_bytes()
        changed(runs[1], **values)
        with pytest.raises(UserError, match=text) as caught:
            main([str(runs[0]), str(runs[1]), str(tmp_path / "soup")])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "soup").exists()
        (runs[1] / "best_videomae.pt").write_bytes(kept)
    for argv, text in (
        ([str(runs[0]), str(tmp_path / "soup")], "two runs or more"),
        ([str(runs[0]), str(runs[1]), str(runs[2])], "is there already"),
        ([str(runs[0]), str(tmp_path / "none"), str(tmp_path / "soup")], "no such file"),
    ):
        with pytest.raises(UserError, match=text):
            main(argv)
