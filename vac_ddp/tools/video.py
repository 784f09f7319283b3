"""Read a video file as a player shows it, to its very end or not at all."""

from __future__ import annotations

import os
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import av

AUDIO_RATE = 16000  # samples per second of a sound file


class DamagedVideo(Exception):
    """A file that does not decode to its end; the message says why."""


def read_frames(source: Path, *, rate: float | None = None, short_side: int | None = None) -> Iterator[np.ndarray]:
    """The frames of a video file as a player shows them, turned and with square pixels: (H, W, 3) uint8 RGB.

    rate: frames per second; the k-th is the one that is shown at k / rate seconds, so that a slower video repeats
    frames. None: every frame once. short_side: larger frames are shrunk to it, in pixels.
    Raises DamagedVideo where the file cannot be decoded to its end.
    """
    import av

    try:
        if not source.stat().st_size:
            raise DamagedVideo("empty file")
    except OSError as error:
        raise DamagedVideo(error.strerror) from error
    decoded, end, shown = 0, 0.0, 0
    held: np.ndarray | None = None
    try:
        _check_length(source)
        with av.open(str(source), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise DamagedVideo("no picture in it")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # files are the threads; FFmpeg's can deadlock with Python's lock
            step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
            start: float | None = None
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise DamagedVideo(f"frame {decoded + 1} is corrupt")
                now = frame.time if frame.time is not None else (start or 0.0) + decoded * step
                if start is None:
                    start = now
                if rate is not None and held is not None:
                    while shown / rate < now - start - 1e-6:
                        yield held
                        shown += 1
                held = _upright(frame, stream, short_side)
                decoded += 1
                end = now - start + step
                if rate is None:
                    yield held
            _check_whole(container, stream, decoded, end)
    except av.FFmpegError as error:
        after = f" after {decoded} frames" if decoded else ""
        raise DamagedVideo(f"{error.strerror or type(error).__name__}{after}") from error
    if held is None:
        raise DamagedVideo("not one frame in it")
    if rate is not None:
        while shown / rate < end - 1e-6:
            yield held
            shown += 1


def write_audio(source: Path, target: Path) -> None:
    """Write the first sound track as 16-bit mono at `AUDIO_RATE`; without one there is no file."""
    import av

    try:
        with av.open(str(source), metadata_errors="ignore") as container:
            if not container.streams.audio:
                return
            resampler = av.AudioResampler(format="s16", layout="mono", rate=AUDIO_RATE)
            with wave.open(str(target), "wb") as sound:
                sound.setnchannels(1)
                sound.setsampwidth(2)
                sound.setframerate(AUDIO_RATE)
                for frame in container.decode(container.streams.audio[0]):
                    for part in resampler.resample(frame):
                        sound.writeframes(part.to_ndarray().tobytes())
                for part in resampler.resample(None):
                    sound.writeframes(part.to_ndarray().tobytes())
    except av.FFmpegError as error:
        raise DamagedVideo(f"sound: {error.strerror or type(error).__name__}") from error


def _check_length(source: Path) -> None:
    """Compare a file's length with what its container declares; readers do not mind where a file is shorter."""
    length = source.stat().st_size
    with source.open("rb") as stream:
        head = stream.read(12)
        if head[:4] == b"RIFF":
            declared = 8 + int.from_bytes(head[4:8], "little")
        elif head[4:8] == b"ftyp":
            declared = _end_of_boxes(stream, length)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            declared = _end_of_segment(stream)
        else:
            return
    if declared > length:
        raise DamagedVideo(f"cut off: {length} of {declared} bytes are there")


def _end_of_boxes(stream: BinaryIO, length: int) -> int:
    """Where the last box of an MP4 ends (ISO 14496-12, 4.2)."""
    end = 0
    while end < length:
        stream.seek(end)
        head = stream.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8:  # 0: up to the end of the file
            return end
        end += size
    return end


def _end_of_segment(stream: BinaryIO) -> int:
    """Where the segment of a Matroska file ends, 0 where it does not say (RFC 8794: identifier, length, content)."""
    stream.seek(4)
    _, header = _element_length(stream)
    stream.seek(header, os.SEEK_CUR)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    known, size = _element_length(stream)
    return stream.tell() + size if known else 0


def _element_length(stream: BinaryIO) -> tuple[bool, int]:
    first = stream.read(1) or b"\x01"
    width = 9 - first[0].bit_length()
    value = (first[0] & ((1 << (8 - width)) - 1)) << 8 * (width - 1) | int.from_bytes(stream.read(width - 1), "big")
    return value != (1 << 7 * width) - 1, value


def _check_whole(container: av.container.InputContainer, stream: av.VideoStream, decoded: int, end: float) -> None:
    """Compare what was decoded with what the file says it has; both figures are a little off in good files too."""
    if decoded < stream.frames * 0.98 - 2:
        raise DamagedVideo(f"ends after {decoded} of {stream.frames} frames")
    length = None
    if stream.duration is not None:
        length = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        length = container.duration / 1e6
    if length is not None and end < length * 0.95 - 1.0:
        raise DamagedVideo(f"ends after {end:.1f} of {length:.1f} seconds")


def _upright(frame: av.VideoFrame, stream: av.VideoStream, short_side: int | None) -> np.ndarray:
    """A frame as it is shown: square pixels, turned, its short side at most `short_side`; (H, W, 3) uint8 RGB."""
    aspect = float(stream.sample_aspect_ratio or 1)
    width, height = frame.width * (aspect if aspect > 0 else 1.0), float(frame.height)
    shrink = 1.0 if short_side is None else min(1.0, short_side / min(width, height))
    width, height = max(1, round(width * shrink)), max(1, round(height * shrink))
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
