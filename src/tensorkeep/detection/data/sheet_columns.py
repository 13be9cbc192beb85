"""What the columns of a table of actions mean: by their names, as people and annotation programs write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tensorkeep.errors import TensorkeepError, near_misses

ROLES = ("video", "start", "end", "length", "label", "subset", "fps", "duration", "segment", "time", "status")
_WORDS = {
    "video": "video video_id video_name video_file video_path video_filename file file_id file_name filename file_path "
    "filepath media media_file media_file_name media_file_path media_name movie clip clip_id clip_name recording vid "
    "视频 视频名 视频文件 文件 文件名",
    "label": "label label_name class class_name action action_class action_name action_label activity activity_name "
    "activity_label category behavior behaviour event event_name event_label tag annotation annotation_value "
    "annotation_label value gesture 标签 类别 动作 行为",
    "subset": "subset split data_split dataset_split partition set 子集 划分",
    "fps": "fps frame_rate framerate video_fps fps_frame_s",
    "duration": "video_duration duration_video video_length media_duration total_length 视频时长",
    "length": "duration length action_duration action_length segment_duration segment_length event_duration dur 时长",
    "segment": "segment segments interval time_interval time_range range start_end start_stop t_start_t_end 区间",
    "time": "time timestamp time_point",
    "status": "status behavior_type behaviour_type event_type",
}
_EXACT = {word: role for role, words in _WORDS.items() for word in words.split()}
_STARTS = frozenset("start starts begin begins beginning from onset init started 开始 开始时间 起始 起始时间".split())
_ENDS = frozenset("end ends stop stops finish until to offset ended 结束 结束时间 终止 终止时间".split())
_FILLERS = frozenset("time times timestamp t at of the action segment event point position label annotation no".split())
_UNITS = {
    **dict.fromkeys("s sec secs second seconds 秒".split(), "seconds"),
    **dict.fromkeys("ms msec msecs millisecond milliseconds 毫秒".split(), "milliseconds"),
    **dict.fromkeys("f frame frames frm framenumber 帧".split(), "frames"),
    **dict.fromkeys("min mins minute minutes 分".split(), "minutes"),
    **dict.fromkeys("clock hms timecode".split(), "clock"),
}
# ELAN's names of units, before single words are looked at
_FORMATS = ((r"h+_m+_s+(_ms|_msec)?", "clock"), (r"m+_s+(_ms|_msec)?", "clock"), (r"ss_ms(ec)?", "seconds"))
_BEST = ("seconds", "clock", "", "minutes", "milliseconds", "frames")  # where a table says times in several units
_JOINED = re.compile(r"(t|f|time|frame)?(start|begin|end|stop|init|onset|offset)(time|frame|seconds|sec|ms|s)?")


class Columns(NamedTuple):
    """Where a table says what.

    Attributes:
        places: role -> number of its column.
        units: "start", "end", "length", "duration" -> the unit that its name says; "" where it says none.
        unread: names of columns that were not looked at.
    """

    places: dict[str, int]
    units: dict[str, str]
    unread: tuple[str, ...]


def meaning(name: str) -> tuple[str, str]:
    """Return the role of a column and its unit, by its name; two empty texts where the name says none.

    Args:
        name: as the table has it.

    >>> meaning("t-start"), meaning("Begin Time - ss.msec"), meaning("endFrame"), meaning("Media file name")
    (('start', ''), ('start', 'seconds'), ('end', 'frames'), ('video', ''))
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    plain = re.sub(r"[\W_]+", "_", spaced.lower()).strip("_")
    if plain in _EXACT:
        return _EXACT[plain], ""
    rest, unit = plain, ""
    for form, each in _FORMATS:
        cut = re.sub(rf"(^|_){form}$", "", rest)
        if cut != rest and cut:
            rest, unit = cut, each
            break
    words = rest.split("_")
    if len(words) == 1 and (found := _JOINED.fullmatch(rest)):
        words = [part for part in found.groups() if part]
    units = [_UNITS[word] for word in words if word in _UNITS]
    bare = [word for word in words if word not in _UNITS]
    unit = unit or (units[0] if units else "")
    if len(set(units)) > 1 or not bare:
        return "", ""
    if (joined := "_".join(bare)) in _EXACT and _EXACT[joined] in ("length", "duration", "segment", "time"):
        return _EXACT[joined], unit
    ends = [word for word in bare if word in _STARTS | _ENDS]
    if len(ends) == 1 and all(word in _FILLERS for word in bare if word != ends[0]):
        return ("start" if ends[0] in _STARTS else "end"), unit
    return "", ""


