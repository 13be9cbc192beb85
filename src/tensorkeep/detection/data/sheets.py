"""Read a table of actions, as people and annotation programs write it: which video, from when to when, what.

CSV, TSV and text of Excel, LibreOffice, BORIS, ELAN; VIA 3's and Label Studio's exports; Audacity's label track. Names
of columns say what they mean (`sheet_columns`), the times what they are (`sheet_times`). What is not understood is an
error with row and column; what could be read in two ways is said, and never chosen in silence.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tensorkeep.detection.data.labelling import Row, is_export, is_via, read_export, read_via
from tensorkeep.detection.data.opening import VIDEO_SUFFIXES
from tensorkeep.detection.data.sheet_columns import is_header
from tensorkeep.detection.data.sheet_rows import Action, Sheet, Unit, oddity, refuse_all, sheet_of_table
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.documents import read_json

SHEETS = (".csv", ".tsv", ".tab", ".txt")
_BOOKS = (".xlsx", ".xls", ".ods", ".numbers", ".xlsm")
_HEAD = 30  # rows among which the names of the columns stand


def is_sheet(path: str | Path) -> bool:
    """Return whether a file's name is that of a table, or of a spreadsheet program's own file.

    >>> is_sheet("times.CSV"), is_sheet("gt.json")
    (True, False)
    """
    return Path(path).suffix.lower() in (*SHEETS, *_BOOKS, ".eaf")


def read_sheet(path: str | Path, columns: Mapping[str, str] | None = None, unit: Unit | None = None) -> Sheet:
    """Read a table of actions.

    Args:
        path: CSV, TSV, text, or JSON of VIA 3 or Label Studio.
        columns: role (video, start, end, label, ...) -> name of its column, where the names do not say it.
        unit: of plain numbers, where no name says it.

    Returns:
        The actions, and how they were read.

    Raises:
        TensorkeepError: Something was not understood; rows and columns are named.

    Example:
        >>> read_sheet("times.csv").actions[0]  # doctest: +SKIP
        Action(place='row 2', video='kitchen_1.mp4', start=4.5, end=9.1, label='pour', frames=False)
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        document = read_json(path)
        if not is_export(document):
            what = "is neither VIA 3's project nor Label Studio's tasks"
            raise TensorkeepError(what, where=path, hint="annotations in ActivityNet's JSON need no conversion")
        return sheet_of_export(document, str(path))
    text = _text_of(path)
    if is_via(text):
        return _of_rows(read_via(text, str(path)), str(path), "VIA 3's CSV; its times are seconds")
    header, rows, delimiter = _table(text, columns or {}, path)
    if not header:
        said = "Audacity's labels: start, end and label, in seconds, of the video that the file is named after"
        return sheet_of_table(["start (s)", "end (s)", "label"], rows, delimiter, {}, unit, path, said)
    return sheet_of_table(header, rows, delimiter, columns or {}, unit, path, "")


def sheet_of_export(document: object, source: str) -> Sheet:
    """Return the actions of a JSON document that `labelling.is_export` knows."""
    rows, said = read_export(document, source)
    return _of_rows(rows, source, said)


def sheet_document(sheet: Sheet) -> dict[str, Any]:
    """Return a table as a document in ActivityNet's layout; a video without a subset is in subset `all`.

    Args:
        sheet: as it was read.

    Raises:
        TensorkeepError: Its times count frames of an unknown rate.
    """
    framed = next((action for action in sheet.actions if action.frames), None)
    if framed is not None:
        hint = "add a column fps, or let the videos say it: "
        hint += f"tensorkeep annotate {sheet.source} --videos FOLDER -o NEW.json"
        what = f"{framed.place}: its times count frames, and nothing says how many there are in a second"
        raise TensorkeepError(what, where=sheet.source, hint=hint)
    database: dict[str, Any] = {}
    spelled_as: dict[str, str] = {}
    for video in [*(action.video for action in sheet.actions), *sheet.empty]:
        name = video_name(video)
        if spelled_as.setdefault(name, video) != video:
            what = f"{spelled_as[name]!r} and {video!r} would both be the video {name!r}"
            raise TensorkeepError(what, where=sheet.source, hint="tensorkeep annotate tells them apart by their files")
        entry = {"subset": sheet.subsets.get(video, "all"), **sheet.facts.get(video, {}), "annotations": []}
        database.setdefault(name, entry)
    for action in sheet.actions:
        row = {"segment": [action.start, action.end], "label": action.label}
        database[video_name(action.video)]["annotations"].append(row)
    return {"database": database}


