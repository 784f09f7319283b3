"""Video files: the frames a player shows, where they are, and the sound. All by PyAV, in process.

Files are opened by `video_stream.open_file`. What the headers claim (number of frames, duration) decides nothing: a
file has the frames that its decoder returns. What is wrong with a file that has frames is a line in `VideoFile.faults`.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg

from vac_ddp.data.video_stream import Clock, DamagedVideo, Picture, decode, demux, open_file
from vac_ddp.data.video_structure import bytes_missing
from vac_ddp.errors import UserError

if TYPE_CHECKING:
    import av

SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
QUALITY = 90  # of JPEG frames, extracted or cached
AUDIO_RATE = 16000  # samples per second of a sound file


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameTable:
    """Where the frames of a file are, in the order shown.

    pts: (N,) int64 time stamps in the stream's unit; keys: (K,) int64, those at which decoding can start, ascending.
    seekable: the time stamps tell the frames apart, so that single frames can be read without those before them.
    """

    pts: np.ndarray
    keys: np.ndarray
    seekable: bool

    def __len__(self) -> int:
        return len(self.pts)


@dataclass(kw_only=True)
class VideoFile:
    """A video file, which each method opens on its own.

    faults: what the methods called so far met, one line each: a file cut off, packets that do not decode, damaged
    frames, unreadable sound. Empty for an intact file.
    """

    path: Path
    faults: list[str] = field(default_factory=list)

    def frames(self, *, rate: float | None = None, short_side: int | None = None) -> Iterator[np.ndarray]:
        """Yield the frames as shown, upright and with square pixels: (H, W, 3) uint8 RGB, all of the first one's size.

        rate: frames per second; the k-th is the one shown at k / rate seconds after the first, so that a slower video
        repeats frames. Where the clock of the file jumps, goes back or stops, the next frame follows after the usual
        time, so that no frame stands for more than 10 seconds. None: every frame once. short_side: larger frames are
        shrunk to it, in pixels. Raises DamagedVideo where there is no frame.
        """
        with Picture(self.path) as picture:
            clock, shown, held = Clock(picture.step), 0, None
            for frame in picture.decode():
                begin = clock.read(frame)
                while rate is not None and held is not None and shown / rate < begin - 1e-6:
                    yield held
                    shown += 1
                held = picture.upright(frame, short_side)
                if rate is None:
                    yield held
            while rate is not None and held is not None and shown / rate < clock.end - 1e-6:
                yield held
                shown += 1
            self._judge(picture, clock)
        if held is None:
            raise DamagedVideo("; ".join(["no frame decodes", *self.faults]))

    def table(self) -> FrameTable:
        """Find out where the frames are: from the packets of MP4 and Matroska files, else by decoding.

        What is wrong goes to `faults`: of packets that are not decoded, those that are missing. Raises DamagedVideo
        where there is no frame.
        """
        listed, faults = self._packet_table()
        if listed is None or not len(listed):
            return self._decoded_table()
        self.faults += faults
        return listed

    def survey(self) -> FrameTable:
        """Find out where the frames that decode are, by decoding all of them; what is wrong goes to `faults`.

        Raises DamagedVideo where there is no frame.
        """
        decoded = self._decoded_table()
        listed = self.listed()
        if listed is None:
            return decoded
        return listed if len(listed) == len(decoded) else _table([0] * len(decoded), [])

    def listed(self) -> FrameTable | None:
        """Where the frames are by the packets of the file; None where they do not tell, and `table` decodes it."""
        listed, _ = self._packet_table()
        return listed if listed is not None and len(listed) else None

    def _packet_table(self) -> tuple[FrameTable | None, list[str]]:
        """The table by the packets of the file, None where the container does not say when they are shown; faults."""
        with Picture(self.path) as picture:
            packets = [p for p in picture.packets() if p.size] if picture.timed else []
            timed = [(p.pts, p) for p in packets if p.pts is not None]
            if not timed:
                return None, []
            faults = self._missing(picture)
        shown = sorted(pts for pts, packet in timed if not packet.is_discard)
        return _table(shown, [pts for pts, packet in timed if packet.is_keyframe]), faults

    def _decoded_table(self) -> FrameTable:
        """The table by decoding everything. Raises DamagedVideo where there is no frame."""
        with Picture(self.path) as picture:
            clock = Clock(picture.step)
            seen = []
            for frame in picture.decode():
                clock.read(frame)
                seen.append((frame.pts, frame.key_frame))
            known = [(pts, key) for pts, key in seen if pts is not None]
            intact = not (picture.broken or picture.damaged or picture.lost) and len(known) == len(seen)
            self._judge(picture, clock)
        if not seen:
            raise DamagedVideo("; ".join(["no frame decodes", *self.faults]))
        if not intact:
            return _table([0] * len(seen), [])
        return _table([pts for pts, _ in known], [pts for pts, key in known if key])

    def write_sound(self, target: Path) -> bool:
        """Write the best sound track as 16-bit mono at `AUDIO_RATE`; returns whether there is one.

        A track may change its format on the way. What cannot be decoded is left out and named in `faults`.
        """
        with open_file(self.path) as container:
            stream = container.streams.best("audio")
            if stream is None:
                return False
            broken: list[str] = []
            written = 0
            with wave.open(str(target), "wb") as sound:
                sound.setnchannels(1)
                sound.setsampwidth(2)
                sound.setframerate(AUDIO_RATE)
                for samples in _resampled(decode(demux(container, stream, broken), broken)):
                    sound.writeframes(samples.tobytes())
                    written += len(samples)
        if broken or not written:
            self.faults.append(f"sound: {broken[0]} ({len(broken)} packets)" if broken else "sound: nothing decodes")
        if not written:
            target.unlink()
        return bool(written)

    def _judge(self, picture: Picture, clock: Clock) -> None:
        """Note what is wrong with a file that was read to its end."""
        self.faults += self._missing(picture)
        if picture.broken:
            self.faults.append(f"packets that do not decode: {len(picture.broken)} ({picture.broken[0]})")
        if picture.damaged:
            self.faults.append(f"damaged frames: {picture.damaged} of {clock.count}")
        length = picture.duration
        if not self.faults and length is not None and not clock.jumps and clock.end < length * 0.95 - 1.0:
            self.faults.append(f"ends after {clock.end:.1f} of {length:.1f} seconds")

    def _missing(self, picture: Picture) -> list[str]:
        """What the container has and the file does not, after its last packet was read."""
        missing = bytes_missing(self.path)
        faults = [missing] if missing else []
        if picture.lost:
            faults.append(f"packets that cannot be read: {picture.lost} of {picture.lost + picture.read}")
        return faults


def write_frames(
    video: VideoFile,
    folder: Path,
    *,
    rate: float | None = None,
    short_side: int | None = None,
    quality: int = QUALITY,
) -> int:
    """Write the frames of a video as 0001.jpg, ... into `folder`; returns their number.

    quality: of the JPEGs, 1 to 100. Raises DamagedVideo, and OSError.
    """
    count = 0
    for image in video.frames(rate=rate, short_side=short_side):
        count += 1
        (folder / f"{count:04d}.jpg").write_bytes(encode_jpeg(image, quality))
    return count


def encode_jpeg(pixels: np.ndarray, quality: int = QUALITY) -> bytes:
    """A frame (H, W, 3) uint8 RGB as a JPEG with 4:2:0 subsampling, as video files have their colours."""
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")


def need_av() -> None:
    """Raise UserError, in one line, where PyAV cannot be imported."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UserError(f"video files need PyAV: pip install av ({error})") from error


def _table(pts: list[int], keys: list[int]) -> FrameTable:
    stamps = np.array(pts, np.int64)
    distinct = len(stamps) > 0 and bool((np.diff(stamps) > 0).all())
    return FrameTable(pts=stamps, keys=np.array(sorted(keys), np.int64), seekable=distinct and len(keys) > 0)


# ---------------------------------------------------------------- sound


def _resampled(frames: Iterator[av.AudioFrame]) -> Iterator[np.ndarray]:
    """Yield the sound as (n,) int16 at AUDIO_RATE; each change of format gets a resampler of its own."""
    import av

    resampler: av.AudioResampler | None = None
    before = None
    for frame in frames:
        now = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or now != before:
            if resampler is not None:
                yield from (part.to_ndarray()[0] for part in resampler.resample(None))
            resampler, before = av.AudioResampler(format="s16", layout="mono", rate=AUDIO_RATE), now
        yield from (part.to_ndarray()[0] for part in resampler.resample(frame))
    if resampler is not None:
        yield from (part.to_ndarray()[0] for part in resampler.resample(None))
