"""The table of damage: every kind of damaged frame, in training, validation and test, from the folder to the batch.

A video of six frames has its third damaged. In training and validation its nearest good neighbour stands in; in the
test part what decodes of it comes first. Each is named once, and every rank has the same steps.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from tests.frame_data import jpeg, write_video
from tests.support import REPO, environment
from vac_ddp.data.dataset import TestViews, TrainClips
from vac_ddp.data.index import Index, open_index
from vac_ddp.data.loader import train_loader
from vac_ddp.data.sampler import StepSampler
from vac_ddp.errors import UserError
from vac_ddp.settings import Config, DataSettings, ViewSettings

FRAMES, BAD = 6, 2
HEIGHT, WIDTH = 96, 128


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def wrong_header(path: Path) -> None:
    path.write_bytes(b"\x00\x00\x00\x00" + path.read_bytes()[4:])


# kind -> (how, before the index is made or after it, how much of the frame a test clip shows)
KINDS: dict[str, tuple[Callable[[Path], None], str, float]] = {
    "0 bytes": (lambda path: path.write_bytes(b""), "before", 0),
    "cut at 10 %": (cut(0.1), "before", 0.1),
    "cut at 50 %": (cut(0.5), "before", 0.5),
    "cut at 99 %": (cut(0.99), "before", 0.99),
    "wrong header": (wrong_header, "before", 0),
    "text named .jpg": (lambda path: path.write_text("not a picture\n" * 30), "before", 0),
    "vanished": (Path.unlink, "after", 0),
    "unreadable": (to_folder, "after", 0),  # the same call fails; root may read every file whatever its mode
}


def config() -> Config:
    made = Config(seed=3)
    made.clip.frames, made.clip.stride, made.clip.size = FRAMES, 1, 64
    made.augment.repeats = 2
    made.data.reduced_decode = False
    return made


def indexed(root: Path, cache: Path, *, labelled: bool = True, **options: object) -> Index:
    return open_index(root, labelled=labelled, settings=DataSettings(cache=str(cache), **options))


def frame_path(root: Path) -> Path:
    return root / "a" / "video0" / f"{BAD + 1:04d}.jpg"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    """Five videos of two classes without damage."""
    root = tmp_path_factory.mktemp("good") / "data_train"
    for i in range(5):
        write_video(root / "ab"[i % 2] / f"video{i}", FRAMES, height=HEIGHT, width=WIDTH, seed=i)
    return root, indexed(root, tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=KINDS)
def damaged(request: pytest.FixtureRequest, good: tuple[Path, Index], tmp_path: Path) -> tuple[str, Index, float]:
    """The same videos with one damaged frame in the first."""
    how, when, shown = KINDS[request.param]
    root = tmp_path / "data_train"
    shutil.copytree(good[0], root)
    if when == "before":
        how(frame_path(root))
    index = indexed(root, tmp_path / "cache")
    if when == "after":
        how(frame_path(root))
    return request.param, index, shown


def epoch_of(index: Index, world: int, workers: int = 0) -> tuple[dict[int, np.ndarray], list[str], list[int]]:
    """Clips by sample number, lines about damage, and the steps of each rank."""
    settings = config()
    clips: dict[int, np.ndarray] = {}
    lines: list[str] = []
    steps = []
    for rank in range(world):
        videos = np.arange(len(index.names))
        sampler = StepSampler(
            videos, seed=3, global_batch=4, clips_per_gpu=4, rank=rank, world=world, repeats=settings.augment.repeats
        )
        loader = train_loader(TrainClips(index, videos, settings, 2, 3), sampler, workers=workers, pin=False)
        batches = iter(loader)
        for step in range(sampler.steps_per_epoch):
            for _ in range(sampler.loads_of_step(step)):
                batch = next(batches)
                lines += batch.damage
                for sample, video, clip in zip(batch.samples, batch.videos, batch.clips, strict=True):
                    clips[int(sample)] = (int(video), clip.numpy())
        assert next(batches, None) is None
        steps.append(sampler.steps_per_epoch)
        loader.close()
    return clips, lines, steps


def test_training_takes_the_nearest_good_frame(damaged: tuple[str, Index, float], good: tuple[Path, Index]) -> None:
    _, index, _ = damaged
    expected, none, _ = epoch_of(good[1], 1)
    assert not none
    for world, workers in ((1, 0), (3, 1)):
        clips, lines, steps = epoch_of(index, world, workers)
        assert steps == [3] * world
        assert clips.keys() == expected.keys()
        for sample, (video, clip) in clips.items():
            whole = expected[sample][1].copy()
            if video == 0:
                whole[BAD] = whole[BAD - 1]
            assert np.array_equal(clip, whole)
        assert len(lines) == 1
        assert lines[0].startswith(f"damaged frame a/video0/{BAD + 1:04d}.jpg: ")


def views(index: Index, *, tolerant: bool, video: int = 0) -> tuple[torch.Tensor, list[str], bool]:
    view = ViewSettings(windows="spread", count=1)
    batch = TestViews(index, np.arange(len(index.names)), config().clip, view, tolerant=tolerant, reduced=False)[video]
    return batch.clips[0, 0], batch.damage, bool(batch.decoded)


def test_validation_takes_the_nearest_good_frame(damaged: tuple[str, Index, float], good: tuple[Path, Index]) -> None:
    _, index, _ = damaged
    whole, _, _ = views(good[1], tolerant=False)
    clip, lines, decoded = views(index, tolerant=False)
    expected = whole.clone()
    expected[BAD] = whole[BAD - 1]
    assert torch.equal(clip, expected)
    assert len(lines) == 1
    assert lines[0].startswith(f"a/video0/{BAD + 1:04d}.jpg: ")
    assert decoded


def test_a_test_video_shows_what_decodes(damaged: tuple[str, Index, float], good: tuple[Path, Index]) -> None:
    kind, index, shown = damaged
    whole, _, _ = views(good[1], tolerant=True)
    clip, lines, decoded = views(index, tolerant=True)
    others = [i for i in range(FRAMES) if i != BAD]
    assert torch.equal(clip[others], whole[others])
    assert decoded
    assert len(lines) == 1
    header = kind == "cut at 10 %" and torch.equal(clip[BAD], whole[BAD - 1])  # the cut may fall into the header
    if shown == 0 or header:
        assert torch.equal(clip[BAD], whole[BAD - 1])
        return
    rows = int(64 * shown * 0.6)
    assert torch.equal(clip[BAD, :rows], whole[BAD, :rows])
    assert not torch.equal(clip[BAD], whole[BAD])
    assert not torch.equal(clip[BAD], whole[BAD - 1])


@pytest.mark.parametrize("kind", [name for name, (_, when, _) in KINDS.items() if when == "before"])
def test_a_video_of_damaged_frames_only(kind: str, good: tuple[Path, Index], tmp_path: Path) -> None:
    """Training: an error at the start, or left out and named; test: an item that says so."""
    root = tmp_path / "data_train"
    shutil.copytree(good[0], root)
    for path in sorted((root / "a" / "video0").iterdir()):
        KINDS[kind][0](path)
    with pytest.raises(UserError, match="a/video0"):
        indexed(root, tmp_path / "cache")
    index = indexed(root, tmp_path / "cache", on_bad_video="skip", max_damaged=0.5)
    assert index.skipped == ["a/video0"]
    for world in (1, 2):
        clips, _, steps = epoch_of(index, world)
        assert len(clips) == 2 * 4
        assert steps == [2] * world
    test = indexed(root / "a", tmp_path / "cache", labelled=False)
    clip, lines, decoded = views(test, tolerant=True)
    anything = KINDS[kind][2] > 0.1 or bool(decoded)
    assert decoded == anything
    assert bool(clip.any()) == decoded
    assert len(lines) == FRAMES


def test_an_empty_folder(good: tuple[Path, Index], tmp_path: Path) -> None:
    root = tmp_path / "data_train"
    shutil.copytree(good[0], root)
    (root / "a" / "video9").mkdir()
    with pytest.raises(UserError, match="a/video9"):
        indexed(root, tmp_path / "cache")
    index = indexed(root, tmp_path / "cache", on_bad_video="skip", max_damaged=0.5)
    assert epoch_of(index, 2)[2] == [3, 3]
    test = indexed(root / "a", tmp_path / "cache", labelled=False)
    assert list(test.names) == ["video0", "video2", "video4", "video9"]
    clip, lines, decoded = views(test, tolerant=True, video=3)
    assert not decoded
    assert not clip.any()
    assert lines == []


def test_a_frame_without_permission() -> None:
    """As a user who may not read it; root, who may, becomes another."""
    folder = Path(tempfile.mkdtemp())
    try:
        root = folder / "data_test"
        write_video(root / "00001", FRAMES, height=HEIGHT, width=WIDTH)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)  # whatever the umask
        frame = root / "00001" / f"{BAD + 1:04d}.jpg"
        frame.chmod(0o000)
        index = indexed(root, folder / "cache", labelled=False)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            seen = {tolerant: views(index, tolerant=tolerant) for tolerant in (False, True)}
        finally:
            os.seteuid(user)
    finally:
        shutil.rmtree(folder)
    for clip, lines, decoded in seen.values():
        assert torch.equal(clip[BAD], clip[BAD - 1])
        assert lines == [f"00001/{BAD + 1:04d}.jpg: Permission denied"]
        assert decoded


HUGE = """
import resource, sys
import numpy as np
from pathlib import Path
from vac_ddp.data.index import open_index
from tests.test_damage import config, epoch_of, views
from vac_ddp.settings import DataSettings

