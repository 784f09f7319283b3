"""A synthetic motion data set whose classes only the order of the frames tells apart.

A bar or a lens of some colour moves aside (and comes back), grows (and shrinks back) and turns (and turns back) on a
noisy ground, with rests between. Every event starts and ends in the same neutral pose, and the class is the order of
the three: 6 classes. Everything that is drawn (look, lengths, rests, noise of every frame) is drawn before the order
is looked at, so the frames of a video are the same set of pictures whatever its class: without their order nobody can
do better than 1/6. `--set directions` makes 8 one-way motions instead (right, left, up, down, growing, shrinking,
turning either way); there a shuffled video still tells the axis, and the ceiling is 1/2.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.files import whole_folder, write_json, write_text
from vac_ddp.schema import read_json

EVENTS = ("move", "grow", "turn")
ORDERS = ["_".join(order) for order in itertools.permutations(EVENTS)]
DIRECTIONS = ["right", "left", "down", "up", "growing", "shrinking", "clockwise", "counterclockwise"]
FACTS = "synth.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is made; the same recipe gives the same bytes (with the same versions of numpy and libjpeg)."""

    set: str = "orders"
    videos_per_class: int = 100
    test_per_class: int = 30
    clips_per_source: int = 3
    seed: int = 0

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of their numbers as sorted folders have them."""
        return sorted(ORDERS if self.set == "orders" else DIRECTIONS)

    @property
    def ceiling(self) -> float:
        """Best accuracy anyone can expect on clips whose frames are in a random order."""
        return 1 / 6 if self.set == "orders" else 1 / 2


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the clips of one source share: background, shape, colour, place, size, quality."""

    ground: np.ndarray  # (H, W, 3) float32, 0 to 255
    colour: np.ndarray  # (3,) float32, 0 to 255
    shape: str
    centre: tuple[float, float]
    radius: float
    angle: float
    noise: float
    quality: int


@dataclass(frozen=True, kw_only=True)
class Video:
    """One folder of frames."""

    part: int  # 0 training, 1 test
    class_name: str
    source: int  # its look is shared by all classes of the part, so that looks tell no class
    clip: int
    folder: str


def draw_look(rng: np.random.Generator) -> Look:
    """Draw a source: frames of 64 to 96 pixels, a smooth coloured ground, a shape that stands out from it."""
    height, width = (int(v) for v in rng.choice([64, 72, 80, 96], size=2))
    coarse = rng.normal(0, rng.uniform(4, 16), size=(6, 6, 3))
    ground = rng.uniform(10, 100, size=3) + _enlarge(coarse, height, width)
    colour = rng.uniform(150, 255, size=3)
    side = min(height, width)
    return Look(
        ground=ground.astype(np.float32),
        colour=colour.astype(np.float32),
        shape=str(rng.choice(["bar", "lens"])),
        centre=(height * rng.uniform(0.45, 0.55), width * rng.uniform(0.45, 0.55)),
        radius=side * rng.uniform(0.20, 0.26),
        angle=rng.uniform(-0.3, 0.3),
        noise=rng.uniform(2, 10),
        quality=int(rng.integers(80, 96)),
    )


def _enlarge(coarse: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear enlargement of (h, w, 3) to (height, width, 3)."""
    for axis, size in ((0, height), (1, width)):
        place = np.linspace(0, coarse.shape[axis] - 1, size)
        low = np.minimum(place.astype(int), coarse.shape[axis] - 2)
        share = np.expand_dims(place - low, tuple(i for i in range(3) if i != axis))
        coarse = np.take(coarse, low, axis) * (1 - share) + np.take(coarse, low + 1, axis) * share
    return coarse


def event_poses(event: str, strength: float, progress: np.ndarray) -> np.ndarray:
    """Poses (n, 4) of dy, dx in radii, log scale and angle, where `progress` (n,) goes from 0 (neutral) to 1 (most)."""
    poses = np.zeros((len(progress), 4))
    if event == "move":
        poses[:, 1] = 1.5 * strength * progress
    elif event == "rise":
        poses[:, 0] = 1.5 * strength * progress
    elif event == "grow":
        poses[:, 2] = 0.6 * abs(strength) * progress
    elif event == "turn":
        poses[:, 3] = math.pi / 2 * strength * progress
    else:
        raise ValueError(f"no event called {event}")
    return poses


def render(look: Look, poses: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames (n, H, W, 3) uint8 of the shape in `poses` (n, 4), each with noise of its own."""
    height, width, _ = look.ground.shape
    dy, dx, scale, angle = (poses[:, i, None, None] for i in range(4))
    radius = look.radius * np.exp(scale)
    y = np.arange(height)[None, :, None] - look.centre[0] - dy * look.radius
    x = np.arange(width)[None, None, :] - look.centre[1] - dx * look.radius
    cos, sin = np.cos(look.angle + angle), np.sin(look.angle + angle)
    along, across = (x * cos + y * sin) / radius, (y * cos - x * sin) / radius
    if look.shape == "bar":
        distance = np.maximum(np.abs(along) - 1.0, np.abs(across) - 0.30)
    else:
        distance = np.sqrt((along / 1.1) ** 2 + (across / 0.35) ** 2) * 0.6 - 0.6
    cover = np.clip(0.5 - distance * radius, 0, 1)[..., None].astype(np.float32)
    frames = look.ground * (1 - cover) + look.colour * cover
    frames += look.noise * rng.standard_normal(frames.shape, dtype=np.float32)
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)


