"""Sound: spectrograms as transformers makes them, files that cannot be used, and fusion with the picture."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs import TINY
from tests.support import environment
from vac_ddp.audio import spectrogram
from vac_ddp.commands import audio_command as command
from vac_ddp.commands import score_command
from vac_ddp.data.index import open_index
from vac_ddp.errors import Findings, UserError
from vac_ddp.results.logits_file import read_views
from vac_ddp.settings import DataSettings


def write_wav(path: Path, samples: np.ndarray, *, rate: int = spectrogram.RATE) -> None:
    """samples: (n,) or (n, channels) int16."""
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.astype("<i2").tobytes())


def tone(hertz: float, rng: np.random.Generator, seconds: float = 1.5) -> np.ndarray:
    time = np.arange(int(seconds * spectrogram.RATE)) / spectrogram.RATE
    sound = 6000 * np.sin(2 * np.pi * (hertz * time + rng.random())) + 1500 * rng.normal(size=len(time))
    return sound.astype(np.int16)


def test_spectrograms_are_those_of_the_library() -> None:
    from transformers import audio_utils

    samples = np.random.default_rng(0).integers(-20000, 20000, 8000).astype(np.int16)
    bank = audio_utils.mel_filter_bank(257, 64, 20.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    expected = audio_utils.spectrogram(
        samples / 32768,
        audio_utils.window_function(400, "hann"),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        mel_filters=bank,
        mel_floor=1e-10,
        log_mel="log10",
    )
    found = spectrogram.log_mel(torch.from_numpy(samples)[None], 64)[0]
    assert found.shape == (64, 51)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_windows_are_read_from_where_they_begin_and_end_in_silence(tmp_path: Path) -> None:
    samples = np.arange(1000, dtype=np.int16)
    write_wav(tmp_path / "mono.wav", samples)
    write_wav(tmp_path / "stereo.wav", np.stack([samples, samples + 2], axis=1))
    assert spectrogram.read_window(tmp_path / "mono.wav", 990, 20).tolist() == [*range(990, 1000), *[0] * 10]
    assert spectrogram.read_window(tmp_path / "stereo.wav", 5, 3).tolist() == [6, 7, 8]
    assert spectrogram.sound_length(tmp_path / "stereo.wav") == 1000
    assert spectrogram.sound_length(tmp_path / "none.wav") == 0
    assert spectrogram.window_starts(1000, 400, 3) == [0, 300, 600] and spectrogram.window_starts(1000, 400, 1) == [300]
    assert spectrogram.window_starts(100, 400, 2) == [0, 0]


def test_sounds_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    write_wav(tmp_path / "fast.wav", np.zeros(10, np.int16), rate=44100)
    (tmp_path / "bad.wav").write_bytes(b"RIFF" + bytes(3))
    for name, said in (("fast.wav", "44100 Hz"), ("bad.wav", "no whole WAV")):
        with pytest.raises(ValueError, match=said):
            spectrogram.sound_length(tmp_path / name)


def test_masks_hide_a_fifth_at_most_and_go_by_their_generator() -> None:
    pictures = torch.ones(2, 40, 100)
    first, again = (spectrogram.mask(pictures, [np.random.default_rng(i) for i in (1, 2)]) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first[0], first[1])
    for one in first:
        rows, columns = int((one == 0).all(1).sum()), int((one == 0).all(0).sum())
        assert rows <= 8 and columns <= 20
        assert int((one == 0).sum()) == rows * 100 + columns * 40 - rows * columns


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_any_backbone_takes_a_spectrogram_and_its_seed(backbone: str) -> None:
    settings = spectrogram.SoundSettings(seconds=1.3, mels=32, backbone=backbone)
    samples = torch.randint(-3000, 3000, (2, settings.samples), dtype=torch.int16)
    a, b = (spectrogram.SoundModel(settings, 5, seed=3).eval() for _ in range(2))
    assert a.spectrograms(samples).shape == (2, 32, settings.columns) and settings.columns % 32 == 0
    assert a(samples).shape == (2, 5)
    assert torch.equal(a(samples), b(samples))
    with pytest.raises(UserError, match="near: resnet"):
        spectrogram.SoundModel(spectrogram.SoundSettings(backbone="resnet18x"), 5, seed=0)


def make_set(folder: Path, videos: int, seed: int) -> Path:
    """Two classes of one sound and two colours, and two of one colour and two sounds; some of the former are mute."""
    rng = np.random.default_rng(seed)
    looks = {"blue": (0, 700), "red": (1, 700), "low": (2, 300), "high": (2, 2500)}
    for name, (colour, hertz) in looks.items():
        for number in range(videos):
            video = folder / name / f"v{number:02d}"
            video.mkdir(parents=True)
            for frame in range(6):
                pixels = rng.random((32, 32, 3)) * 60 + np.eye(3)[colour] * 150
                Image.fromarray(pixels.astype(np.uint8)).save(video / f"{frame + 1:04d}.jpg")
            if number % 4 or hertz != 700:
                write_wav(video / spectrogram.NAME, tone(hertz, rng))
    return folder


def test_the_seed_decides_and_without_validation_only_the_test_part_is_predicted(tmp_path: Path) -> None:
    train = make_set(tmp_path / "train", 2, 0)
    weights = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ["--epochs", "2", "--backbone", "test_resnet", "--seconds", "0.5", "--mels", "32", "--test", str(train)]
        words += [f"seed={seed}", "data.val_fraction=0", "data.group_by=none", f"data.cache={tmp_path / 'cache'}"]
        command.main([str(train), "--out", str(tmp_path / out), *words])
        assert not (tmp_path / out / "val").exists() and read_views(tmp_path / out / "test").labelled
        weights.append(torch.load(tmp_path / out / "audio.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_picture_and_sound_together_beat_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = make_set(tmp_path / "data_train", 12, 0), make_set(tmp_path / "data_test", 6, 1)
    (test / "low" / "v00" / spectrogram.NAME).write_bytes(b"RIFF")
    (tmp_path / "tiny.yaml").write_text(TINY)
    run, out, cache = tmp_path / "run", tmp_path / "sound", f"data.cache={tmp_path / 'cache'}"
    assert not any("strange" in note or "left alone" in note for note in _notes(train, tmp_path / "cache"))
    words = ["train.epochs=30", "augment.mixup=0", "augment.cutmix=0", "data.val_fraction=0.34", "model.drop_path=0"]
    words += ["train.ema_decay=null", "train.label_smoothing=0", "optim.layer_decay=1", "model.head_init_scale=1"]
    words += [f"--config={tmp_path / 'tiny.yaml'}", f"data.train={train}", f"run.dir={run}", cache, "data.workers=0"]
    _vac("train", *words)
    _vac("predict", "--run", str(run), "--part", "val")
    _vac("predict", "--run", str(run), "--data", str(test))

    small = ["--backbone", "resnet10t", "--seconds", "1", "--mels", "32", "--epochs", "12", "--batch", "8"]
    with pytest.raises(Findings, match="low/v00"):
        command.main([str(train), "--run", str(run), "--out", str(out), "--test", str(test), *small])
    with pytest.raises(UserError, match="--overwrite"):
        command.main([str(train), "--out", str(out)])
    sound = read_views(out / "test")
    mute = {"low/v00", *(f"{name}/v{number:02d}" for name in ("blue", "red") for number in (0, 4))}
    assert {name for name, failed in zip(sound.ids, sound.failed, strict=True) if failed} == mute
    assert read_views(out / "val").ids == read_views(run / "predictions" / "val").ids

    picture = run / "predictions"
    fused = tmp_path / "fused"
    validation = [str(picture / "val"), str(out / "val")]
    words = ["--fit", *validation, "--temperature-from", *validation, "--out", str(fused)]
    capsys.readouterr()
    score_command.main([str(picture / "data_test"), str(out / "test"), *words])
    said = capsys.readouterr()
    assert "was made of" not in said.err  # both views files are known to be of the same videos
    both = json.loads((fused / "metrics.json").read_text())["top1"]
    alone = [_top1(picture / "data_test"), _top1(out / "test")]
    assert both > max(alone) + 0.1, (both, alone, said.out)


def _notes(root: Path, cache: Path) -> list[str]:
    return open_index(root, labelled=True, settings=DataSettings(cache=str(cache))).notes


def _top1(path: Path) -> float:
    views = read_views(path)
    return float((views.logits.mean(1).argmax(1) == views.labels).mean())


def _vac(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vac_ddp.cli", *words], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_sounds_that_cannot_be_used_are_the_first_reason(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(root / name / "1.png")
        write_wav(root / name / spectrogram.NAME, np.zeros(100, np.int16), rate=44100)
    words = [str(root), "--out", str(tmp_path / "o"), f"data.cache={tmp_path}"]
    with pytest.raises(UserError, match=r"^4 of 4 sounds cannot be used, .*16 bits at 44100 Hz, expected 16 bits at"):
        command.main(words)
    for sound in root.rglob(spectrogram.NAME):
        sound.unlink()
    with pytest.raises(UserError, match=r"^fewer than two classes .*vac extract --audio"):
        command.main(words)