index = open_index(Path(sys.argv[1]), labelled=True, settings=DataSettings(cache=sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clips, lines, _ = epoch_of(index, 1)
lines += [line for tolerant in (False, True) for line in views(index, tolerant=tolerant)[1]]
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert lines == [], lines
np.save(sys.argv[3], views(index, tolerant=True)[0][2].numpy())
print(len(clips), grown >> 10)
"""


def test_one_huge_frame_is_used_in_little_memory(good: tuple[Path, Index], tmp_path: Path) -> None:
    """108 megapixels, 324 MB decoded: used at 1/8 of its size, in training, validation and test."""
    root = tmp_path / "data_train"
    shutil.copytree(good[0], root)
    squares = (np.arange(9 * 12).reshape(9, 12) * 2).astype(np.uint8)
    huge = np.repeat(np.repeat(squares, 1000, axis=0), 1000, axis=1)
    frame_path(root).write_bytes(simplejpeg.encode_jpeg(huge[..., None], colorspace="GRAY", quality=80))
    done = subprocess.run(
        [sys.executable, "-c", HUGE, str(root), str(tmp_path / "cache"), str(tmp_path / "frame.npy")],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    clips, grown = map(int, done.stdout.split())
    assert clips == 10
    assert grown < 100  # MiB
    centre = np.repeat(np.repeat(squares, 64, axis=0), 64, axis=1)[:, 96:-96]  # 9 squares high, the middle 9 wide
    expected = Image.fromarray(centre).resize((64, 64), Image.Resampling.BOX)
    shown = np.load(tmp_path / "frame.npy")
    assert np.abs(shown.astype(int) - np.asarray(expected)[..., None]).mean() < 3


def test_a_huge_png_is_replaced_and_named(good: tuple[Path, Index], tmp_path: Path) -> None:
    """Other formats cannot be decoded reduced: a clear outcome, before any of it is decoded."""
    root = tmp_path / "data_train"
    shutil.copytree(good[0], root)
    path = frame_path(root)
    path.unlink()
    png = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", (12000).to_bytes(4, "big") + (9000).to_bytes(4, "big") + b"\x08\x02\0\0\0"
    )
    path.with_suffix(".png").write_bytes(png + chunk(b"IDAT", jpeg(48, 64)) + chunk(b"IEND", b""))
    index = indexed(root, tmp_path / "cache")
    for tolerant in (False, True):
        clip, lines, _ = views(index, tolerant=tolerant)
        assert torch.equal(clip[BAD], clip[BAD - 1])
        assert lines == ["a/video0/0003.png: 12000x9000 pixels are too many for a PNG (limit 50000000)"]


def chunk(kind: bytes, data: bytes) -> bytes:
    import zlib

    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
