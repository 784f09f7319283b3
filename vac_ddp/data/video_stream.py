"""An open video file: packets, frames, how they are shown and when. The only place that opens a video file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vac_ddp.data.video_structure import avi_packets

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter

MAX_PIXELS = 50_000_000  # of a frame, as for images

_GAP_S = 10.0  # a longer step of the clock is a jump, as in the ffmpeg program (-dts_delta_threshold)
_BACK_S = 0.1  # a step back beyond this is a jump too
_STILL = 3  # so many frames without a step: the clock has stopped
_PLAYLISTS = {"hls", "dash", "concat", "imf"}  # texts that name other files and addresses


class DamagedVideo(Exception):
    """A file without one frame that can be shown; the message says why."""


def open_file(path: Path) -> InputContainer:
    """Open a file, and nothing else: no address, no playlist. Raises DamagedVideo."""
    import av

    try:
        if not path.stat().st_size:
            raise DamagedVideo("empty file")
    except OSError as error:
        raise DamagedVideo(error.strerror or str(error)) from error
    named = f"file:{path}"  # or "a:b.mp4" would be an address
    options = {"protocol_whitelist": "file"}
    try:
        try:
            container = av.open(named, options=options, metadata_errors="replace")
        except TypeError:  # the argument is to go in a later PyAV
            container = av.open(named, options=options)
    except (av.FFmpegError, UnicodeError) as error:
        raise DamagedVideo(f"cannot be opened as a video: {reason(error)}") from error
    if _PLAYLISTS & set(container.format.name.split(",")):
        container.close()
        raise DamagedVideo(f"a playlist ({container.format.name}), not a video")
    return container


def decode(packets: Iterator[Any], broken: list[str]) -> Iterator[Any]:
    """Yield every frame that decodes from the packets of a stream; the reasons of those that do not go to `broken`."""
    import av

    for packet in packets:
        try:
            frames = packet.decode()
        except av.error.EOFError:
            continue
        except av.FFmpegError as error:
            broken.append(reason(error))
            continue
        yield from frames


def demux(container: InputContainer, stream: Any, broken: list[str]) -> Iterator[Any]:
    """Yield the packets of a stream as far as the container can be read, the last one empty: the end for a decoder."""
    import av

    try:
        for packet in container.demux(stream):
            if packet.size or packet.dts is None:  # to a decoder an empty chunk would be the end
                yield packet
    except av.FFmpegError as error:
        broken.append(reason(error))


def reason(error: BaseException) -> str:
    """What an error of FFmpeg says, without the file's name."""
    return getattr(error, "strerror", None) or type(error).__name__