def video_name(text: str) -> str:
    r"""Return the name of a video as a table spells it, without a file's ending; of a whole path its last part.

    >>> video_name("C:\\films\\a.MP4"), video_name("cam1/b.mov"), video_name("https://x.org/c.webm"), video_name("v.2")
    ('a', 'cam1/b', 'c', 'v.2')
    """
    plain = text.strip().replace("\\", "/")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|/|\.\.?/", plain):
        plain = plain.partition("?d=")[2] or plain.partition("?")[0]
        plain = PurePosixPath(plain).name
    end = PurePosixPath(plain).suffix
    return plain[: -len(end)] if end.lower() in VIDEO_SUFFIXES else plain


def _text_of(path: Path) -> str:
    """The text of a table, in UTF-8 or, as Excel's "Unicode text" is, UTF-16."""
    if path.suffix.lower() in _BOOKS:
        hint = 'save it as "CSV UTF-8" (Excel, Numbers) or "Text CSV" (LibreOffice), one sheet'
        raise TensorkeepError("is a spreadsheet program's own file, which is not read", where=path, hint=hint)
    if path.suffix.lower() == ".eaf":
        hint = "in ELAN: File, Export As, Tab-delimited Text, with column labels"
        raise TensorkeepError("is ELAN's own file, which is not read", where=path, hint=hint)
    data = read_small(path)
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        hint = 'save it as "CSV UTF-8", so that names with accents stay'
        raise TensorkeepError("is no text in UTF-8", where=path, hint=hint) from error
    if "\0" in text:
        hint = "a workbook or another program's own file: save it as CSV there"
        raise TensorkeepError("is no text, it holds NUL bytes", where=path, hint=hint)
    return text


def _table(text: str, given: Mapping[str, str], path: Path) -> tuple[list[str], list[tuple[int, list[str]]], str]:
    """The names of the columns, the rows below with their numbers, and what parts the columns; no name: Audacity's."""
    first, _, rest = text.partition("\n")
    skipped = 0
    if said := re.fullmatch(r"sep=(.)", first.strip()):
        text, skipped = rest, 1
    delimiters = [said[1]] if said else sorted(",;\t|", key=lambda d: -text[:4000].count(d))
    for delimiter in delimiters:
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
        except csv.Error:
            continue
        numbered = [(number, row) for number, row in enumerate(rows, 1 + skipped)]
        for at, (_, row) in enumerate(numbered[:_HEAD]):
            names = {cell.strip() for cell in row}
            if is_header(row) or (given and set(given.values()) <= names):
                return [cell.strip() for cell in row], _filled(numbered[at + 1 :]), delimiter
    lines = [(number, line.split("\t")) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    lines = [(number, cells) for number, cells in lines if cells[0] != "\\"]  # Audacity's ranges of frequencies
    if lines and all(len(cells) == 3 and re.fullmatch(r"\d+[.,]\d+", cells[0].strip()) for _, cells in lines):
        return [], lines, "\t"
    head = " | ".join(first.split(delimiters[0]))[:80]
    hint = "the first row names the columns: video,start,end,label; --columns start=NAME ... says other names"
    raise TensorkeepError(
        f"none of its first rows names a column for the start; row 1: {head!r}", where=path, hint=hint
    )


def _filled(rows: Sequence[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """Rows that say something."""
    return [(number, row) for number, row in rows if any(cell.strip() for cell in row)]


def _of_rows(rows: Sequence[Row], source: str, said: str) -> Sheet:
    """A table of what an annotation program exports."""
    if not rows:
        raise TensorkeepError("no action with a start and an end in it", where=source)
    actions = tuple(Action(*row) for row in rows)
    refuse_all([f"{a.place}: {why}" for a in actions if (why := oddity(a))], source)
    unit = "frames" if any(action.frames for action in actions) else "seconds"
    return Sheet(source, actions, (), {}, {}, unit, (f"read as {said}",))
