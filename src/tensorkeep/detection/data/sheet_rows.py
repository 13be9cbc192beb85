"""The rows of a table of actions: cells become seconds, or frames; what is not understood is told with its place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from tensorkeep.detection.data.sheet_columns import Columns, find_columns
from tensorkeep.detection.data.sheet_times import both_ends, decimal_comma, spelled
from tensorkeep.errors import TensorkeepError

Unit = Literal["seconds", "milliseconds", "frames"]
_SECONDS = {"seconds": 1.0, "clock": 1.0, "": 1.0, "milliseconds": 1e-3, "minutes": 60.0}
_SHOWN = 6  # rows that an error names


class Action(NamedTuple):
    """One row of a table.

    Attributes:
        place: where it stands, "row 3".
        video: as the table says it.
        start: seconds, or frames.
        end: in the same unit.
        label: name of its class.
        frames: whether start and end count frames whose rate the table does not say.
    """

    place: str
    video: str
    start: float
    end: float
    label: str
    frames: bool = False


class Sheet(NamedTuple):
    """A table of actions.

    Attributes:
        source: the file.
        actions: in the order of the rows.
        empty: videos that have a row and no action.
        subsets: video -> the subset that the table says; empty where it says none.
        facts: video -> what else it says: `duration` (seconds), `fps`.
        unit: how times count: "seconds", "clock", "milliseconds", "minutes", "frames"; "" where nothing says it.
        notes: how it was read.
    """

    source: str
    actions: tuple[Action, ...]
    empty: tuple[str, ...]
    subsets: Mapping[str, str]
    facts: Mapping[str, Mapping[str, float]]
    unit: str
    notes: tuple[str, ...]


def sheet_of_table(
    header: list[str],
    rows: Sequence[tuple[int, list[str]]],
    delimiter: str,
    given: Mapping[str, str],
    unit: Unit | None,
    path: Path,
    said: str,
) -> Sheet:
    """Read a table whose columns have names.

    Args:
        header: the names.
        rows: number and cells of each row below.
        delimiter: what parts the columns.
        given: role -> name, where somebody says it.
        unit: of plain numbers, where no name says it.
        path: the file.
        said: how the file was read, where its kind is known.

    Returns:
        The actions, and how they were read.

    Raises:
        TensorkeepError: A column is lacking, or rows were not understood.
    """
    source = str(path)
    columns = find_columns(header, given, source)
    wide = [number for number, row in rows if any(cell.strip() for cell in row[len(header) :])]
    if wide:
        what = f"row {wide[0]} has more cells than the first row has names"
        hint = "decimal commas in a table whose columns are parted by commas? put them in quotes, or part by semicolons"
        raise TensorkeepError(what, where=source, hint=hint)
    table = _Table(header, columns, [(n, row + [""] * (len(header) - len(row))) for n, row in rows], path.stem)
    moments = [n for n, row in table.rows if _cell(table, row, "status").upper() == "POINT"]
    table = table._replace(rows=[(n, row) for n, row in table.rows if n not in set(moments)])
    try:
        comma = decimal_comma(_times_of(table), delimiter == ",")
    except ValueError as error:
        raise TensorkeepError(str(error), where=source, hint="write all times alike: 4.5 or 1:04.5") from error
    notes = [f"read as {said}"] if said else []
    if moments:
        notes.append(f"{len(moments)} rows are points, without a length, and are left out: first row {moments[0]}")
    unit_said, note = _unit_of(table, unit, source)
    found, empty, problems = _read_rows(table, comma, unit_said)
    refuse_all(problems, source)
    actions = [action for action, _ in found]
    if points := [a for a in actions if a.start == a.end]:
        notes.append(f"{len(points)} rows have no length and are left out, first {points[0].place}")
        actions = [a for a in actions if a.start != a.end]
    if not actions:
        raise TensorkeepError("no action with a start and an end in it", where=source)
    subsets, facts = _of_videos(table, comma, actions, found, notes, source)
    notes += [*([note] if note else []), *_notes(table, actions)]
    return Sheet(source, tuple(actions), tuple(dict.fromkeys(empty)), subsets, facts, unit_said, tuple(notes))


def _read_rows(table: _Table, comma: bool, unit: str) -> tuple[list[tuple[Action, int]], list[str], list[str]]:
    """The actions with the numbers of their rows, videos without one, and what was not understood."""
    paired = "time" in table.columns.places
    found: list[tuple[Action, int]] = []
    problems: list[str] = []
    empty: list[str] = []
    opened: dict[tuple[str, ...], tuple[int, float]] = {}
    for number, row in table.rows:
        try:
            made = (
                _paired(table, row, number, comma, unit, opened) if paired else _action(table, row, number, comma, unit)
            )
        except ValueError as error:
            problems.append(f"row {number}: {error}")
            continue
        if made is not None:
            found.append((made, number))
        elif not paired:
            empty.append(_cell(table, row, "video") or table.stem)
    problems += [f"row {at}: {key[-1]!r} starts here and nothing ends it" for key, (at, _) in opened.items()]
    problems += [f"{a.place}: {why}" for a, _ in found if (why := oddity(a))]
    return found, empty, problems


class _Table(NamedTuple):
    """The cells of a table below the names of its columns; `stem`: the video where no column names one."""

    header: list[str]
    columns: Columns
    rows: list[tuple[int, list[str]]]
    stem: str


def _cell(table: _Table, row: Sequence[str], role: str) -> str:
    """The text of a cell; empty where the table has no such column."""
    place = table.columns.places.get(role)
    return "" if place is None else row[place].strip()


def _times_of(table: _Table) -> list[tuple[str, str]]:
    """Place and text of every cell that is a time; cells that hold both ends are split."""
    found = []
    for number, row in table.rows:
        for role in ("start", "end", "length", "time", "duration", "segment"):
            text = _cell(table, row, role)
            if role == "segment" and text:
                try:
                    found += [(f"row {number}", part) for part in both_ends(text)]
                except ValueError:
                    continue  # the row's own error is told with its place
            elif text:
                found.append((f"row {number}", text))
    return found


def _unit_of(table: _Table, given: Unit | None, source: str) -> tuple[str, str]:
    """The unit of start and end, and a note on it."""
    units = table.columns.units
    stated = {units[role] for role in ("start", "end", "segment", "time") if role in units}
    if len(stated - {""}) > 1 or (len(stated) > 1 and "clock" not in stated):
        shown = " and ".join(unit or "no unit" for unit in sorted(stated))
        raise TensorkeepError(f"start and end are named in different units: {shown}", where=source)
    unit = next(iter(stated - {""}), "")
    if unit and given and unit not in (given, "clock"):
        raise TensorkeepError(f"the names of the columns say {unit}, --unit says {given}", where=source)
    if unit or given:
        return unit or given or "", ""
    texts = [text for _, text in _times_of(table)]
    clocks = sum(":" in text for text in texts)
    if clocks == len(texts):
        return "clock", ""
    note = "plain numbers are read as seconds: the names of the columns say no unit (--unit frames, milliseconds)"
    if clocks:
        note += "; other times of the table are clocks"
    elif max(float(t.replace(",", ".")) for t in texts if re.fullmatch(r"[\d.,]+", t)) < 1:
        note += "; all are below 1: a spreadsheet program shows clocks as parts of a day where cells are numbers"
    return "", note


def _time(table: _Table, row: Sequence[str], role: str, text: str, comma: bool, unit: str) -> float:
    """A time in seconds, or in frames. Raises ValueError with the column's name."""
    name = table.header[table.columns.places[role]]
    try:
        value, clock = spelled(text, comma)
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from None
    if clock and unit in ("milliseconds", "frames", "seconds"):
        raise ValueError(f"column {name!r}: {text!r} is a clock, and the unit is {unit}")
    if unit == "clock" and not clock and value:
        raise ValueError(f"column {name!r}: {text!r} is no clock like 0:01:04.5")
    if unit == "frames" and value != int(value):
        raise ValueError(f"column {name!r}: {text!r} is no whole frame")
    return value * (1.0 if clock else _SECONDS.get(unit, 1.0))


