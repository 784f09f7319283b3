"""The synthetic motion set: its layout, and the proof that only the order of the frames tells its classes apart."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vac_ddp.commands import synth_command
from vac_ddp.data import synthetic
from vac_ddp.errors import UserError

SMALL = ["--videos-per-class", "4", "--test-per-class", "2", "--clips-per-source", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "set"
    assert synth_command.main([str(out), *SMALL]) == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout_is_the_readmes(made: Path) -> None:
    classes = sorted(p.name for p in (made / "data_train").iterdir())
    assert classes == sorted("_".join(order) for order in itertools.permutations(("move", "grow", "turn")))
    for name in classes:
        videos = sorted(p.name for p in (made / "data_train" / name).iterdir())
        assert videos == ["s000_c00", "s000_c01", "s001_c00", "s001_c01"]
    assert sorted(p.name for p in (made / "data_test").iterdir()) == [f"{i:05d}" for i in range(1, 13)]
    for video in [*(made / "data_train").glob("*/*"), *(made / "data_test").iterdir()]:
        frames = sorted(p.name for p in video.iterdir())
        assert frames == [f"{i:04d}.jpg" for i in range(1, len(frames) + 1)]
        assert 21 <= len(frames) <= 51
        with Image.open(video / "0001.jpg") as image:
            assert min(image.size) >= 64
            assert max(image.size) <= 96
            assert image.mode == "RGB"


def test_test_labels_lie_beside_the_folders_and_are_balanced(made: Path) -> None:
    rows = list(csv.DictReader((made / "test_labels.csv").open()))
    assert [int(row["id"]) for row in rows] == list(range(1, 13))
    labels = [row["class"] for row in rows]
    assert {name: labels.count(name) for name in set(labels)} == dict.fromkeys(synthetic.Recipe().classes, 2)
    assert labels != sorted(labels)
    assert not [p for p in (made / "data_test").rglob("*") if p.is_file() and p.suffix != ".jpg"]


@pytest.mark.parametrize("seed", range(20))
def test_the_frames_of_a_video_are_the_same_set_for_every_class(seed: int) -> None:
    """The ceiling 1/6 rests on this: given the frames without their order, all six classes are equally likely."""
    look = synthetic.draw_look(np.random.default_rng(seed))
    clips = [
        synthetic.order_clip(look, order, np.random.default_rng(seed + 100))
        for order in itertools.permutations(synthetic.EVENTS)
    ]
    assert len({clip.tobytes() for clip in clips}) == 6
    assert len({tuple(sorted(frame.tobytes() for frame in clip)) for clip in clips}) == 1


@pytest.mark.parametrize("pair", [synthetic.DIRECTIONS[i : i + 2] for i in range(0, 8, 2)])
def test_opposite_directions_are_the_same_frames_backwards(pair: list[str]) -> None:
    look = synthetic.draw_look(np.random.default_rng(3))
    one, other = (synthetic.direction_clip(look, name, np.random.default_rng(4)) for name in pair)
    assert not np.array_equal(one, other)
    assert np.array_equal(one, other[::-1])


def track(clip: np.ndarray, look: synthetic.Look) -> np.ndarray:
    """Row and column of the middle, area and steepness of the shape in every frame, measured from the pixels."""
    share = ((clip - look.ground) @ (look.colour - look.ground.mean((0, 1)))) / 1e4
    mask = share > share.max() / 2
    rows, columns = np.mgrid[: clip.shape[1], : clip.shape[2]]
    out = []
    for frame in mask:
        y, x = rows[frame], columns[frame]
        out.append((y.mean(), x.mean(), frame.sum(), y.std() / x.std()))
    return np.array(out)


def test_what_is_seen_is_what_the_class_says() -> None:
    rng = np.random.default_rng(0)
    for order in itertools.permutations(synthetic.EVENTS):
        look = synthetic.draw_look(rng)
        _, x, area, steepness = track(synthetic.order_clip(look, order, rng), look).T
        when = {
            "move": np.abs(x - np.median(x)).argmax(),
            "grow": area.argmax(),
            "turn": steepness.argmax(),
        }
        assert tuple(sorted(when, key=lambda event: when[event])) == order


def test_directions_go_where_their_name_says() -> None:
    rng = np.random.default_rng(1)
    for column, name, sign in [(1, "right", 1), (1, "left", -1), (0, "down", 1), (0, "up", -1), (2, "growing", 1)]:
        look = synthetic.draw_look(rng)
        seen = track(synthetic.direction_clip(look, name, rng), look)
        assert sign * (seen[-1, column] - seen[0, column]) > 0


def test_nothing_but_the_order_tells_the_class(tmp_path: Path) -> None:
    """An order-blind nearest neighbour on colour, size, length and mean frame does no better than chance."""
    recipe = synthetic.Recipe(videos_per_class=20, test_per_class=20)
    features: dict[int, list[np.ndarray]] = {0: [], 1: []}
    labels: dict[int, list[str]] = {0: [], 1: []}
    for video in synthetic.plan(recipe):
        look = synthetic.draw_look(np.random.default_rng([recipe.seed, video.part, video.source]))
        number = recipe.classes.index(video.class_name)
        rng = np.random.default_rng([recipe.seed, video.part, video.source, 1 + video.clip, number])
        clip = synthetic.order_clip(look, video.class_name.split("_"), rng).astype(np.float32)
        tracked = np.sort(track(clip, look), axis=0)[np.linspace(0, len(clip) - 1, 8).astype(int)]
        features[video.part].append(np.concatenate([clip.mean((0, 1, 2)), clip.shape[:3], tracked.ravel()]))
        labels[video.part].append(video.class_name)
    train, test = np.stack(features[0]), np.stack(features[1])
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    distance = np.linalg.norm(((test - mean) / deviation)[:, None] - ((train - mean) / deviation)[None], axis=2)
    nearest = np.array(labels[0])[distance.argmin(1)]
    # 120 answers at chance: 1/6, deviation 0.034; 0.30 is four deviations above
    assert (nearest == np.array(labels[1])).mean() < 0.30


def test_same_recipe_same_bytes_whatever_the_number_of_processes(made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert synth_command.main([str(again), *SMALL[:-1], "2"]) == 0
    assert files(again) == files(made)
    other = tmp_path / "other"
    assert synth_command.main([str(other), *SMALL, "--seed", "1"]) == 0
    assert files(other / "data_train") != files(made / "data_train")


def test_clips_of_a_source_share_their_look_and_parts_share_none() -> None:
    recipe = synthetic.Recipe(videos_per_class=6, test_per_class=3)
    videos = synthetic.plan(recipe)
    names = [re.fullmatch(r"data_train/\w+/(s\d+)_c\d+", v.folder) for v in videos if v.part == 0]
    assert all(names)
    assert len({m.group(1) for m in names if m}) == 2
    looks = {
        (v.part, v.source): synthetic.draw_look(np.random.default_rng([0, v.part, v.source])).colour.tobytes()
        for v in videos
    }
    assert len(looks) == len(set(looks.values())) == 3


def test_a_second_call_reuses_the_set_and_another_recipe_is_refused(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    assert synth_command.main([str(made), *SMALL]) == 0
    assert "already" in capsys.readouterr().out
    with pytest.raises(UserError, match="another folder"):
        synth_command.main([str(made), *SMALL, "--seed", "7"])
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(recipe: synthetic.Recipe, video: synthetic.Video, root: Path) -> int:
        if video.part == 1:
            raise OSError(28, "No space left on device")
        return original(recipe, video, root)

    original = synthetic.write_video
    monkeypatch.setattr(synthetic, "write_video", full)
    with pytest.raises(OSError, match="No space"):
        synth_command.main([str(tmp_path / "out"), *SMALL])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--videos-per-class", "0"], "at least 1"), (["--sed", "1"], "--sed"), (["--seed", "-1"], "at least 0")],
)
def test_bad_arguments_are_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        synth_command.main([str(tmp_path / "out"), *words])
    assert "\n" not in str(caught.value)
