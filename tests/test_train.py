"""The main job: real torchrun launches of the trainer with gloo on the CPU, compared with a single process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import Workplace, assert_same_end, one_line
from tests.support import environment
from vac_ddp import config
from vac_ddp.arguments import parse_settings
from vac_ddp.results.logits_file import read_views
from vac_ddp.training.trainer import open_trainer

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def single(place: Workplace) -> str:
    """A run of one process that the others are compared with."""
    done = place.alone("single")
    assert done.returncode == 0, done.stderr
    return "single"


def test_run_directory_holds_what_the_design_says(place: Workplace, single: str) -> None:
    folder = place.folder / single
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "classes.json",
        "split.csv",
        "index.cache",
        "index.val.cache",
        "load_report.json",
        "log.txt",
        "metrics.jsonl",
        "checkpoints",
        "best_videomae.pt",
        "report.html",
        "validation.npz",
    }
    assert json.loads((folder / "classes.json").read_text()) == ["class0", "class1", "class2"]
    assert "GiB of host memory per rank" in (folder / "log.txt").read_text()
    saved = config.read_yaml(folder / "config.yaml")
    assert saved.train.global_batch == 6 and saved.optim.base_lr is None
    # 21 videos, 6 a step: 4 steps an epoch, the last one short; checkpoints every 3 steps and every epoch
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (folder / "checkpoints").glob("*.pt"))
    assert steps == [3, 4, 6, 8, 9, 12]
    assert place.steps(single) == list(range(1, 13))
    assert [line["epoch"] for line in place.lines(single, "epoch")] == [1, 2, 3]


def test_the_report_at_the_end_shows_the_best_validation(place: Workplace, single: str) -> None:
    lines = place.lines(single, "epoch")
    best = max(line["val_top1"] for line in lines)
    kept = read_views(place.folder / single / "validation.npz")
    assert kept.about["epoch"] == next(line["epoch"] for line in lines if line["val_top1"] == best)
    assert len(kept.ids) == 6
    assert (kept.logits.mean(1).argmax(1) == kept.labels).mean() == pytest.approx(best)
    page = (place.folder / single / "report.html").read_text()
    assert f"{best:.4f}" in page and "Confusion matrix" in page and "Recall of every class" in page


def test_best_file_loads_into_the_library_class(place: Workplace, single: str) -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    best = torch.load(place.folder / single / "best_videomae.pt", weights_only=True)
    assert set(best) >= {"model", "classes", "config", "metrics"}
    made = VideoMAEForVideoClassification(
        VideoMAEConfig(
            image_size=32,
            num_frames=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            num_labels=3,
            use_mean_pooling=True,
        )
    )
    made.load_state_dict(best["model"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_has_the_loss_curve_of_one(place: Workplace, single: str, ranks: int) -> None:
    done = place.train(f"ranks{ranks}", ranks=ranks)
    assert done.returncode == 0, done.stderr
    for kind, figures in (("train", ["loss", "accuracy", "lr", "grad_norm"]), ("epoch", ["val_loss", "val_top1"])):
        expected, found = place.lines(single, kind), place.lines(f"ranks{ranks}", kind)
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            assert a["step"] == b["step"]
            for name in figures:
                assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["step"])


def test_killed_and_resumed_ends_in_the_same_weights(place: Workplace) -> None:
    assert place.train("whole").returncode == 0
    killed = place.train("killed", fault="SIGKILL step=7 rank=1")
    assert killed.returncode != 0
    resumed = place.train("killed", "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 6 of 12" in resumed.stdout and "bit for bit" in resumed.stdout
    assert_same_end(place, "whole", "killed")


def test_stopped_right_after_its_last_step_a_run_still_has_its_epoch_to_end(place: Workplace) -> None:
    stopped = place.train("last", "train.epochs=1", "optim.warmup_epochs=0", fault="SIGTERM step=2", ranks=1)
    assert "saving at step 4 and ending" in stopped.stdout  # of 4: the ranks agree one step later
    assert not (place.folder / "last" / "best_videomae.pt").exists()
    (place.folder / "last" / "report.html").mkdir()  # in the way of the report, which must not fail the run
    resumed = place.train("last", "train.epochs=1", "optim.warmup_epochs=0", "run.resume=auto", ranks=1)
    assert resumed.returncode == 0, resumed.stderr
    assert [line["epoch"] for line in place.lines("last", "epoch")] == [1]
    report = place.folder / "last" / "report.html"
    assert f"no report.html (WriteError: cannot write {report}: it is a folder, not a file" in resumed.stdout
    assert (place.folder / "last" / "best_videomae.pt").exists()


def test_without_validation_the_last_weights_are_saved(place: Workplace) -> None:
    words = ["data.val=null", "data.val_fraction=0", "train.max_steps=3", "train.ema_decay=null"]
    done = place.train("everything", *words, ranks=1)
    assert done.returncode == 0, done.stderr
    best = torch.load(place.folder / "everything" / "best_videomae.pt", weights_only=True)
    assert best["metrics"] == {}
    state = place.state("everything")["model"]
    assert torch.equal(best["model"]["classifier.weight"], state["head.weight"])


def test_a_model_of_its_own_run_with_other_classes_gets_a_new_head(place: Workplace, single: str) -> None:
    other = place.folder / "other_data"
    for name in ("x", "y"):
        (other / name).mkdir(parents=True)
        for number in range(3):
            source = place.folder / "data_train" / f"class{number}" / f"v{number:02d}"
            (other / name / f"clip{number}").symlink_to(source)
    weights = place.folder / single / "best_videomae.pt"
    words = [f"data.train={other}", "data.val=null", f"model.weights={weights}", "train.max_steps=1"]
    sizes = ["model.width=null", "model.depth=null", "model.heads=null"]
    done = place.train("tuned", *words, *sizes, ranks=1)
    assert done.returncode == 0, done.stderr
    report = json.loads((place.folder / "tuned" / "load_report.json").read_text())
    assert "classes" in report["head"] and report["missing"]


def test_bad_input_is_one_line_and_status_2(place: Workplace, single: str, tmp_path: Path) -> None:
    empty_class = tmp_path / "empty_class"
    (empty_class / "full" / "v").mkdir(parents=True)
    frame = place.folder / "data_train" / "class0" / "v00" / "0001.jpg"
    (empty_class / "full" / "v" / "1.jpg").write_bytes(frame.read_bytes())
    (empty_class / "hollow").mkdir()
    empty_video = tmp_path / "empty_video"
    for name in ("a", "b"):
        (empty_video / name / "v").mkdir(parents=True)
    (empty_video / "a" / "v" / "1.jpg").write_bytes(frame.read_bytes())
    single_class = tmp_path / "single_class"
    (single_class / "only").mkdir(parents=True)
    for number in range(3):
        (single_class / "only" / f"v{number}").symlink_to(frame.parent)
    unreadable = tmp_path / "unreadable"
    for name in ("a", "b"):
        (unreadable / name / "v").mkdir(parents=True)
        (unreadable / name / "v" / "1.jpg").write_bytes(b"no picture")
    cases = {
        "no such folder": ["data.train=/nowhere", "data.val=null"],
        "hollow": [f"data.train={empty_class}", "data.val=null"],
        "b/v": [f"data.train={empty_video}", "data.val=null"],
        "single class": [f"data.train={single_class}", "data.val=null"],
        "no frame decodes": [f"data.train={unreadable}", "data.val=null"],
        "train.epochs": ["train.epoch=3"],
        "expected int": ["train.epochs=many"],
        "exactly one": ["optim.lr=1", "optim.base_lr=1"],
        "no such file": ["run.resume=/nowhere/step-00000001.pt"],
        "model.weights": ["model.weights=/nowhere/weights.pth"],
    }
    for expected, words in cases.items():
        line = one_line(place.alone("bad", *words))
        assert expected in line, (expected, line)
        assert not (place.folder / "bad" / "checkpoints").exists()


def test_a_directory_with_a_run_is_left_alone(place: Workplace, single: str) -> None:
    folder = place.folder / single
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert "run.resume=auto" in one_line(place.alone(single))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    other = place.alone(single, "run.resume=auto", "train.global_batch=8")
    assert "train.global_batch is 8 and was 6" in one_line(other)


def test_damaged_checkpoint_is_named(place: Workplace, single: str) -> None:
    source = place.folder / single / "checkpoints" / "step-00000012.pt"
    bad = place.folder / "elsewhere" / source.name
    bad.parent.mkdir()
    bad.write_bytes(source.read_bytes()[:-7])
    bad.with_suffix(".json").write_bytes(source.with_suffix(".json").read_bytes())
    assert "is damaged" in one_line(place.alone("fresh", f"run.resume={bad}"))


def test_an_error_of_all_ranks_is_one_line_of_the_program(place: Workplace) -> None:
    done = place.train("nowhere", "data.train=/nowhere", "data.val=null")
    assert [line for line in done.stderr.splitlines() if line.startswith("vac:")] == [
        "vac: no such folder: /nowhere (expected <class>/<video>/*.jpg, a packed set, or a CSV)"
    ]
    assert place.status("nowhere")["status"] == 2


def test_vac_train_starts_the_ranks_and_gives_their_status(place: Workplace) -> None:
    def vac(run: str, *words: str) -> subprocess.CompletedProcess[str]:
        return place.python("-m", "vac_ddp.cli", "train", "--nproc", "2", *place.arguments(run, *words))

    done = vac("by_vac", "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert place.steps("by_vac") == [1, 2]
    again = vac("by_vac", "train.max_steps=2")
    assert one_line(again).startswith("vac: ")


def test_debug_runs_in_one_process_without_data_or_workers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vac_ddp.train", "--debug"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "debug" / "best_videomae.pt").exists()
    wrong = subprocess.run(
        [sys.executable, "-m", "vac_ddp.train", "--debug", "data.train=/nowhere"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert wrong.returncode == 1 and "Traceback" in wrong.stderr


def test_even_steps_reach_the_loop(tmp_path: Path) -> None:
    """21 videos in batches of 6: a short last step, or none."""
    place = Workplace(tmp_path)
    sizes = {}
    for even in ("false", "true"):
        words = place.arguments(f"even_{even}", f"train.even_steps={even}", "data.workers=0")
        settings = parse_settings(words).config
        with open_trainer(settings, torch.device("cpu")) as trainer:
            sampler = trainer.sampler
            sizes[even] = [sampler.samples_of_step(step) for step in range(sampler.steps_per_epoch)]
            sampler.set_epoch(0)
            batches = iter(trainer.loader)
            for step, size in enumerate(sizes[even]):
                assert sum(len(next(batches)) for _ in range(sampler.loads_of_step(step))) == size
    assert sizes == {"false": [6, 6, 6, 3], "true": [5, 5, 5, 6]}
