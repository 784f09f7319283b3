"""Frames to measure with: textured like photographs, moving like a hand-held camera, of known size as JPEG."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg

NOISE = 2.0  # grey levels of sensor noise
CONTRAST = 52.0  # standard deviation of the luminance, in grey levels
ROLL_OFF = 1.44  # gives 25 KB at 320x240 and 195 KB at 1280x720 (quality 90), as sharp video does


def texture(height: int, width: int, rng: np.random.Generator, roll_off: float) -> np.ndarray:
    """A random field, mean 0, deviation 1, whose amplitude falls with frequency as 1 / f^roll_off.

    Photographs have 1 to 1.5 (Field 1987, Tolhurst 1992), frames of compressed video are at the soft end.
    """
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(y, x), 1 / max(height, width))
    spectrum = np.fft.rfft2(rng.normal(size=(height, width))) / frequency**roll_off
    field = np.fft.irfft2(spectrum, s=(height, width))
    return (field - field.mean()) / field.std()


def moving_frames(height: int, width: int, count: int, seed: int, roll_off: float = ROLL_OFF) -> Iterator[np.ndarray]:
    """`count` frames (height, width, 3) uint8: a panned background, two textured disks that move over it, noise."""
    rng = np.random.default_rng(seed)
    margin = height // 3
    layers = []
    for _ in range(3):  # background and two disks
        light = CONTRAST * texture(height + margin, width + margin, rng, roll_off)
        red, blue = (9 * texture(height + margin, width + margin, rng, roll_off + 0.2) for _ in range(2))
        layers.append(np.stack([light + red, light - 0.3 * (red + blue), light + blue], axis=-1).astype(np.float32))
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        turn = 2 * np.pi * i / 90
        top, left = (round(margin / 2 * (1 + f(turn + seed))) for f in (np.sin, np.cos))
        image = layers[0][top : top + height, left : left + width].copy()
        for n, layer in enumerate(layers[1:]):
            centre = height * (0.5 + 0.3 * np.sin(2 * turn + n)), width * (0.5 + 0.35 * np.cos(turn + 2 * n))
            disk = np.hypot(y - centre[0], x - centre[1]) < height * (0.2 - 0.05 * n)
            image[disk] = layer[:height, :width][disk]
        image += 118 + rng.normal(scale=NOISE, size=image.shape)
        yield image.clip(0, 255).astype(np.uint8)


def write_videos(root: Path, *, videos: int, frames: int, height: int, width: int, quality: int = 90) -> float:
    """Write <root>/<class>/<video>/0001.jpg, two classes; returns the mean size of a frame in bytes."""
    total = 0
    for video in range(videos):
        folder = root / f"class{video % 2}" / f"video{video:02d}"
        folder.mkdir(parents=True)
        for i, image in enumerate(moving_frames(height, width, frames, video), start=1):
            data = simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling="420")
            (folder / f"{i:04d}.jpg").write_bytes(data)
            total += len(data)
    return total / (videos * frames)
