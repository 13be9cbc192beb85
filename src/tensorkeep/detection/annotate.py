"""Make annotations of tables of actions and their videos: files found, times in seconds, subsets chosen."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from tensorkeep.detection.data.containers import VideoInfo, frame_table, probe, shown_times
from tensorkeep.detection.data.finding import find_videos
from tensorkeep.detection.data.sheet_rows import Sheet, refuse_all
from tensorkeep.detection.data.sheets import video_name
from tensorkeep.errors import TensorkeepError, near_misses, word
from tensorkeep.storage.files import Progress

TRAINING, VALIDATION = "training", "validation"
_PAST = 0.5  # seconds by which an action may end after its video; more is told as an error
_UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # Label Studio puts eight digits before the name of an uploaded file


class Made(NamedTuple):
    """Annotations, and how they came about.

    Attributes:
        document: in ActivityNet's layout, with `duration` and `frame` of each video.
        classes: names of the classes, in label order.
        notes: what was read how, chosen and left out.
    """

    document: dict[str, Any]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def make_annotations(
    sheets: Sequence[Sheet],
    videos: Path,
    share: float | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Made:
    """Make the annotations of some tables.

    Args:
        sheets: the tables, as `sheets.read_sheet` gives them.
        videos: the folder of the videos.
        share: of the videos that become subset `validation`; None: a fifth, where the tables name no subsets.
        progress: is told how many of a table's videos were looked at.

    Returns:
        The document and what there is to say about it.

    Raises:
        TensorkeepError: A video is not found, a time lies past its video's end, or subsets are named and asked for too.

    Example:
        >>> make_annotations([read_sheet("times.csv")], Path("videos")).classes  # doctest: +SKIP
        ('pour', 'stir')
    """
    notes = [f"{sheet.source}: {note}" for sheet in sheets for note in sheet.notes]
    files = find_videos([videos])
    actions: dict[str, list[tuple[float, float, str]]] = {}
    said: dict[str, str] = {}
    looked: dict[str, VideoInfo] = {}
    for sheet in sheets:
        names = _matched(sheet, files, videos, notes)
        for done, name in enumerate(fresh := dict.fromkeys(names.values())):
            progress("look", done, len(fresh))
            looked[name] = looked.get(name) or probe(files[name])
            actions.setdefault(name, [])
        for video, subset in sheet.subsets.items():
            name = names[video]
            if said.setdefault(name, subset) != subset:
                raise TensorkeepError(f"{name!r} is in {subset!r} and in {said[name]!r}", where=sheet.source)
        for name, start, end, label in _in_seconds(sheet, names, looked, notes):
            actions[name].append((start, end, label))
    notes += [f"{name}: {info.problem}" for name, info in looked.items() if info.problem]
    if unused := sorted(set(files) - set(actions)):
        notes.append(f"videos left out, since no table names them ({len(unused)}): {', '.join(unused[:6])}")
    subsets = _subsets(actions, said, share, notes)
    database = {
        name: {
            "subset": subsets[name],
            "duration": round(looked[name].duration, 6),
            "frame": looked[name].frames,
            "annotations": _annotations(name, rows, notes),
        }
        for name, rows in sorted(actions.items())
    }
    classes = tuple(sorted({label for rows in actions.values() for _, _, label in rows}))
    return Made({"database": database}, classes, tuple(notes))


def _annotations(name: str, rows: Sequence[tuple[float, float, str]], notes: list[str]) -> list[dict[str, Any]]:
    """The rows of one video by time, repetitions once."""
    kept = sorted(dict.fromkeys(rows))
    if len(kept) < len(rows):
        notes.append(f"{name}: {len(rows) - len(kept)} rows say what another says; each counts once")
    return [{"segment": [round(start, 6), round(end, 6)], "label": label} for start, end, label in kept]


def _matched(sheet: Sheet, files: Mapping[str, Path], folder: Path, notes: list[str]) -> dict[str, str]:
    """Return the name of the file's video for each video that a table spells."""
    found: dict[str, str] = {}
    loose, problems = [], []
    places = {video: f"video {video!r}" for video in sheet.empty} | {a.video: a.place for a in reversed(sheet.actions)}
    for video in places:
        name = video_name(video)
        for wanted, same in _spellings(name):
            fitting = [known for known, path in files.items() if _fits(same, wanted, known, path)]
            ending = PurePosixPath(video.strip()).suffix.lower()
            fitting = [known for known in fitting if files[known].suffix.lower() == ending] or fitting
            if fitting:
                break
        if len(fitting) == 1:
            found[video] = fitting[0]
            if same or wanted != name:
                loose.append(f"{video} is {files[fitting[0]].name}")
        elif fitting:
            problems.append(f"{places[video]}: {video!r} could be {' or '.join(str(files[f]) for f in fitting[:3])}")
        else:
            near = near_misses(name, files)
            problems.append(f"{places[video]}: no video {video!r} in {folder}" + (f" ({near})" if near else ""))
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        there = ", ".join(sorted(files)[:6])
        hint = f"names in the table are those of files, with or without ending; videos there: {there}"
        raise TensorkeepError("; ".join(problems[:6]) + more, where=sheet.source, hint=hint)
    if loose:
        notes.append(f"{sheet.source}: names matched but for case or an upload's number: {', '.join(loose[:6])}")
    return found


