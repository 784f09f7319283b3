"""Run directories are never lost: what overwrites, what is refused, what a start after a kill finds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.runs import Workplace
from vac_ddp import train
from vac_ddp.arguments import parse_settings
from vac_ddp.errors import UserError
from vac_ddp.report import run_reader
from vac_ddp.runtime import lock
from vac_ddp.settings import RunSettings
from vac_ddp.training import run_directory

pytestmark = pytest.mark.distributed

SHORT = ("train.epochs=1", "optim.warmup_epochs=0", "data.workers=0", "checkpoint.every_steps=null")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    made = Workplace(tmp_path_factory.mktemp("run_dir"))
    assert here(made, "finished", *SHORT)[0] == 0
    (made.folder / "finished" / "predictions" / "mine").mkdir(parents=True)
    (made.folder / "finished" / "predictions" / "mine" / "submission.csv").write_text("id,class\n")
    return made


def here(place: Workplace, run: str, *words: str) -> tuple[int, str, str]:
    """Train in this process: exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = train.main(place.arguments(run, *words))
        except SystemExit as leaving:
            status = int(str(leaving.code))
    return status, out.getvalue(), err.getvalue()


def refused(done: tuple[int, str, str]) -> str:
    """The one line of a start that ended with status 2."""
    status, _, err = done
    assert status == 2 and err.count("\n") == 1, err
    return err


def finished(place: Workplace, name: str) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(place.folder / "finished", place.folder / name))


def test_debug_leaves_a_finished_run_alone(place: Workplace) -> None:
    folder = finished(place, "real")
    before = contents(folder)
    for words in ([], ["run.overwrite=true"], ["run.resume=auto"]):
        assert f"{folder} is not a debug run" in refused(here(place, "real", "--debug", *words))
        assert contents(folder) == before


def test_debug_replaces_debug_runs_and_takes_empty_directories(place: Workplace) -> None:
    (place.folder / "trial").mkdir()
    for _ in range(2):
        assert here(place, "trial", "--debug")[0] == 0
        assert (place.folder / "trial" / "debug_run.txt").exists()
        assert not list(place.folder.glob("trial.*"))


def test_overwrite_counts_on_the_command_line_only(place: Workplace) -> None:
    folder = finished(place, "kept")
    before = contents(folder)
    text = (place.folder / "tiny.yaml").read_text() + "run: {overwrite: true}\n"
    (place.folder / "overwriting.yaml").write_text(text)
    given = f"--config={place.folder / 'overwriting.yaml'}"  # the later of two counts
    assert "run.overwrite=true counts only on the command line" in refused(here(place, "kept", *SHORT, given))
    # the settings of a run of the first version, which kept how it was started
    old = finished(place, "first_version") / "config.yaml"
    old.write_text(old.read_text().replace("overwrite: false", "overwrite: true"))
    command = parse_settings([f"--config={old}"])
    assert not command.config.run.overwrite and "is ignored" in command.notes[0]
    assert "holds a run already" in refused(here(place, "kept", *SHORT, f"--config={old}"))
    assert contents(folder) == before


@pytest.mark.fault
def test_what_is_overwritten_goes_after_the_first_checkpoint(place: Workplace) -> None:
    """Killed before it, the earlier run is whole beside it, and later starts say so until it is replaced."""
    folder = finished(place, "again")
    (folder / "notes.txt").write_text("mine\n")
    before = {k: v for k, v in contents(folder).items() if k != "notes.txt"}
    fault = {"FAULT": "SIGKILL step=2 rank=0", "FAULT_DONE": str(place.folder / "again.fault")}
    driver = Path(__file__).parent / "drivers" / "fault.py"
    killed = place.python(driver, *place.arguments("again", *SHORT, "run.overwrite=true"), **fault)
    assert killed.returncode == -9
    (aside,) = place.folder.glob("again.discarded-*")
    assert contents(aside) == before
    status, said, _ = here(place, "again", *SHORT, "run.resume=auto")
    assert status == 0 and f"{aside} holds the run that was overwritten" in said
    assert not aside.exists()
    assert (folder / "notes.txt").read_text() == "mine\n"
    assert "overwrite: false" in (folder / "config.yaml").read_text()


