"""Lists of videos as other tools write them: what can be told apart is read, the rest is one line that shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.drivers import mutate
from tests.frame_data import write_video
from vac_ddp.data.grouping import find_sources
from vac_ddp.data.index import open_index
from vac_ddp.data.scan import looks_labelled
from vac_ddp.errors import UserError
from vac_ddp.settings import DataSettings

VIDEOS = ["run/a", "run/b c", "walk/a"]
LABELS = ["run", "run", "walk"]
NUMBERS = ["0", "0", "1"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(VIDEOS):
        write_video(tmp_path / "d" / name, 2 + number)
    return tmp_path / "d"


def lines(separator: str, labels: list[str], *, header: str = "", end: str = "\n") -> str:
    rows = [f"{name}{separator}{label}" for name, label in zip(VIDEOS, labels, strict=True)]
    return end.join([*([header] if header else []), *rows, ""])


PLAIN = lines(",", LABELS, header="path,label")
READ = {
    "plain.csv": PLAIN,
    "semicolons.csv": lines(";", LABELS, header="path;label"),
    "tabs.tsv": lines("\t", LABELS, header="path\tlabel"),
    "excel.csv": "sep=;\r\n" + lines(";", LABELS, header="path;label", end="\r\n"),
    "case.csv": lines(",", LABELS, header=" Path , LABEL"),
    "synonyms.csv": lines(",", LABELS, header="video_path,class"),
    "turned.csv": "label,n,path\nrun,1,run/a\nrun,2,run/b c\nwalk,3,walk/a\n",
    "backslashes.csv": PLAIN.replace("/", "\\"),
    "slashes_and_dots.csv": PLAIN.replace("run/a", "./run//a/"),
    "spaces.csv": lines(", ", LABELS, header="path, label") + ",\n\n",
    "no_header.csv": lines(",", LABELS),
    "videomae.csv": lines(" ", NUMBERS),
    "rawframes.txt": lines(" 20 ", NUMBERS),
    "rawframes.csv": lines(",20,", NUMBERS),
    "old_mac.csv": PLAIN.replace("\n", "\r"),
}


@pytest.mark.parametrize("name", READ)
def test_a_list_is_read_whatever_tool_wrote_it(root: Path, tmp_path: Path, name: str) -> None:
    (root / name).write_text(READ[name], newline="")
    data = DataSettings(cache=str(tmp_path / "cache"))
    index = open_index(root / name, labelled=True, settings=data)
    assert looks_labelled(root / name)
    assert list(index.names) == VIDEOS
    assert index.frame_counts.tolist() == [2, 3, 4]
    assert index.classes == (["0", "1"] if "20" in READ[name] or name == "videomae.csv" else ["run", "walk"])
    assert index.labels.tolist() == [0, 0, 1]
    assert open_index(root / name, labelled=False, settings=data).labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    for name in ("é/a", "é/b", "walk/a"):
        write_video(tmp_path / name, 2)
    text = "path,label\né/a,é\né/b,é\nwalk/a,walk\n"
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    index = open_index(tmp_path / "list.csv", labelled=True, settings=DataSettings(cache=str(tmp_path / "c")))
    assert index.classes == ["walk", "é"]
    assert index.frame_counts.tolist() == [2, 2, 2]
    assert len(index.notes) == (encoding not in ("utf-8", "utf-8-sig"))


def test_bytes_that_name_the_folders_are_kept(tmp_path: Path) -> None:
    """The names of a Korean archive, say: the folders have the same bytes."""
    import os

    name = os.fsdecode("영상".encode("cp949"))
    try:
        write_video(tmp_path / name, 2)
        write_video(tmp_path / "b", 2)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "list.csv").write_bytes(b"path,label\n" + os.fsencode(name) + b"," + os.fsencode(name) + b"\nb,x\n")
    index = open_index(tmp_path / "list.csv", labelled=True, settings=DataSettings(cache=str(tmp_path / "c")))
    assert index.frame_counts.tolist() == [2, 2]
    assert index.names[1] == "b"
    assert index.names[0].isprintable()
    assert sorted(index.classes) == sorted([index.names[0], "x"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label,youtube_id,start\nrun,abc,3\n", "no column path: its first line is 'label,youtube_id,start'"),
        ("run/gone 0\nrun/a 0\n", "its first line is 'run/gone 0'"),
        ("run/a,0,1,2\n", "no column path"),
        ("run/a 0\nrun/b\n", "no column path"),
        ("path,sort\nrun/a,x\n", "no column label: its first line must be path,label, and is 'path,sort'"),
        ("path,label\nC:\\data\\a,x\n", "line 2: C:\\data\\a is a path of a Windows drive"),
        ("path,label\nrun/a,x\nclip.MP4,y\n", "clip.MP4 (no frame decodes); clip.MP4: empty file"),
        ("clip.MP4 0\nrun/a 1\n", "clip.MP4: empty file"),
        ('path,label\n"run/a,x\nb,y\n', "no label"),
        ('path,label\n"' + "a" * 200_000 + '",y\n', "line 2: field larger than field limit"),
        ("path,label\nrun/\0a,x\n", "zero bytes"),
        ("", "lists no videos"),
        ("\n\n", "lists no videos"),
    ],
)
def test_what_cannot_be_told_is_shown(root: Path, text: str, says: str) -> None:
    (root / "clip.MP4").touch()
    (root / "list.csv").write_text(text, newline="")
    with pytest.raises(UserError) as caught:
        open_index(root / "list.csv", labelled=True, settings=DataSettings(cache=str(root / "cache")))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_of_sources_may_have_another_separator(tmp_path: Path) -> None:
    (tmp_path / "sources.csv").write_bytes("Video;Source\na;s1\nb;s2\nc;s1\n".encode("utf-16"))
    settings = DataSettings(group_csv=str(tmp_path / "sources.csv"))
    assert find_sources(["a", "b", "c"], ["x", "x", "x"], settings).groups == ["s1", "s2", "s1"]


def test_mutated_lists_and_samples_are_read_or_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    """The fixed budget of the test command; a larger one is in long/."""
    texts = [text.encode() for text in READ.values()] + [PLAIN.encode("utf-16"), PLAIN.encode("utf-32")]
    counted = mutate.try_lists(root, texts, count=1000, rng=np.random.default_rng(1))
    assert counted["read"] > 50
    assert counted["refused"] > 50
    counted = mutate.try_samples(tmp_path, count=1000, rng=np.random.default_rng(2))
    assert counted["read"] > 50
    assert counted["refused"] > 50


@pytest.mark.parametrize("header", ["path,label,path", "path,label,Label"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "list.csv").write_text(f"{header}\na/v0,a,b\n")
    with pytest.raises(UserError, match=f"column {header.split(',')[2].lower()} twice"):
        open_index(str(tmp_path / "list.csv"), labelled=True, settings=DataSettings(cache=str(tmp_path / "cache")))
