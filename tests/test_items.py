"""One bad video, file or run never ends the work on the others: its line, and exit status 3."""

from __future__ import annotations

import random
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.frame_data import MemoryVideos, jpeg, write_video
from vac_ddp.audio import spectrogram
from vac_ddp.audio.sounds import Sounds
from vac_ddp.audit.inspection import inspect_video
from vac_ddp.cli import main
from vac_ddp.data.frames import read_clip
from vac_ddp.data.index import open_index
from vac_ddp.settings import DataSettings

EPOCH = '{"kind": "epoch", "step": 3, "epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_top1": 0.5}\n'
BROKEN = {
    "settings that are no YAML": ("config.yaml", b"model: [\n"),
    "settings that are not text": ("config.yaml", b"\xff\xfe\x00"),
    "figures that are not text": ("metrics.jsonl", b"\xff\x00\n{}\n"),
    "figures that are no objects": ("metrics.jsonl", b"[1, 2]\n3\n"),
    "figures of other types": ("metrics.jsonl", EPOCH.replace("0.5", '"high"').encode() * 2),
    "no figures but a folder": ("metrics.jsonl", None),
}


def make_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "log.txt").write_text("")
    (folder / "metrics.jsonl").write_text(EPOCH)
    return folder


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("command", ["runs", "table", "plot"])
def test_a_broken_run_is_a_line_beside_the_others(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "spoiled", "third"):
        make_run(tmp_path / name)
    name, content = BROKEN[kind]
    path = tmp_path / "spoiled" / name
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    words = [str(tmp_path)] if command == "runs" else [str(tmp_path / run) for run in ("first", "spoiled", "third")]
    status = main([command, *words])
    said = capsys.readouterr()
    if command == "plot" and name == "config.yaml":  # it reads the figures only
        assert status == 0
        return
    assert status == 3, said
    assert said.err == ""
    assert sum("spoiled" in line for line in said.out.splitlines()) == 1
    if command == "runs":
        assert {"first", "third"} <= {line.split()[0] for line in said.out.splitlines()}
    elif command == "table":
        assert "   2   0.5000" in said.out
    else:
        assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("error", [ValueError("cannot mmap"), IndexError("offsets"), MemoryError()])
def test_whatever_reading_a_frame_raises_is_that_frame(error: Exception) -> None:
    good = [jpeg(48, 64, seed) for seed in range(3)]

    def read(frame: int) -> bytes:
        if frame == 1:
            raise error
        return good[frame]

    out = torch.zeros((1, 3, 32, 32, 3), dtype=torch.uint8)
    damaged = read_clip(read, np.arange(3), lambda height, width: [(0, 0, height, width)], out, n_frames=3)
    assert list(damaged) == [1]
    assert type(error).__name__ in damaged[1]
    assert torch.equal(out[0, 1], out[0, 0])

    class Videos(MemoryVideos):
        def frame_bytes(self, video: int, frame: int) -> bytes:
            return read(frame)

    look = inspect_video(Videos([good]), 0)
    assert look.damaged == [(1, damaged[1])]
    assert look.sizes.total() == 2


def write_wav(path: Path, samples: int = 4000) -> bytes:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(spectrogram.RATE)
        sound.writeframes(np.random.default_rng(0).integers(-999, 999, samples).astype("<i2").tobytes())
    return path.read_bytes()


def test_broken_sounds_are_silent_and_named(tmp_path: Path) -> None:
    """300 mutations of a header, a folder, and a file that is gone when its samples are read."""
    whole = write_wav(tmp_path / "whole.wav")
    draw = random.Random(0)
    for number in range(300):
        folder = write_video(tmp_path / "data" / f"{number:03d}", 1)
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(44)] = draw.randrange(256)
        (folder / spectrogram.NAME).write_bytes(bytes(data)[: draw.choice([20, 40, 44, 1000, len(data)])])
    (write_video(tmp_path / "data" / "300", 1) / spectrogram.NAME).mkdir()
    gone = write_video(tmp_path / "data" / "301", 1) / spectrogram.NAME
    gone.write_bytes(whole)
    sounds = Sounds(open_index(tmp_path / "data", labelled=False, settings=DataSettings(cache=str(tmp_path / "cache"))))
    assert any(line.endswith(f"300/{spectrogram.NAME}: Is a directory") for line in sounds.damaged)
    gone.unlink()
    heard = np.flatnonzero(sounds.lengths).tolist()
    assert 10 < len(heard) < 300
    assert 301 in heard
    windows = sounds.windows([(video, 0) for video in heard], 800)
    assert windows.shape == (len(heard), 800)
    assert not windows[heard.index(301)].any()
    assert sounds.lengths[301] == 0
    assert sum(line.startswith(f"{gone}: ") for line in sounds.damaged) == 1
