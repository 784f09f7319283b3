"""submission.csv: every test video once, by the notebook's rule or after a given sample file, or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vac_ddp.errors import UserError
from vac_ddp.files import write_atomic
from vac_ddp.results.metrics import log_softmax, top_classes
from vac_ddp.text import listed, printable

HEADER = ("id", "class")
_CELL = re.compile(r'[ \t]*"(?:[^"]|"")*"[ \t]*|[^,\r\n]*')
_ENDING = re.compile(r"(?<=.)\.[A-Za-z][A-Za-z0-9]{1,4}$")  # of a file, as in 00015.mp4
_SHOWN = 5
_LINE_END = re.compile(r"\r\n|\n|\r")


def written_id(name: str) -> str:
    """The id of a test folder: a number without its leading zeros (00015 -> 15), any other name as it is."""
    return name.lstrip("0") or "0" if is_number(name) else name


def is_number(name: str) -> bool:
    """Whether a name is made of ASCII digits alone."""
    return name.isascii() and name.isdigit()


def natural_key(name: str) -> tuple[tuple[int, int, str, str], ...]:
    """Sorts clip2 before clip10: runs of digits, however long, compare as numbers, and come before text."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((0, len(written_id(p)), written_id(p), p) if is_number(p) else (1, 0, "", p) for p in parts)


def submission_text(names: Sequence[str], answers: Sequence[str]) -> str:
    """The file as the notebook writes it: `id,class`, numbers in numeric order, then other names in natural order.

    Fields are quoted only where they must be. Two names that give one id (1 and 01) are a UserError.
    """
    answer_of = _by_id(names, answers)
    rows = [HEADER, *((name, answer_of[name]) for name in sorted(answer_of, key=natural_key))]
    return "".join(",".join(map(quoted, row)) + "\n" for row in rows)


def submission_after(
    sample: str,
    names: Sequence[str],
    answers: Sequence[str],
    *,
    where: str = "sample file",
    probabilities: np.ndarray | None = None,
    classes: Sequence[str] = (),
) -> str:
    """The sample file with its answers replaced: its header, ids, order, quotes, line ends and other columns stay.

    The id column is the one headed `id` (else the first). Where every class has a column of its name, they get
    `probabilities` (V, K) in the order of `classes`. Otherwise the column headed `class` or `label` (else the only
    other one) gets `answers`; with several other columns that are not the classes it is a UserError.

    Ids are compared as numbers where they are numbers (15 is the folder 00015), and without a file ending where that
    names one test video only (00015.mp4). Whatever is not answered exactly once is a UserError: an id that is no test
    video, a test video that has no row, an id given twice.
    """
    answer_of = _by_id(names, answers)
    place_of = {written_id(name): place for place, name in enumerate(names)}
    records = parse(sample)
    header, rows, columns = _layout(records, classes, where)
    stems = _by_stem(answer_of)
    seen: dict[str, int] = {}
    unknown: list[str] = []
    for record in rows:
        if len(record.cells) != len(header):
            raise UserError(f"{where}, line {record.line}: {len(record.cells)} fields, the header has {len(header)}")
        given = unquoted(record.cells[columns.id])
        key = _match(given, answer_of, stems, f"{where}, line {record.line}")
        if key is None:
            unknown.append(given)
            continue
        if key in seen:
            raise UserError(f"{where}: the id {given!r} is on line {seen[key]} and again on line {record.line}")
        seen[key] = record.line
        if columns.answer is not None:
            record.cells[columns.answer] = _like(record.cells[columns.answer], answer_of[key])
        for column, label in columns.classes.items():
            value = 0.0 if probabilities is None else float(probabilities[place_of[key], label])
            record.cells[column] = _like(record.cells[column], f"{value:.8g}")
    missing = [name for name in sorted(answer_of, key=natural_key) if name not in seen]
    if unknown:
        raise UserError(f"{where} asks for {_few(unknown)}, which the test data does not have")
    if missing:
        raise UserError(f"{where} has no row for {_few(missing)} of the test data")
    return "".join(",".join(record.cells) + record.end for record in records)


