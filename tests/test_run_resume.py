"""A run directory needs nothing else to resume, and a checkpoint is only resumed where it belongs."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import Workplace, assert_same_end, differences, make_videos
from vac_ddp import config, train
from vac_ddp.arguments import parse_settings
from vac_ddp.models import load_model, rebuild_model
from vac_ddp.predict import main as predict_main
from vac_ddp.runtime import distributed
from vac_ddp.runtime.gpus import Gpu
from vac_ddp.settings import ClipSettings, Config, ModelSettings
from vac_ddp.training import meters, resuming, same_run
from vac_ddp.training.best_weights import BestFile
from vac_ddp.training.trainer import open_trainer

pytestmark = pytest.mark.distributed

SHORT = ("data.workers=0", "train.global_batch=7", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    made = Workplace(tmp_path_factory.mktemp("resume"))
    assert here(made, "whole")[0] == 0
    return made


def here(place: Workplace, run: str, *words: str) -> tuple[int, str, str]:
    """Train in this process: exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = train.main(place.arguments(run, *SHORT, *words))
    return status, out.getvalue(), err.getvalue()


def refused(done: tuple[int, str, str]) -> str:
    """The one line of a start that ended with status 2."""
    status, _, err = done
    assert status == 2 and err.count("\n") == 1, err
    return err


def stopped(place: Workplace, run: str, step: int) -> Path:
    """The run "whole" as it was when `step` was its newest checkpoint; returns that checkpoint."""
    folder = place.folder / run
    shutil.copytree(place.folder / "whole", folder)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.stem[5:]) > step:
            path.unlink()
    return folder / "checkpoints" / f"step-{step:08d}.pt"


def copied_out(place: Workplace, name: str) -> Path:
    """A checkpoint of the run "whole", copied into a folder of its own."""
    folder = place.folder / name
    folder.mkdir()
    for ending in (".pt", ".json"):
        shutil.copy(place.folder / "whole" / "checkpoints" / f"step-00000004{ending}", folder)
    return folder / "step-00000004.pt"


def rewrite(companion: Path, **changes: Any) -> None:
    """Change the JSON beside a checkpoint."""
    companion.write_text(json.dumps({**json.loads(companion.read_text()), **changes}))


# ---------------------------------------------------------------- a new directory


