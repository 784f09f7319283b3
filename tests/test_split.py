from __future__ import annotations

import csv
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import shared
from vac_ddp.data.frame_names import Texts, pack_runs
from vac_ddp.data.grouping import find_sources, source_of
from vac_ddp.data.holdout import grouped_folds, grouped_holdout, nearest_subset
from vac_ddp.data.index import Index
from vac_ddp.data.official_lists import read_official
from vac_ddp.data.split import Split, leak_share, make_split, parse_fold, random_split, read_split, write_split
from vac_ddp.errors import UserError
from vac_ddp.settings import DataSettings


def index_of(names: list[str]) -> Index:
    """An index of videos "class/video" without frames."""
    classes = sorted({name.split("/")[0] for name in names})
    number = {name: i for i, name in enumerate(classes)}
    return Index(
        root=Path("data_train"),
        classes=classes,
        labels=np.array([number[name.split("/")[0]] for name in names], np.int64),
        names=Texts.of(names),
        frames=pack_runs([[] for _ in names]),
        frame_counts=np.ones(len(names), np.int64),
    )


def hmdb_name(class_name: str, source: str, clip: int, tail: str = "u_nm_np1_ba_goo") -> str:
    return f"{class_name}/{source}_{class_name}_{tail}_{clip}"


def hmdb_names(classes: tuple[str, ...] = ("brush_hair", "wave", "kick_ball"), sources: int = 8) -> list[str]:
    odd = ["April_09", "a!b#c", "20060723sfjffbartsinger", "x_wave_y", "(21)", "50_FIRST_DATES", "v;+@[~]", "np1_ba"]
    return [
        hmdb_name(label, odd[s % 8] + ("" if s < 8 else str(s)), clip)
        for label in classes
        for s in range(sources)
        for clip in range(1 + (s * 7 + len(label)) % 5)
    ]


def ucf_names(classes: tuple[str, ...] = ("Archery", "YoYo"), groups: int = 6, clips: int = 4) -> list[str]:
    return [
        f"{label}/v_{label}_g{g:02d}_c{c:02d}"
        for label in classes
        for g in range(1, groups + 1)
        for c in range(1, clips + 1)
    ]


def check_parts(split: Split, index: Index, *, unused: int = 0) -> None:
    """Every video in exactly one part, no source on both sides: counted here, not by the code under test."""
    train, val = split.train.tolist(), split.val.tolist()
    assert train == sorted(set(train))
    assert val == sorted(set(val))
    assert not set(train) & set(val)
    assert len(train) + len(val) + unused == len(index)
    assert not {split.groups[i] for i in train} & {split.groups[i] for i in val}


# ---------------------------------------------------------------- grammars


@pytest.mark.parametrize(
    ("grammar", "name", "label", "source"),
    [
        ("hmdb51", "April_09_brush_hair_u_nm_np1_ba_goo_0", "brush_hair", "April_09"),
        ("hmdb51", "50_FIRST_DATES_wave_f_cm_np1_fr_med_0.avi", "wave", "50_FIRST_DATES"),
        ("hmdb51", "a_wave_b_wave_f_cm_np12_le_bad_11", "wave", "a_wave_b"),
        ("hmdb51", "April_09_brush_hair_u_nm_np1_ba_goo", "brush_hair", None),
        ("hmdb51", "April_09_brush_hair_u_xx_np1_ba_goo_0", "brush_hair", None),
        ("ucf101", "v_HandStandPushups_g01_c01", "HandstandPushups", "v_HandStandPushups_g01"),
        ("ucf101", "v_Archery_g25_c07.avi", "Archery", "v_Archery_g25"),
        ("ucf101", "Archery_g25_c07", "Archery", None),
        ("numbered", "party_001", "dance", "party"),
        ("numbered", "party-2", "dance", "party"),
        ("numbered", "dQw4w9WgXcQ_000012_000022", "dance", "dQw4w9WgXcQ"),
        ("numbered", "set1_seq01_clip004", "hug", "set1_seq01_clip"),
        ("numbered", "00012", "dance", None),
        ("numbered", "party", "dance", None),
        ("last number", "party_01_002", "dance", "party_01"),
        ("last number", "20240101_120000", "dance", "20240101"),
        ("last number", "00012", "dance", None),
    ],
)
def test_sources_are_told_from_names(grammar: str, name: str, label: str, source: str | None) -> None:
    assert source_of(grammar, name, label) == source