def write_submission(
    path: str | Path,
    names: Sequence[str],
    answers: Sequence[str],
    *,
    sample: str | Path | None = None,
    scores: np.ndarray | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Check everything, then write submission.csv atomically (UTF-8; a byte-order mark only if the sample has one).

    scores: (V, K) logits, of which a sample file with a column per class gets the softmax.
    """
    if sample is None:
        data = submission_text(names, answers).encode("utf-8")
    else:
        shares = None if scores is None else np.exp(log_softmax(scores))
        text = submission_after(
            read_sample(sample), names, answers, where=str(sample), probabilities=shares, classes=classes
        )
        data = text.encode("utf-8")
    write_atomic(path, lambda stream: stream.write(data))


def read_sample(path: str | Path) -> str:
    """The text of a sample file with every byte kept; UserError if it is not there or not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read the sample file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the sample file {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def sample_note(sample: str, classes: Sequence[str], where: str) -> str | None:
    """What to know about a sample file that gets class names where it holds numbers, such as 0.5; else None."""
    header, rows, columns = _layout(parse(sample), classes, where)
    if columns.answer is None or all(_is_float(name) for name in classes):
        return None
    held = {unquoted(row.cells[columns.answer]) for row in rows}
    if not rows or not all(map(_is_float, held)):
        return None
    return (
        f"note: {where} has numbers in its column {header[columns.answer]}, such as {min(held)}; it gets class names "
        "(predict.answer=index: class numbers). If it asks for a probability, take it from scores.csv"
    )


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def quoted(text: str) -> str:
    """`text` as a CSV field, in quotes only where it must be."""
    if re.search(r'[",\r\n]', text) or text != text.strip() or text == "":
        return '"' + text.replace('"', '""') + '"'
    return text


def unquoted(cell: str) -> str:
    """The value of a raw CSV cell."""
    text = cell.strip().removeprefix("\ufeff")
    return text[1:-1].replace('""', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text


@dataclass
class Record:
    """One line of a CSV file, its cells exactly as written; `end` is its line end ("" at the end of the file)."""

    cells: list[str]
    end: str
    line: int


def parse(text: str) -> list[Record]:
    """Cut CSV text into records without losing a character: joining cells by commas and ends gives it back."""
    records: list[Record] = []
    cells: list[str] = []
    place, line = 0, 1
    while place < len(text) or cells:
        match = _CELL.match(text, place)
        cell = match.group() if match else ""
        place += len(cell)
        inner = cell.strip(" \t")
        unclosed = inner.startswith('"') and (len(inner) < 2 or not inner.endswith('"'))
        if unclosed or (place < len(text) and text[place] not in ",\r\n"):
            raise UserError(f"line {line} of the sample file: a quote that does not end a field")
        cells.append(cell)
        if place < len(text) and text[place] == ",":
            place += 1
            continue
        end = _LINE_END.match(text, place)
        records.append(Record(cells, end.group() if end else "", line))
        place = end.end() if end else place
        line += 1 + sum(cell.count("\n") for cell in cells)
        cells = []
    return records


def _by_id(names: Sequence[str], answers: Sequence[str]) -> dict[str, str]:
    if len(names) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(names)} videos")
    if not names:
        raise UserError("no test videos: a submission would be empty")
    first: dict[str, str] = {}
    found: dict[str, str] = {}
    for name, answer in zip(names, answers, strict=True):
        key = written_id(name)
        if key in found:
            raise UserError(f"the test videos {first[key]!r} and {name!r} would both be id {key}: rename one of them")
        first[key], found[key] = name, answer
    return found


@dataclass(kw_only=True)
class _Columns:
    """Column numbers: the id, the one that gets the answer (or None), and the class number of each that has a class."""

    id: int
    answer: int | None
    classes: dict[int, int]


def _layout(records: list[Record], classes: Sequence[str], where: str) -> tuple[list[str], list[Record], _Columns]:
    """Header, rows without empty lines, and columns of a parsed sample file."""
    filled = [record for record in records if len(record.cells) > 1 or record.cells[0].strip("\ufeff \t")]
    if not filled:
        raise UserError(f"{where} is empty: expected a header and a row for every test video")
    header = [unquoted(cell) for cell in filled[0].cells]
    return header, filled[1:], _columns(header, classes, where)


def _columns(header: list[str], classes: Sequence[str], where: str) -> _Columns:
    names = [cell.lower() for cell in header]
    if len(names) < 2:
        raise UserError(f"{where}: expected a header like id,class with commas, found {header[0]!r}")
    id_column = names.index("id") if "id" in names else 0
    others = [column for column in range(len(names)) if column != id_column]
    by_class = _class_columns(header, others, classes)
    answer = next((name for name in ("class", "label") if name in names), None)
    headed = None if answer is None else names.index(answer)
    if twice := next((name for name in ("id", answer) if names.count(name or "") > 1 and name), None):
        raise UserError(f"{where} has {names.count(twice)} columns headed {twice}: expected one")
    headed = None if headed == id_column else headed
    if len(by_class) == len(classes) > 1:
        if headed is None or headed in by_class:
            return _Columns(id=id_column, answer=None, classes=by_class)
        raise UserError(
            f"{where} has a column {header[headed]} and one for every class: remove either, so that it is clear what "
            "is asked for"
        )
    if headed is not None:
        return _Columns(id=id_column, answer=headed, classes={})
    if len(others) == 1:
        return _Columns(id=id_column, answer=others[0], classes={})
    some, known = listed([header[column] for column in others], _SHOWN), listed(classes, _SHOWN)
    raise UserError(
        f"{where} has the columns {some} beside the id, and the classes are {known or 'not known'}: expected a column "
        "class or label, or one for every class, headed by its name"
    )


def _class_columns(header: list[str], others: list[int], classes: Sequence[str]) -> dict[int, int]:
    """Class number of each column headed by the name of a class, in any case where that is unambiguous."""
    exact = {name: label for label, name in enumerate(classes)}
    folded = {name.strip().casefold(): label for label, name in enumerate(classes)}
    found = {column: exact[header[column]] for column in others if header[column] in exact}
    if len(folded) == len(classes):
        for column in others:
            label = folded.get(header[column].strip().casefold())
            if label is not None and label not in found.values():
                found[column] = label
    return found if len(set(found.values())) == len(found) else {}


def _stem(name: str) -> str:
    """`name` without a file ending; what looks like the fraction of a number is none."""
    return _ENDING.sub("", name)


def _by_stem(ids: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in ids:
        found.setdefault(written_id(_stem(key)), []).append(key)
    return found


def _match(given: str, ids: Mapping[str, str], stems: dict[str, list[str]], where: str) -> str | None:
    """The id of the test video that the sample's `given` names, None if there is none."""
    key = written_id(printable(given))
    if key in ids:
        return key
    alike = stems.get(written_id(_stem(given)), [])
    if len(alike) > 1:
        raise UserError(f"{where}: {given!r} may be {' or '.join(map(repr, alike))}: rename one of these test videos")
    return alike[0] if alike else None


def _like(cell: str, value: str) -> str:
    """`value` with the quotes and blanks around it that `cell` has."""
    inner = cell.strip(" \t")
    if not inner:
        return quoted(value)
    before, _, after = cell.partition(inner)
    always = len(inner) > 1 and inner[0] == inner[-1] == '"'
    return before + ('"' + value.replace('"', '""') + '"' if always else quoted(value)) + after


def _few(names: Sequence[str], most: int = 5) -> str:
    what = "the id" if len(names) == 1 else f"{len(names)} ids:"
    return f"{what} {listed([repr(name) for name in names], most)}"


def scores_text(names: Sequence[str], scores: np.ndarray, classes: Sequence[str], *, top: int = 5) -> str:
    """A table of the best classes: id, class and confidence, then the second to the `top`-th and theirs.

    scores: (V, K) logits; confidences are their softmax. Rows as `submission_text` orders them.
    """
    top = min(top, len(classes))
    header = ["id", "class", "confidence"]
    header += [f"{what}_{place}" for place in range(2, top + 1) for what in ("class", "confidence")]
    lines = [",".join(header)]
    numbers, probabilities = top_classes(scores, top)
    for row in sorted(range(len(names)), key=lambda i: natural_key(written_id(names[i]))):
        cells = [quoted(written_id(names[row]))]
        for number, probability in zip(numbers[row].tolist(), probabilities[row].tolist(), strict=True):
            cells += [quoted(classes[number]), f"{probability:.6f}"]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"
