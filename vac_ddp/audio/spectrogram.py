"""Sound of videos: windows of their audio.wav, log-mel spectrograms on the device, and a timm image model on them.

A spectrogram is treated as a picture of one channel: mel bands high, one column every 10 ms wide, as in AST (Gong et
al. 2021) and PANNs (Kong et al. 2020).
"""

from __future__ import annotations

import difflib
import functools
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vac_ddp.data.scan import SOUND
from vac_ddp.errors import UserError

NAME = SOUND  # of a video without sound there is none
RATE = 16000  # samples a second, as `vac extract --audio` writes them
WINDOW, HOP, FFT = 400, 160, 512  # 25 ms every 10 ms, as in AST and PANNs
LOWEST_HZ = 20.0
FLOOR = 1e-10  # power below which everything is silence
COLUMNS = 32  # widths of spectrograms are multiples of it, so that patches and strides divide them


@dataclass(frozen=True, kw_only=True)
class SoundSettings:
    """What one window of sound is, and which network looks at it."""

    seconds: float = 4.0
    mels: int = 64
    backbone: str = "resnet18"
    pretrained: bool = False

    @property
    def columns(self) -> int:
        """Columns of a spectrogram."""
        return max(COLUMNS, round(self.seconds * RATE / HOP / COLUMNS) * COLUMNS)

    @property
    def samples(self) -> int:
        """Samples of a window: as many as give `columns` columns."""
        return (self.columns - 1) * HOP


def sound_length(path: Path) -> int:
    """Samples of a sound file, 0 where there is no such file. ValueError, in a few words, for one that cannot be used.

    16-bit PCM at `RATE`, of any number of channels.
    """
    try:
        with wave.open(str(path), "rb") as sound:
            if (sound.getframerate(), sound.getsampwidth()) != (RATE, 2):
                raise ValueError(
                    f"{8 * sound.getsampwidth()} bits at {sound.getframerate()} Hz, expected 16 bits at {RATE} Hz"
                )
            return sound.getnframes()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise ValueError(error.strerror) from None
    except ValueError:
        raise
    except Exception as error:  # wave.Error, EOFError, struct.error, ...
        raise ValueError(f"no whole WAV file ({error or 'cut off'})") from None


def read_window(path: Path, start: int, length: int) -> np.ndarray:
    """Samples `start` to `start + length` of a sound file, mono, (length,) int16; silence behind its end."""
    with wave.open(str(path), "rb") as sound:
        sound.setpos(min(start, sound.getnframes()))
        data, channels = sound.readframes(length), sound.getnchannels()
    values = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], "<i2").reshape(-1, channels)
    out = np.zeros(length, np.int16)
    out[: len(values)] = values[:, 0] if channels == 1 else np.rint(values.mean(axis=1))
    return out


def window_starts(length: int, window: int, count: int) -> list[int]:
    """First samples of `count` windows spread evenly over a sound of `length` samples; all 0 where it is shorter."""
    last = max(0, length - window)
    return [round(last * i / max(1, count - 1)) if count > 1 else last // 2 for i in range(count)]


@functools.cache
def _filters(mels: int, device: torch.device) -> Tensor:
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        num_frequency_bins=FFT // 2 + 1,
        num_mel_filters=mels,
        min_frequency=LOWEST_HZ,
        max_frequency=RATE / 2,
        sampling_rate=RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(bank.T).float().to(device)


def log_mel(samples: Tensor, mels: int) -> Tensor:
    """Spectrograms (B, mels, columns) float32 of samples (B, S) int16: log10 of the power in each mel band."""
    window = torch.hann_window(WINDOW, device=samples.device)
    waves = torch.stft(samples.float() / 32768, FFT, HOP, WINDOW, window, center=True, return_complex=True)
    return (_filters(mels, samples.device) @ waves.abs().square()).clamp(min=FLOOR).log10()


def mask(spectrograms: Tensor, rngs: list[np.random.Generator]) -> Tensor:
    """Hide a band of pitches and a stretch of time of each spectrogram, up to a fifth each (SpecAugment, Park 2019).

    What is hidden is 0, the mean of normalised spectrograms (B, mels, columns).
    """
    out = spectrograms.clone()
    for row, rng in enumerate(rngs):
        for axis in (0, 1):
            size = out.shape[1 + axis]
            width = int(rng.integers(0, size // 5 + 1))
            start = int(rng.integers(0, size - width + 1))
            out[row].narrow(axis, start, width).zero_()
    return out


class SoundModel(nn.Module):
    """Samples (B, S) int16 to logits (B, K): log-mel, normalised by the training part's mean and deviation, timm."""

    level: Tensor  # (2,) float32, mean and deviation

    def __init__(self, settings: SoundSettings, classes: int, *, seed: int) -> None:
        super().__init__()
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = _backbone(settings, classes)
        self.register_buffer("level", torch.zeros(2))
        self.level[1] = 1.0

    def spectrograms(self, samples: Tensor) -> Tensor:
        """Normalised spectrograms (B, mels, columns)."""
        return (log_mel(samples, self.settings.mels) - self.level[0]) / self.level[1]

    def forward(self, samples: Tensor, rngs: list[np.random.Generator] | None = None) -> Tensor:
        """Logits; with a generator for each sample the spectrograms are masked."""
        pictures = self.spectrograms(samples)
        if rngs is not None:
            pictures = mask(pictures, rngs)
        return self.network(pictures[:, None]).float()


def _backbone(settings: SoundSettings, classes: int) -> nn.Module:
    import timm

    name = settings.backbone
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(f"--backbone {name}: timm has no such model" + (f"; near: {', '.join(near)}" if near else ""))
    words: dict[str, Any] = {"pretrained": settings.pretrained, "in_chans": 1, "num_classes": classes}
    default = timm.get_pretrained_cfg(name)
    if default is not None and default.fixed_input_size:
        words["img_size"] = (settings.mels, settings.columns)
    try:
        return timm.create_model(name, **words)
    except (OSError, RuntimeError, TypeError, AssertionError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"--backbone {name} cannot be made for {settings.mels} x {settings.columns}: {line}") from error
