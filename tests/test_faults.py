"""The table of faults in tests/README.md: real torchrun processes with gloo, and one thing that goes wrong in each."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import Workplace, assert_same_end, differences, make_videos, no_orphans, one_line
from tests.support import REPO, environment
from vac_ddp.data.augment import augment_clips
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.index import open_index
from vac_ddp.data.loader import train_loader
from vac_ddp.data.mixing import mix, soft_targets
from vac_ddp.data.sampler import StepSampler
from vac_ddp.errors import UserError
from vac_ddp.models import load_model
from vac_ddp.models.kept_tokens import kept_tokens
from vac_ddp.runtime.lock import RunLock
from vac_ddp.settings import Config
from vac_ddp.training import checkpoint
from vac_ddp.training.data_setup import check_labels

pytestmark = [pytest.mark.fault, pytest.mark.distributed]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A workplace with one undisturbed run of two ranks, `whole`, checkpoints at every step."""
    made = Workplace(tmp_path_factory.mktemp("faults"))
    done = made.train("whole", "checkpoint.every_steps=1")
    assert done.returncode == 0, done.stderr
    yield made
    assert no_orphans(made) == []


def repeats(place: Workplace, what: str, out: str, run: str, *words: str, ranks: int) -> list[dict[str, object]]:
    """Run drivers/repeats.py under torchrun; its lines."""
    path = place.folder / out
    driver = REPO / "tests" / "drivers" / "repeats.py"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = place.python(*launch, driver, what, path, *place.arguments(run, *words), timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------- 1


def full_batch_gradients(settings: Config) -> list[dict[str, torch.Tensor]]:
    """The gradient of every step of an epoch, by one forward pass over the whole global batch and torch's own loss."""
    index = open_index(settings.data.train, labelled=True, settings=settings.data)
    loaded = load_model(settings.model, settings.clip, index.classes, seed=settings.seed)
    model = loaded.model.train()
    model.train_tokens = kept_tokens(model, settings.train.keep_tokens, settings.train.keep_policy, setting="unused")
    sampler = StepSampler(
        np.arange(len(index)), seed=settings.seed, global_batch=settings.train.global_batch, clips_per_gpu=64,
        rank=0, world=1,
    )  # fmt: skip
    dataset = TrainClips(index, np.arange(len(index)), settings, model.noise_size, settings.seed)
    found = []
    for batch in train_loader(dataset, sampler, workers=0, pin=False):
        clips = augment_clips(
            batch.clips, batch.params, settings.augment, mean=loaded.mean, std=loaded.std, dtype=torch.float32
        )
        partner = batch.params["partner"]
        clips, keep = mix(clips, partner, batch.params)
        targets = soft_targets(batch.labels, batch.labels[partner], keep, 3, settings.train.label_smoothing)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(clips, batch.noise), targets).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


@pytest.mark.parametrize(("ranks", "kept"), [(1, ""), (2, ""), (4, ""), (2, "random"), (2, "motion")])
def test_01_any_split_of_the_batch_has_its_gradient(place: Workplace, ranks: int, kept: str) -> None:
    from vac_ddp.arguments import parse_settings

    name = f"grad{ranks}{kept}"
    words = ["train.global_batch=16", "train.epochs=1", "data.val=null", "data.val_fraction=0"]
    words.append("checkpoint.every_steps=null")
    words += ["train.keep_tokens=0.5", f"train.keep_policy={kept}"] if kept else []
    repeats(place, "gradients", name, name, *words, ranks=ranks)
    settings = parse_settings(place.arguments("unused", *words)).config
    expected = full_batch_gradients(settings)
    assert len(expected) == 2  # 21 videos: a batch of 16 and a short one of 5
    for clips in (32, 16, 8, 3):
        found = torch.load(place.folder / f"{name}.{clips}.pt", weights_only=True)
        assert len(found) == len(expected)
        for a, b in zip(expected, found, strict=True):
            off = torch.cat([(a[name] - b[name]).flatten() for name in a])
            norm = torch.cat([a[name].flatten() for name in a]).norm()
            assert off.norm() <= 1e-6 * norm, (ranks, clips, float(off.norm() / norm))


# ---------------------------------------------------------------- 2 to 6: kills and signals