def order_clip(look: Look, order: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """One video (n, H, W, 3) uint8 of the events in `order`.

    All draws and all rendering come before `order` is read: another order of the same `rng` state gives the same
    frames in another order, which is the proof of the ceiling.
    """
    lengths = rng.integers(7, 14, size=len(EVENTS))
    rests = rng.integers(0, 4, size=len(EVENTS) + 1)
    strengths = rng.choice([-1.0, 1.0], size=len(EVENTS)) * rng.uniform(0.75, 1.0, size=len(EVENTS))
    blocks = {}
    for event, length, strength in zip(EVENTS, lengths, strengths, strict=True):
        progress = np.sin(math.pi * np.arange(1, length + 1) / (length + 1))
        blocks[event] = render(look, event_poses(event, strength, progress), rng)
    neutral = np.split(render(look, np.zeros((int(rests.sum()), 4)), rng), np.cumsum(rests)[:-1])
    parts = [neutral[0]]
    for event, rest in zip(order, neutral[1:], strict=True):
        parts += [blocks[event], rest]
    return np.concatenate(parts)


def direction_clip(look: Look, direction: str, rng: np.random.Generator) -> np.ndarray:
    """One video (n, H, W, 3) uint8 of a one-way motion; its opposite is the same frames backwards."""
    frames = int(rng.integers(20, 44))
    progress = np.linspace(-1, 1, frames) * rng.uniform(0.75, 1.0)
    axis, sign = divmod(DIRECTIONS.index(direction), 2)
    event = ("move", "rise", "grow", "turn")[axis]
    video = render(look, event_poses(event, 1.0, progress), rng)
    return video[::-1] if sign else video


def make_clip(recipe: Recipe, video: Video) -> list[bytes]:
    """The JPEG files of one video, in order."""
    import simplejpeg

    look = draw_look(np.random.default_rng([recipe.seed, video.part, video.source]))
    number = recipe.classes.index(video.class_name)
    rng = np.random.default_rng([recipe.seed, video.part, video.source, 1 + video.clip, number])
    if recipe.set == "orders":
        frames = order_clip(look, video.class_name.split("_"), rng)
    else:
        frames = direction_clip(look, video.class_name, rng)
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(f), quality=look.quality) for f in frames]


def plan(recipe: Recipe) -> list[Video]:
    """All videos. Test folders are numbered in an order that has nothing to do with the class."""

    def part(per_class: int) -> list[tuple[str, int, int]]:
        return [(name, *divmod(i, recipe.clips_per_source)) for name in recipe.classes for i in range(per_class)]

    videos = [
        Video(part=0, class_name=name, source=source, clip=clip, folder=f"data_train/{name}/s{source:03d}_c{clip:02d}")
        for name, source, clip in part(recipe.videos_per_class)
    ]
    test = part(recipe.test_per_class)
    places = np.random.default_rng([recipe.seed, 2]).permutation(len(test))
    for (name, source, clip), place in zip(test, places, strict=True):
        folder = f"data_test/{place + 1:05d}"
        videos.append(Video(part=1, class_name=name, source=source, clip=clip, folder=folder))
    return videos


def write_video(recipe: Recipe, video: Video, root: Path) -> int:
    """Write the frames of one video below `root` as 0001.jpg and so on; returns how many."""
    folder = root / video.folder
    folder.mkdir(parents=True)
    files = make_clip(recipe, video)
    for frame, data in enumerate(files, start=1):
        (folder / f"{frame:04d}.jpg").write_bytes(data)
    return len(files)


def write_dataset(out: Path, recipe: Recipe, *, workers: int) -> int:
    """Write the whole data set; returns the number of frames. `out` appears complete or not at all."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there and is not this data set: give another folder, or remove it")
    videos = plan(recipe)
    with whole_folder(out) as partial:
        write = functools.partial(write_video, recipe, root=partial)
        if workers > 1:
            with ProcessPoolExecutor(workers) as pool:
                frames = sum(pool.map(write, videos, chunksize=16))
        else:
            frames = sum(map(write, videos))
        rows = sorted((int(Path(v.folder).name), v.class_name) for v in videos if v.part == 1)
        write_text(partial / "test_labels.csv", "".join(f"{i},{name}\n" for i, name in [("id", "class"), *rows]))
        write_json(partial / FACTS, {**asdict(recipe), "classes": recipe.classes, "ceiling": recipe.ceiling})
    return frames


def is_made(out: Path, recipe: Recipe) -> bool:
    """Whether `out` holds this very data set."""
    try:
        facts = read_json(out / FACTS, dict[str, Any], remedy="use another OUT")
    except (OSError, UserError):
        return False
    return all(facts.get(name) == value for name, value in asdict(recipe).items())


def make_dataset(out: Path, recipe: Recipe, *, workers: int) -> list[str]:
    """Write the data set, unless `out` holds it already; returns lines that say what is there."""
    counts = (
        f"{len(recipe.classes)} classes of {recipe.videos_per_class} training and {recipe.test_per_class} test videos"
    )
    if is_made(out, recipe):
        return [f"{out} holds this data set already ({counts})"]
    frames = write_dataset(out, recipe, workers=workers)
    return [
        f"{out}: {counts}, {frames} frames; labels of the test part in {out / 'test_labels.csv'}",
        f"without the order of the frames nobody can expect more than {recipe.ceiling:.3f} top-1 there",
    ]
