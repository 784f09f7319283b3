"""The features file: read by numpy alone, memory-mapped, checked when it is read."""

from __future__ import annotations

import json
import mmap
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vac_ddp.errors import UserError
from vac_ddp.results.features_file import FeaturesHead, read_features, write_features

VIDEOS, VIEWS, STEPS, WIDTH = 5, 2, 3, 7


def head(videos: int = VIDEOS) -> FeaturesHead:
    return FeaturesHead(
        ids=[f"wave/clip_{i}" for i in range(videos - 1)] + ["wave/Ünïcode"],
        labels=np.array([0] * (videos - 1) + [-1]),
        groups=["a"] * (videos - 1) + [""],
        damaged=np.arange(videos),
        failed=np.arange(videos) == 1,
        views=np.array([[0, 0, 0], [0, 0, 1]]),
        classes=["wave", "sit"],
        about={"weights": "ab12", "fingerprint": {"data": "5 videos"}, "settings": {"clip": {"frames": 6}}},
    )


def features(seed: int = 0, videos: int = VIDEOS) -> dict[str, np.ndarray]:
    steps = np.random.default_rng(seed).normal(size=(videos, VIEWS, STEPS, WIDTH)).astype(np.float32)
    return {"pooled": steps.mean(axis=2), "steps": steps}


def write(path: Path, arrays: dict[str, np.ndarray], *, dtype: str = "float32", cut: int = 2) -> Path:
    blocks = {name: iter([value[:cut], value[cut:cut], value[cut:]]) for name, value in arrays.items()}
    write_features(path, head(), blocks, dtype=dtype, width=WIDTH, steps=STEPS if "steps" in arrays else None)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_features_file_is_read_by_numpy_alone_and_as_a_memory_map(tmp_path: Path, dtype: str) -> None:
    arrays = features()
    path = write(tmp_path / "features.npz", arrays, dtype=dtype)
    found = read_features(tmp_path)  # a folder will do
    with np.load(path) as stored:  # allow_pickle is off by default
        for name, value in arrays.items():
            np.testing.assert_array_equal(stored[name], value.astype(dtype))
            np.testing.assert_array_equal(getattr(found, name), stored[name])
            assert getattr(found, name).dtype == dtype
        assert stored["ids"].tolist() == found.ids == head().ids
        assert json.loads(str(stored["about"]))["format"] == 1
    for array in (found.pooled, found.steps):
        assert isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap)
        assert array.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert (found.labels.tolist(), found.groups, found.classes) == ([0, 0, 0, 0, -1], [*"aaaa", ""], ["wave", "sit"])
    assert (found.failed.tolist(), found.damaged.tolist()) == ([False, True, False, False, False], [0, 1, 2, 3, 4])
    assert found.about["settings"] == {"clip": {"frames": 6}}
    assert zipfile.ZipFile(path).testzip() is None


def test_every_array_begins_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    """Where the bytes of each array are found in the file, without the zip's directory."""
    arrays = features()
    data = write(tmp_path / "features.npz", arrays).read_bytes()
    for value in (*arrays.values(), head().labels, head().views):
        place = data.find(value.tobytes())
        assert place > 0 and place % 64 == 0


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{cut}.npz", features(), cut=cut).read_bytes() for cut in (1, 4))
    assert a == b


def test_without_steps_there_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "features.npz", {"pooled": features()["pooled"]})
    assert read_features(path).steps is None
    assert "steps" not in np.load(path).files


def test_blocks_that_do_not_add_up_leave_no_file(tmp_path: Path) -> None:
    for rows, width in ((4, WIDTH), (6, WIDTH), (5, WIDTH + 1)):
        with pytest.raises(ValueError, match=r"rows of pooled|a block of pooled"):
            write_features(
                tmp_path / "a.npz", head(), {"pooled": [np.zeros((rows, VIEWS, width))]}, dtype="float32", width=WIDTH
            )
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_features_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no features file"):
        read_features(tmp_path)
    good = dict(np.load(write(tmp_path / "good.npz", features())))
    nan = good["steps"].copy()
    nan[3, 1, 2, 6] = np.nan
    about = json.loads(str(good["about"]))
    changes: list[tuple[dict[str, object], str]] = [
        ({"steps": nan}, "steps: expected finite numbers, found 1 of 210"),
        ({"pooled": good["pooled"].astype(np.float64)}, "pooled: expected float32 or float16"),
        ({"pooled": good["pooled"][:, :, :0], "steps": good["steps"][..., :0]}, "at least one view, step and feature"),
        ({"steps": good["steps"][:4]}, r"steps: expected the shape \(5, 2, steps, 7\)"),
        ({"pooled": good["pooled"].astype(int)}, "pooled: expected an array of the type f"),
        ({"labels": good["labels"] + 3}, "labels: expected numbers below 2"),
        ({"groups": good["groups"][1:]}, "groups: expected the shape"),
        ({"ids": np.array(["a"] * 5)}, "ids: expected different names"),
        ({"about": np.array(json.dumps(about | {"format": 2}))}, "features format 2, this version reads 1"),
        ({"about": np.array(json.dumps({"format": 1}))}, "about: weights: expected text"),
        ({"pooled": None}, "pooled: expected an array, found nothing"),
    ]
    for number, (change, words) in enumerate(changes):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **{name: value for name, value in (good | change).items() if value is not None})
        with pytest.raises(UserError, match=words) as caught:
            read_features(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    data = bytearray((tmp_path / "good.npz").read_bytes())
    data[data.find(good["steps"].tobytes()) + 80] ^= 1  # a value that is changed, and still a number
    (tmp_path / "flipped.npz").write_bytes(data)
    with pytest.raises(UserError, match="not a features file, or is damaged"):
        read_features(tmp_path / "flipped.npz")
    (tmp_path / "cut.npz").write_bytes(data[:2000])
    with pytest.raises(UserError, match="not a features file, or is damaged"):
        read_features(tmp_path / "cut.npz")


def test_reading_takes_no_memory_for_the_features(tmp_path: Path) -> None:
    videos, width = 64, 4096
    row = np.zeros((1, VIEWS, STEPS, width), np.float16)
    blocks = {"pooled": (row[:, :, 0] for _ in range(videos)), "steps": (row for _ in range(videos))}
    big = FeaturesHead(**{**vars(head(videos)), "views": head().views})
    write_features(tmp_path / "a.npz", big, blocks, dtype="float16", width=width, steps=STEPS)
    read_features(tmp_path / "a.npz")  # what is imported on the way is not counted
    tracemalloc.start()
    found = read_features(tmp_path / "a.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.pooled.nbytes + found.steps.nbytes == 4 * videos * VIEWS * width * 2
    assert peak < 4 << 20