def test_02_killed_rank_restarts_by_itself(place: Workplace) -> None:
    done = place.train("restart", fault="SIGKILL step=7 rank=1", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 6" in done.stdout
    assert_same_end(place, "whole", "restart")


SIGNALS = {
    "03_term_to_torchrun": "SIGTERM:agent step=5 rank=0",
    "03_term_in_mid_accumulation": "SIGTERM:agent at=piece step=4 rank=0",
    "04_term_to_everything": "SIGTERM:group step=5 rank=0",
    "05_usr1_to_one_rank": "SIGUSR1 step=5 rank=1",
    "05_usr2_to_all_ranks": "SIGUSR2 step=5",
    "06_during_validation": "SIGTERM at=validation rank=1",
    "06_during_a_save": "SIGTERM at=save step=6 rank=0",
}


@pytest.mark.parametrize("name", SIGNALS)
def test_03_to_06_signal_saves_and_resumes(place: Workplace, name: str) -> None:
    stopped = place.train(name, "checkpoint.every_steps=6", fault=SIGNALS[name])
    assert stopped.returncode != 0
    status = place.status(name)
    assert status["status"] == 75, (status, stopped.stderr)
    assert json.loads((place.folder / name / "interrupted.json").read_text())["step"] == status["step"]
    newest = checkpoint.numbered(place.folder / name / "checkpoints")[-1]
    state, facts = checkpoint.read(newest)
    assert facts["step"] == status["step"] == state["position"]["step"]
    if "step=5" in SIGNALS[name]:
        assert 6 <= status["step"] <= 8  # step number 5 is the sixth: it is finished, at most two more are made
    assert no_orphans(place) == []
    resumed = place.train(name, "checkpoint.every_steps=6", "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert not (place.folder / name / "interrupted.json").exists()
    assert_same_end(place, "whole", name)


def test_06_two_signals_leave_one_valid_checkpoint(place: Workplace) -> None:
    stopped = place.train("twice", fault="SIGTERM:twice step=5")
    assert place.status("twice")["status"] == 75, stopped.stderr
    resumed = place.train("twice", "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(place, "whole", "twice")


# ---------------------------------------------------------------- 7 to 9: disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB of its own (root), or a skip that says why."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]).returncode:
        pytest.skip("a small file system needs the right to mount (root): disk faults are not tested here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("answer", ["continue", "stop"])
def test_07_full_disk(place: Workplace, small_disk: Path, answer: str) -> None:
    run = f"full_{answer}"
    (place.folder / run).symlink_to(small_disk, target_is_directory=True)
    words = [f"checkpoint.on_failure={answer}", "checkpoint.every_steps=2", "checkpoint.keep=2"]
    done = place.train(run, *words, fault="fill step=4 free=9 rank=0")
    assert "No space left on device" in done.stdout
    if answer == "continue":
        assert done.returncode == 0, done.stderr
        assert "rank 1: rank 0 could not write a checkpoint" in done.stderr
        assert_same_end(place, "whole", run)
        return
    assert done.returncode != 0
    assert done.stderr.count("checkpoint.on_failure=stop") >= 2  # both ranks
    path, state, _ = checkpoint.read_newest(small_disk / "checkpoints", print)
    assert state["position"]["step"] == 4
    expected = torch.load(place.folder / "whole" / "checkpoints" / path.name, weights_only=True)
    assert differences(state["model"], expected["model"]) == []


def test_08_killed_between_write_and_rename(place: Workplace) -> None:
    place.train("rename", fault="SIGKILL at=rename step=6 rank=0")
    folder = place.folder / "rename" / "checkpoints"
    assert any(path.name.endswith(".partial") for path in folder.iterdir())
    resumed = place.train("rename", "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert not any(path.name.endswith(".partial") for path in folder.iterdir())
    assert "left by a save that was killed" in resumed.stdout
    assert_same_end(place, "whole", "rename")


def test_08_killed_between_the_line_of_an_epoch_and_its_checkpoint(place: Workplace) -> None:
    """The checkpoint of the last step is there: the epoch is ended again, its line is there once."""
    place.train("line", "checkpoint.every_steps=4", fault="SIGKILL at=epoch step=4 rank=0")
    assert [line["epoch"] for line in place.lines("line", "epoch")] == [1]
    assert place.state("line")["position"]["step"] == 4
    resumed = place.train("line", "checkpoint.every_steps=4", "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(place, "whole", "line")


def test_09_damage_is_always_found(place: Workplace, tmp_path: Path) -> None:
    source = place.folder / "whole" / "checkpoints"
    draw = random.Random(0)
    older, newest = "step-00000011", "step-00000012"
    for name in (older, newest):
        for ending in (".pt", ".json"):
            shutil.copy(source / (name + ending), tmp_path)
    whole = (tmp_path / f"{newest}.pt").read_bytes()
    for case in range(100):
        if case % 4 == 3:
            spoiled = bytearray(whole)
            spoiled[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            spoiled = whole[: len(whole) * (10, 50, 99)[case % 4] // 100 - draw.randrange(50)]
        (tmp_path / f"{newest}.pt").write_bytes(spoiled)
        said: list[str] = []
        path, state, _ = checkpoint.read_newest(tmp_path, said.append)
        assert path.stem == older and state["position"]["step"] == 11
        assert len(said) == 1 and newest in said[0] and "damaged" in said[0]


def test_09_a_run_goes_on_from_the_one_before(place: Workplace) -> None:
    shutil.copytree(place.folder / "whole", place.folder / "cut")
    newest = place.folder / "cut" / "checkpoints" / "step-00000012.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed = place.train("cut", "run.resume=auto", "checkpoint.every_steps=1")
    assert resumed.returncode == 0, resumed.stderr
    assert "step-00000012.pt is damaged" in resumed.stdout and "resumed at step 11" in resumed.stdout
    assert_same_end(place, "whole", "cut")


# ---------------------------------------------------------------- 10 and 11: ranks that go wrong


def test_10_nan_on_one_rank_steps_nowhere(place: Workplace) -> None:
    done = place.train("nan", "checkpoint.every_steps=1", "checkpoint.keep=20", fault="nan steps=4,5 rank=1")
    assert done.returncode == 0, done.stderr
    assert "non-finite loss or gradient, no rank stepped at step 4 (rank 1: samples" in done.stdout
    folder = place.folder / "nan" / "checkpoints"
    states = {s: torch.load(folder / f"step-{s:08d}.pt", weights_only=True) for s in (4, 5, 6, 7)}
    for part in ("model", "ema"):
        assert differences(states[4][part], states[6][part]) == []
        assert differences(states[6][part], states[7][part]) != []
    assert differences(states[4]["optimizer"]["state"], states[6]["optimizer"]["state"]) == []


def test_10_nan_for_ever_ends_the_run_on_all_ranks(place: Workplace) -> None:
    steps = ",".join(map(str, range(2, 12)))
    done = place.train("nans", "health.max_bad_steps=3", fault=f"nan steps={steps} rank=1")
    assert done.returncode != 0
    assert "3 steps in a row were not finite" in place.status("nans")["message"]
    assert "rank 1: samples" in place.status("nans")["message"]


def test_11_a_slow_rank_is_named(place: Workplace) -> None:
    done = place.train("slow", "log.every_steps=4", "train.epochs=2", fault="slow rank=1")
    assert done.returncode == 0, done.stderr
    assert "rank 1 is slow" in done.stdout
    assert "rank 0 is slow" not in done.stdout


def test_11_a_stopped_rank_ends_all(place: Workplace) -> None:
    done = place.train("stopped", "health.timeout_s=6", fault="SIGSTOP step=5 rank=1", timeout=120)
    assert done.returncode != 0
    assert "rank 1 does not answer" in place.status("stopped")["message"]
    assert no_orphans(place) == []


# ---------------------------------------------------------------- 12 to 17: resume, decisions, figures


@pytest.mark.parametrize("ranks", [1, 4])
def test_12_resumed_on_another_number_of_ranks(place: Workplace, ranks: int) -> None:
    run = f"moved{ranks}"
    source = place.folder / "whole" / "checkpoints" / "step-00000006.pt"
    done = place.train(run, f"run.resume={source}", "checkpoint.every_steps=1", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert f"the same batches, the loss to 1e-5 (world_size 2 -> {ranks})" in done.stdout
    expected = [line for line in place.lines("whole", "train") if line["step"] > 6]
    found = place.lines(run, "train")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_13_resumed_at_each_of_12_steps(place: Workplace) -> None:
    words = ["train.epochs=4", "checkpoint.every_steps=1", "checkpoint.keep=20"]
    assert place.train("many/whole", *words).returncode == 0
    lines = repeats(place, "resumes", "resumes.jsonl", "many/again", *words, ranks=2)
    assert len(lines) >= 12
    assert [line["same"] for line in lines] == [True] * len(lines)


def test_14_early_stop_is_one_decision(place: Workplace) -> None:
    words = ["train.patience=1", "train.epochs=6", "train.global_batch=21", "checkpoint.every_steps=null"]
    lines = repeats(place, "stops", "stops.jsonl", "stops", *words, ranks=2)
    assert len(lines) == 20
    assert all(len(set(line["steps"])) == 1 for line in lines)
    assert sum(bool(line["early"]) for line in lines) > 10


def test_15_figures_of_one_process_for_any_sizes(place: Workplace) -> None:
    for size in (1, 2, 3, 5, 7):
        folder = place.folder / f"data_val-{size}"
        videos = sorted((place.folder / "data_train").glob("*/*"))[::3][:size]
        for name in ("class0", "class1", "class2"):
            (folder / name).mkdir(parents=True)
        for video in videos:
            (folder / video.parent.name / video.name).symlink_to(video)
        for name in folder.iterdir():
            if not any(name.iterdir()):
                name.rmdir()
    words = ["train.max_steps=1", "train.global_batch=4"]
    found = {n: repeats(place, "validations", f"val{n}.jsonl", f"val{n}", *words, ranks=n) for n in (1, 4)}
    assert [line["size"] for line in found[1]] == [1, 2, 3, 5, 7]
    for one, four in zip(found[1], found[4], strict=True):
        assert one == pytest.approx(four, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_16_overflow_in_fp16_skips_everywhere(place: Workplace, shard: str) -> None:
    run = f"fp16_{shard}"
    words = ["train.precision=fp16", f"optim.shard={shard}", "health.checksum_every=1", "train.epochs=2"]
    done = place.train(run, *words, fault="overflow steps=3 rank=1")
    assert done.returncode == 0, done.stderr  # checksum_every=1: the weights of the ranks were compared at every step
    state = place.state(run)
    assert state["position"]["step"] == 8
    assert state["position"]["schedule_step"] == 7
    assert state["scaler"]["scale"] == 2.0**15  # one halving of torch's first scale
    rates = [line["lr"] for line in place.lines(run, "train")]
    assert rates[4] == rates[3]  # the skipped step's rate is used again


def test_17_sharded_optimizer_resumes_and_changes_nothing(place: Workplace) -> None:
    assert place.train("sharded", "optim.shard=true").returncode == 0
    a, b = place.state("whole"), place.state("sharded")
    for part in ("model", "ema"):
        assert differences(a[part], b[part], part) == []
    killed = place.train("sharded_killed", "optim.shard=true", fault="SIGKILL step=7 rank=0")
    assert killed.returncode != 0
    assert place.train("sharded_killed", "optim.shard=true", "run.resume=auto").returncode == 0
    assert_same_end(place, "sharded", "sharded_killed")


def test_17_class_weights_balance_and_repeats_resume(place: Workplace) -> None:
    words = ["train.class_weights=inverse", "data.balance=class", "augment.repeats=2", "train.freeze_depth=1"]
    words += ["augment.erase=0.5", "augment.color_jitter=0.4", "augment.randaugment=rand-m7-n4-mstd0.5-inc1"]
    words += ["clip.stride_jitter=1", "model.head_dropout=0.3", "optim.head_lr_scale=3"]
    assert place.train("recipe", *words).returncode == 0
    assert place.train("recipe_killed", *words, fault="SIGKILL step=9 rank=1").returncode != 0
    assert place.train("recipe_killed", *words, "run.resume=auto").returncode == 0
    assert_same_end(place, "recipe", "recipe_killed")


# ---------------------------------------------------------------- 18 and 19: directories and input


def test_18_two_runs_on_one_directory(place: Workplace) -> None:
    folder = place.folder / "shared_run"
    folder.mkdir()
    lock = RunLock(folder)
    lock.take()
    try:
        assert f"is in use by process {os.getpid()}" in one_line(place.alone("shared_run"))
    finally:
        lock.release()
    assert list(folder.iterdir()) == []


def test_18_the_lock_of_the_dead_is_taken_over_at_any_clock(place: Workplace, tmp_path: Path) -> None:
    child = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import os, sys; from pathlib import Path; from vac_ddp.runtime.lock import RunLock;"
            "RunLock(Path(sys.argv[1])).take(); os._exit(0)",
            str(tmp_path),
        ],
        env=environment(),
    )
    assert child.returncode == 0 and (tmp_path / "run.lock").exists()
    os.utime(tmp_path / "run.lock", (4e9, 4e9))  # touched in the far future, by this clock
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_18_newest_is_by_step_not_by_clock(place: Workplace, tmp_path: Path) -> None:
    source = place.folder / "whole" / "checkpoints"
    for number in (11, 12):
        for ending in (".pt", ".json"):
            copied = shutil.copy(source / f"step-{number:08d}{ending}", tmp_path)
            os.utime(copied, (2e9 - number * 1e8,) * 2)
    path, _, _ = checkpoint.read_newest(tmp_path, print)
    assert path.stem == "step-00000012"


def test_18_read_only_directory(place: Workplace, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "cannot be" in one_line(place.alone("unused", f"run.dir={small_disk}/run"))


def test_19_label_out_of_range_names_the_video() -> None:
    with pytest.raises(UserError, match="b/v1 has the label 7, classes are 0 to 2"):
        check_labels(torch.tensor([0, 7, 2]), 3, ["a/v0", "b/v1", "c/v2"])


def test_19_video_without_frames_is_named(place: Workplace, tmp_path: Path) -> None:
    data = make_videos(tmp_path / "data", videos=2)
    (data / "class1" / "hollow").mkdir()
    assert "class1/hollow" in one_line(place.alone("hollow", f"data.train={data}", "data.val=null"))
