"""Videos as a program gives them: paths, arrays, tensors, lists of images, or a list of these, as one `Videos`."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vac_ddp.data.data_kind import ONE_VIDEO, kind_of
from vac_ddp.data.dataset import Videos
from vac_ddp.data.decode import upright_rgb
from vac_ddp.data.frame_cache_setup import for_clips
from vac_ddp.data.frames import Frame
from vac_ddp.data.index import open_folder, open_index
from vac_ddp.data.video_frames import file_encoding, open_video
from vac_ddp.data.video_reader import need_av
from vac_ddp.errors import UserError
from vac_ddp.settings import Config
from vac_ddp.text import escaped

EXPECTED = (
    "expected a path, a numpy array (T, H, W, 3) uint8, a torch tensor (T, C, H, W) uint8, a list of PIL images, or a "
    "list of these"
)
_LOADING = threading.Lock()  # Pillow reads a file when its pixels are first needed; two threads may have one image


@dataclass(kw_only=True)
class Given:
    """The videos of one call, lines about the data, and what is wrong with files of which some frames decode."""

    videos: Videos
    notes: list[str] = field(default_factory=list)
    faults: dict[int, list[str]] = field(default_factory=dict)  # by number of the video


@dataclass(kw_only=True, eq=False)
class OneVideo:
    """One video of `count` frames; `read` gives the file of a frame, or its pixels (H, W, 3) uint8, by its number."""

    name: str
    count: int
    read: Callable[[int], Frame]

    def __post_init__(self) -> None:
        self.names = [self.name]
        self.labels = np.full(1, -1, np.int64)
        self.frame_counts = np.array([self.count], np.int64)

    def __len__(self) -> int:
        return 1

    def reader(self, video: int) -> Callable[[int], Frame]:
        """The file or the pixels of a frame by its number."""
        return self.read

    def frame_name(self, video: int, frame: int) -> str:
        """Name and number of a frame."""
        return f"{self.name}/frame {frame}"


@dataclass(kw_only=True, eq=False)
class Joined:
    """Several sets of videos, one behind the other; `names` may differ from theirs."""

    parts: Sequence[Videos]
    names: list[str]

    def __post_init__(self) -> None:
        self.labels = np.concatenate([part.labels for part in self.parts])
        self.frame_counts = np.concatenate([part.frame_counts for part in self.parts])
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return len(self.names)

    def reader(self, video: int) -> Callable[[int], Frame]:
        """The file or the pixels of a frame by its number."""
        part, number = self._place(video)
        return part.reader(number)

    def frame_name(self, video: int, frame: int) -> str:
        """The frame's name behind the video's."""
        part, number = self._place(video)
        return self.names[video] + part.frame_name(number, frame).removeprefix(part.names[number])

    def _place(self, video: int) -> tuple[Videos, int]:
        place = int(np.searchsorted(self._ends, video, side="right"))
        part = self.parts[place]
        return part, video - int(self._ends[place]) + len(part)


def open_given(x: Any, config: Config, classes: list[str]) -> Given:
    """The videos of `x`, which is what `Classifier.predict` takes; a folder of videos counts as many.

    A video is named by its file or folder, one of a folder of videos as in the submission, one in memory by its place
    in the list ("0" where it is alone); where a name would come twice, those of files and folders are their paths.
    classes: of the model, those of a labelled folder must be among them. No file is written. Raises UserError, in one
    line, for what is not a video, has another type or shape, or does not exist, and for a single file that does not
    decode.
    """
    if not isinstance(x, list | tuple) or _is_images(x):
        return _open(x, "x", "0", config, classes, alone=True)
    if not x:
        raise UserError(f"x is an empty list: {EXPECTED}")
    parts: list[Videos] = []
    notes: list[str] = []
    faults: dict[int, list[str]] = {}
    longer: list[str] = []  # what a video is called where its name would come twice
    for number, item in enumerate(x):
        start = len(longer)
        given = _open(item, f"x[{number}]", str(number), config, classes, alone=False)
        parts.append(given.videos)
        notes += given.notes
        faults |= {start + video: lines for video, lines in given.faults.items()}
        longer += _paths_of(item, given.videos) if isinstance(item, str | os.PathLike) else [str(number)]
    names = [name for part in parts for name in part.names]
    times = Counter(names)
    names = [long if times[name] > 1 else name for name, long in zip(names, longer, strict=True)]
    return Given(videos=Joined(parts=parts, names=names), notes=notes, faults=faults)


def _open(item: Any, where: str, name: str, config: Config, classes: list[str], *, alone: bool) -> Given:
    if not isinstance(item, str | os.PathLike):
        return Given(videos=_in_memory(item, where, name))
    path = Path(item).expanduser()
    kind = kind_of(path)
    if kind == "video file":
        return _open_file(path, config, alone=alone)
    if kind == "frames":
        index = open_folder(path, config.data)
    else:
        known = classes if kind == "labelled" else None
        index = open_index(path, labelled=known is not None, settings=config.data, classes=known, keep=False)
        index = for_clips(index, config)
    return Given(videos=index, notes=index.notes)


def _open_file(path: Path, config: Config, *, alone: bool) -> Given:
    """One video file; where nothing of it decodes, an error if it is alone, else a video without frames."""
    need_av()
    name = escaped(path.stem.lstrip(".") or "video")
    try:
        film = open_video(path, file_encoding(config.data, config.clip))
    except UserError as error:
        if alone:
            raise
        return Given(videos=OneVideo(name=name, count=0, read=bytes), faults={0: [str(error)]})
    video = OneVideo(name=name, count=film.count, read=film.read)
    return Given(videos=video, faults={0: film.faults} if film.faults else {})


def _paths_of(item: str | os.PathLike[str], videos: Videos) -> list[str]:
    path = escaped(str(Path(item).expanduser()))
    return [path] if kind_of(Path(item).expanduser()) in ONE_VIDEO else [f"{path}/{name}" for name in videos.names]


def _in_memory(item: Any, where: str, name: str) -> OneVideo:
    if isinstance(item, np.ndarray):
        return _of_array(item, where, name)
    if isinstance(item, torch.Tensor):
        return _of_tensor(item, where, name)
    if isinstance(item, list | tuple) and _is_images(item):
        return OneVideo(name=name, count=len(item), read=lambda frame: _of_image(item[frame]))
    if isinstance(item, Image.Image):
        raise UserError(f"{where} is one image, not a video: give the images of a video as a list")
    if isinstance(item, list | tuple):
        held = " and ".join(sorted({type(value).__name__ for value in item})) or "nothing"
        raise UserError(f"{where} is a list that holds {held}: expected the images of one video (PIL.Image.Image)")
    raise UserError(f"{where} is of type {type(item).__name__}: {EXPECTED}")


def _is_images(x: Sequence[Any]) -> bool:
    return len(x) > 0 and all(isinstance(item, Image.Image) for item in x)


def _of_array(array: np.ndarray, where: str, name: str) -> OneVideo:
    _check_type(where, "numpy array", str(array.dtype), tuple(array.shape))
    remedy = "stack the frames of a video to (T, H, W, 3)" if array.ndim == 3 else "give a list of its videos"
    if array.ndim == 4:
        remedy = f"give {where}.transpose(0, 2, 3, 1)" if array.shape[1] == 3 else "give three channels, RGB"
    if array.ndim != 4 or array.shape[3] != 3:
        raise UserError(f"{where} has shape {_shown(array.shape)}: expected (T, H, W, 3); {remedy}")
    _check_size(where, array.shape, array.shape[1:3])
    return OneVideo(name=name, count=len(array), read=lambda frame: np.ascontiguousarray(array[frame]))


def _of_tensor(tensor: torch.Tensor, where: str, name: str) -> OneVideo:
    _check_type(where, "torch tensor", str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    remedy = "stack the frames of a video to (T, 3, H, W)" if tensor.ndim == 3 else "give a list of its videos"
    if tensor.ndim == 4:
        remedy = f"give {where}.permute(0, 3, 1, 2)" if tensor.shape[3] == 3 else "give three channels, RGB"
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise UserError(f"{where} has shape {_shown(tensor.shape)}: expected (T, 3, H, W); {remedy}")
    _check_size(where, tensor.shape, tensor.shape[2:])
    return OneVideo(
        name=name, count=len(tensor), read=lambda frame: tensor[frame].permute(1, 2, 0).contiguous().cpu().numpy()
    )


def _of_image(image: Image.Image) -> np.ndarray:
    with _LOADING:
        image.load()
    return upright_rgb(image)


def _check_type(where: str, kind: str, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype == "uint8":
        return
    convert = "np.uint8" if kind == "numpy array" else "torch.uint8"
    cast = f".astype({convert})" if kind == "numpy array" else f".to({convert})"
    remedy = f"for values from 0 to 1 give ({where} * 255).round(){cast}" if "float" in dtype else f"give {where}{cast}"
    raise UserError(f"{where} is a {kind} {_shown(shape)} of {dtype}: expected uint8, pixels from 0 to 255; {remedy}")


def _check_size(where: str, shape: Sequence[int], sides: Sequence[int]) -> None:
    if not shape[0]:
        raise UserError(f"{where} has shape {_shown(shape)}: a video needs at least one frame")
    if not all(sides):
        raise UserError(f"{where} has shape {_shown(shape)}: its frames have no pixels")


def _shown(shape: Sequence[int]) -> str:
    return str(tuple(int(size) for size in shape))