def _action(table: _Table, row: Sequence[str], number: int, comma: bool, unit: str) -> Action | None:
    """The action of a row; None for one that names a video alone. Raises ValueError."""
    video, label = _video(table, row), _cell(table, row, "label")
    roles = [role for role in ("start", "end", "length", "segment") if role in table.columns.places]
    if not label and not any(_cell(table, row, role) for role in roles if role != "length"):
        return None
    if "start" not in roles:
        try:
            first, last = both_ends(_cell(table, row, "segment"))
        except ValueError as error:
            raise ValueError(f"column {table.header[table.columns.places['segment']]!r}: {error}") from None
        start, end = (_time(table, row, "segment", text, comma, unit) for text in (first, last))
    else:
        start = _time(table, row, "start", _cell(table, row, "start"), comma, unit)
        role = "end" if "end" in roles else "length"
        own = unit if role == "end" else table.columns.units["length"] or unit
        end = _time(table, row, role, _cell(table, row, role), comma, own) + (0 if role == "end" else start)
    return _counted(table, row, Action(f"row {number}", video, start, end, label, unit == "frames"), comma)


def _paired(
    table: _Table,
    row: Sequence[str],
    number: int,
    comma: bool,
    unit: str,
    opened: dict[tuple[str, ...], tuple[int, float]],
) -> Action | None:
    """The action that a row of BORIS' events ends; None where it begins one. Raises ValueError."""
    video, label, status = _video(table, row), _cell(table, row, "label"), _cell(table, row, "status").upper()
    who = next((row[n].strip() for n, name in enumerate(table.header) if name.lower() == "subject"), "")
    key = (video, who, label)
    if status not in ("START", "STOP"):
        raise ValueError(
            f"column {table.header[table.columns.places['status']]!r}: {status!r} is not START, STOP or POINT"
        )
    at = _time(table, row, "time", _cell(table, row, "time"), comma, unit)
    if status == "START":
        if key in opened:
            raise ValueError(f"{label!r} starts again, and has not ended since row {opened[key][0]}")
        opened[key] = (number, at)
        return None
    if key not in opened:
        raise ValueError(f"{label!r} ends, and has not started")
    begun, start = opened.pop(key)
    return _counted(table, row, Action(f"row {begun}", video, start, at, label, unit == "frames"), comma)


