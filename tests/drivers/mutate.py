"""Random damage to lists and sample files: whatever comes of it must be read, or refused in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vac_ddp.data.grouping import find_sources
from vac_ddp.data.scan import looks_labelled, scan_root
from vac_ddp.data.video_list import read_list
from vac_ddp.errors import UserError
from vac_ddp.results.submission import parse, read_sample, sample_note, submission_after, write_submission
from vac_ddp.settings import DataSettings

PIECES = [b",", b";", b"\t", b"|", b" ", b"\n", b"\r", b"\r\n", b'"', b'""', b"\0", b"\xff\xfe", b"\xfe\xff",
          b"\xef\xbb\xbf", b"\xe9", b"\\", b"/", b"..", b"path", b"label", b"id", b"class", b"1", b".mp4", b"sep=;\n",
          b"C:\\x", b"=1+1", b"\xed\xa0\x80", b"'", b"a" * 300, b"," * 50, b"1e999"]  # fmt: skip


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with one to six pieces cut out, doubled, overwritten or put in."""
    for _ in range(int(rng.integers(1, 7))):
        start, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        end = min(end, start + int(rng.choice([0, 1, 2, 8, 1000])))
        piece = PIECES[int(rng.integers(len(PIECES)))]
        what = int(rng.integers(4))
        if what == 0:
            data = data[:start] + data[end:]
        elif what == 1:
            data = data[:end] + data[start:end] + data[end:]
        elif what == 2:
            data = data[:start] + bytes(rng.integers(0, 256, end - start, dtype=np.uint8)) + data[end:]
        else:
            data = data[:start] + piece + data[start:]
    return data


def _one_line(error: UserError) -> None:
    assert len(str(error).splitlines()) == 1, ascii(str(error))


def try_lists(root: Path, texts: Sequence[bytes], *, count: int, rng: np.random.Generator) -> Counter[str]:
    """Scan `count` damaged lists in `root`, and read them as tables of sources. Counts what was read and refused."""
    counted: Counter[str] = Counter()
    for number in range(count):
        data = mutated(texts[number % len(texts)], rng)
        path = root / "mutated.csv"
        path.write_bytes(data)
        try:
            looks_labelled(path)
            read_list(path, labelled=bool(number % 2))
            if number % 5 == 0:
                scan_root(path, labelled=True)
            counted["read"] += 1
        except UserError as error:
            _one_line(error)
            counted["refused"] += 1
        if number % 5:
            continue
        path.write_bytes(data.replace(b"path", b"video").replace(b"label", b"source"))
        try:
            find_sources(["run/a"], ["run"], DataSettings(group_by="csv", group_csv=str(path)))
        except UserError as error:
            _one_line(error)
    return counted


SAMPLES = [
    b"id,class\n1,x\n2,x\n3,x\n",
    b"id,run,walk\r\n1,0.5,0.5\r\n00002,0.5,0.5\r\n3,0.5,0.5\r\n",
    b'\xef\xbb\xbf"id","label"\n"1.mp4","x"\n"2.mp4","x"\n"3.avi","x"',
    b"id,class,Usage\n3,,a\n1,,b\n2,,c\n",
]


def _parts(text: str) -> bool:
    try:
        return bool(parse(text))
    except UserError:
        return False


def try_samples(folder: Path, *, count: int, rng: np.random.Generator) -> Counter[str]:
    """Write `count` submissions after damaged samples: the submission has the sample's ids, or is not there."""
    counted: Counter[str] = Counter()
    names, answers = ["00001", "00002", "00003"], ["run", "walk", "a,b"]
    scores, shares = np.zeros((3, 2)), np.full((3, 2), 0.5)
    for number in range(count):
        sample, out = folder / "sample.csv", folder / "submission.csv"
        sample.write_bytes(mutated(SAMPLES[number % len(SAMPLES)], rng))
        out.unlink(missing_ok=True)
        try:
            if number % 5 == 0:
                write_submission(out, names, answers, sample=sample, scores=scores, classes=["run", "walk"])
            text = read_sample(sample)
            written = submission_after(text, names, answers, probabilities=shares, classes=["run", "walk"])
        except UserError as error:
            _one_line(error)
            assert not out.exists()
            counted["refused"] += 1
            continue
        sample_note(text, ["run", "walk"], "sample")
        assert number % 5 or out.read_bytes() == written.encode()
        assert _parts(written), ascii(text)
        again = submission_after(written, names, answers, probabilities=shares, classes=["run", "walk"])
        assert again == written, "a submission is its own sample"
        counted["read"] += 1
    return counted