def test_a_start_that_was_killed_while_it_renamed_is_mentioned_and_nothing_removed(tmp_path: Path) -> None:
    aside = tmp_path / "run.discarded-20260101-000000"
    aside.mkdir()
    (aside / "metrics.jsonl").write_text("old\n")
    said: list[str] = []
    run = run_directory.open_run(RunSettings(dir=str(tmp_path / "run")), {}, said.append)
    run.begin(said.append)
    run.lock.release()
    assert len(said) == 1 and str(aside) in said[0] and "rename it to keep it" in said[0]
    assert run.discarded == []


def test_a_directory_that_cannot_be_renamed_is_left_as_it_is(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode:
        pytest.skip("a mount point needs the right to mount (root)")
    try:
        (disk / "metrics.jsonl").write_text("old\n")
        with pytest.raises(UserError, match=r"renaming it to disk.discarded-.* failed .*nothing was changed"):
            run_directory.open_run(RunSettings(dir=str(disk), overwrite=True), {}, print)
        assert contents(disk) == {"metrics.jsonl": b"old\n"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_current_directory_is_not_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("old\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds the current directory"):
        run_directory.open_run(RunSettings(dir=".", overwrite=True), {}, print)
    assert contents(tmp_path) == {"metrics.jsonl": b"old\n"}


def test_a_disk_without_room_for_both_runs_gives_the_earlier_one_back(place: Workplace) -> None:
    folder = finished(place, "large")
    before = contents(folder)
    keep = shutil.disk_usage(folder).free // 100_000  # copies of a checkpoint of a few hundred KB
    line = refused(here(place, "large", *SHORT, "run.overwrite=true", f"checkpoint.keep={keep}"))
    assert "GB free and the checkpoints need" in line and "kept until the first checkpoint" in line
    assert contents(folder) == before
    assert not list(place.folder.glob("large.*"))


def test_results_without_checkpoints_are_not_started_over(place: Workplace) -> None:
    folder = finished(place, "pruned")
    shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    assert "no checkpoint to resume from" in refused(here(place, "pruned", *SHORT, "run.resume=auto"))
    assert contents(folder) == before


def test_discarded_runs_are_not_listed(place: Workplace, tmp_path: Path) -> None:
    for name in ("a", "a.discarded-20260101-000000"):
        shutil.copytree(place.folder / "finished", tmp_path / name)
    assert run_reader.find_runs(tmp_path) == [tmp_path / "a"]


def test_a_run_that_goes_on_in_a_debug_directory_is_no_debug_run(place: Workplace) -> None:
    folder = place.folder / "was-debug"
    folder.mkdir()
    (folder / "debug_run.txt").write_text(run_directory.DEBUG_NOTE)  # all that a debug run left that was killed at once
    assert here(place, "was-debug", *SHORT, "run.resume=auto")[0] == 0
    before = contents(folder)
    assert "is not a debug run" in refused(here(place, "was-debug", "--debug"))
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_debug_in_what_is_no_directory_is_one_line(place: Workplace, kind: str) -> None:
    path = place.folder / f"no-directory-{kind[:4]}"
    path.write_text("mine") if kind == "file" else path.symlink_to("nowhere")
    assert "give a directory" in refused(here(place, path.name, "--debug"))


@pytest.mark.parametrize("written", ["nothing", "the lock"])
def test_a_disk_that_is_full_at_the_start_changes_nothing(place: Workplace, written: str) -> None:
    name = f"an-earlier-run-with-a-long-name-on-a-full-disk-{written[:3]}"
    folder = finished(place, name)
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lock_bytes = len(json.dumps(dataclasses.asdict(lock._own())))
    resource.setrlimit(resource.RLIMIT_FSIZE, (lock_bytes if written == "the lock" else 0, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            run_directory.open_run(RunSettings(dir=str(folder), overwrite=True), {}, lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
    assert not list(place.folder.glob(f"{name}.discarded-*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "config.yaml", "classes.json", "checkpoints"])
def test_a_folder_in_place_of_a_file_is_one_line(place: Workplace, name: str) -> None:
    folder = finished(place, f"kind-{name}")
    entry = folder / name
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    entry.write_text("mine") if name == "checkpoints" else entry.mkdir()
    assert f"{entry} is " in refused(here(place, folder.name, *SHORT, "run.resume=auto"))


def test_a_damaged_list_of_classes_is_one_line(place: Workplace) -> None:
    folder = finished(place, "classes-damaged")
    (folder / "classes.json").write_text('{"a')
    assert "classes.json" in refused(here(place, folder.name, *SHORT, "run.resume=auto"))