def test_long_names_do_not_hang() -> None:
    for grammar in ("numbered", "last number", "hmdb51", "ucf101"):
        source_of(grammar, "1" * 200 + "_" * 200 + "a1" * 200 + "x", "c")


def told(names: list[str], **wishes: object):
    index = index_of(names)
    classes = [index.classes[label] for label in index.labels]
    return find_sources(names, classes, DataSettings(**wishes))


def test_hmdb51_is_recognised_and_groups_by_class_and_source() -> None:
    names = hmdb_names()
    found = told(names)
    assert found.grammar == "hmdb51"
    assert len(set(found.groups)) == 3 * 8
    assert "wave/April_09" in found.groups
    assert f"{len(names)} of {len(names)} names" in found.notes[0]
    assert "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0 -> brush_hair/April_09" in found.notes[1]
    assert len(set(told(names, group_across_classes=True).groups)) == 8


def test_ucf101_is_recognised() -> None:
    found = told(ucf_names())
    assert found.grammar == "ucf101"
    assert len(set(found.groups)) == 12


def test_numbered_names_are_recognised_across_classes_unless_told_otherwise() -> None:
    names = [f"{label}/{place}_{i:03d}" for label in ("a", "b") for place in ("park", "home", "gym") for i in range(4)]
    assert (told(names).grammar, set(told(names).groups)) == ("numbered", {"park", "home", "gym"})
    assert len(set(told(names, group_across_classes=False).groups)) == 6


def test_a_grammar_that_leaves_a_class_one_source_is_rejected() -> None:
    names = [f"{label}/{label}_{i:03d}" for label in ("run", "walk") for i in range(5)]
    found = told(names)
    assert (found.grammar, found.groups) == ("none", names)
    assert found.notes[0].startswith("warning")
    assert "fewer than two sources in class run" in found.notes[0]
    with pytest.raises(UserError, match="fewer than two sources in class run"):
        told(names, group_by="numbered")
    finer = [f"{label}/{label}_{s}_{i:03d}" for label in ("run", "walk") for s in (1, 2, 3) for i in range(5)]
    assert (told(finer).grammar, len(set(told(finer).groups))) == ("last number", 6)  # falls on to the next
    assert len(set(told(finer, group_by="numbered").groups)) == 6


def test_names_that_tell_nothing_warn() -> None:
    for names in (["a/1", "a/2", "b/3", "b/4"], ["a/xq", "a/yq", "b/zq", "b/wq"], ["a/p1", "a/q1", "b/r1", "b/s1"]):
        found = told(names)
        assert (found.grammar, found.groups) == ("none", names)
        assert found.notes[0].startswith("warning")
    assert not told(["a/1", "b/2"], group_by="none").notes[0].startswith("warning")


def test_a_few_other_names_are_their_own_source_and_named() -> None:
    names = [*hmdb_names(sources=20), "wave/my own clip"]
    found = told(names)
    assert found.grammar == "hmdb51"
    assert found.groups[-1] == "wave/my own clip"
    assert "warning: 1 videos are their own source" in found.notes[-1]
    with pytest.raises(UserError, match=r"does not tell the source of 1 of \d+ videos \(wave/my own clip\)"):
        told(names, group_by="hmdb51")


REAL = [f"{c}/set{1 + s // 3}_seq{s:02d}_clip{i:03d}" for i, c in enumerate(("hug", "kick", "push")) for s in range(6)]


