"""The submission gate: the notebook's rule, a table of bad inputs, and sample files followed byte by byte."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vac_ddp.errors import UserError
from vac_ddp.results.submission import (
    natural_key,
    parse,
    sample_note,
    scores_text,
    submission_after,
    submission_text,
    write_submission,
    written_id,
)


def test_the_notebooks_rule() -> None:
    """Folders sorted by int(name), ids written as integers, no quotes, line feeds."""
    names, answers = ["00010", "00002", "00001"], ["wave", "climb", "pick"]
    expected = "id,class\n"
    for name, answer in sorted(zip(names, answers, strict=True), key=lambda pair: int(pair[0])):
        expected += f"{int(name)},{answer}\n"
    assert submission_text(names, answers) == expected == "id,class\n1,pick\n2,climb\n10,wave\n"


def test_other_names_stay_and_are_in_natural_order() -> None:
    names = ["clip10", "clip9", "007b", "12", "²", "a,b"]
    rows = list(csv.reader(io.StringIO(submission_text(names, list("uvwxyz")))))
    assert rows == [
        ["id", "class"],
        ["007b", "w"],
        ["12", "x"],
        ["a,b", "z"],
        ["clip9", "v"],
        ["clip10", "u"],
        ["²", "y"],
    ]


def test_names_that_need_quotes_survive_a_csv_reader() -> None:
    answers = ['say "hi"', "a,b", "two\nlines", " blank ", ""]
    names = [f"v{i}" for i in range(5)]
    rows = list(csv.reader(io.StringIO(submission_text(names, answers), newline="")))
    assert rows[1:] == [list(pair) for pair in zip(names, answers, strict=True)]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["1", "01"], "'1' and '01' would both be id 1"),
        (["00015", "15", "2"], "both be id 15"),
        (["a", "a"], "both be id a"),
        ([], "no test videos"),
    ],
)
def test_test_folders_that_collide(names: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        submission_text(names, ["x"] * len(names))


GOOD = "id,class\n1,x\n2,x\n3,x\n"


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (GOOD, "id,class\n1,A\n2,B\n3,C d\n"),
        ("id,class\n3,x\n1,x\n2,x\n", "id,class\n3,C d\n1,A\n2,B\n"),  # order
        ("id,class\n00003,x\n0001,x\n02,x\n", "id,class\n00003,C d\n0001,A\n02,B\n"),  # ids
        (GOOD.replace("\n", "\r\n"), "id,class\r\n1,A\r\n2,B\r\n3,C d\r\n"),  # line ends
        (GOOD.rstrip("\n"), "id,class\n1,A\n2,B\n3,C d"),  # no last line end
        (GOOD + "\n", "id,class\n1,A\n2,B\n3,C d\n\n"),  # an empty last line
        ('"id","class"\n"1","x"\n"2","x"\n"3","x"\n', '"id","class"\n"1","A"\n"2","B"\n"3","C d"\n'),
        ('id,"class"\n1,"x"\n2,x\n"3","x"\n', 'id,"class"\n1,"A"\n2,B\n"3","C d"\n'),  # cell by cell
        ("id,class\n1,\n2,\n3,\n", "id,class\n1,A\n2,B\n3,C d\n"),  # empty cells
        ("\ufeffid,class\n1,x\n2,x\n3,x\n", "\ufeffid,class\n1,A\n2,B\n3,C d\n"),  # byte-order mark
        ("Label,ID\nx,1\nx,2\nx,3\n", "Label,ID\nA,1\nB,2\nC d,3\n"),  # columns
        ("id,class,Usage\n1,x,a\n2,x,\n3,x,'b'\n", "id,class,Usage\n1,A,a\n2,B,\n3,C d,'b'\n"),
        ("video,answer\n1,x\n2,x\n3,x\n", "video,answer\n1,A\n2,B\n3,C d\n"),
        ("id, class\n1, x\n2, x\n3, x\n", "id, class\n1, A\n2, B\n3, C d\n"),  # blanks
        ("id,class\r1,x\r2,x\r3,x\r", "id,class\r1,A\r2,B\r3,C d\r"),
    ],
)
def test_a_sample_is_followed_byte_by_byte(tmp_path: Path, sample: str, expected: str) -> None:
    (tmp_path / "sample.csv").write_bytes(sample.encode())
    write_submission(
        tmp_path / "out.csv", ["00001", "00002", "00003"], ["A", "B", "C d"], sample=tmp_path / "sample.csv"
    )
    assert (tmp_path / "out.csv").read_bytes() == expected.encode()


SCORES = np.log([[0.125, 0.875], [0.5, 0.5], [0.75, 0.25]])


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ("id,run,walk\n1,0.5,0.5\n2,0.5,0.5\n3,0.5,0.5\n", "id,run,walk\n1,0.125,0.875\n2,0.5,0.5\n3,0.75,0.25\n"),
        ("walk,id,run\n,2,\n,1,\n,3,\n", "walk,id,run\n0.5,2,0.5\n0.875,1,0.125\n0.25,3,0.75\n"),
        ("x,RUN,Walk\n3.jpg,,\n2.jpg,,\n1.jpg,,\n", "x,RUN,Walk\n3.jpg,0.75,0.25\n2.jpg,0.5,0.5\n1.jpg,0.125,0.875\n"),
        ("id,run,walk,Use\n1,,,a\n2,,,b\n3,,,c\n", "id,run,walk,Use\n1,0.125,0.875,a\n2,0.5,0.5,b\n3,0.75,0.25,c\n"),
        ("filename,label\n00001.mp4,x\n2.mp4,x\n3.avi,x\n", "filename,label\n00001.mp4,A\n2.mp4,B\n3.avi,C\n"),
    ],
)  # fmt: skip
def test_a_column_for_every_class_gets_its_probabilities(tmp_path: Path, sample: str, expected: str) -> None:
    """By the names in the header, in any order and case, and whatever else the sample has stays."""
    (tmp_path / "sample.csv").write_text(sample, newline="")
    write_submission(
        tmp_path / "out.csv",
        ["00001", "00002", "00003"],
        ["A", "B", "C"],
        sample=tmp_path / "sample.csv",
        scores=SCORES,
        classes=["run", "walk"],
    )
    assert (tmp_path / "out.csv").read_text() == expected


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        ("video_id,p_video_fake,p_audio_fake\n1,0.5,0.5\n", "columns p_video_fake, p_audio_fake beside the id"),
        ("id,run,jump\n1,0.5,0.5\n", "the classes are run, walk: expected a column class or label"),
        ("id,run,run\n1,0.5,0.5\n", "columns run, run"),
        ("id,run,walk,label\n1,0.5,0.5,x\n", "has a column label and one for every class"),
        ("id,class\na.mp4,x\n", "'a.mp4' may be 'a.avi' or 'a.mkv'"),
        ("id,class\nb,x\nb.mp4,x\n", "'b.mp4' is on line 2 and again on line 3|'b' is on line 2 and again"),
        ("id,class\nb.5,x\n", "asks for the id 'b.5'"),
    ],
)
def test_columns_and_ids_that_are_not_clear_are_refused(sample: str, text: str) -> None:
    names = ["a.avi", "a.mkv", "b", "1"]
    with pytest.raises(UserError, match=text) as caught:
        submission_after(sample, names, ["x"] * 4, classes=["run", "walk"], probabilities=np.full((4, 2), 0.5))
    assert "\n" not in str(caught.value)


def test_numbers_where_names_are_written_are_named() -> None:
    note = sample_note("filename,label\na.mp4,0.5\nb.mp4,0.5\n", ["fake", "real"], "s.csv")
    assert note is not None and "numbers in its column label, such as 0.5" in note
    assert sample_note("id,class\n1,0\n", ["0", "1"], "s.csv") is None
    assert sample_note("id,class\n1,x\n", ["a", "b"], "s.csv") is None


def test_a_class_with_a_comma_is_quoted_whatever_the_sample_has() -> None:
    after = submission_after(GOOD, ["1", "2", "3"], ["a,b", 'c"d', "e"])
    assert after == 'id,class\n1,"a,b"\n2,"c""d"\n3,e\n'


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("id\n1\n2\n3\n", "expected a header like id,class"),
        ("id;class\n1;x\n2;x\n3;x\n", "expected a header like id,class"),
        ("id,class\n1,x\n2,x\n", "no row for the id '3'"),
        ("id,class\n", "no row for 3 ids"),
        (GOOD + "4,x\n", "asks for the id '4', which the test data does not have"),
        (GOOD + "2,x\n", "'2' is on line 3 and again on line 5"),
        (GOOD + "0002,x\n", "'0002' is on line 3 and again on line 5"),
        ("id,class\n1,x\n2,x\n3,x,y\n", "line 4: 3 fields, the header has 2"),
        ("id,class\n1,x\n2\n3,x\n", "line 3: 1 fields"),
        ('id,class\n1,"x"y\n2,x\n3,x\n', "line 2 of the sample file: a quote"),
        ('id,class\n1,"x\n2,x\n3,x\n', "line 2 of the sample file: a quote"),
        ("id,class\n1.0,x\n2,x\n3,x\n", "asks for the id '1.0'"),
    ],
)
def test_the_gate(tmp_path: Path, sample: str, text: str) -> None:
    """What does not fit is one line, and the submission of an earlier run stays as it was."""
    out = tmp_path / "submission.csv"
    out.write_text("as it was")
    (tmp_path / "sample.csv").write_text(sample, newline="")
    with pytest.raises(UserError, match=text) as caught:
        write_submission(out, ["00001", "00002", "00003"], ["A", "B", "C"], sample=tmp_path / "sample.csv")
    assert "\n" not in str(caught.value)
    assert out.read_text() == "as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sample.csv", "submission.csv"]


def test_sample_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the sample file"):
        write_submission(tmp_path / "o.csv", ["1"], ["a"], sample=tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("id,class\n1,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        write_submission(tmp_path / "o.csv", ["1"], ["a"], sample=tmp_path / "latin.csv")


@given(st.text(alphabet='a1," \r\n', max_size=30))
def test_parsing_loses_no_character(text: str) -> None:
    try:
        records = parse(text)
    except UserError:
        return
    assert "".join(",".join(r.cells) + r.end for r in records) == text


@given(st.lists(st.lists(st.text(alphabet='ab,"\n', max_size=5), min_size=2, max_size=3), min_size=1, max_size=5))
def test_parsing_agrees_with_the_csv_module(rows: list[list[str]]) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows(rows)
    cells = [[cell[1:-1].replace('""', '"') for cell in record.cells] for record in parse(stream.getvalue())]
    assert cells == rows


def test_natural_order_and_ids() -> None:
    assert sorted(["b", "10", "9", "a2", "a10"], key=natural_key) == ["9", "10", "a2", "a10", "b"]
    assert [written_id(n) for n in ("00015", "0", "007b", "-1", "١")] == ["15", "0", "007b", "-1", "١"]


def test_scores_name_the_best_classes_in_the_submissions_order() -> None:
    scores = np.log([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])
    rows = list(csv.reader(io.StringIO(scores_text(["02", "01"], scores, ["a", "b,c", "d"]))))
    assert rows[0] == ["id", "class", "confidence", "class_2", "confidence_2", "class_3", "confidence_3"]
    assert rows[1] == ["1", "a", "0.500000", "b,c", "0.250000", "d", "0.250000"]
    assert rows[2] == ["2", "d", "0.700000", "b,c", "0.200000", "a", "0.100000"]


def test_ids_of_more_digits_than_python_reads_as_a_number():
    long = "7" * 5000
    assert written_id(f"00{long}") == long
    assert sorted([long, "10", "9", "8" * 4999], key=natural_key) == ["9", "10", "8" * 4999, long]
    assert submission_text([long, "2"], ["a", "b"]) == f"id,class\n2,b\n{long},a\n"


@pytest.mark.parametrize(("header", "twice"), [("id,class,class", "class"), ("id,id,label", "id")])
def test_a_sample_with_a_column_twice_is_refused(header, twice):
    with pytest.raises(UserError, match=f"2 columns headed {twice}"):
        submission_after(f"{header}\n1,1,x\n", ["1"], ["a"])
