"""Batches: the same bytes for any number of loader processes, ranks and restarts; shapes; pairs; signals."""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.frame_data import MemoryVideos, cut_out, jpeg, write_video
from tests.support import REPO, environment
from vac_ddp.data import loader as loader_module
from vac_ddp.data.batch import unit_rows
from vac_ddp.data.clip_sampling import FRAMES, MIX, generator, train_frames, view_windows
from vac_ddp.data.dataset import TestViews, TrainClips
from vac_ddp.data.index import open_index
from vac_ddp.data.loader import (
    Loader,
    to_device,
    train_loader,
    views_loader,
    worker_count,
)
from vac_ddp.data.sampler import Key, StepSampler
from vac_ddp.errors import UserError
from vac_ddp.settings import Config, DataSettings, ViewSettings

NOISE = 5
CPU = torch.device("cpu")


def config(repeats: int = 1) -> Config:
    made = Config(seed=11)
    made.clip.frames, made.clip.stride, made.clip.size = 4, 2, 16
    made.augment.repeats = repeats
    made.augment.mixup, made.augment.cutmix = 0.8, 1.0
    made.augment.color_jitter, made.augment.erase, made.augment.randaugment = 0.4, 0.25, "rand-m7-n4-mstd0.5-inc1"
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data_train")
    for i in range(13):
        write_video(root / "abc"[i % 3] / f"video{i:02d}", 5 + i, seed=i)
    (root / "a" / "video00" / "0002.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def index(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    return open_index(folder, labelled=True, settings=DataSettings(cache=str(tmp_path_factory.mktemp("cache"))))


def loaders(
    index: object, settings: Config, *, world: int, workers: int, clips_per_gpu: int = 4
) -> Iterator[tuple[StepSampler, Loader]]:
    videos = np.arange(len(index.names))
    for rank in range(world):
        dataset = TrainClips(index, videos, settings, NOISE, settings.seed)
        sampler = StepSampler(
            videos,
            seed=settings.seed,
            global_batch=6 * settings.augment.repeats,
            clips_per_gpu=clips_per_gpu,
            rank=rank,
            world=world,
            repeats=settings.augment.repeats,
        )
        loader = train_loader(dataset, sampler, workers=workers, pin=False)
        yield sampler, loader
        loader.close()


def everything(
    index: object, settings: Config, *, epochs: list[tuple[int, int]], **options: int
) -> dict[tuple[int, int], tuple]:
    """(epoch, sample) -> step, bytes and parameters of every clip of all ranks. epochs: (epoch, first step)."""
    seen: dict[tuple[int, int], tuple] = {}
    for sampler, loader in loaders(index, settings, **options):
        for epoch, start in epochs:
            sampler.set_epoch(epoch, start_step=start)
            batches = to_device(loader, CPU)
            for step in range(start, sampler.steps_per_epoch):
                for _ in range(sampler.loads_of_step(step)):
                    batch = next(batches)
                    partner = batch.params["partner"]
                    for row, sample in enumerate(batch.samples.tolist()):
                        key = (epoch, sample)
                        assert key not in seen
                        params = {name: value[row].numpy().tobytes() for name, value in batch.params.items()}
                        params["partner"] = int(batch.samples[partner[row]])
                        values = (batch.clips[row], batch.labels[row], batch.videos[row], batch.noise[row])
                        seen[key] = (step, *(v.numpy().tobytes() for v in values), params)
            assert next(batches, None) is None
    return seen


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("repeats", [1, 2])
def test_same_bytes_for_all_workers_ranks_and_restarts(index: object, repeats: int) -> None:
    settings = config(repeats)
    expected = everything(index, settings, epochs=[(0, 0), (1, 0)], world=1, workers=0)
    assert len(expected) == 2 * 13 * repeats
    for world, workers, clips_per_gpu in [(1, 1, 4), (1, 4, 8), (2, 0, 1), (4, 1, 4), (9, 0, 4)]:
        options = {"world": world, "workers": workers, "clips_per_gpu": clips_per_gpu}
        assert everything(index, settings, epochs=[(0, 0), (1, 0)], **options) == expected
    resumed = everything(index, settings, epochs=[(1, 1)], world=2, workers=1)
    assert resumed == {key: value for key, value in expected.items() if key[0] == 1 and value[0] >= 1}


def test_epochs_samples_and_seeds_differ(index: object) -> None:
    settings = config(2)
    first = everything(index, settings, epochs=[(0, 0), (1, 0)], world=1, workers=0)
    assert len({value[1] for value in first.values()}) == len(first)
    assert len({value[4] for value in first.values()}) == len(first)
    settings.seed = 12
    other = everything(index, settings, epochs=[(0, 0)], world=1, workers=0)
    assert not {value[1] for value in other.values()} & {value[1] for value in first.values()}


def test_an_item_is_what_the_plan_says(index: object) -> None:
    """Frames by `train_frames` of the draw's stream, boxes by `draw_crop_box` of each sample's, by Pillow."""
    import io

    from PIL import Image

    from vac_ddp.data.augment import draw_crop_box, draw_parameters
    from vac_ddp.data.clip_sampling import AUGMENT, CROP

    settings = config(2)
    settings.data.reduced_decode = False
    item = TrainClips(index, np.arange(13), settings, NOISE, settings.seed).__getitems__([Key(3, 7, 9)])
    count = int(index.frame_counts[9])
    frames = train_frames(count, settings.clip, generator(11, 3, 7, FRAMES))
    for r, sample in enumerate((14, 15)):
        top, left, h, w = draw_crop_box(generator(11, 3, sample, CROP), settings.augment, 48, 64)
        for t, frame in enumerate(frames):
            image = Image.open(io.BytesIO(index.frame_bytes(9, int(frame)))).crop((left, top, left + w, top + h))
            expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
            assert np.abs(item.clips[r, t].numpy() - expected).max() <= 1
        drawn = draw_parameters(generator(11, 3, sample, AUGMENT), settings.augment, size=16)
        assert item.params.keys() - {"partner", "mix_keep", "mix_box", "mix_cut"} == drawn.keys()
        assert all(np.array_equal(item.params[name][r], value) for name, value in drawn.items())
    assert item.samples.tolist() == [14, 15]
    assert item.labels.tolist() == [int(index.labels[9])] * 2
    assert item.noise.shape == (2, NOISE)
    assert item.noise.dtype == torch.float32


def test_a_batch_holds_the_items_in_units(index: object) -> None:
    from vac_ddp.data.mixing import draw_mixing

    settings = config(2)
    dataset = TrainClips(index, np.arange(13), settings, NOISE, settings.seed)
    keys = [Key(1, 6, 2), Key(1, 7, 5), Key(1, 10, 8)]
    batch = dataset.__getitems__(keys)
    items = [dataset.__getitems__([key]) for key in keys]
    order = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    for row, (i, r) in enumerate(order):
        for name in ("clips", "labels", "samples", "videos", "noise"):
            assert torch.equal(getattr(batch, name)[row], getattr(items[i], name)[r])
        for name in items[i].params.keys() - {"partner", "mix_keep", "mix_box", "mix_cut"}:
            assert torch.equal(batch.params[name][row], items[i].params[name][r])
    assert batch.samples.tolist() == [12, 14, 13, 15, 20, 21]
    assert batch.units.tolist() == [[0, 1], [2, 3], [4, -1], [5, -1]]
    assert batch.params["partner"].tolist() == [1, 0, 3, 2, 4, 5]
    for row, sample in enumerate([12, 12, 12, 12, 20, 20]):
        drawn = draw_mixing(generator(11, 1, sample, MIX), settings.augment, size=16)
        assert all(np.array_equal(batch.params[name][row], value) for name, value in drawn.items())


def test_an_empty_batch_is_one_of_zero_rows(index: object) -> None:
    dataset = TrainClips(index, np.arange(13), config(2), NOISE, 11)
    empty, full = dataset.__getitems__([]), dataset.__getitems__([Key(0, 0, 0)])
    assert len(empty) == 0
    for name in ("clips", "labels", "samples", "videos", "noise", "units"):
        a, b = getattr(empty, name), getattr(full, name)
        assert a.shape == (0, *b.shape[1:])
        assert a.dtype == b.dtype
    assert {n: (v.dtype, v.shape[1:], len(v)) for n, v in empty.params.items()} == {
        n: (v.dtype, v.shape[1:], 0) for n, v in full.params.items()
    }


@pytest.mark.parametrize("draws", range(6))
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_unit_rows_are_a_numbering_of_all_clips(draws: int, repeats: int) -> None:
    rows, units = unit_rows(draws, repeats)
    assert sorted(rows.reshape(-1).tolist()) == list(range(draws * repeats))
    pairs = [(int(a), int(b)) for a, b in units]
    expected = [
        (rows[d, r], rows[d + 1, r] if d + 1 < draws else -1) for d in range(0, draws, 2) for r in range(repeats)
    ]
    assert pairs == expected
    assert all(b in (a + 1, -1) for a, b in pairs)
    assert all(a % 2 == 0 for a, b in pairs if b >= 0)


def test_what_mixing_needs_goes_to_the_device_and_the_plan_stays(index: object) -> None:
    batch = TrainClips(index, np.arange(13), config(), NOISE, 11).__getitems__([Key(0, 0, 0), Key(0, 1, 1)])
    moved = batch.to(torch.device("meta"))
    there = {name for name, value in moved.params.items() if value.is_meta}
    assert there == {"partner", "mix_keep", "mix_box", "mix_cut"}
    assert moved.clips.is_meta
    assert moved.labels.is_meta
    assert moved.noise.is_meta


def test_a_batch_survives_the_way_between_processes(index: object) -> None:
    train = TrainClips(index, np.arange(13), config(2), NOISE, 11).__getitems__([Key(0, 0, 0), Key(0, 1, 1)])
    test = TestViews(index, [3, 5], config().clip, ViewSettings(), tolerant=True).__getitems__([0, 1])
    for batch in (train, test):
        again = pickle.loads(pickle.dumps(batch))
        assert type(again) is type(batch)
        assert again.damage == batch.damage
        for a, b in zip(batch.tensors(), again.tensors(), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
        state = batch.__getstate__()
        assert not any(isinstance(value, torch.Tensor) for value in state.values())  # a file descriptor each


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_whole_on_a_gpu(index: object) -> None:
    """Copied from pinned memory on another stream while the device is busy with the batch before."""
    device = torch.device("cuda", 0)
    made = {}
    for pin, where in ((False, CPU), (True, device)):
        dataset = TrainClips(index, np.arange(13), config(2), NOISE, 11)
        sampler = StepSampler(np.arange(13), seed=0, global_batch=4, clips_per_gpu=4, rank=0, world=1, repeats=2)
        loader = train_loader(dataset, sampler, workers=1, pin=pin)
        arrived = []
        for batch in to_device(loader, where):
            busy = torch.randn(2000, 2000, device=where)
            for _ in range(5):
                busy = busy @ busy / 2000
            arrived.append((batch.clips.clone(), batch.noise.clone(), batch.params["partner"].clone()))
        made[where.type] = [[tensor.cpu() for tensor in batch] for batch in arrived]
        loader.close()
    for there, here in zip(made["cuda"], made["cpu"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


# ---------------------------------------------------------------- scored videos


@pytest.mark.parametrize("workers", [0, 2])
def test_views_of_scored_videos(index: object, workers: int) -> None:
    settings = config()
    views = ViewSettings(offsets=[0, 3], crops=3)
    dataset = TestViews(index, np.arange(2, 9), settings.clip, views, tolerant=True, reduced=False)
    loader = views_loader(dataset, [4, 0, 6], videos_per_batch=2, workers=workers, prefetch=2, pin=False)
    batches = list(loader)
    loader.close()
    assert [b.places.tolist() for b in batches] == [[4, 0], [6]]
    assert [b.videos.tolist() for b in batches] == [[6, 2], [8]]
    assert [b.labels.tolist() for b in batches] == [index.labels[[6, 2]].tolist(), index.labels[[8]].tolist()]
    assert all(b.decoded.all() for b in batches)
    clips = batches[0].clips[1]
    assert clips.shape == (6, 4, 16, 16, 3)
    from vac_ddp.data.frames import decode_frame

    for k, window in enumerate(view_windows(int(index.frame_counts[2]), settings.clip, views)):
        stack = np.stack([decode_frame(index.frame_bytes(2, int(frame))) for frame in window])
        for c, left in enumerate((0, 8, 16)):
            assert torch.equal(clips[3 * k + c], cut_out(stack, (0, left, 48, 48), 16))


def test_short_side_below_the_crop_is_refused(index: object) -> None:
    settings = config()
    settings.clip.short_side = 12
    with pytest.raises(UserError, match="short_side=12"):
        TestViews(index, [0], settings.clip, ViewSettings(), tolerant=True)


def test_every_frame_of_all_views_is_decoded_once() -> None:
    videos = MemoryVideos([[jpeg(48, 64, i) for i in range(9)]])
    views = ViewSettings(offsets=[0, 1, 2], crops=3)
    TestViews(videos, [0], config().clip, views, tolerant=True)[0]
    used = np.unique(view_windows(9, config().clip, views)).tolist()
    assert [frame for _, frame in videos.read] == used


# ---------------------------------------------------------------- errors, damage, processes


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_frame_is_named_once_and_counted(workers: int) -> None:
    videos = MemoryVideos([[b"", jpeg(48, 64)], [jpeg(48, 64), b"text"]], labels=[0, 1])
    settings = config()
    settings.clip.frames, settings.clip.stride = 2, 1
    dataset = TrainClips(videos, [0, 1], settings, NOISE, 0)
    sampler = StepSampler([0, 1], seed=0, global_batch=2, clips_per_gpu=2, rank=0, world=1)
    loader = train_loader(dataset, sampler, workers=workers, pin=False)
    lines = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        lines += [line for batch in loader for line in batch.damage]
    loader.close()
    assert sorted(lines) == [
        "damaged frame class/video0/0001.jpg: empty file",
        "damaged frame class/video1/0002.jpg: not an image (JPEG, PNG, WebP, BMP, GIF), or without a readable header",
    ]
    assert loader.damaged == 2


def test_many_videos_with_damaged_frames_are_counted_rather_than_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "NAMED", 2)
    settings = config()
    settings.clip.frames, settings.clip.stride = 9, 1
    videos = MemoryVideos([[b""] * 8 + [jpeg(48, 64)]] * 4)
    dataset = TrainClips(videos, range(4), settings, NOISE, 0)
    sampler = StepSampler(range(4), seed=0, global_batch=2, clips_per_gpu=2, rank=0, world=1)
    loader = train_loader(dataset, sampler, workers=0, pin=False)
    lines = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        lines += [line for batch in loader for line in batch.damage]
    assert len(lines) == 3
    assert all("8 damaged frames in class/video" in line and "0001.jpg: empty file" in line for line in lines[:2])
    assert "more than 2 videos have damaged frames" in lines[2]
    assert loader.damaged == 32


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_without_a_good_frame_is_one_line_to_the_user(workers: int) -> None:
    videos = MemoryVideos([[b"", b"nothing"]])
    sampler = StepSampler([0], seed=0, global_batch=2, clips_per_gpu=2, rank=0, world=1)
    loader = train_loader(TrainClips(videos, [0], config(), NOISE, 0), sampler, workers=workers, pin=False)
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    loader.close()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("video class/video0: none of its 2 frames can be decoded")
    assert "data.on_bad_video=skip" in str(caught.value)
    with pytest.raises(UserError, match="video class/video0"):
        TestViews(videos, [0], config().clip, ViewSettings(), tolerant=False)[0]


def test_number_of_workers() -> None:
    cores = len(os.sched_getaffinity(0))
    assert worker_count(3, local_ranks=2) == 3
    assert worker_count(0, local_ranks=2) == 0
    assert worker_count(None, local_ranks=1) == min(16, cores)
    assert worker_count(None, local_ranks=1000) == 1


def test_loader_processes_ignore_signals_and_run_one_thread() -> None:
    videos = MemoryVideos([[jpeg(48, 64, i) for i in range(4)]] * 100)  # 25 batches, 8 are made ahead
    sampler = StepSampler(np.arange(100), seed=0, global_batch=4, clips_per_gpu=4, rank=0, world=1)
    loader = train_loader(TrainClips(videos, np.arange(100), config(), NOISE, 0), sampler, workers=2, pin=False)
    others = children_of(os.getpid())  # of other tests, as the standard library's resource tracker
    batches = iter(loader)
    count = len(next(batches)) + len(next(batches))  # one of each process: both have begun
    children = sorted(set(children_of(os.getpid())) - set(others))
    assert len(children) >= 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        for child in children:
            os.kill(child, number)
    count += sum(len(batch) for batch in batches)
    assert count == 100
    loader.close()
    assert not set(children) & set(children_of(os.getpid()))


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(number) for number in text.split()]


SCRIPT = """
import os
import sys
import numpy as np
from tests.frame_data import MemoryVideos, jpeg
from tests.test_dataset import config
from vac_ddp.data.dataset import TrainClips
from vac_ddp.data.loader import train_loader
from vac_ddp.data.sampler import StepSampler

videos = MemoryVideos([[jpeg(48, 64)] * 4] * 24)
sampler = StepSampler(np.arange(24), seed=0, global_batch=4, clips_per_gpu=4, rank=0, world=1)
noise = 40000  # 640 KB a batch through a pipe that holds 64
loader = train_loader(TrainClips(videos, np.arange(24), config(), noise, 0), sampler, workers=2, pin=False)
batches = iter(loader)
next(batches)
print(open(f"/proc/self/task/{os.getpid()}/children").read())
sys.stdout.flush()
if sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
if sys.argv[1] == "error":
    raise ValueError("on purpose")
print("done")
"""


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("error", 1), ("kill", -9)])
def test_a_program_that_forgets_its_loader_ends_with_all_its_processes(how: str, status: int) -> None:
    """Processes that ignore SIGTERM would keep the interpreter waiting at its end, and outlive a killed one."""
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], cwd=REPO, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert process.returncode == status
    assert ("done" in process.stdout) == (how == "end")
    assert ("on purpose" in process.stderr) == (how == "error")
    children = [int(number) for number in process.stdout.split() if number.isdigit()]
    assert len(children) >= 2
    assert all(ends(child) for child in children)


def ends(process: int) -> bool:
    """Whether a process is gone, or goes within ten seconds."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 10)[0])
    finally:
        os.close(handle)