def _spellings(name: str) -> list[tuple[str, bool]]:
    """The name, and with True the name in any case; then both without the number of an upload."""
    uploaded = _UPLOADED.fullmatch(name)
    names = [name, uploaded[1]] if uploaded else [name]
    return [(each, loose) for each in names for loose in (False, True)]


def _fits(loose: bool, wanted: str, known: str, path: Path) -> bool:
    """Return whether a file is called as a table says: by name, and by its last folders where the table has some."""
    fold = str.casefold if loose else str
    inside, outside = fold(wanted).split("/"), fold(path.with_suffix("").as_posix()).split("/")
    return fold(known) == fold(wanted) or outside[-len(inside) :] == inside


def _in_seconds(
    sheet: Sheet, names: Mapping[str, str], looked: Mapping[str, VideoInfo], notes: list[str]
) -> list[tuple[str, float, float, str]]:
    """Return video, start and end in seconds, and label of every action; each must lie in its video."""
    found, problems, late = [], [], []
    times: dict[str, Any] = {}
    for action in sheet.actions:
        name = names[action.video]
        info = looked[name]
        start, end = action.start, action.end
        if action.frames:
            if name not in times:
                times[name] = None if info.even else shown_times(frame_table(info.path), info)
            start, end = (_of_frame(frame, info, times[name]) for frame in (start, end))
        if end > info.duration + _PAST:
            what = f"ends at {end:g} s" if start < info.duration else f"starts at {start:g} s"
            problems.append((action, f"{action.place}: {what}, {name} lasts {info.duration:.2f} s"))
        elif end > info.duration:
            late.append(action.place)
        found.append((name, start, end, action.label))
    if problems:
        refuse_all([text for _, text in problems], sheet.source, _cause(sheet, names, looked))
    if late:
        what = f"{len(late)} actions end up to {_PAST:g} s after their video, first {late[0]}: kept"
        notes.append(f"{sheet.source}: {what}")
    if any(action.frames for action in sheet.actions):
        notes.append(f"{sheet.source}: frame n is the picture n of the file, from 0: its time is when it is shown")
    return found


def _of_frame(frame: float, info: VideoInfo, times: Any) -> float:
    """The second at which a frame is shown; past the last one at the mean rate."""
    if times is None or frame >= info.frames:
        return frame / info.fps
    return float(np.interp(frame, np.arange(len(times)), times))