def test_a_regex_of_the_user() -> None:
    for wish in ({"group_by": "regex"}, {}):  # auto takes the regex where there is one
        found = told(REAL, group_regex=r"(set\d+_seq\d+)", **wish)
        assert found.grammar == "regex"
        assert set(found.groups) == {f"set{1 + s // 3}_seq{s:02d}" for s in range(6)}
    for wrong, says in ((None, "needs data.group_regex"), ("(", "no regular expression"), (r"set\d", "has no group")):
        with pytest.raises(UserError, match=says):
            told(REAL, group_by="regex", group_regex=wrong)
    with pytest.raises(UserError, match="fewer than two sources in class hug"):
        told(REAL, group_regex=r"(set)")
    with pytest.raises(UserError, match="does not tell the source of 9 of 18"):
        told(REAL, group_regex=r"(set1_seq\d+)")


def test_a_rule_that_is_not_used_is_named(tmp_path: Path) -> None:
    rule = {"group_regex": r"(set\d+_seq\d+)"}
    for wishes in ({"group_by": "none"}, {"group_by": "numbered"}):
        assert any("data.group_regex is not used" in note for note in told(REAL, **rule, **wishes).notes)
    assert not any("not used" in note for note in told(REAL, **rule).notes)


def test_a_csv_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "sources.csv"
    rows = [f"{name if i % 2 else name.split('/')[1]},s{i % 4}" for i, name in enumerate(REAL)]
    path.write_text("video,source\n" + "\n".join(rows) + "\n")
    found = told(REAL, group_csv=str(path))
    assert (found.grammar, found.groups) == ("csv", [f"s{i % 4}" for i in range(len(REAL))])
    for text, says in (
        ("name,source\n", "columns video,source"),
        ("video,source\na,\n", "line 2 has no video or no source"),
        ("video,source\na,b\na,c\n", "second source"),
        ("video,source\n" + "\n".join(rows[1:]) + "\n", "does not tell the source of 1 of 18"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            told(REAL, group_by="csv", group_csv=str(path))
    with pytest.raises(UserError, match="cannot read"):
        told(REAL, group_csv=str(tmp_path / "gone.csv"))


# ---------------------------------------------------------------- hold-out and folds


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), min_size=1, max_size=80),
    st.sampled_from([0.1, 0.2, 0.33, 0.5, 0.8]),
    st.integers(0, 5),
    st.booleans(),
)
def test_no_source_is_ever_on_both_sides(videos, fraction: float, seed: int, across: bool) -> None:
    groups = [f"s{source}" if across else f"{label}/s{source}" for source, label in videos]
    labels = np.array([label for _, label in videos], np.int64)
    held = grouped_holdout(groups, labels, fraction=fraction, seed=seed)
    assert held.shape == (len(videos),)
    assert held.dtype == bool
    inside = {group for group, out in zip(groups, held, strict=True) if out}
    assert not inside & {group for group, out in zip(groups, held, strict=True) if not out}
    folds = grouped_folds(groups, labels, folds=3, seed=seed)
    assert set(folds.tolist()) <= {0, 1, 2}
    assert all(len({fold for g, fold in zip(groups, folds.tolist(), strict=True) if g == name}) == 1 for name in groups)
    if not across:
        for label in set(labels.tolist()):
            mine = {groups[i] for i in np.flatnonzero(labels == label)}
            if len(mine) > 1:  # something on both sides
                assert 0 < held[labels == label].sum() < (labels == label).sum()
            else:
                assert not held[labels == label].any()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.floats(0, 1), st.booleans(), st.booleans())