class Picture:
    """The video stream of an open file: its packets, its frames, and how they are shown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container = open_file(path)
        try:
            self.stream = self._choose()
        except BaseException:
            self.container.close()
            raise
        self.stream.codec_context.thread_count = 1  # files are the threads; FFmpeg's can deadlock with Python's lock
        self.stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        self.step = min(_GAP_S, 1 / float(self.stream.average_rate or self.stream.guessed_rate or 25))
        self.broken: list[str] = []
        self.damaged = self.read = 0  # frames, packets
        self.size: tuple[int, int] | None = None
        self.scaler: VideoReformatter | None = None
        self.how = ""

    def __enter__(self) -> Picture:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def _choose(self) -> av.VideoStream:
        """The stream that FFmpeg takes for the main one; cover pictures and thumbnails are not videos."""
        from av.stream import Disposition

        still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
        streams = [s for s in self.container.streams.video if not s.disposition & still]
        if not streams:
            raise DamagedVideo("only a cover picture, no video" if self.container.streams.video else "no video in it")
        best = self.container.streams.best("video")
        if best not in streams:
            best = streams[0]
        if best.codec_context is None:
            raise DamagedVideo("no decoder for its video")
        return best

    @property
    def timed(self) -> bool:
        """Whether the container stores for each packet when its frame is shown."""
        return bool({"mp4", "matroska"} & set(self.container.format.name.split(",")))

    @property
    def duration(self) -> float | None:
        """Length in seconds that the headers claim for the video, None where they claim none.

        In an AVI the claim counts empty chunks, and the length of the file says whether it is complete.
        """
        if self.container.format.name == "avi":
            return None
        if self.stream.duration is not None and self.stream.time_base is not None:
            return float(self.stream.duration * self.stream.time_base)
        if self.container.duration is not None and len(self.container.streams) == 1:
            return self.container.duration / 1e6
        return None

    @property
    def lost(self) -> int:
        """Packets that the index of the file has and that were not met, after the last one was read."""
        listed = len(getattr(self.stream, "index_entries", ()))  # not in older releases of PyAV
        if self.container.format.name == "avi":
            listed = max(listed, avi_packets(self.path, self.stream.index))
        return max(0, listed - self.read)

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets of the stream, undecoded, as far as the container can be read."""
        for packet in demux(self.container, self.stream, self.broken):
            self.read += bool(packet.size)
            yield packet

    def decode(self) -> Iterator[av.VideoFrame]:
        """Yield the frames in the order shown."""
        for frame in decode(self.packets(), self.broken):
            self.damaged += bool(frame.is_corrupt)
            yield frame

    def fit(self, frame: av.VideoFrame, short_side: int | None) -> None:
        """Set the size of all pictures by the first frame, as `upright` does with the first one that it gets."""
        from av.video.reformatter import VideoReformatter

        aspect = float(self.stream.sample_aspect_ratio or 1)
        width, height = frame.width * (aspect if aspect > 0 else 1.0), float(frame.height)
        shrink = 1.0 if short_side is None else min(1.0, short_side / min(width, height))
        self.size = max(1, round(width * shrink)), max(1, round(height * shrink))
        self.how = "AREA" if shrink < 1 else "BICUBIC"  # the latter is the ffmpeg program's
        self.scaler = VideoReformatter()

    def upright(self, frame: av.VideoFrame, short_side: int | None) -> np.ndarray:
        """A frame as shown: (H, W, 3) uint8 RGB, square pixels, upright, its short side at most `short_side`."""
        if self.scaler is None or self.size is None:
            self.fit(frame, short_side)
        assert self.scaler is not None
        assert self.size is not None
        width, height = self.size
        image = self.scaler.reformat(frame, width=width, height=height, format="rgb24", interpolation=self.how)
        return np.ascontiguousarray(_oriented(image.to_ndarray(), frame))


def _oriented(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Apply the display matrix of a frame to its picture (H, W, 3): the nearest of the eight orientations.

    The matrix maps a pixel (x, y) to (a x + c y, b x + d y), ISO 14496-12, 6.2.2.
    """
    extra = frame.side_data
    data: Any = extra.get("DISPLAYMATRIX") if len(extra) else None  # a key that is not there costs an exception
    if data is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


class Clock:
    """When each frame is shown, in seconds after the first; jumps of the file's own clock are taken out."""

    def __init__(self, step: float) -> None:
        self.step = step  # usual time between frames
        self.end = 0.0  # of the last frame
        self.count = 0
        self.jumps = 0
        self._offset = 0.0
        self._before: float | None = None
        self._still = 0

    def read(self, frame: av.VideoFrame) -> float:
        """The time at which `frame` begins."""
        self.count += 1
        expected = self.end
        now = expected if frame.time is None else frame.time + self._offset
        if self._before is None:
            self._offset, now = -(frame.time or 0.0), 0.0
        else:
            self._still = self._still + 1 if now <= self._before else 0
            if not -_BACK_S <= now - self._before <= _GAP_S or self._still >= _STILL:
                self._offset += expected - now
                self.jumps += 1
                now = expected
            now = max(now, self._before)
        self._before = now
        length = frame.duration * float(frame.time_base or 0) if frame.duration else 0.0
        self.end = now + (length if 0 < length <= _GAP_S else self.step)
        return now
