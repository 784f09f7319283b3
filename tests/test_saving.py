"""What a run leaves is there and whole, also where a file could not be written or was removed in between."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.runs import Workplace, differences
from vac_ddp import files
from vac_ddp.arguments import parse_settings
from vac_ddp.errors import UserError
from vac_ddp.report.lines import Lines
from vac_ddp.training import checkpoint
from vac_ddp.training.best_weights import BestFile
from vac_ddp.training.finish import finish
from vac_ddp.training.progress import Validation
from vac_ddp.training.trainer import open_trainer

pytestmark = pytest.mark.distributed

ACCURACIES = (0.9, 0.5, 0.4)  # of the epochs: the first is the best


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("saving"))


def train_with(place: Workplace, run: str, at_validation: Callable[[int], object], *words: str) -> str:
    """Train three epochs in this process with given accuracies; `at_validation(epoch)` comes before each validation.

    Returns what it printed.
    """
    options = ("data.workers=0", "checkpoint.every_steps=null", "train.global_batch=21", *words)
    settings = parse_settings(place.arguments(run, *options)).config
    out = io.StringIO()
    with contextlib.redirect_stdout(out), open_trainer(settings, torch.device("cpu")) as trainer:
        assert trainer.validator is not None
        measure = trainer.validator.run

        def validate(stop: Callable[[], bool]) -> Validation | None:
            at_validation(trainer.position.epoch)
            found = measure(stop)
            assert found is not None
            found.top1 = found.figures["top1"] = ACCURACIES[trainer.position.epoch - 1]
            return found

        trainer.validator.run = validate  # type: ignore[method-assign]
        trainer.run()
        finish(trainer)
    return out.getvalue()


def test_best_weights_that_could_not_be_written_are_written_later(place: Workplace) -> None:
    """A folder stands in the place of the file in the first epoch, which stays the best one."""
    best = place.folder / "late" / "best_videomae.pt"

    def hinder(epoch: int) -> None:
        if epoch == 1:
            best.mkdir()
        if epoch == 2:
            assert best.is_dir()
            best.rmdir()

    said = train_with(place, "late", hinder)
    assert "best weights could not be written and are kept in memory: " in said
    assert "it is a folder, not a file" in said
    content = torch.load(best, weights_only=True)
    first = torch.load(place.folder / "late" / "checkpoints" / "step-00000001.pt", weights_only=True)
    assert torch.equal(content["model"]["classifier.weight"], first["ema"]["head.weight"])
    assert content["metrics"]["top1"] == ACCURACIES[0] and content["format"] == 1
    facts = json.loads((place.folder / "late" / "checkpoints" / "step-00000003.json").read_text())
    assert facts["best"] == {"epoch": 1, "bytes": best.stat().st_size, "sha256": files.sha256(best)}


def test_best_weights_that_stay_unwritten_are_an_error(place: Workplace) -> None:
    best = place.folder / "never" / "best_videomae.pt"
    with pytest.raises(UserError, match=r"could not be written \(.*it is a folder"):
        train_with(place, "never", lambda epoch: best.mkdir(exist_ok=True))
    assert len(checkpoint.numbered(place.folder / "never" / "checkpoints")) == 3  # independent of it


def test_a_failed_save_of_the_last_epoch_stops_where_it_should(place: Workplace) -> None:
    def hinder(epoch: int) -> None:
        if epoch == 3:  # what the last checkpoint is renamed to
            (place.folder / "stop" / "checkpoints" / "step-00000003.pt").mkdir()

    with pytest.raises(RuntimeError, match="on_failure=stop"):
        train_with(place, "stop", hinder, "checkpoint.on_failure=stop")


@pytest.mark.parametrize("change", ["removed", "changed"])
def test_best_weights_that_somebody_touched_are_an_error(place: Workplace, change: str) -> None:
    best = place.folder / change / "best_videomae.pt"

    def touch(epoch: int) -> None:
        if epoch == 3 and change == "removed":
            best.unlink()
        elif epoch == 3:
            best.write_bytes(best.read_bytes()[:-1] + b"x")

    with pytest.raises(UserError, match="was removed or changed during training"):
        train_with(place, change, touch)


def test_without_any_best_validation_the_last_weights_are_saved(place: Workplace, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.ACCURACIES", (float("nan"),) * 3)
    said = train_with(place, "nan", lambda epoch: None)
    assert "the last ones are saved instead" in said
    best = torch.load(place.folder / "nan" / "best_videomae.pt", weights_only=True)
    last = place.state("nan")["ema"]
    assert torch.equal(best["model"]["classifier.weight"], last["head.weight"])


def test_removed_logs_are_made_again(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place.folder / "logs_gone"
    gone = ("log.txt", "metrics.jsonl", "config.yaml", "classes.json", "split.csv", "load_report.json")
    before: dict[str, bytes] = {}

    def remove(epoch: int) -> None:
        if epoch == 2:
            for name in gone:
                before[name] = (folder / name).read_bytes()
                (folder / name).unlink()

    said = train_with(place, "logs_gone", remove)
    assert "metrics.jsonl: removed or replaced by somebody; made again" in said
    assert "log.txt: removed or replaced by somebody; made again" in capsys.readouterr().err
    assert [line["epoch"] for line in place.lines("logs_gone", "epoch")] == [2, 3]
    assert "best weights" in (folder / "log.txt").read_text()
    for name in gone[2:]:
        assert (folder / name).read_bytes() == before[name], name
        assert f"{name} was removed during training: written again" in said


def test_a_removed_run_directory_ends_the_run(place: Workplace) -> None:
    folder = place.folder / "gone"

    def remove(epoch: int) -> None:
        if epoch == 2:
            shutil.rmtree(folder)

    with pytest.raises(UserError, match="gone was removed or moved during training"):
        train_with(place, "gone", remove)
    assert not folder.exists()


def test_the_writer_keeps_the_best_weights_until_they_are_written(tmp_path: Path) -> None:
    writer, best = checkpoint.Writer(tmp_path / "checkpoints", keep=5), BestFile(tmp_path / "best_x.pt")
    best.path.mkdir()
    best.offer({"model": {"w": torch.arange(3.0)}}, epoch=4)
    for step in (1, 2):
        writer.start(step, {"w": torch.zeros(1)}, {}, best=best)
        saved = writer.join()
        assert saved is not None and "it is a folder" in str(saved.error)
        _, facts = checkpoint.read(tmp_path / "checkpoints" / f"step-{step:08d}.pt")  # whole all the same
        assert facts["best"] is None
    best.path.rmdir()
    writer.start(3, {"w": torch.zeros(1)}, {}, best=best)
    assert writer.join().error is None
    content = torch.load(best.path, weights_only=True)
    assert differences(content, {"format": 1, "model": {"w": torch.arange(3.0)}}) == []
    _, facts = checkpoint.read(tmp_path / "checkpoints" / "step-00000003.pt")
    assert facts["best"]["epoch"] == 4 and facts["best"]["sha256"] == files.sha256(best.path)


def test_lines_go_to_the_path_not_to_a_removed_file(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "log.txt"
    path.parent.mkdir()
    lines = Lines(path)
    assert lines.write("one") == ""
    path.unlink()
    assert "made again" in lines.write("two")
    assert lines.write("three") == "" and path.read_text() == "two\nthree\n"
    shutil.rmtree(path.parent)
    assert "No such file or directory" in lines.write("four")
    assert lines.write("five") == "" and lines.error
    path.parent.mkdir()
    lines.close()
    assert lines.error is None and path.read_text() == "four\nfive\n"


def test_a_save_names_its_step_and_any_error(tmp_path: Path) -> None:
    writer = checkpoint.Writer(tmp_path / "checkpoints", keep=2)
    writer.start(7, {"model": lambda: None}, {}, best=None)  # what torch.save cannot pickle
    saved = writer.join()
    assert saved is not None
    assert saved.step == 7
    assert "lambda" in (saved.error or "")
    assert checkpoint.numbered(tmp_path / "checkpoints") == []
