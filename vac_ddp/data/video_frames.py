"""Single frames of a video file, as the bytes of an image each: what a folder of frames gives, without the folder."""

from __future__ import annotations

import errno
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from vac_ddp.data.video_reader import FrameTable, VideoFile, encode_jpeg, need_av
from vac_ddp.data.video_stream import DamagedVideo, Picture
from vac_ddp.errors import UserError, reason
from vac_ddp.settings import ClipSettings, DataSettings

if TYPE_CHECKING:
    import av

DOES_NOT_DECODE = "its part of the video file does not decode"

_REMEMBERED = 4096  # files whose tables a process keeps


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the frames of a video file become images: shrunk to `short_side` where they are larger, as JPEG or PNG.

    JPEGs are those that `vac extract` writes; PNG keeps every pixel.
    """

    short_side: int | None = None
    image: Literal["jpeg", "png"] = "jpeg"

    def encode(self, pixels: np.ndarray) -> bytes:
        """The image file of pixels (H, W, 3) uint8 RGB."""
        if self.image == "jpeg":
            return encode_jpeg(pixels)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        return stream.getvalue()


def file_encoding(settings: DataSettings, clip: ClipSettings) -> Encoding:
    """How the frames of video files are encoded for clips: at most twice as large as they are, unless set otherwise."""
    short_side = 2 * clip.size if settings.video_short_side is None else settings.video_short_side
    return Encoding(short_side=short_side, image=settings.cache_format)


@dataclass(kw_only=True)
class OpenVideo:
    """One video file: how many frames it has, a function from a frame's number to its image file, and its faults.

    faults: what is wrong with a file of which some frames decode, as one that is cut off, one line each.
    """

    count: int
    read: Callable[[int], bytes]
    faults: list[str]


def open_video(path: Path, encoding: Encoding) -> OpenVideo:
    """Open one video file to read its frames in memory, as `read_clip` and `Videos.reader` want them.

    The frames are those that decode, in the order shown. `read` gives the bytes of an image that `decode_frame` reads;
    predictions take `file_encoding(config.data, config.clip)`. It decodes on demand and holds no more than a frame, is
    fastest in ascending order, and is not to be shared by threads: they open the file again. Raises UserError where
    nothing of the file decodes, and where PyAV is missing.
    """
    need_av()
    video = VideoFile(path=path)
    try:
        table = video.survey()
    except DamagedVideo as error:
        raise UserError(f"{path} cannot be read as a video: {error}") from None
    return OpenVideo(count=len(table), read=VideoFrames(path, encoding, table), faults=video.faults)


class VideoFrames:
    """Reads single frames of a video file by their numbers, in any order. Not to be shared by threads.

    A frame is decoded from the key frame before it on. Where that is not sure to give what decoding the whole file
    gives (damage, changing sizes, time stamps that do not lead there), the file is decoded from its start. So the
    pixels of a frame do not depend on what was read before.

    table: where the frames are; numbers count its entries. Default: as `VideoFile.table` finds them, kept by process.
    """

    def __init__(self, path: Path, encoding: Encoding, table: FrameTable | None = None) -> None:
        self.path, self.encoding = path, encoding
        self._table = table
        self._picture: Picture | None = None
        self._running: Iterator[av.VideoFrame] | None = None
        self._size = (0, 0)  # width and height that the container declares
        self._at = -1  # the last frame read by seeking
        self._sure = False  # whether decoding has met the key frame
        self._order: list[int] | None = None  # of a file that is decoded from its start: see `numbering`
        self._next = 0  # place in that order

    def __call__(self, frame: int) -> bytes:
        """The frame as an image file. Raises OSError where it does not decode."""
        return self.encoding.encode(self.pixels(frame))

    @property
    def table(self) -> FrameTable:
        """Where the frames are."""
        if self._table is None:
            status = self.path.stat()
            self._table = _table_of(self.path, status.st_size, status.st_mtime_ns)
        return self._table

    def pixels(self, frame: int) -> np.ndarray:
        """The frame as shown: (H, W, 3) uint8 RGB. Raises OSError where it does not decode."""
        try:
            if not 0 <= frame < len(self.table):
                raise IndexError(f"{self.path} has {len(self.table)} frames, not {frame}")
            found = None
            if self._order is None and self.table.seekable:
                found = self._by_seeking(frame)
                if found is None:
                    self._running = None
            if found is None:
                found = self._by_order(frame)
        except OSError:
            raise
        except Exception as error:  # PyAV raises a dozen kinds
            raise OSError(errno.EIO, str(error) if isinstance(error, DamagedVideo) else reason(error)) from error
        if found is None:
            raise OSError(errno.EIO, DOES_NOT_DECODE)
        return found

    def _by_seeking(self, frame: int) -> np.ndarray | None:
        """The frame, decoded from the key frame before it; None where only the whole file shows what it is."""
        pts, keys = self.table.pts, self.table.keys
        key = self._key(frame)
        first = int(pts[np.searchsorted(pts, keys[key])])  # to be shown of those from the key frame on
        if self._picture is None:
            self._picture = Picture(self.path)
            context = self._picture.stream.codec_context
            self._size = context.width, context.height
        picture = self._picture
        if self._running is None or frame <= self._at or key != self._key(self._at):
            picture.container.seek(int(keys[key]), stream=picture.stream)
            self._running, self._sure = picture.decode(), False
        self._at = frame
        for decoded in self._running:
            if decoded.pts is None or decoded.pts > pts[frame]:
                return None
            if decoded.pts < first:  # shown before the key frame and decoded after it: not what they are in the file
                continue
            self._sure = self._sure or decoded.pts == first
            if not self._sure or decoded.is_corrupt or (decoded.width, decoded.height) != self._size:
                return None
            if decoded.pts == pts[frame]:
                return picture.upright(decoded, self.encoding.short_side)
        return None

    def _key(self, frame: int) -> int:
        """Which of the key frames decoding of `frame` begins at."""
        return max(0, int(np.searchsorted(self.table.keys, self.table.pts[frame], side="right")) - 1)

    def _by_order(self, frame: int) -> np.ndarray | None:
        """The frame, decoded from the start of the file; None where it is not among those that decode."""
        if self._order is None:
            self._order = list(range(len(self.table)))
            if self.table.seekable:
                with Picture(self.path) as picture:
                    self._order = numbering(self.table, [decoded.pts for decoded in picture.decode()])
        if frame not in self._order:
            return None
        place = self._order.index(frame)
        if self._running is None or place < self._next:
            self._picture = Picture(self.path)
            self._running, self._next = self._picture.decode(), 0
        assert self._picture is not None
        for decoded in self._running:
            if self._picture.size is None:
                self._picture.fit(decoded, self.encoding.short_side)
            self._next += 1
            if self._next > place:
                return self._picture.upright(decoded, self.encoding.short_side)
        self._running = None
        return None


def encoded_frames(path: Path, encoding: Encoding) -> Iterator[tuple[int | None, bytes]]:
    """Yield the time stamp and the image file of every frame that decodes, in the order shown. Raises DamagedVideo."""
    with Picture(path) as picture:
        for decoded in picture.decode():
            yield decoded.pts, encoding.encode(picture.upright(decoded, encoding.short_side))


@functools.lru_cache(_REMEMBERED)
def _table_of(path: Path, size: int, mtime: int) -> FrameTable:
    return VideoFile(path=path).table()


def numbering(table: FrameTable, stamps: Sequence[int | None]) -> list[int]:
    """Which frame of the table each one is that decodes, in order, by its time stamp where not all of them decode.

    -1: none of them.
    """
    places = {pts: i for i, pts in enumerate(table.pts.tolist())}
    if len(stamps) != len(table) and table.seekable:
        found = [-1 if pts is None else places.get(pts, -1) for pts in stamps]
        known = [number for number in found if number >= 0]
        if known and len(set(known)) == len(known):
            return found
    return [number if number < len(table) else -1 for number in range(len(stamps))]
