"""The loader benchmark runs to its end and writes what it measured (its figures mean nothing in a quick run)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from benchmarks.pictures import moving_frames
from tests.support import REPO, environment
from vac_ddp.files import read_json


def test_a_quick_run_measures_every_way(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loader", "--quick", "--out", str(tmp_path)],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode in (0, 3), done.stderr
    found = read_json(tmp_path / "loader.json")
    for size, ways in (("320x240", 8), ("1280x720", 10)):
        rates = found["sizes"][size]["clips_per_s"]
        assert len(rates) >= ways
        assert min(rates.values()) > 0
        assert found["sizes"][size]["worker_memory"]["peak_resident_mib"] > 100
    assert all(name in done.stdout for name in ("JPEG decoding alone", "Pillow", "the notebook's way", "ours, packed"))
    assert done.stdout.strip() == (tmp_path / "loader.md").read_text().strip()
    assert set(found["about"]) >= {"date", "processor", "cores", "versions"}


@pytest.mark.parametrize(("height", "width", "low", "high"), [(240, 320, 22, 28), (720, 1280, 150, 240)])
def test_frames_are_as_large_as_those_of_videos(height: int, width: int, low: int, high: int) -> None:
    frames = list(moving_frames(height, width, 3, seed=1))
    sizes = [len(simplejpeg.encode_jpeg(f, quality=90, colorsubsampling="420")) / 1024 for f in frames]
    assert low < np.mean(sizes) < high
    assert np.abs(frames[0].astype(int) - frames[2]).mean() > 5  # they move
