"""Lists of videos as other tools write them: a path and a label a line, with any separator, encoding and header.

What can be told apart is read; where two readings are possible the files on the disk decide; else it is a UserError
that shows what was found.
"""

# ruff: noqa: PTH110, PTH118 - paths stay text: a million Path objects cost more than the reads

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vac_ddp.errors import UserError

SUFFIXES = (".csv", ".txt", ".tsv", ".lst")
PATH, LABEL = "path", "label"
# Other headings of the two columns, the likeliest first: taken where the column's folders exist.
_PATHS = (PATH, "video_path", "filepath", "file_path", "frame_dir", "folder", "dir", "directory", "filename",
          "file_name", "file", "video", "video_name", "clip", "name", "video_id", "id")  # fmt: skip
_LABELS = (LABEL, "class", "category", "class_name", "label_name", "action", "target", "tag", "labels", "class_id")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "|"}
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_LOOKS = 20  # lines whose folders are looked for


@dataclass(kw_only=True)
class Row:
    """The fields of one line that is not empty."""

    line: int
    fields: list[str]


@dataclass(kw_only=True)
class VideoList:
    """Rows of a list, and which columns are the path and the label (None: there is none)."""

    path: Path
    rows: list[Row]
    path_column: int
    label_column: int | None
    header: Row | None = None
    notes: list[str] = field(default_factory=list)  # how it was read, where that is not the usual way


def decode_text(data: bytes, where: Path) -> tuple[str, str]:
    """(text, encoding) of a text file: by its byte-order mark, as UTF-16 by its zero bytes, else as UTF-8.

    Bytes that are not UTF-8 are kept as surrogate escapes (as in `os.fsdecode`), the encoding is then "".
    """
    marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and data[:4096].count(0) > len(data[:4096]) // 4:
        encoding = "utf-16-be" if data[:4096:2].count(0) > data[1:4096:2].count(0) else "utf-16-le"
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise UserError(
                f"{where} looks like {encoding.upper()}, but is not (byte {error.start}): save it as UTF-8"
            ) from None
        return data.decode(encoding, "surrogateescape"), ""


def read_rows(text: str, separator: str, where: Path) -> list[Row]:
    """The lines that are not empty, cut at `separator` by the rules of CSV. UserError where they are broken."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        return [Row(line=reader.line_num, fields=fields) for fields in reader if any(f.strip() for f in fields)]
    except csv.Error as error:
        raise UserError(f"{where} line {reader.line_num}: {error}: is a quote missing?") from None


def heading(text: str) -> str:
    """A column's name without case, and with underscores for blanks and hyphens."""
    return re.sub(r"[\s-]+", "_", text.strip().casefold())


def read_table(path: Path, wanted: Sequence[str]) -> tuple[list[str], list[Row]] | None:
    """(names of the columns, rows below them) of a table whose first line has the columns `wanted`; None: it has not.

    Raises OSError where it cannot be read.
    """
    text, _ = decode_text(path.read_bytes(), path)
    for separator in _SEPARATORS:
        rows = read_rows(text, separator, path)
        names = [heading(name) for name in rows[0].fields] if rows else []
        if set(wanted) <= set(names):
            return names, rows[1:]
    return None


def has_labels(path: Path) -> bool:
    """Whether a file is a list with labels beside its paths."""
    try:
        return path.suffix.lower() in SUFFIXES and open_list(path).label_column is not None
    except UserError:
        return False