def test_the_nearest_subset_is_the_nearest_of_all(sizes: list[int], share: float, some: bool, rest: bool) -> None:
    target = share * sum(sizes)
    chosen = nearest_subset(sizes, target, some=some, rest=rest).tolist()
    everything = itertools.chain.from_iterable(
        itertools.combinations(range(len(sizes)), k) for k in range(int(some), len(sizes) + 1 - int(rest))
    )
    distances = [abs(sum(sizes[i] for i in subset) - target) for subset in everything]
    if not distances:
        assert chosen == []
        return
    assert len(set(chosen)) == len(chosen)
    assert int(some) <= len(chosen) <= len(sizes) - int(rest)
    assert abs(sum(sizes[i] for i in chosen) - target) == pytest.approx(min(distances))


def test_many_groups_are_held_out_as_exactly_as_few() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 30, 5000).tolist()
    chosen = nearest_subset(sizes, 0.2 * sum(sizes), some=True, rest=True)
    assert abs(sum(sizes[i] for i in chosen) - 0.2 * sum(sizes)) < 1
    assert 0.18 < len(set(chosen.tolist())) / 5000 < 0.22  # a fair sample, neither the smallest nor the largest
    assert nearest_subset([10**6] * 40, 8e6, some=True, rest=True).shape == (8,)
    assert len(nearest_subset([1, *[10**6] * 2000], 3.0, some=True, rest=True)) > 0


def test_each_class_comes_as_near_as_its_sources_allow() -> None:
    index = index_of(hmdb_names())
    split = make_split(index, DataSettings(), seed=3)
    check_parts(split, index)
    sizes = {label: Counter(split.groups[i] for i in np.flatnonzero(index.labels == label)) for label in range(3)}
    for label, groups in sizes.items():
        total = sum(groups.values())
        sums = [sum(subset) for k in range(1, len(groups)) for subset in itertools.combinations(groups.values(), k)]
        held = int((index.labels[split.val] == label).sum())
        assert abs(held - 0.2 * total) == pytest.approx(min(abs(s - 0.2 * total) for s in sums))


def test_sources_over_several_classes_stay_together_and_near() -> None:
    index = index_of([f"{c}/s{s:02d}_{i}" for c in "abcdef" for s in range(14) for i in range(1 + (s + ord(c)) % 3)])
    for seed in range(5):
        split = make_split(index, DataSettings(group_regex=r"(s\d+)"), seed=seed)
        check_parts(split, index)
        share = np.bincount(index.labels[split.val]) / np.bincount(index.labels)
        assert (abs(share - 0.2) < 0.08).all()


def test_spanning_sources_against_every_possible_choice() -> None:
    rng = np.random.default_rng(1)
    for trial in range(8):
        table = rng.integers(0, 5, (9, 3))
        groups = [f"g{g}" for g, c in itertools.product(range(9), range(3)) for _ in range(table[g, c])]
        labels = np.array([c for g, c in itertools.product(range(9), range(3)) for _ in range(table[g, c])])
        total = table.sum(0)

        def cost(held: np.ndarray, table: np.ndarray = table, total: np.ndarray = total) -> float:
            return float((((table * held[:, None]).sum(0) / total - 0.3) ** 2).sum())

        best = min(cost(np.array(bits)) for bits in itertools.product((0, 1), repeat=9))
        held = grouped_holdout(groups, labels, fraction=0.3, seed=trial)
        chosen = np.array([held[groups.index(f"g{g}")] if f"g{g}" in groups else 0 for g in range(9)])
        assert cost(chosen) <= best + 0.02


def test_the_split_is_a_fact_of_names_and_seed() -> None:
    names = hmdb_names(sources=30)
    shuffled = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    one, other = index_of(names), index_of(shuffled)
    for wishes in ({}, {"fold": "2/4"}, {"group_across_classes": True}, {"group_by": "none"}):
        data = DataSettings(**wishes)
        first, again = make_split(one, data, seed=7), make_split(other, data, seed=7)
        assert {names[i] for i in first.val} == {shuffled[i] for i in again.val}
    assert make_split(one, DataSettings(), seed=8).val.tolist() != make_split(one, DataSettings(), seed=7).val.tolist()