def test_a_checkpoint_in_a_new_directory_becomes_a_complete_run(place: Workplace) -> None:
    whole = place.folder / "whole"
    status, said, _ = here(place, "branch", f"run.resume={whole / 'checkpoints' / 'step-00000004.pt'}")
    assert status == 0 and "bit for bit" in said
    folder = place.folder / "branch"
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in folder.iterdir()} == names | {"start.json"}
    for name in ("classes.json", "split.csv", "load_report.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert config.read_yaml(folder / "config.yaml").run.dir == str(folder)
    a, b = place.state("whole"), place.state("branch")
    for part in ("model", "ema", "optimizer", "stopping", "position"):
        assert differences(a[part], b[part], part) == []
    bests = [torch.load(run / "best_videomae.pt", weights_only=True) for run in (whole, folder)]
    assert differences(bests[0]["model"], bests[1]["model"]) == []
    assert here(place, "branch", "run.resume=auto")[0] == 0  # and from now on it is a run like any other


def test_without_the_best_file_the_best_is_looked_for_anew(place: Workplace) -> None:
    status, said, _ = here(place, "from_bare", f"run.resume={copied_out(place, 'bare')}")
    assert status == 0 and "the best validation is looked for anew" in said
    best = torch.load(place.folder / "from_bare" / "best_videomae.pt", weights_only=True)
    later = [line["val_top1"] for line in place.lines("from_bare", "epoch")]
    assert best["metrics"]["top1"] == max(later)


def test_an_attempt_that_is_repeated_resumes_its_own_checkpoint(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM requeues a job that was told run.resume=PATH: its second attempt is not told apart from another run."""
    source = stopped(place, "before", 4)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    status, said, _ = here(place, "requeued", f"run.resume={source}")
    assert status == 0 and "no report.html" not in said, said
    shutil.rmtree(place.folder / "requeued" / "checkpoints")
    (place.folder / "requeued" / "report.html").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    status, said, err = here(place, "requeued", f"run.resume={source}")  # killed before its first checkpoint
    assert status == 0 and "resumed at step 4" in said, err
    status, said, err = here(place, "requeued", f"run.resume={source}")
    assert status == 0 and "resumed at step 9 of 9" in said, err


# ---------------------------------------------------------------- what does not belong together


def test_settings_are_compared_by_their_exact_names(place: Workplace) -> None:
    stopped(place, "names", 4)
    assert "data.val_fraction is 0.3 and was 0.2" in refused(
        here(place, "names", "run.resume=auto", "data.val_fraction=0.3")
    )
    moved = place.folder / "moved"
    if not moved.exists():
        shutil.copytree(place.folder / "data_train", moved)
    words = (f"data.train={moved}", "train.patience=9", "checkpoint.keep=3", "model.weights=gone.pth")
    status, said, err = here(place, "names", "run.resume=auto", *words)
    assert status == 0, err
    assert "model.weights=gone.pth is not read" in said


def test_a_setting_that_the_checkpoint_does_not_know_counts_as_its_default() -> None:
    given = dataclasses.asdict(Config(seed=1))
    saved = dataclasses.asdict(Config(seed=1))
    del saved["augment"]["repeats"]
    same_run.check_settings({"config": saved}, given, Path("step.pt"))
    given["augment"]["repeats"] = 2
    with pytest.raises(same_run.UserError, match=r"augment\.repeats is 2 and was 1"):
        same_run.check_settings({"config": saved}, given, Path("step.pt"))


def test_a_video_that_changed_sides_is_found(place: Workplace) -> None:
    words = ("data.val=null", "train.epochs=1", "optim.warmup_epochs=0")
    assert here(place, "sides", *words)[0] == 0
    table = place.folder / "sides" / "split.csv"
    before = table.read_text()
    rows = before.splitlines()
    row = next(i for i, line in enumerate(rows) if line.endswith(",val"))
    swap = next(i for i, line in enumerate(rows) if line.endswith(",train"))
    rows[row], rows[swap] = rows[row].replace(",val", ",train"), rows[swap].replace(",train", ",val")
    table.write_text("\n".join(rows) + "\n")
    assert "split: a video was" in refused(here(place, "sides", *words, "run.resume=auto"))
    newest = place.folder / "sides" / "checkpoints" / "step-00000003.pt"
    assert "split: a video was" in refused(here(place, "sides_new", *words, f"run.resume={newest}"))
    assert not (place.folder / "sides_new").exists()
    table.write_text(before)
    assert here(place, "sides", *words, "run.resume=auto")[0] == 0


@pytest.mark.parametrize(("change", "said"), [("classes", "classes:"), ("frames", "frames:"), ("names", "split:")])
def test_other_data_is_refused_by_name(place: Workplace, change: str, said: str) -> None:
    other = place.folder / f"other_{change}"
    make_videos(other, frames=8 if change == "frames" else 9)
    if change == "classes":
        (other / "class2").rename(other / "class9")
    if change == "names":
        (other / "class2" / "v06").rename(other / "class2" / "v66")
    source = copied_out(place, f"out_{change}")
    words = [f"data.train={other}", f"data.val={other if change == 'classes' else place.folder / 'data_val'}"]
    line = refused(here(place, f"on_{change}", *words, f"run.resume={source}"))
    assert said in line and "cannot be resumed with this data" in line
    assert not (place.folder / f"on_{change}").exists()


def test_a_checkpoint_of_another_run_is_refused_where_it_was_copied_to(place: Workplace) -> None:
    """The same settings and the same number of steps, other videos."""
    other = make_videos(place.folder / "others", frames=8)
    assert here(place, "alien", f"data.train={other}")[0] == 0
    source = stopped(place, "host", 4)
    for path in (place.folder / "alien" / "checkpoints").glob("step-00000006.*"):
        shutil.copy(path, source.parent)
    before = {p.name: p.stat().st_mtime_ns for p in source.parent.iterdir()}
    assert "frames: videos have another number" in refused(here(place, "host", "run.resume=auto"))
    rewrite(source.parent / "step-00000006.json", config={"seed": 0})
    assert "are not those that were saved" in refused(here(place, "host", "run.resume=auto"))
    assert {p.name for p in source.parent.iterdir()} == set(before)


def test_an_earlier_checkpoint_sets_later_files_aside(place: Workplace) -> None:
    shutil.copytree(place.folder / "whole", place.folder / "back")
    folder = place.folder / "back"
    status, said, _ = here(place, "back", f"run.resume={folder / 'checkpoints' / 'step-00000002.pt'}")
    assert status == 0 and "best_videomae.pt is not that of step-00000002.pt" in said
    aside = folder / "checkpoints" / "discarded"
    whole = place.folder / "whole"
    assert (aside / "best_videomae.pt").read_bytes() == (whole / "best_videomae.pt").read_bytes()
    assert (aside / "step-00000009.pt").read_bytes() == (whole / "checkpoints" / "step-00000009.pt").read_bytes()
    assert_same_end(place, "whole", "back")


def test_a_refused_start_sets_nothing_aside(place: Workplace) -> None:
    shutil.copytree(place.folder / "whole", place.folder / "kept")
    earlier = place.folder / "kept" / "checkpoints" / "step-00000002.pt"
    refused(here(place, "kept", f"run.resume={earlier}", f"data.val={place.folder / 'data_train'}"))
    assert not (earlier.parent / "discarded").exists()
    assert (earlier.parent / "step-00000009.pt").exists()


# ---------------------------------------------------------------- nothing else is needed, and what is promised


def test_a_run_needs_no_weights_file(place: Workplace) -> None:
    weights = Path(shutil.copy(place.folder / "whole" / "best_videomae.pt", place.folder / "start.pt"))
    sizes = ("model.width=null", "model.depth=null", "model.heads=null", "model.mean=[0.4,0.5,0.6]")
    words = (*sizes, f"model.weights={weights}")
    assert here(place, "tuned", *words)[0] == 0
    shutil.copytree(place.folder / "tuned", place.folder / "tuned_half")
    for path in (place.folder / "tuned_half" / "checkpoints").glob("step-*"):
        if int(path.stem[5:]) > 4:
            path.unlink()
    weights.unlink()
    status, said, err = here(place, "tuned_half", *words, "run.resume=auto")
    assert status == 0 and "bit for bit" in said, err
    assert_same_end(place, "tuned", "tuned_half")
    out = place.folder / "predicted"
    assert (
        predict_main(
            ["--run", str(place.folder / "tuned"), "--data", str(place.folder / "data_val"), "--out", str(out)]
        )
        == 0
    )


@pytest.mark.parametrize("name", ["videomae", "lsvit", "frame_vit"])
def test_a_model_is_rebuilt_from_what_a_checkpoint_says(tmp_path: Path, name: str) -> None:
    clip, classes = ClipSettings(frames=4, size=32), ["a", "b", "c"]
    sizes = {"width": 32, "depth": 2, "heads": 2, "patch": 16}
    scratch = ModelSettings(name=name, weights=None, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), **sizes)
    first = load_model(scratch, clip, classes, seed=1)
    first.model.head.bias.data.normal_()
    again = rebuild_model(dataclasses.replace(scratch, mean=None, std=None), clip, classes, first.architecture, seed=9)
    again.model.load_state_dict(first.model.state_dict())
    assert (again.mean, again.std, again.architecture) == (first.mean, first.std, first.architecture)
    clips = torch.rand(2, 4, 3, 32, 32)
    assert torch.equal(first.model.eval()(clips), again.model.eval()(clips))


def test_the_precision_is_that_of_the_run(place: Workplace) -> None:
    companion = stopped(place, "precise", 4).with_suffix(".json")
    assert json.loads(companion.read_text())["precision"] == "fp32"
    rewrite(companion, precision="fp8")
    assert "trained in fp8 on cpu, which the CPU lacks" in refused(here(place, "precise", "run.resume=auto"))
    rewrite(companion, precision="bf16")  # as a GPU resolves `auto`
    settings = parse_settings(place.arguments("precise", *SHORT, "run.resume=auto")).config
    with contextlib.redirect_stdout(io.StringIO()), open_trainer(settings, torch.device("cpu")) as trainer:
        assert trainer.stepper.autocast is torch.bfloat16


def test_auto_on_a_gpu_without_bf16_is_the_run_s_precision_on_any_gpu(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(meters.SIDE, "cpu", 32)
    words = ("train.max_steps=3", "data.val=null", "data.val_fraction=0")
    gpus = {bf16: Gpu(name="X", capability=(8, 0) if bf16 else (7, 5), bf16=bf16) for bf16 in (False, True)}
    monkeypatch.setattr(distributed, "weakest_gpu", lambda device: gpus[False])
    assert here(place, "fp16", *words)[0] == 0
    newest = max((place.folder / "fp16" / "checkpoints").glob("step-*.pt"))
    assert json.loads(newest.with_suffix(".json").read_text())["precision"] == "fp16"
    assert place.state("fp16")["scaler"]["scale"] > 1
    assert torch.load(place.folder / "fp16" / "best_videomae.pt", weights_only=True)["precision"] == "fp16"
    newest.unlink()
    newest.with_suffix(".json").unlink()
    monkeypatch.setattr(distributed, "weakest_gpu", lambda device: gpus[True])
    arguments = place.arguments("fp16", *SHORT, *words, "run.resume=auto")
    with (
        contextlib.redirect_stdout(io.StringIO()),
        open_trainer(parse_settings(arguments).config, torch.device("cpu")) as trainer,
    ):
        assert trainer.stepper.precision == "fp16"


def test_the_promise_names_everything_that_changes_results(place: Workplace) -> None:
    companion = stopped(place, "promise", 4).with_suffix(".json")
    facts = json.loads(companion.read_text())
    assert set(same_run.COMPARED) <= set(facts)
    rewrite(companion, numpy="1.0", compile=True, threads=64, cpu="AVX9", simplejpeg="0.1", revision="abc")
    _, said, _ = here(place, "promise", "run.resume=auto", "train.checkpointing=1")
    (line,) = [line for line in said.splitlines() if "resumed at step 4" in line]
    assert "bit for bit" not in line
    for name in ("numpy 1.0 -> ", "compile True -> False", "threads 64 -> ", "cpu AVX9 -> ", "simplejpeg 0.1 -> "):
        assert name in line
    assert "revision abc -> " in line and "checkpointing 0 -> 1" in line


def test_files_say_their_format_and_newer_ones_are_refused(place: Workplace) -> None:
    source = stopped(place, "newer", 4)
    folder = place.folder / "newer"
    assert json.loads(source.with_suffix(".json").read_text())["format"] == 1
    assert json.loads((folder / "load_report.json").read_text())["format"] == 1
    assert torch.load(folder / "best_videomae.pt", weights_only=True)["format"] == 1
    assert (folder / "config.yaml").read_text().startswith("# settings of a run of vac_ddp, format 1\n")
    rewrite(source.with_suffix(".json"), format=2)
    line = refused(here(place, "elsewhere", f"run.resume={source}"))
    assert "has format 2, this version reads up to 1: update vac_ddp" in line


def test_checkpoints_of_the_first_version_say_less_and_are_accepted(place: Workplace) -> None:
    companion = stopped(place, "first", 4).with_suffix(".json")
    known = ("torch", "threads", "device", "world_size", "revision", "config", "clips_per_gpu", "total_steps")
    facts = json.loads(companion.read_text())
    kept = {name: facts[name] for name in (*known, "epoch", "saved", "step", "bytes", "sha256")}
    companion.write_text(json.dumps(kept))
    status, said, err = here(place, "first", "run.resume=auto")
    assert status == 0, err
    assert said.count("is of an earlier version and does not say") == 1
    assert_same_end(place, "whole", "first")


def test_a_damaged_best_file_of_the_first_version_is_set_aside(tmp_path: Path) -> None:
    best, source, said = tmp_path / "best_videomae.pt", tmp_path / "checkpoints" / "step-00000004.pt", []
    best.write_bytes(b"cut off")
    stopping = {"best": 0.5, "best_epoch": 1, "since_best": 0}
    after = resuming.settle_best(BestFile(best), source, {}, stopping, said.append)
    assert after == {"best": None, "best_epoch": None, "since_best": 0}
    assert (source.parent / "discarded" / best.name).read_bytes() == b"cut off" and not best.exists()
    assert len(said) == 2
