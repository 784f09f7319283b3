"""Decoding on the device gives the clips that decoding in loader processes gives, to a few grey levels.

torchvision decodes on the CPU as well, so all but nvJPEG itself is shown here without a GPU.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.pictures import moving_frames
from tests.runs import Workplace, one_line
from vac_ddp.data.batch import Batch, TestBatch
from vac_ddp.data.dataset import TestViews, TrainClips
from vac_ddp.data.gpu_decode import check_decoder, decode_clips, plain_jpeg
from vac_ddp.data.index import open_index
from vac_ddp.data.loader import test_loader, to_device, train_loader
from vac_ddp.data.sampler import Key, StepSampler
from vac_ddp.errors import UserError
from vac_ddp.settings import Config, DataSettings, ViewSettings

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")
CPU = torch.device("cpu")
GPU = pytest.param(
    torch.device("cuda", 0),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="extra test: needs a CUDA device"),
    ],
)


def encoded(picture: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of photographs-like frames: plain, grey, PNG, turned by EXIF, of mixed sizes, with a cut-off file."""
    root = tmp_path_factory.mktemp("frames")
    turned = Image.Exif()
    turned[0x0112] = 6
    for number in range(6):
        target = root / f"class{number % 2}" / f"video{number}"
        target.mkdir(parents=True)
        for i, frame in enumerate(moving_frames(72, 96, 12, number), start=1):
            data = encoded(frame, quality=95)
            if number == 1:
                data = encoded(frame[..., 0], quality=95)
            elif number == 2:
                data = encoded(frame, "PNG")
            elif number == 3:
                data = encoded(np.ascontiguousarray(np.rot90(frame)), quality=95, exif=turned)
            elif number == 4 and i % 3 == 0:
                data = encoded(np.asarray(Image.fromarray(frame).resize((64, 48))), quality=95)
            elif number == 5 and i == 4:
                data = data[: len(data) // 2]
            (target / f"{i:04d}.jpg").write_bytes(data)
    return root


def config(decode: str, repeats: int = 1) -> Config:
    found = Config()
    found.data.decode, found.data.reduced_decode = decode, False
    found.clip.frames, found.clip.size, found.augment.repeats = 4, 32, repeats
    found.data.workers = 0
    return found


def near(a: torch.Tensor, b: torch.Tensor, cuda: bool) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.uint8
    difference = (a.cpu().float() - b.float()).abs()
    assert difference.mean() < (1.5 if cuda else 0.5)
    assert (difference > (12 if cuda else 4)).float().mean() < 0.01
    assert b.float().std() > 5


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_clips_are_those_of_loader_processes(
    folder: Path, tmp_path: Path, device: torch.device, repeats: int, workers: int
) -> None:
    index = open_index(folder, labelled=True, settings=DataSettings(cache=str(tmp_path)))
    made: dict[str, list[Batch]] = {}
    for decode in ("cpu", "gpu"):
        dataset = TrainClips(index, np.arange(6), config(decode, repeats), 3, 0)
        sampler = StepSampler(
            np.arange(6), seed=0, global_batch=4 * repeats, clips_per_gpu=4 * repeats, rank=0, world=1, repeats=repeats
        )
        loader = train_loader(dataset, sampler, workers=workers, pin=device.type == "cuda")
        made[decode] = list(to_device(loader, CPU if decode == "cpu" else device))
        loader.close()
    assert len(made["cpu"]) == len(made["gpu"]) > 1
    for plain, other in zip(made["cpu"], made["gpu"], strict=True):
        assert other.layout is None
        assert other.clips.device == device
        near(other.clips, plain.clips, device.type == "cuda")
        assert plain.damage == other.damage
        for name in ("labels", "samples", "videos", "noise"):
            assert torch.equal(getattr(plain, name).cpu(), getattr(other, name).cpu())


@pytest.mark.parametrize("device", [CPU, GPU])
def test_views_are_those_of_loader_processes(folder: Path, tmp_path: Path, device: torch.device) -> None:
    root = tmp_path / "test"
    root.mkdir()
    for number, video in enumerate(sorted(folder.glob("*/*"))):
        (root / str(number)).symlink_to(video)
    (root / "none").mkdir()
    (root / "none" / "0001.jpg").write_bytes(b"no picture")
    index = open_index(root, labelled=False, settings=DataSettings(cache=str(tmp_path)))
    views = ViewSettings(windows="spread", count=2, crops=3)
    made: dict[str, list[TestBatch]] = {}
    for decode in ("cpu", "gpu"):
        settings = config(decode)
        dataset = TestViews(index, np.arange(7), settings.clip, views, tolerant=True, reduced=False, decode=decode)
        loader = test_loader(dataset, range(7), videos_per_batch=2, workers=1, prefetch=2, pin=False)
        made[decode] = list(to_device(loader, CPU if decode == "cpu" else device))
        loader.close()

    def views_of(batch: TestBatch) -> torch.Tensor:
        return batch.clips.cpu() if batch.clip_of_view is None else batch.clips.cpu()[:, batch.clip_of_view]

    whole = {name: torch.cat([views_of(batch) for batch in batches]) for name, batches in made.items()}
    good = torch.cat([batch.decoded for batch in made["cpu"]])
    assert torch.equal(good, torch.cat([batch.decoded for batch in made["gpu"]]))
    assert good.sum() == 6
    assert not whole["gpu"][~good].any()
    near(whole["gpu"], whole["cpu"], device.type == "cuda")


def test_batches_that_travel_are_the_files(folder: Path, tmp_path: Path) -> None:
    """What goes between the processes is what lies on the disk, each frame once."""
    index = open_index(folder, labelled=True, settings=DataSettings(cache=str(tmp_path)))
    batch = TrainClips(index, np.arange(6), config("gpu", 2), 0, 0).__getitems__([Key(0, 0, 0)])
    assert batch.layout is not None
    frames = [index.frame_bytes(0, frame) for frame in range(12)]
    start = 0
    for end in batch.layout.ends.tolist():
        assert batch.clips[start:end].numpy().tobytes() in frames
        start = end
    assert len(batch.layout.ends) == 4  # two clips of the same four frames
    assert batch.layout.files.shape == (2, 4)


def test_files_that_nvjpeg_does_not_take_are_encoded_anew() -> None:
    picture = next(moving_frames(48, 64, 1, 0))
    plain = encoded(picture, quality=90)
    assert plain_jpeg(plain, False) is plain
    for data in (encoded(picture, "PNG"), encoded(picture, "WEBP", lossless=True)):
        again = np.asarray(Image.open(io.BytesIO(plain_jpeg(data, False))))
        assert np.abs(again.astype(int) - picture).mean() < 1.5


def test_what_the_decoder_refuses_ends_as_far_as_it_goes_or_in_one_line() -> None:
    picture = next(moving_frames(48, 64, 1, 0))
    whole = encoded(picture, quality=90)
    layout = type("L", (), {})()
    layout.size, layout.shape = 32, (1,)
    layout.files, layout.boxes = np.zeros((1, 1), np.int64), np.array([[[0, 0, 48, 64]]])
    for data, good in ((whole, True), (b"\xff\xd8 no picture \xff\xd9", False)):
        layout.ends = np.array([len(data)])
        stored = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if good:
            assert decode_clips(stored, layout, CPU).shape == (1, 1, 32, 32, 3)
        else:
            with pytest.raises(UserError, match=r"data\.decode=cpu"):
                decode_clips(stored, layout, CPU)


def test_without_a_gpu_it_is_refused_in_one_line(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    line = one_line(place.alone("run", "data.decode=gpu"))
    assert line == "vac: data.decode=gpu needs a CUDA device, and this process has none: set data.decode=cpu"
    check_decoder("cpu", CPU)
    check_decoder("gpu", torch.device("cuda", 0))