def _cause(sheet: Sheet, names: Mapping[str, str], looked: Mapping[str, VideoInfo]) -> str:
    """Say under which other unit all times of a table lie in their videos; a general hint where none fits."""

    def fit(scale: Any) -> bool:
        pairs = [(action, looked[names[action.video]]) for action in sheet.actions]
        return all(action.end * scale(info) <= info.duration + _PAST for action, info in pairs)

    if sheet.unit == "" and fit(lambda info: 1 / info.fps):
        ms = " (so would milliseconds)" if fit(lambda _: 1e-3) else ""
        return f"as frames all of them lie in their videos{ms}: --unit frames"
    if sheet.unit == "" and fit(lambda _: 1e-3):
        return "as milliseconds all of them lie in their videos: --unit milliseconds"
    if sheet.unit == "clock" and fit(lambda _: 1 / 60):
        return "as minutes:seconds they all fit: a spreadsheet program made hours of minutes; write 0:04:30, not 4:30"
    return "the table is about other videos, or about longer ones that these were cut from; --unit says another unit"


def _subsets(
    actions: Mapping[str, Sequence[tuple[float, float, str]]],
    said: Mapping[str, str],
    share: float | None,
    notes: list[str],
) -> dict[str, str]:
    """The subset of each video: as the tables say, or some for validation of which training keeps every class."""
    if said:
        if share is not None:
            what = "the table says the subset of each video, and --validation too"
            raise TensorkeepError(what, where="--validation", hint="leave --validation out")
        lacking = [name for name in actions if name not in said]
        if lacking:
            raise TensorkeepError(f"no table says the subset of {', '.join(lacking[:6])}", where="subset")
        return dict(said)
    share = 0.2 if share is None else share
    if not 0 <= share < 1:
        raise TensorkeepError(f"{share:g} is no share", where="--validation", hint="0.2 is a fifth; 0: none")
    shown = {name: Counter(label for _, _, label in rows) for name, rows in actions.items() if rows}
    wanted = min(max(1, round(share * len(shown))), len(shown) - 1) if share else 0
    left: Counter[str] = sum(shown.values(), Counter())
    chosen: list[str] = []
    while len(chosen) < wanted:
        free = [n for n in shown if n not in chosen and all(left[label] > k for label, k in shown[n].items())]
        if not free:
            break
        seen = {label for name in chosen for label in shown[name]}
        best = min(free, key=lambda n: (-len(set(shown[n]) - seen), hashlib.sha256(n.encode()).hexdigest()))
        chosen.append(best)
        left -= shown[best]
    by_label = Counter(label for counts in shown.values() for label in counts)
    lone = sorted(label for label, videos in by_label.items() if videos == 1)
    if len(chosen) < wanted:
        notes.append(
            f"{len(chosen)} of {wanted} videos are for validation: training would lose {', '.join(lone[:6])}, "
            "which only one video shows"
        )
    if share and not chosen:
        hint = "annotate another video with these classes, add a column subset, or --validation 0 to train on all"
        what = f"no video can be kept for validation: training would be left without {', '.join(lone[:6])}"
        raise TensorkeepError(what, where="--validation", hint=hint)
    absent = sorted(set(by_label) - {k for n in chosen for k in shown[n]})
    lack = f"; no action of {', '.join(absent[:6])} there" if absent and chosen else ""
    notes.append(f"{VALIDATION}: {', '.join(sorted(chosen)) or 'no video'}{lack}; the other videos are for {TRAINING}")
    return {name: VALIDATION if name in chosen else TRAINING for name in actions}


def fields_of(out: Path, videos: Path, made: Made) -> dict[str, str]:
    """Return what a recipe says of these annotations: field -> value, spelled for a command line.

    Args:
        out: the annotations.
        videos: the folder of the videos.
        made: what was written.
    """
    subsets = list(dict.fromkeys(entry["subset"] for entry in made.document["database"].values()))
    first = next((s for s in subsets if s.lower().startswith("train")), subsets[0])
    second = next((s for s in subsets if s != first), first)
    fields = {"model.head.classes": str(len(made.classes)), "data.class_map": "null"}
    for part, subset in (("train", first), ("test", second)):
        fields[f"data.{part}.annotations"] = word(out)
        fields[f"data.{part}.subset"] = word(subset)
        fields[f"data.{part}.folder"] = word(videos)
    return fields
