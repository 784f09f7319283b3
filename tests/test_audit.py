from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import shared
from vac_ddp import cli
from vac_ddp.audit.duplicates import THRESHOLD, Hashes, collect, hash_frame, near_pairs, sampled
from vac_ddp.audit.inspection import inspect_video
from vac_ddp.audit.shortcuts import nearest_neighbour
from vac_ddp.commands.audit_command import main
from vac_ddp.data.index import open_index
from vac_ddp.errors import UserError
from vac_ddp.settings import DataSettings


def picture(seed: int, shift: int = 0, height: int = 72, width: int = 96) -> np.ndarray:
    """Smooth random colours, (H, W, 3) uint8, another for every seed, moved sideways by `shift` pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    large = Image.fromarray(coarse).resize((width + 32, height), Image.Resampling.BICUBIC)
    return np.asarray(large)[:, shift % 32 : shift % 32 + width]


def encoded(pixels: np.ndarray, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def clip(folder: Path, seed: int, count: int = 10, **looks: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i + 1:04d}.jpg").write_bytes(encoded(picture(seed, 2 * i, **looks)))
    return folder


def copy_of(folder: Path, target: Path, change) -> Path:
    """A second copy of a clip, with every frame changed."""
    target.mkdir(parents=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(encoded(change(np.asarray(Image.open(path))), 60))
    return target


def clean(root: Path) -> Path:
    """Two classes, four sources each, three clips a source, nothing wrong; clips of one source do not look alike."""
    for c, label in enumerate(("run", "walk")):
        for source in range(4):
            for i in range(3):
                clip(root / label / f"{label[0]}{'abcd'[source]}_{i}", seed=100 * c + 10 * source + i)
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def audited(*argv: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict, str]:
    path = Path(str(argv[0])).parent / "audit.json"
    status = cli.main(["audit", *map(str, argv), "--json", str(path)])
    return status, json.loads(path.read_text()), capsys.readouterr().out


def test_nothing_wrong_is_exit_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        clip(tmp_path / "test" / f"{i:03d}", seed=900 + i)
    status, report, said = audited(clean(tmp_path / "d"), "--test", tmp_path / "test", capsys=capsys)
    assert (status, report["findings"]) == (0, [])
    assert said.rstrip().endswith("nothing found that would spoil a result")
    assert report["damage"]["data"] == {
        "videos": 24,
        "frames": 240,
        "damaged": 0,
        "odd_sized": 0,
        "lost_videos": 0,
        "damaged_frames": [],
        "odd_sized_frames": [],
        "videos_without_frames": [],
        "sizes": [[96, 72, 24]],
        "frames_least_median_most": [10, 10, 10],
    }
    assert report["damage"]["test"]["videos"] == 3
    assert [(row["class"], row["videos"], row["training"] + row["validation"]) for row in report["classes"]] == [
        ("run", 12, 12),
        ("walk", 12, 12),
    ]
    assert report["split"]["grammar"] == "numbered"
    assert report["split"]["sources"] == 8
    assert report["split"]["leak_chosen"] == 0.0
    assert report["split"]["leak_random"] > 0.5
    assert report["duplicates"]["clips"] == 27


def test_every_kind_of_damage_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = clean(tmp_path / "d")
    good = encoded(picture(1))
    harms = {
        "run/ra_0/0001.jpg": b"",
        "run/ra_0/0005.jpg": good[: len(good) // 2],
        "run/ra_1/0002.jpg": good[:-30],
        "run/rb_1/0003.jpg": b"text, no image",
        "walk/wa_0/0004.jpg": b"\xff\xd8" + b"\x00" * 50 + good[52:],
    }
    for name, data in harms.items():
        (root / name).write_bytes(data)
    (root / "walk/wb_0/0007.jpg").write_bytes(encoded(picture(5, height=60, width=80)))
    (root / "walk/wd_9").mkdir()
    (root / "run/a_0").mkdir()  # the first of all
    for path in (root / "walk/wc_1").iterdir():
        path.write_bytes(b"x")
    status, report, said = audited(root, capsys=capsys)
    seen = report["damage"]["data"]
    assert status == 3
    assert {line.split(":")[0] for line in seen["damaged_frames"]} == {
        *harms,
        *(f"walk/wc_1/{i:04d}.jpg" for i in range(1, 11)),
    }
    assert seen["damaged"] == len(harms) + 10
    assert seen["odd_sized_frames"] == ["walk/wb_0/0007.jpg"]
    assert [line.split(":")[0] for line in seen["videos_without_frames"]] == [
        "run/a_0",
        "walk/wc_1",
        "walk/wd_9",
    ]
    assert seen["frames"] == 240
    assert len(report["findings"]) == 3
    assert "15 of 240 frames of the data are damaged" in said
    assert "3 of 26 videos of the data have no frame that decodes" in said
    assert sum(row["validation"] for row in report["classes"]) == report["split"]["validation"]
    assert sum(row["training"] + row["validation"] for row in report["classes"]) == 23


def test_damage_in_the_test_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip(tmp_path / "test" / "1", seed=901)
    (tmp_path / "test" / "2").mkdir()
    (clip(tmp_path / "test" / "3", seed=903) / "0010.jpg").write_bytes(b"x")
    status, report, _ = audited(clean(tmp_path / "d"), "--test", tmp_path / "test", capsys=capsys)
    assert status == 3
    assert report["damage"]["test"]["videos_without_frames"] == ["2: no frames in it"]
    assert [line.split(":")[0] for line in report["damage"]["test"]["damaged_frames"]] == ["3/0010.jpg"]


CHANGES = {
    "compressed": lambda pixels: pixels,
    "half size": lambda pixels: np.asarray(Image.fromarray(pixels).resize((48, 36))),
    "brighter": lambda pixels: np.clip(pixels * 1.2, 0, 255).astype(np.uint8),
    "mirrored": lambda pixels: pixels[:, ::-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found_across_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    root = clean(tmp_path / "d")
    clip(tmp_path / "test" / "1", seed=901)
    copy_of(root / "run" / "ra_1", tmp_path / "test" / "2", CHANGES[change])  # in the test part
    copy_of(root / "run" / "ra_0", root / "walk" / "wb_7", CHANGES[change])  # under another label
    status, report, said = audited(root, "--test", tmp_path / "test", capsys=capsys)
    assert status == 3
    found = {frozenset(p["clips"]): p for pairs in report["duplicates"]["examples"].values() for p in pairs}
    assert set(found) == {frozenset({"run/ra_1", "2"}), frozenset({"run/ra_0", "walk/wb_7"})}
    assert all(pair["mirrored"] == (change == "mirrored") for pair in found.values())
    assert sum(report["duplicates"]["pairs"].values()) == 2
    assert "and test" in " ".join(report["duplicates"]["pairs"])
    assert "look the same" in said


def test_copies_between_training_and_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = clean(tmp_path / "d")
    for source in "abcd":  # every source has a copy under another name: whatever is held out, some pair is apart
        for i in range(3):
            copy_of(root / "run" / f"r{source}_{i}", root / "run" / f"x{source}_{i}", CHANGES["compressed"])
    status, report, _ = audited(root, capsys=capsys)
    part = {name: kind for kind in ("training", "validation") for name in parts_of(root)[kind]}
    expected = {
        frozenset({f"run/r{s}_{i}", f"run/x{s}_{i}"})
        for s in "abcd"
        for i in range(3)
        if part[f"run/r{s}_{i}"] != part[f"run/x{s}_{i}"]
    }
    pairs = report["duplicates"]["examples"]["training and validation"]
    assert status == 3
    assert expected
    assert {frozenset(pair["clips"]) for pair in pairs} == expected


def parts_of(root: Path) -> dict[str, list[str]]:
    from vac_ddp.data.split import make_split

    index = open_index(root, labelled=True, settings=DataSettings())
    split = make_split(index, DataSettings(), seed=0)
    return {"training": [index.names[i] for i in split.train], "validation": [index.names[i] for i in split.val]}


def test_black_clips_are_not_called_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = clean(tmp_path / "d")
    for name in ("run/rd_8", "walk/wd_8"):
        (root / name).mkdir()
        for i in range(6):
            (root / name / f"{i}.jpg").write_bytes(encoded(np.full((72, 96, 3), 3, np.uint8)))
    _, report, _ = audited(root, capsys=capsys)
    assert report["duplicates"]["without_hash"] == 2
    assert report["duplicates"]["pairs"] == {}


def test_size_and_length_that_tell_the_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "d"
    for c, label in enumerate(("run", "walk", "jump")):
        for s in "abcdefgh":
            clip(root / label / f"{label}{s}_1", 100 * c + ord(s), count=5 + c, height=60 + 4 * c)
    status, report, said = audited(root, "data.group_by=none", capsys=capsys)
    assert status == 3
    assert report["giveaway"]["accuracy"] == 1.0
    assert report["giveaway"]["chance"] == pytest.approx(7 / 23)
    assert "size and length alone tell the class in 100.0% of the cases" in said


def test_classes_that_are_out_of_balance_or_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "d"
    for i in range(12):
        clip(root / "run" / f"r{i}x", i, count=2)
    for i in range(2):
        clip(root / "walk" / f"w{i}x", 50 + i, count=2)
    (root / "jump").mkdir()
    status, report, _ = audited(root, "data.group_by=none", capsys=capsys)
    assert status == 3
    assert report["findings"] == ["1 classes have no videos: jump"]
    assert any("6.0 times the videos" in remark for remark in report["remarks"])
    assert any("a leak cannot be ruled out" in remark for remark in report["remarks"])
    assert report["split"]["leak_chosen"] is None


def test_separate_validation_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = clean(tmp_path / "d")
    clip(tmp_path / "val" / "run" / "ra_9", 500)  # a source that trains
    clip(tmp_path / "val" / "run" / "rz_9", 501)
    clip(tmp_path / "val" / "walk" / "wz_1", 502)
    copy_of(root / "walk" / "wc_2", tmp_path / "val" / "walk" / "wz_2", CHANGES["half size"])
    status, report, _ = audited(root, f"data.val={tmp_path / 'val'}", capsys=capsys)
    assert status == 3
    assert report["split"]["leak_chosen"] == 0.25
    assert "25.0% of the validation videos have their source in training" in report["findings"]
    assert report["damage"]["validation"]["videos"] == 4
    assert report["duplicates"]["pairs"] == {"training and validation": 1}


def test_the_split_is_the_one_of_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = clean(tmp_path / "d")
    _, report, _ = audited(root, "data.fold=1/4", "seed=3", capsys=capsys)
    assert (report["seed"], report["split"]["validation"]) == (3, 6)
    assert any("fold 1 of 4, seed 3" in note for note in report["split"]["notes"])
    _, report, said = audited(root, "data.val_fraction=0", capsys=capsys)
    assert report["split"]["validation"] == 0
    assert "nothing is held out" in said


def test_bad_words_are_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean(tmp_path / "d")
    for argv in (
        [str(tmp_path / "gone")],
        [str(tmp_path / "d"), "--test", str(tmp_path / "gone")],
        [str(tmp_path / "d"), "data.grup_by=none"],
        [str(tmp_path / "d"), "--no-such-flag"],
        [],
    ):
        assert cli.main(["audit", *argv]) == 2
        said = capsys.readouterr()
        assert len(said.err.strip().splitlines()) == 1
        assert said.out == ""


def test_a_packed_set_is_audited_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vac_ddp.data.pack_writer import pack

    root = clean(tmp_path / "d")
    (root / "run/ra_0/0005.jpg").write_bytes(b"x")
    pack(root, tmp_path / "p")
    _, folder, _ = audited(root, capsys=capsys)
    _, packed, _ = audited(tmp_path / "p", capsys=capsys)
    for name in ("damage", "split", "classes", "duplicates", "giveaway", "findings"):
        assert folder[name] == packed[name]


# ---------------------------------------------------------------- the measures


def test_the_hash_is_the_sign_of_the_low_frequencies() -> None:
    pixels = picture(3)
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.BILINEAR), float)
    angle = np.pi / 32 * (np.arange(32) + 0.5)
    low = np.array(
        [[(grey * np.outer(np.cos(u * angle), np.cos(v * angle))).sum() for v in range(8)] for u in range(8)]
    ).ravel()
    expected = int("".join("1" if value > np.median(low[1:]) else "0" for value in low), 2)
    straight, mirrored = hash_frame(pixels)
    assert straight == expected
    turned = hash_frame(np.ascontiguousarray(pixels[:, ::-1]))
    assert (straight ^ turned[1]).bit_count() <= 2
    assert (mirrored ^ turned[0]).bit_count() <= 2
    assert (straight ^ mirrored).bit_count() > 8
    assert hash_frame(np.full((40, 40, 3), 200, np.uint8)) is None


@pytest.mark.parametrize("block", [1 << 22, 200])
def test_pairs_against_a_plain_double_loop(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("vac_ddp.audit.duplicates._BLOCK", block)
    rng = np.random.default_rng(0)
    clips = [[(int(a), int(b)) for a, b in rng.integers(0, 2**63, (rng.integers(1, 9), 2))] for _ in range(30)]
    clips[4] = []
    for i, j, flips in ((2, 21, 3), (7, 20, 7), (9, 26, 12), (3, 11, 4)):
        clips[j] = [(a ^ sum(1 << int(b) for b in rng.choice(63, flips, replace=False)), b) for a, b in clips[i]]
    clips[28] = [(b, a) for a, b in clips[15]]
    kinds = np.arange(30) % 2

    def distance(one: list[int], other: list[int]) -> float:
        forth = np.mean([min((a ^ b).bit_count() for b in other) for a in one])
        back = np.mean([min((a ^ b).bit_count() for a in one) for b in other])
        return min(forth, back)

    def frames(i: int, side: int) -> list[int]:
        return [clips[i][f % len(clips[i])][side] for f in range(8)]

    expected = set()
    for i in range(30):
        for j in range(i + 1, 30):
            if kinds[i] == kinds[j] or not clips[i] or not clips[j]:
                continue
            for side in (0, 1):
                if distance(frames(i, side), frames(j, 0)) <= THRESHOLD:
                    expected.add((i, j, bool(side)))
    found = near_pairs(collect(clips), kinds)
    assert {(i, j, mirrored) for i, j, _, mirrored in found} == expected
    assert expected == {(2, 21, False), (7, 20, False), (15, 28, True)}  # 12 bits are too many, 3 and 11 one kind
    assert all(d == pytest.approx(distance(frames(i, m), frames(j, 0))) for i, j, d, m in found)


def test_no_clips_no_pairs() -> None:
    assert near_pairs(collect([]), np.zeros(0, np.int64)) == []
    assert near_pairs(collect([[], []]), np.arange(2)) == []
    assert isinstance(collect([[]]), Hashes)
    assert sampled(0) == []
    assert sampled(1) == [0]
    assert sampled(3) == [0, 1, 2]
    assert sampled(100)[0] == 0
    assert sampled(100)[-1] == 99
    assert len(sampled(100)) == 8


def test_the_nearest_neighbour_of_another_source() -> None:
    labels = np.array([0, 0, 1, 1, 0, 1])
    features = np.array([[100, 80, 10], [100, 80, 10], [320, 240, 50], [320, 240, 50], [100, 80, 10], [320, 240, 50]])
    alone = nearest_neighbour(features, labels, [str(i) for i in range(6)])
    assert alone.accuracy == 1.0
    assert alone.chance == pytest.approx(2 / 5)
    # the same sizes, but each size belongs to one source only: nothing is told about a new one
    assert nearest_neighbour(features, labels, ["a", "a", "b", "b", "a", "b"]).accuracy == 0.0
    equal = nearest_neighbour(np.ones((6, 3)), labels, [str(i) for i in range(6)])
    assert equal.accuracy == pytest.approx(2 / 5)
    assert not equal.found


def test_chance_is_what_shuffled_classes_score() -> None:
    rng = np.random.default_rng(0)
    features = rng.integers(1, 6, (120, 3))
    labels = rng.choice(3, 120, p=[0.6, 0.3, 0.1])
    groups = [str(i) for i in range(120)]
    shuffled = [nearest_neighbour(features, rng.permutation(labels), groups).accuracy for _ in range(60)]
    told = nearest_neighbour(features, labels, groups)
    assert np.mean(shuffled) == pytest.approx(told.chance, abs=0.02)
    assert np.quantile(shuffled, 0.98) < told.chance + told.margin


def test_every_frame_of_a_video_is_looked_at(tmp_path: Path) -> None:
    clip(tmp_path / "t" / "1", seed=1, count=40)
    (tmp_path / "t" / "1" / "0013.jpg").write_bytes(b"x")
    (tmp_path / "t" / "1" / "0014.jpg").unlink()
    index = open_index(tmp_path / "t", labelled=False, settings=DataSettings())
    look = inspect_video(index, 0)
    assert look.sizes == {(72, 96): 38}
    assert [frame for frame, _ in look.damaged] == [12]
    assert len(look.hashes) == 8


def test_the_real_clips(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train, test = shared("clips", "data_train"), shared("clips", "data_test")
    status = main([str(train), "--test", str(test), "--json", str(tmp_path / "a.json")])
    report = json.loads((tmp_path / "a.json").read_text())
    assert status == 0
    assert report["damage"]["data"]["frames"] == 1992
    assert report["damage"]["test"]["videos"] == 31
    assert report["split"]["leak_chosen"] == 0
    assert report["split"]["leak_random"] > 0.9
    assert report["duplicates"]["pairs"] == {}
    assert report["giveaway"]["found"] is False
    assert "nothing found that would spoil a result" in capsys.readouterr().out


def test_a_copied_real_clip_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = shared("clips", "data_train")
    one = sorted((train / "hug").iterdir())[0]
    (tmp_path / "test").mkdir()
    copy_of(one, tmp_path / "test" / "1", lambda pixels: np.asarray(Image.fromarray(pixels).resize((96, 96))))
    assert main([str(train), "--test", str(tmp_path / "test"), "--json", str(tmp_path / "a.json")]) == 3
    pairs = json.loads((tmp_path / "a.json").read_text())["duplicates"]["examples"]
    assert [p["clips"] for kind in pairs.values() for p in kind] == [[f"hug/{one.name}", "1"]]


def test_settings_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hmdb51 does not tell"):
        main([str(clean(tmp_path / "d")), "data.group_by=hmdb51"])