def open_list(path: Path) -> VideoList:
    """Read a list and tell its columns. UserError, showing its first line, where they cannot be told."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    text, encoding = decode_text(data, path)
    if "\0" in text:
        raise UserError(f"{path} has zero bytes in it and is not a list: expected lines with {PATH},{LABEL}")
    found = _columns(text, path)
    if not encoding and not _some_exist(found, odd=True):
        western = _columns(data.decode("cp1252", "replace"), path)  # what spreadsheets write in the west
        if _some_exist(western, odd=True):
            found, encoding = western, "Windows-1252"
    if encoding != "utf-8-sig":
        found.notes.insert(0, f"read as {encoding.upper() or 'bytes that are not UTF-8'}")
    return found


def _columns(text: str, path: Path) -> VideoList:
    """The rows cut at the right separator, with their columns, by the header or by what lies on the disk."""
    declared = re.match(r"sep=([,;\t|])\r?\n", text)  # a line that Excel writes
    text = "\n" + text[declared.end() :] if declared else text
    possible = [declared[1]] if declared else [separator for separator in _SEPARATORS if separator in text] or [","]
    tables = []
    for separator in possible:
        tables.append(read_rows(text, separator, path))
        found = _by_header(tables[-1], path)
        if found is not None:
            found.notes += [f"its columns are separated by {_SEPARATORS[separator]}"] if separator != "," else []
            return found
    for readings in (tables, _by_blanks(text)):
        readable = [found for rows in readings if (found := _without_header(rows, path)) is not None]
        if len(readable) == 1:
            readable[0].notes.append("it has no header: its columns were inferred from the folders they name")
            return readable[0]
    return _nothing_told(tables[0], path)


def _nothing_told(rows: list[Row], path: Path) -> VideoList:
    """A list with a column path alone, or the UserError of one whose columns cannot be told."""
    names = [heading(name) for name in rows[0].fields] if rows else []
    if PATH in names:
        return VideoList(path=path, rows=rows[1:], path_column=names.index(PATH), label_column=None, header=rows[0])
    if not rows:
        raise UserError(f"{path} lists no videos: it needs lines with {PATH},{LABEL}")
    raise UserError(
        f"{path} has no column {PATH}: its first line is {_shown(rows[0])}, expected {PATH},{LABEL} "
        f"(without a header its first line must name a folder that exists, from the folder of {path.name})"
    )


def _by_header(rows: list[Row], path: Path) -> VideoList | None:
    """The columns that the first line names; other words than path and label count where folders show it."""
    names = [heading(name) for name in rows[0].fields] if rows else []
    place, label = (next((n for n in known if n in names), None) for known in (_PATHS, _LABELS))
    if place is None:
        return None
    found = VideoList(
        path=path,
        rows=rows[1:],
        path_column=names.index(place),
        label_column=names.index(label) if label is not None else None,
        header=rows[0],
    )
    if place == PATH and label in (LABEL, None):
        if twice := [name for name in (PATH, LABEL) if names.count(name) > 1]:
            raise UserError(f"{path} has the column {twice[0]} twice: leave one of them")
        return found
    if not _some_exist(found) or _exists(path, rows[0].fields[found.path_column]):
        return None
    found.notes.append(f"its columns {place} and {label} are used as {PATH} and {LABEL}" if label else
                       f"its column {place} is used as {PATH}")  # fmt: skip
    return found


def _by_blanks(text: str) -> list[list[Row]]:
    """Readings of lines cut at blanks from the right: path label, and path frames label."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    readings = []
    for cuts in (1, 2):
        rows = [Row(line=number, fields=line.rsplit(None, cuts)) for number, line in lines]
        if all(len(row.fields) == cuts + 1 for row in rows):
            readings.append(rows)
    return readings


def _without_header(rows: list[Row], path: Path) -> VideoList | None:
    """A list whose first line is a video that is there: path; path and label; or path, frames and label."""
    widths = {len(row.fields) for row in rows}
    if not rows or len(widths) > 1 or not widths <= {1, 2, 3}:
        return None
    width = widths.pop()
    if width == 3 and not all(row.fields[1].strip().isdigit() for row in rows):
        return None
    if not _exists(path, rows[0].fields[0]):
        return None
    return VideoList(path=path, rows=rows, path_column=0, label_column=width - 1 if width > 1 else None)


def _some_exist(found: VideoList, *, odd: bool = False) -> bool:
    """Whether one of the first lines names something that is there; odd: of those whose path is not plain ASCII."""
    names = [row.fields[found.path_column] for row in found.rows if len(row.fields) > found.path_column]
    names = [name for name in names if not name.isascii()] if odd else names
    return any(_exists(found.path, name) for name in names[:_LOOKS])


def _exists(path: Path, name: str) -> bool:
    name = name.strip()
    return bool(name) and os.path.exists(os.path.join(path.parent, _on_this_system(path, name)))


def _on_this_system(path: Path, name: str) -> str:
    """`name` with slashes for the backslashes of Windows, unless it is there as it is written."""
    if "\\" not in name or os.path.exists(os.path.join(path.parent, name)):
        return name
    return name.replace("\\", "/")


def read_list(path: Path, *, labelled: bool) -> tuple[list[str], list[str], list[str]]:
    """(paths in their shortest form, labels, notes) of a list; labels are empty where they are not asked for.

    UserError: no such columns, a line without path or label, a path twice, or paths that cannot be folders here.
    """
    found = open_list(path)
    wanted = {PATH: found.path_column, LABEL: found.label_column} if labelled else {PATH: found.path_column}
    if labelled and found.label_column is None:
        shown = f", and is {_shown(found.header)}" if found.header else ""
        raise UserError(f"{path} has no column {LABEL}: its first line must be {PATH},{LABEL}{shown}")
    names: list[str] = []
    labels: list[str] = []
    seen: dict[str, int] = {}
    for row in found.rows:
        values = {}
        for column, number in wanted.items():
            assert number is not None
            values[column] = row.fields[number].strip() if number < len(row.fields) else ""
            if not values[column]:
                raise UserError(f"{path} line {row.line} has no {column}: every line needs {','.join(wanted)}")
        name = os.path.normpath(_on_this_system(path, values[PATH]))
        if _DRIVE.match(name) and not os.path.exists(os.path.join(path.parent, name)):
            raise UserError(
                f"{path} line {row.line}: {values[PATH]} is a path of a Windows drive: give paths from the folder of "
                f"{path.name}"
            )
        if name in seen:
            raise UserError(f"{path} line {row.line} names {name} again (first on line {seen[name]}): remove one")
        seen[name] = row.line
        names.append(name)
        labels.append(values.get(LABEL, ""))
    if not names:
        raise UserError(f"{path} lists no videos: it needs lines with {','.join(wanted)}")
    return names, labels, [f"{path}: {note}" for note in found.notes]


def _shown(row: Row, most: int = 80) -> str:
    text = ",".join(row.fields)
    return repr(text if len(text) <= most else text[:most] + "...")
