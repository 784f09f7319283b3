"""The speed benchmarks run to their end and write what they measured (their figures mean nothing in a dry run)."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.stats
import torch

from benchmarks.bars import required
from benchmarks.common import Stopwatch, our_training, ratio, settings_for
from benchmarks.curves import CHANGES
from benchmarks.memory import TRIES, largest
from benchmarks.options import Bench
from benchmarks.peers import hf_model
from benchmarks.tokens import interval, time_to
from benchmarks.train_step import check_same
from tests.support import REPO, environment
from vac_ddp.files import read_json


def gpu_script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(REPO / "benchmarks" / "gpu.sh"), *words],
        env=environment(VAC_PYTHON=sys.executable, OUT=str(folder)),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_dry_run_of_the_pieces_leaves_tables(tmp_path: Path) -> None:
    done = gpu_script(tmp_path, "--dry", "train", "predict")
    assert done.returncode == 0, done.stdout + done.stderr
    train, predict = read_json(tmp_path / "train_cpu.json"), read_json(tmp_path / "predict_cpu.json")
    for part, least in (("memory", 3), ("loader", 4)):
        rounds = train[part]["rounds"]
        assert len(rounds) >= least
        assert all(rate > 0 for rates in rounds.values() for rate in rates)
    assert sum(train["profile"]["shares"].values()) == pytest.approx(1, abs=0.05)
    assert train["dry"] and predict["dry"] and set(train["about"]) >= {"date", "device", "processor", "versions"}
    assert predict["passes"]["difference"] < 1e-3  # our logits and the peer's
    for name in ("train_cpu", "predict_cpu"):
        assert "A dry run" in (tmp_path / f"{name}.md").read_text()
    rows = required(tmp_path, "cpu")
    assert [row[0] for row in rows if row[1] == "not measured"] == [
        f"loss curve of the first seed, {change}" for change in CHANGES
    ]
    assert [row[2].split()[:2] for row in rows if row[1] != "not measured"] == [
        [">=", "0.45"],
        [">=", "0.6"],
        ["<=", "0.02"],
        [">=", "1.3"],
        [">=", "2"],
        [">=", "0.5"],
    ]
    assert all(row[0] in done.stdout.split("######## required")[1] for row in rows)
    assert [line.split()[0] for line in done.stdout.split("######## summary")[1].split("\n") if line] == [
        "train",
        "predict",
    ]


@pytest.mark.fault
def test_a_dry_run_of_part_of_the_tokens(tmp_path: Path) -> None:
    for part in ("quickstart", "step"):
        words = ["-m", "benchmarks.tokens", part, "--dry", "--out", str(tmp_path)]
        done = subprocess.run(
            [sys.executable, *words],
            env=environment(),
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    curves = read_json(tmp_path / "tokens_quickstart.json")["curves"]
    assert set(curves) == {"all seed 0", "motion 0.5 seed 0"}
    assert all(0 < first[0] < last[0] and 0 <= last[1] <= 1 for first, last in curves.values())
    assert set(read_json(tmp_path / "tokens_step.json")["ratios"]) >= {"vac_ddp, random 0.5", "vac_ddp, motion 0.5"}


def test_figures_of_part_of_the_tokens() -> None:
    assert time_to([(10.0, 0.5), (20.0, 0.9), (30.0, 1.0)], 0.95) == pytest.approx(25.0)
    assert time_to([(10.0, 0.96), (20.0, 0.9)], 0.95) == pytest.approx(10.0 * 0.95 / 0.96)
    assert time_to([(10.0, 0.5)], 0.95) == math.inf
    mean, low, high = interval([0.1, 0.2, 0.3])
    expected = scipy.stats.t.interval(0.95, 2, loc=0.2, scale=0.1 / math.sqrt(3))
    assert (mean, low, high) == pytest.approx((0.2, *expected), abs=1e-4)


@pytest.mark.fault
def test_a_dry_run_of_features_and_probes_leaves_tables(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.probe", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(words, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_json(tmp_path / "probe_cpu.json")
    assert found["dry"] and set(found["about"]) >= {"date", "device", "processor", "versions"}
    assert found["cosine"] > 0.99  # our features of a frame and the pipeline's
    assert [row["probe"] for row in found["table"]] == [*found["their_table"], "k-NN"] == ["ridge", "logistic", "k-NN"]
    for program in ("embed", "probe"):
        assert all(run["seconds"] > 0 and run["processor_s"] > 0 for run in found[program].values())
    text = (tmp_path / "probe_cpu.md").read_text()
    assert "A dry run" in text
    assert str(REPO) not in text + (tmp_path / "probe_cpu.json").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_what_the_script_cannot_do_is_one_line(tmp_path: Path) -> None:
    for words, said in ((["train", "bake"], "no piece bake"), (["train"], "no CUDA device; --dry tries")):
        done = gpu_script(tmp_path, *words)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_peer_computes_the_same() -> None:
    config = settings_for({"width": 32, "depth": 2, "heads": 2}, frames=4, size=32, clips=2)
    ours = our_training(config, torch.device("cpu"))
    theirs = hf_model(ours.stepper.model)
    check_same(ours, theirs, torch.device("cpu"))
    with torch.no_grad():
        theirs.classifier.weight.mul_(2)
    with pytest.raises(AssertionError, match="differ"):
        check_same(ours, theirs, torch.device("cpu"))


def test_a_stopwatch_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now, other = [0.0], [0.0]
    monkeypatch.setattr("time.process_time", lambda: other[0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"), seconds=1.0, warm=2, least=1)
    going, steps = True, 0
    while going:
        now[0] += 10.0 if steps < 2 else 0.25
        steps += 1
        going = watch.tick(8)
    assert (steps, watch.clips) == (6, 32)
    assert watch.rate == pytest.approx(32 / 1.0)
    alone = Stopwatch(torch.device("cpu"), seconds=1.0, warm=1, least=1, alone=True)
    assert alone.tick(8)
    now[0], other[0] = 1000.0, 2.0
    assert not alone.tick(8)
    assert alone.rate == pytest.approx(8 / 2.0)
    assert ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "a", "b") == {"median": 2.0, "best": 2.25}


@pytest.mark.parametrize("fixed", [1.0, 30.0])
@pytest.mark.parametrize("each", [0.01, 0.07, 0.9, 7.0, 60.0, 200.0])
def test_the_search_for_the_largest_batch_is_short_and_right(fixed: float, each: float) -> None:
    asked = []

    def peak(clips: int) -> float | None:
        asked.append(clips)
        used = fixed + each * clips * (1.02 if clips < 8 else 1.0)  # small batches are no exact measure
        return used if used <= 78.0 else None

    fits = [clips for clips in range(1, 1025) if fixed + each * clips * (1.02 if clips < 8 else 1.0) <= 78.0]
    best = max(fits, default=0)
    found, gib = largest(peak, 1024, 0.95 * 80)
    assert len(asked) <= TRIES
    assert best * 7 // 8 - 1 <= found <= best
    assert found == 0 or gib == peak(found)


def test_an_attention_option_builds_its_model_inside_its_context(tmp_path: Path) -> None:
    """On the CPU the exact kernel by parts is what the context asks for, and the fused one what is taken without."""
    from torch.profiler import ProfilerActivity, profile

    options = SimpleNamespace(dry=True, clips=2, size=32, sizes={"width": 32, "depth": 2, "heads": 2})
    ways = Bench(options, torch.device("cpu"), tmp_path).attention("MATH")
    fused = []
    for way in ways:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            way(Stopwatch(torch.device("cpu"), seconds=0.0, warm=1, least=1))
        fused.append(any("flash_attention_for_cpu" in event.key for event in found.key_averages()))
    assert fused == [False, True]


def test_results_are_kept_with_machine_versions_and_date() -> None:
    for name in ("train_cpu", "train_cpu_epyc", "predict_cpu", "probe_cpu", "scaling", "levers", "curves_cpu"):
        kept = REPO / "benchmarks" / "results" / f"{name}.json"
        about = read_json(kept)["about"]
        assert {"date", "processor", "cores", "versions", "device"} <= set(about), name
        assert not read_json(kept).get("dry"), name
        assert about["date"] in kept.with_suffix(".md").read_text()
