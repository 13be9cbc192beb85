"""EPIC-Kitchens-100: annotations in its CSV, as three sets of classes: verbs, nouns and actions.

The challenge scores each apart. Classes are called by number, as in its submissions: verb "3", noun "17", action
"3,17". Every row counts, as in the challenge's own script (`evaluate_detection_json_ek100.py`). Numpy only.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np

from tensorkeep.detection.data.truth import Annotations, Video
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.documents import read_text
from tensorkeep.storage.files import explained

TASKS = ("verb", "noun", "action")
_COLUMNS = ("video_id", "start_timestamp", "stop_timestamp", "verb_class", "noun_class")
_CLOCK = re.compile(r"(\d+):(\d{1,2}):(\d{1,2}(?:\.\d*)?)")


def is_epic(path: str | Path) -> bool:
    """Return whether a file is a CSV with columns of EPIC-Kitchens' classes, by its first line.

    Args:
        path: the file; one that is not called .csv is not opened.

    >>> is_epic("gt.json")
    False
    """
    if Path(path).suffix.lower() != ".csv":
        return False
    with explained(path), Path(path).open("rb") as file:
        first = file.read(4096).partition(b"\n")[0]
    return b"verb_class" in first or b"noun_class" in first


def read_epic(path: str | Path) -> dict[str, Annotations]:
    """Read EPIC-Kitchens' annotations.

    Args:
        path: `EPIC_100_train.csv`, `EPIC_100_validation.csv` or another file of their columns.

    Returns:
        The same segments under three sets of labels: "verb", "noun" and "action".

    Raises:
        TensorkeepError: The file has other columns, no row, or a row with a time or class that is none.

    Example:
        >>> read_epic("EPIC_100_validation.csv")["verb"].classes  # doctest: +SKIP
        ('0', '1', '2', ...)
    """
    source = str(path)
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(Path(path)), newline="")))
    except csv.Error as error:
        raise TensorkeepError(f"no CSV: {error}", where=source) from error
    lacking = [name for name in _COLUMNS if not rows or name not in rows[0]]
    if lacking:
        what = f"no column {', '.join(lacking)}" if rows else "no row in it"
        raise TensorkeepError(what, where=source, hint="expected the columns of EPIC_100_validation.csv")
    spans: dict[str, list[tuple[float, float]]] = {}
    labels: dict[str, dict[str, list[str]]] = {task: {} for task in TASKS}
    for number, row in enumerate(rows, 2):
        video = row["video_id"] or ""
        ends = _seconds(row["start_timestamp"], number, source), _seconds(row["stop_timestamp"], number, source)
        spans.setdefault(video, []).append(ends)
        verb, noun = _number(row, "verb_class", number, source), _number(row, "noun_class", number, source)
        for task, label in zip(TASKS, (verb, noun, f"{verb},{noun}"), strict=True):
            labels[task].setdefault(video, []).append(label)
    segments = {video: np.array(found, dtype=np.float64) for video, found in spans.items()}
    return {task: _annotations(segments, labels[task], source) for task in TASKS}


def _annotations(segments: dict[str, np.ndarray], labels: dict[str, list[str]], source: str) -> Annotations:
    """The annotations under one set of labels."""
    videos = {name: Video(name, "all", found, tuple(labels[name])) for name, found in segments.items()}
    classes = sorted({label for found in labels.values() for label in found}, key=class_order)
    return Annotations(videos, tuple(classes), "epic", source)


def class_order(label: str) -> tuple[int, ...]:
    """Return what sorts class numbers, and pairs of them, by number.

    Args:
        label: "3" or "3,17".

    >>> sorted(["10", "9"], key=class_order), sorted(["3,17", "3,2"], key=class_order)
    (['9', '10'], ['3,2', '3,17'])
    """
    return tuple(map(int, label.split(",")))


def _seconds(text: str | None, number: int, source: str) -> float:
    """A time of the form hours:minutes:seconds."""
    found = _CLOCK.fullmatch((text or "").strip())
    if found is None:
        raise TensorkeepError(f"line {number}: {text!r} is no time like 00:01:23.45", where=source)
    hours, minutes, seconds = map(float, found.groups())
    return hours * 3600 + minutes * 60 + seconds


def _number(row: dict[str, str | None], name: str, number: int, source: str) -> str:
    """A class number, without leading zeros."""
    text = (row[name] or "").strip()
    if not text.isdecimal():
        raise TensorkeepError(f"line {number}: {name} {text!r} is no whole number", where=source)
    return str(int(text))