def test_folds_hold_every_source_once_and_the_classes_evenly() -> None:
    index = index_of(hmdb_names(sources=40))
    times, shares = Counter(), []
    for k in range(1, 6):
        split = make_split(index, DataSettings(fold=f"{k}/5"), seed=1)
        check_parts(split, index)
        times.update({split.groups[i] for i in split.val})
        shares.append(np.bincount(index.labels[split.val], minlength=3) / np.bincount(index.labels))
    assert set(times.values()) == {1}
    assert set(times) == set(split.groups)
    assert abs(np.array(shares) - 0.2).max() < 0.05


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "5", "a/b", "1/5/2", "/"])
def test_a_wrong_fold_is_refused(fold: str) -> None:
    with pytest.raises(UserError, match="must be k/K"):
        parse_fold(fold)
    assert parse_fold(None) is None
    assert parse_fold("2/3") == (2, 3)


def test_settings_that_cannot_be_met() -> None:
    index = index_of(ucf_names(groups=2))
    for wishes, says in (
        ({"fold": "1/9"}, "only 4 sources"),
        ({"val_fraction": 1.0}, "at least 0 and below 1"),
        ({"val_fraction": -0.1}, "at least 0 and below 1"),
        ({"fold": "1/2", "official_lists": "lists"}, "set one of them"),
        ({"official_lists": "/nowhere"}, "no such folder"),
    ):
        with pytest.raises(UserError, match=says):
            make_split(index, DataSettings(**wishes), seed=0)


def test_everything_trains_where_that_was_asked() -> None:
    index = index_of(ucf_names())
    for wishes in ({"val_fraction": 0.0}, {"val": "data_val"}):
        split = make_split(index, DataSettings(**wishes), seed=0)
        assert split.train.tolist() == list(range(len(index)))
        assert split.val.tolist() == []


def test_classes_of_one_source_are_named_and_train() -> None:
    index = index_of(["a/1", "b/1", "b/2", "b/3", "b/4", "b/5"])
    split = make_split(index, DataSettings(), seed=0)
    assert 0 in split.train.tolist()
    assert any("1 classes have no validation video: a" in note for note in split.notes)


# ---------------------------------------------------------------- leaks


def test_leaks_are_counted() -> None:
    groups = ["x", "x", "y", "z", "z"]
    assert leak_share(groups, np.array([0, 2, 3]), np.array([1, 4])) == 1.0
    assert leak_share(groups, np.array([0, 1, 3]), np.array([2, 4])) == 0.5
    assert leak_share(groups, np.array([0, 1]), np.array([2, 3, 4])) == 0.0
    assert leak_share(groups, np.array([0]), np.array([], np.int64)) == 0.0


def test_a_random_split_is_stratified_and_blind() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 5])
    train, val = random_split(labels, fraction=0.2, seed=0)
    assert sorted([*train, *val]) == list(range(35))
    assert np.bincount(labels[val]).tolist() == [2, 4, 1]


def test_the_notes_compare_with_a_random_split() -> None:
    split = make_split(index_of(ucf_names(groups=10, clips=7)), DataSettings(), seed=0)
    note = next(note for note in split.notes if "source in training" in note)
    assert "training: 0.0% (a random split: " in note
    assert float(note.split("split: ")[1].rstrip("%)")) > 80


# ---------------------------------------------------------------- official lists


def write_hmdb_lists(folder: Path) -> dict[str, int]:
    """Three classes; one video in four unused, one test."""
    folder.mkdir()
    codes = {}
    for label in ("brush_hair", "wave", "kick_ball"):
        names = [name.split("/")[1] for name in hmdb_names((label,))]
        codes |= {f"{label}/{name}": (1, 1, 2, 0)[i % 4] for i, name in enumerate(names)}
        for split in (1, 2, 3):
            lines = [
                f"{name}.avi {codes[f'{label}/{name}'] if split == 1 else 1 + i % 2} " for i, name in enumerate(names)
            ]
            (folder / f"{label}_test_split{split}.txt").write_text("\n".join(lines) + "\n")
    return codes


