"""W&B and TensorBoard get every figure of metrics.jsonl, over a kill and a resume; a run does not depend on them."""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import DRIVER, Workplace
from tests.wandb_files import OfflineRun, offline_runs
from vac_ddp.report import services
from vac_ddp.report.tracker import Tracker
from vac_ddp.settings import LogSettings

KEY = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_notARealTokenButOneThatMustNotBeSeen"
SECRETS = {"WANDB_API_KEY": KEY, "HF_TOKEN": TOKEN}
WORDS = ("log.wandb=offline", "log.tensorboard=true", "log.wandb_artifact=true", "train.epochs=2", "data.workers=0")


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, str]:
    """A run whose process was killed in its second epoch, and that was resumed to its end."""
    place = Workplace(tmp_path_factory.mktemp("services"))
    words = place.arguments("run", *WORDS)
    killed = place.python(
        DRIVER,
        *words,
        FAULT="SIGKILL step=7",
        FAULT_DONE=str(place.folder / "done"),
        **SECRETS,
    )
    assert killed.returncode == -9, killed.stderr
    done = place.python("-m", "vac_ddp.train", *words, "run.resume=auto", **SECRETS)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resumed at step [46] of 8", done.stdout)  # 6 where that save was done before the kill
    return place, done.stdout + done.stderr


def figures(lines: list[dict[str, Any]]) -> set[tuple[str, int, float]]:
    """(name, step, value) of every number of metrics.jsonl."""
    return {
        (f"{line['kind']}/{name}", line["step"], float(value))
        for line in lines
        for name, value in line.items()
        if name not in ("kind", "step") and isinstance(value, int | float) and not isinstance(value, bool)
    }


def test_offline_files_of_wandb_hold_every_figure_under_one_id(killed_and_resumed: tuple[Workplace, str]) -> None:
    place, said = killed_and_resumed
    runs = offline_runs(place.folder / "run")
    assert len(runs) == 2
    assert len({run.path.name for run in runs}) == 1  # run-<id>.wandb
    assert runs[1].id in said
    assert runs[1].path.name == f"run-{runs[1].id}.wandb"
    assert (runs[0].exit_code, runs[1].exit_code) == (None, 0)
    wanted = figures(place.lines("run"))
    assert {name for name, _, _ in wanted} >= {"train/lr", "train/loss", "train/clips_per_s", "epoch/val_top1"}
    assert {step for _, step, _ in wanted} == set(range(1, 9))
    there = {
        (name, row["step"], float(value))
        for run in runs
        for row in run.rows
        for name, value in row.items()
        if "step" in row and isinstance(value, int | float)
    }
    assert wanted - there == set()
    known = json.loads((place.folder / "run" / "wandb" / "complete.json").read_text())
    assert known == {"id": runs[1].id, "lines": len(place.lines("run"))}


def test_wandb_has_the_settings_the_pictures_and_the_best_weights(killed_and_resumed: tuple[Workplace, str]) -> None:
    place, _ = killed_and_resumed
    last = offline_runs(place.folder / "run")[-1]
    assert last.config["train"]["global_batch"] == 6
    assert last.config["optim"]["lr"] == 0.003
    pictures = {name.partition("/_type")[0] for row in last.rows for name in row if name.endswith("/_type")}
    assert pictures == {"validation/confusion", *(f"validation/example_{i}" for i in range(1, 7))}
    captions = [value for row in last.rows for name, value in row.items() if name.endswith("/caption")]
    assert any("class0/v00: class" in caption and "is class0" in caption for caption in captions)
    assert last.artifacts == [f"{last.id}-best"]


def test_tensorboard_has_every_figure_once(killed_and_resumed: tuple[Workplace, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place, _ = killed_and_resumed
    board = EventAccumulator(str(place.folder / "run" / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    there = sorted((tag, e.step, np.float32(e.value)) for tag in board.Tags()["scalars"] for e in board.Scalars(tag))
    wanted = sorted((name, step, np.float32(value)) for name, step, value in figures(place.lines("run")))
    assert there == wanted
    assert "validation/confusion" in board.Tags()["images"]


def test_no_key_is_left_in_the_run(killed_and_resumed: tuple[Workplace, str]) -> None:
    place, said = killed_and_resumed
    assert KEY not in said
    assert TOKEN not in said
    for path in (place.folder / "run").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert KEY.encode() not in data, path
            assert TOKEN.encode() not in data, path


# ---------------------------------------------------------------- without the service


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of a server that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_run_goes_on_without_the_service(silent: str, tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    words = place.arguments("run", "log.wandb=online", "train.epochs=1", "data.workers=0")
    done = place.python("-m", "vac_ddp.train", *words, WANDB_BASE_URL=silent, **SECRETS)
    assert done.returncode == 0, done.stderr
    told = [line for line in (done.stdout + done.stderr).splitlines() if "W&B" in line or "wandb" in line.lower()]
    assert told == [f"going on without W&B: {silent} does not answer; every figure is in metrics.jsonl"]
    assert len(place.lines("run", "train")) == 4


def test_what_counts_as_an_answer(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    hangs = threading.Event()

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            hangs.wait(30)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    assert services.answers(here)  # 404 is an answer
    assert not services.answers(here, 0.2, data=b"{}")  # half dead
    hangs.set()
    server.shutdown()
    server.server_close()
    assert not services.answers(here)
    assert not services.answers(silent, 0.2)
    assert not services.answers("http://no-such-host.invalid")
    assert not services.answers("no address")


def test_a_missing_key_is_one_line_and_no_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(services, "answers", lambda url, **named: True)
    with pytest.raises(services.Unavailable, match="no key"):
        services.start_wandb(LogSettings(wandb="online"), tmp_path, {}, "name", None)


def test_a_service_that_dies_later_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Dead:
        def log(self, row: dict[str, Any]) -> None:
            raise BrokenPipeError("the service is gone")

    tracker = Tracker(tmp_path, LogSettings(), rank=0)
    tracker._wandb = Dead()
    tracker.write("train", 1, loss=1.0)
    tracker.write("train", 2, loss=0.5)
    tracker.close()
    assert capsys.readouterr().out.count("without W&B: the service is gone") == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 0.5]


def test_a_torn_record_at_the_end_is_left_out(killed_and_resumed: tuple[Workplace, str], tmp_path: Path) -> None:
    """The reader of these tests itself: it must not take damage for an end."""
    place, _ = killed_and_resumed
    whole = offline_runs(place.folder / "run")[-1]
    data = bytearray(whole.path.read_bytes())
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "x.wandb").write_bytes(data[: len(data) // 2])
    assert 0 < len(OfflineRun(tmp_path / "cut").rows) < len(whole.rows)
    data[len(data) // 2] ^= 1
    (tmp_path / "cut" / "x.wandb").write_bytes(data)
    with pytest.raises(AssertionError, match="damaged"):
        OfflineRun(tmp_path / "cut")