def _video(table: _Table, row: Sequence[str]) -> str:
    """The video of a row. Raises ValueError where the cell is empty."""
    if "video" in table.columns.places and not _cell(table, row, "video"):
        name = table.header[table.columns.places["video"]]
        raise ValueError(f"column {name!r} is empty: every row names its video")
    return _cell(table, row, "video") or table.stem


def _counted(table: _Table, row: Sequence[str], action: Action, comma: bool) -> Action:
    """An action in seconds where the row says how many frames there are in one."""
    text = _cell(table, row, "fps")
    if not action.frames or not text:
        return action
    rate = _number(table, "fps", text, comma or "," in text)
    return action._replace(start=action.start / rate, end=action.end / rate, frames=False)


def _number(table: _Table, role: str, text: str, comma: bool) -> float:
    """A number above 0. Raises ValueError with the column's name."""
    name = table.header[table.columns.places[role]]
    try:
        value, clock = spelled(text, comma)
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from None
    if clock or not value:
        raise ValueError(f"column {name!r}: {text!r} is no number above 0")
    return value


def _of_videos(
    table: _Table,
    comma: bool,
    actions: Sequence[Action],
    found: Sequence[tuple[Action, int]],
    notes: list[str],
    source: str,
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """What the table says of videos: subset, and duration where a column holds it."""
    subsets: dict[str, str] = {}
    lengths: dict[str, set[float]] = {}
    problems = []
    role = "duration" if "duration" in table.columns.places else "length"
    for number, row in table.rows:
        video, subset = _cell(table, row, "video") or table.stem, _cell(table, row, "subset")
        if subset and subsets.setdefault(video, subset) != subset:
            problems.append(f"row {number}: {video!r} is in {subset!r}, above in {subsets[video]!r}")
        if text := _cell(table, row, role):
            try:
                lengths.setdefault(video, set()).add(
                    _time(table, row, role, text, comma, table.columns.units.get(role, ""))
                )
            except ValueError as error:
                problems.append(f"row {number}: {error}")
    if "subset" in table.columns.places:
        videos = dict.fromkeys(a.video for a in actions)
        problems += [f"{video!r} has no subset in any row" for video in videos if video not in subsets]
    refuse_all(problems, source)
    if not lengths or (role == "length" and "end" not in table.columns.places):
        return subsets, {}
    name = table.header[table.columns.places[role]]
    ends = {video: max(a.end for a in actions if a.video == video) for video in {a.video for a in actions}}
    spans = [(a.end - a.start, _cell(table, table_row, role)) for a, table_row in _rows_of(table, found)]
    if role == "length" and all(abs(spelled(text, comma)[0] - span) < 0.02 for span, text in spans if text):
        return subsets, {}
    if all(len(said) == 1 and next(iter(said)) >= ends.get(video, 0) - 0.05 for video, said in lengths.items()):
        return subsets, {video: {"duration": next(iter(said))} for video, said in lengths.items()}
    notes.append(f"column {name!r} is neither the length of the actions nor that of the videos: it is not used")
    return subsets, {}


def _rows_of(table: _Table, found: Sequence[tuple[Action, int]]) -> list[tuple[Action, list[str]]]:
    """Actions with the rows that they were made of."""
    rows = dict(table.rows)
    return [(action, rows[number]) for action, number in found]


def _notes(table: _Table, actions: Sequence[Action]) -> list[str]:
    """How the columns were read."""
    shown = [f"{role} from {table.header[place]!r}" for role, place in table.columns.places.items() if role != "status"]
    notes = [f"columns: {', '.join(shown)}"]
    if table.columns.unread:
        notes.append(f"columns that are not read: {', '.join(table.columns.unread[:12])}")
    if "video" not in table.columns.places:
        notes.append(f"no column names a video: all rows are of {table.stem!r}, as the file is called")
    folded: dict[str, set[str]] = {}
    for action in actions:
        folded.setdefault(" ".join(action.label.lower().split()), set()).add(action.label)
    for names in folded.values():
        if len(names) > 1:
            notes.append(
                f"{' and '.join(map(repr, sorted(names)))} are {len(names)} classes: they differ in case or spaces"
            )
    return notes


def oddity(action: Action) -> str:
    """Return what is wrong with an action by itself; an empty text where nothing is.

    Args:
        action: of a row.
    """
    if not action.label:
        return "it has no label"
    if action.start < 0:
        return f"it starts at {action.start:g}"
    return f"it ends at {action.end:g}, before it starts at {action.start:g}" if action.end < action.start else ""


def refuse_all(problems: Sequence[str], source: str, hint: str = "nothing was read: mend these rows") -> None:
    """Raise one error that names the first rows; nothing where there is no problem.

    Args:
        problems: what is wrong, a text for each row.
        source: the file.
        hint: what to do about it.

    Raises:
        TensorkeepError: There is a problem.
    """
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise TensorkeepError("; ".join(problems[:_SHOWN]) + more, where=source, hint=hint)