def write_ucf_lists(folder: Path) -> None:
    folder.mkdir()
    names = ucf_names()
    (folder / "classInd.txt").write_text("1 Archery\n2 YoYo\n")
    for split in (1, 2, 3):
        test = [name for name in names if f"_g0{split}_" in name]
        train = [f"{name}.avi {1 + name.startswith('YoYo')}" for name in names if name not in test]
        (folder / f"testlist0{split}.txt").write_text("\r\n".join(f"{name}.avi" for name in test) + "\r\n")
        (folder / f"trainlist0{split}.txt").write_text("\n".join(train) + "\n")


@pytest.mark.parametrize("ending", ["", ".avi"])
def test_official_hmdb51_lists(tmp_path: Path, ending: str) -> None:
    codes = write_hmdb_lists(tmp_path / "lists")
    index = index_of([name + ending for name in codes])
    split = make_split(index, DataSettings(official_lists=str(tmp_path / "lists")), seed=0)
    expected = list(codes.values())
    assert [expected[i] for i in split.train] == [1] * expected.count(1)
    assert [expected[i] for i in split.val] == [2] * expected.count(2)
    assert len(split.train) + len(split.val) == len(codes) - expected.count(0)
    assert split.grammar == "hmdb51"
    second = make_split(index, DataSettings(official_lists=str(tmp_path / "lists"), official_split=2), seed=0)
    assert len(second.train) + len(second.val) == len(codes)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_official_ucf101_lists(tmp_path: Path, number: int) -> None:
    write_ucf_lists(tmp_path / "lists")
    index = index_of(ucf_names())
    split = make_split(index, DataSettings(official_lists=str(tmp_path / "lists"), official_split=number), seed=0)
    check_parts(split, index)
    assert {index.names[i].split("_")[2] for i in split.val} == {f"g0{number}"}


def test_official_lists_of_other_data(tmp_path: Path) -> None:
    write_ucf_lists(tmp_path / "lists")
    data = DataSettings(official_lists=str(tmp_path / "lists"))
    partly = [name for name in ucf_names() if not name.endswith("c04")]
    split = make_split(index_of([*partly, "YoYo/other"]), data, seed=0)
    assert len(split.train) + len(split.val) == len(partly)
    assert any("1 videos are in no official list and stay unused: YoYo/other" in note for note in split.notes)
    assert any("12 videos of the official split are not there" in note for note in split.notes)
    with pytest.raises(UserError, match="other data"):
        make_split(index_of(hmdb_names()), data, seed=0)
    with pytest.raises(UserError, match="1, 2 and 3"):
        read_official(tmp_path / "lists", 4)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"neither HMDB51 lists .* nor UCF101 lists"):
        read_official(tmp_path / "none", 1)
    (tmp_path / "none" / "wave_test_split1.txt").write_text("a.avi 7\n")
    with pytest.raises(UserError, match="line 1 is not"):
        read_official(tmp_path / "none", 1)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_real_hmdb51_lists(number: int) -> None:
    lists = read_official(shared("lists", "hmdb51"), number)
    assert len(lists.parts) == 6766
    index = index_of([f"{lists.classes[video]}/{video}" for video in lists.parts])
    assert len(index.classes) == 51
    found = find_sources(list(index.names), [index.classes[i] for i in index.labels], DataSettings())
    assert found.grammar == "hmdb51"
    assert "6766 of 6766 names" in found.notes[0]
    assert len(set(found.groups)) == 2291

    split = make_split(
        index, DataSettings(official_lists=str(shared("lists", "hmdb51")), official_split=number), seed=0
    )
    assert (len(split.train), len(split.val)) == (3570, 1530)
    assert leak_share(split.groups, split.train, split.val) == 0.0

    part = index_of([index.names[i] for i in split.train])
    ours = make_split(part, DataSettings(), seed=0)
    check_parts(ours, part)
    share = np.bincount(part.labels[ours.val]) / np.bincount(part.labels)
    assert (abs(share - 0.2) < 0.02).all()
    leaks = [leak_share(ours.groups, *random_split(part.labels, fraction=0.2, seed=seed)) for seed in range(20)]
    assert 0.77 <= np.mean(leaks) <= 0.79


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_real_ucf101_lists(number: int) -> None:
    lists = read_official(shared("lists", "ucf101"), number)
    index = index_of([f"{lists.classes[video]}/{video}" for video in lists.parts])
    assert (len(index), len(index.classes)) == (13320, 101)
    data = DataSettings(official_lists=str(shared("lists", "ucf101")), official_split=number)
    split = make_split(index, data, seed=0)
    check_parts(split, index)
    assert split.grammar == "ucf101"
    assert len(set(split.groups)) == 2525
    assert (len(split.train), len(split.val)) == [(9537, 3783), (9586, 3734), (9624, 3696)][number - 1]
    leaks = [leak_share(split.groups, *random_split(index.labels, fraction=0.2, seed=seed)) for seed in range(5)]
    assert 0.98 < np.mean(leaks) <= 1.0


