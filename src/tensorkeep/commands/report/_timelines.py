"""Draw timelines of what `predict` found, with true segments and pictures where the run's recipe leads to them."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tensorkeep.detection.data.annotations import Annotations, Video, read_annotations
from tensorkeep.detection.data.containers import frame_table, probe
from tensorkeep.detection.data.finding import find_files
from tensorkeep.detection.data.opening import VIDEO_SUFFIXES
from tensorkeep.detection.results.results import DetectionTable, read_detections
from tensorkeep.detection.results.subtitles import NamedDetection, best_rows
from tensorkeep.detection.results.timeline import STRIP, jpeg, picture_times, timeline
from tensorkeep.errors import TensorkeepError, printable

VIDEOS, _MIN_SCORE, _TOP = 20, 0.3, 100  # timelines shown, and what of a video's detections
_RECIPE = "recipe.yaml"


class Sources(NamedTuple):
    """Where a run's test videos lie and what is true of them; `pattern` is of a file's name: `{video}.mp4`."""

    annotations: Annotations
    folder: Path
    pattern: str  # of a file's name: `{video}.mp4`


def timelines(run: Path, predictions: Path) -> list[str]:
    """Draw one element for each of the first videos of a file of detections; what is not found is told in its place."""
    table = read_detections(predictions)
    sources, told = _sources(run)
    names = table.video_names[:VIDEOS]
    parts = [_note(told)] if told else []
    if sources is not None and any(name in sources.annotations.videos for name in names):
        parts.append(_note("green: true; blue: predicted, the stronger the better its score"))
    for number, name in enumerate(names):
        parts += _one(name, _rows(table, number), sources)
    more = len(table.video_names) - VIDEOS
    return [*parts, _note(f"{more} more videos")] if more > 0 else parts


def _sources(run: Path) -> tuple[Sources | None, str]:
    """Return what the run's recipe names, or why that cannot be had; nothing for a run without a recipe."""
    if not (run / _RECIPE).is_file():
        return None, ""
    try:
        from tensorkeep.detection.recipe.text import read_recipe  # imports torch; a page without a recipe does not

        data = read_recipe(run / _RECIPE).data
        return Sources(read_annotations(data.test.annotations), Path(data.test.folder), data.file_pattern), ""
    except (TensorkeepError, ImportError) as error:
        return None, f"without true segments and pictures: {getattr(error, 'line', error)}"


def _one(name: str, rows: list[NamedDetection], sources: Sources | None) -> list[str]:
    """Draw the timeline of one video."""
    video = None if sources is None else sources.annotations.videos.get(name)
    true = _true(video) if video else []
    # a file of detections has no lengths: without annotations a picture ends with the last one
    end = video.duration if video and video.duration else max((row.end for row in (*rows, *true)), default=0.0)
    pictures, told = _pictures(name, end, sources) if video else ([], "")
    shown = best_rows(rows, _MIN_SCORE, _TOP)
    parts = [f"<h3>{escape(printable(name, 200))}</h3>"]
    if shown or true:
        parts.append(timeline(end, shown, true, pictures))
    return [
        *parts,
        *([_note(told)] if told else []),
        *([] if shown else [_note(f"nothing scores {_MIN_SCORE:g} or more")]),
    ]


def _rows(table: DetectionTable, number: int) -> list[NamedDetection]:
    """Return a video's detections as rows of a timeline."""
    own = (table.videos == number).nonzero()[0]
    names, scores = [table.label_names[i] for i in table.labels[own]], table.scores[own].tolist()
    return [NamedDetection(*row) for row in zip(*table.segments[own].T.tolist(), names, scores, strict=True)]


def _true(video: Video) -> list[NamedDetection]:
    """Return a video's true segments as rows of a timeline."""
    return [
        NamedDetection(start, end, label, 1.0)
        for (start, end), label in zip(video.segments.tolist(), video.labels, strict=True)
    ]


def _pictures(name: str, end: float, sources: Sources | None) -> tuple[list[tuple[float, bytes]], str]:
    """Return small pictures at their seconds, or why there are none."""
    assert sources is not None
    try:
        from tensorkeep.detection.data.video import decode

        found, lacking = find_files(sources.folder, [name], sources.pattern, VIDEO_SUFFIXES)
        if lacking:
            return [], f"without pictures: {lacking[name]}"
        path = found[name]
        info = probe(path)
        times = [seconds for seconds in picture_times(end) if seconds < info.duration]
        shown = frame_table(path).seconds
        frames = np.clip(np.searchsorted(shown, times, side="right") - 1, 0, info.frames - 1)
        pictures = decode(path, frames, size=STRIP, broken="keep", problems=[])
        return [(seconds, jpeg(picture.numpy())) for seconds, picture in zip(times, pictures)], ""
    except (TensorkeepError, ImportError) as error:
        return [], f"without pictures: {getattr(error, 'line', error)}"


def _note(text: str) -> str:
    """Return a line of small print."""
    return f"<p class='note'>{escape(printable(text, 400))}</p>"