def is_header(row: Sequence[str]) -> bool:
    """Return whether a row names columns of actions: a start or both ends, or BORIS' time and status.

    >>> is_header(["video", "start", "end"]), is_header(["a.mp4", "4.5", "9"]), is_header(["My project", "", ""])
    (True, False, False)
    """
    roles = {meaning(name)[0] for name in row}
    return "start" in roles or ("segment" in roles and "label" in roles) or {"time", "status", "label"} <= roles


def find_columns(header: Sequence[str], given: Mapping[str, str], where: str) -> Columns:
    """Find out which column says what.

    Args:
        header: the names, from left to right.
        given: role -> name, where somebody says it; these names win.
        where: the file, for errors.

    Returns:
        The columns that are read, and those that are not.

    Raises:
        TensorkeepError: A column is lacking, or several could be meant.

    >>> find_columns(["file", "t-start", "t-end", "label", "who"], {}, "a.csv").unread
    ('who',)
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for number, name in enumerate(header):
        role, unit = meaning(name)
        if role and role not in given:
            found.setdefault(role, []).append((number, unit))
    for role, name in given.items():
        found[role] = [(_named(header, role, name, where), meaning(name)[1])]
    _settle(found)
    for role, several in found.items():
        if len(several) > 1:
            shown = " and ".join(repr(header[number]) for number, _ in several)
            hint = f"leave one of them out, or say which: tensorkeep annotate {where} --columns {role}=NAME"
            raise TensorkeepError(f"{shown} could both be the {role}", where=where, hint=hint)
    _demand(found, header, where)
    places = {role: rows[0][0] for role, rows in found.items()}
    units = {role: rows[0][1] for role, rows in found.items()}
    unread = tuple(name for number, name in enumerate(header) if name.strip() and number not in places.values())
    return Columns(places, units, unread)


def _named(header: Sequence[str], role: str, name: str, where: str) -> int:
    """The number of the column that somebody named."""
    if role not in ROLES:
        hint = near_misses(role, ROLES) or f"one of {', '.join(ROLES[:9])}"
        raise TensorkeepError(f"no column is read as {role!r}", where="--columns", hint=hint)
    same = [number for number, text in enumerate(header) if text.strip() == name.strip()]
    if len(same) != 1:
        what = f"{len(same)} columns are called {name!r}" if same else f"no column is called {name!r}"
        hint = near_misses(name, header) or f"columns there: {', '.join(filter(None, header))}"
        raise TensorkeepError(what, where=where, hint=hint)
    return same[0]


def _settle(found: dict[str, list[tuple[int, str]]]) -> None:
    """Of times in several units take one that start and end both have; drop what a table with both ends needs not."""
    starts, ends = found.get("start", []), found.get("end", found.get("length", []))
    shared = [unit for unit in _BEST if unit in {u for _, u in starts} and unit in {u for _, u in ends}]
    for role in ("start", "end", "length"):
        alike = [row for row in found.get(role, []) if shared and row[1] == shared[0]]
        if alike:
            found[role] = alike
    if "end" in found and len(found.get("length", [])) > 1:
        found["length"] = found["length"][:1]  # it is compared with the ends alone
    if "start" in found and ("end" in found or "length" in found):
        found.pop("segment", None)
    if "start" in found or "segment" in found:
        found.pop("time", None)
    if "time" not in found and len(found.get("status", [])) > 1:
        found.pop("status")


def _demand(found: Mapping[str, object], header: Sequence[str], where: str) -> None:
    """Raise where a table does not say when actions start and end, or what they are."""
    paired = {"time", "status"} <= set(found)
    lacking = []
    if not paired and "segment" not in found:
        lacking += [] if "start" in found else ["start"]
        lacking += [] if "end" in found or "length" in found else ["end"]
    lacking += [] if "label" in found else ["label"]
    if lacking:
        there = ", ".join(name for name in header if name.strip()) or "none"
        hint = "name the columns video,start,end,label in the first row, or say which is which: tensorkeep annotate "
        hint += f"{where} --columns {' '.join(f'{role}=NAME' for role in lacking)}"
        raise TensorkeepError(
            f"no column says the {' or the '.join(lacking)}; columns there: {there}", where=where, hint=hint
        )