def test_the_real_clips_group_by_sequence() -> None:
    root = shared("clips", "data_train")
    index = index_of(sorted(f"{video.parent.name}/{video.name}" for video in root.glob("*/*")))
    for k in range(1, 6):
        split = make_split(index, DataSettings(group_regex=r"(set\d+_seq\d+)", fold=f"{k}/5"), seed=0)
        check_parts(split, index)
        assert len(set(split.groups)) == 14
    assert {split.groups[i] for i in range(len(index))} == {name.split("/")[1][:10] for name in index.names}


# ---------------------------------------------------------------- files


def test_a_split_is_written_and_read_back(tmp_path: Path) -> None:
    codes = write_hmdb_lists(tmp_path / "lists")
    index = index_of([*codes, 'wave/comma, "quote"'])
    split = make_split(index, DataSettings(official_lists=str(tmp_path / "lists")), seed=0)
    path = tmp_path / "run" / "split.csv"
    write_split(path, index, split)
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["video", "class", "source", "part"]
    assert [row["video"] for row in rows] == list(index.names)
    assert [row["part"] for row in rows[:-1]] == [["unused", "train", "val"][code] for code in codes.values()]
    back = read_split(path, index)
    assert back.train.tolist() == split.train.tolist()
    assert back.val.tolist() == split.val.tolist()
    assert back.groups == split.groups

    order = np.random.default_rng(0).permutation(len(index))
    other = index_of([index.names[i] for i in order])
    moved = read_split(path, other)
    assert {other.names[i] for i in moved.val} == {index.names[i] for i in split.val}
    assert moved.groups == [split.groups[i] for i in order]


def test_a_split_of_other_data_is_refused(tmp_path: Path) -> None:
    names = ucf_names()
    index = index_of(names)
    path = tmp_path / "split.csv"
    write_split(path, index, make_split(index, DataSettings(), seed=0))
    text = path.read_text()
    with pytest.raises(UserError, match=r"1 videos of .*split.csv are not in data_train \(Archery/v_Archery_g01_c01\)"):
        read_split(path, index_of(names[1:]))
    with pytest.raises(UserError, match=r"1 videos of data_train are not in .*split.csv \(YoYo/new\)"):
        read_split(path, index_of([*names, "YoYo/new"]))
    for wrong, says in (
        (text.replace("Archery/v_Archery_g01_c01,Archery", "Archery/v_Archery_g01_c01,YoYo"), "in class YoYo"),
        (text.replace(",train\n", ",training\n", 1), "line 2|line 3|line"),
        ("a,b\n", "is no split"),
        (text + text.splitlines()[1] + "\n", "twice"),
        ("", "is no split"),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match=says):
            read_split(path, index)
    with pytest.raises(UserError, match="cannot read"):
        read_split(tmp_path / "gone.csv", index)
