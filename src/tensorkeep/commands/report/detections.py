"""The parts of a page about detections: an error analysis where the truth is known, and timelines with frames.

Of a run, the truth and the videos are those that its recipe names; else they are given. What is not found is told in
its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tensorkeep.commands.report import _errors as errors
from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report._films import film, key
from tensorkeep.commands.report._frame import Section
from tensorkeep.detection.data.annotations import Annotations, Video, read_annotations
from tensorkeep.detection.data.containers import frame_table, probe
from tensorkeep.detection.data.finding import find_files
from tensorkeep.detection.data.opening import VIDEO_SUFFIXES
from tensorkeep.detection.results.error_analysis import analyse_errors
from tensorkeep.detection.results.results import DetectionTable, read_detections
from tensorkeep.detection.results.subtitles import NamedDetection, best_rows
from tensorkeep.detection.results.timeline import STRIP, jpeg, picture_times
from tensorkeep.errors import TensorkeepError, printable

VIDEOS, _MIN_SCORE, _TOP, _FEW = 20, 0.3, 100, 5  # timelines shown, and what of a video's detections
_PICTURES = 400  # of all videos together: a page of them has some 1 MB
_RECIPE = "recipe.yaml"


class Sources(NamedTuple):
    """Where videos lie and what is true of them.

    Attributes:
        annotations: what is true.
        folder: of the videos; None where frames are not wanted.
        pattern: of a file's name, `{video}.mp4`.
    """

    annotations: Annotations
    folder: Path | None
    pattern: str


def detections_page(path: str | Path, annotations: str | Path | None, videos: str | Path | None) -> str:
    """Return the page of a file of detections.

    Args:
        path: detections of any program.
        annotations: what is true; None: timelines alone.
        videos: the folder of the videos; None: no frames.

    Raises:
        TensorkeepError: a file cannot be read.
    """
    table = read_detections(path)
    sources = None
    if annotations is not None:
        sources = Sources(read_annotations(annotations), Path(videos) if videos else None, "{video}.mp4")
    elif videos is not None:
        hint = "--annotations GT.json: how long each video is stands there"
        raise TensorkeepError("frames need annotations", where="--videos", hint=hint)
    facts = [("detections", frame.code(path))]
    facts += [("annotations", frame.code(annotations))] if annotations else []
    figures = [(f"{len(table):,}", "detections"), (f"{len(table.video_names):,}", "videos")]
    figures += [(f"{len(table.label_names):,}", "classes")]
    found, told = _analysed(table, sources)
    parts = [f"{int((table.scores >= _MIN_SCORE).sum()):,} of {len(table):,} detections score {_MIN_SCORE:g} or more."]
    if found:
        parts = [f"mAP {100 * found['mAP']:.2f} % at tIoU {found['tiou']:g}.", errors.worst(found)]
    head = frame.top("Detections", facts=facts, said=" ".join(parts)) + frame.tiles(figures)
    return frame.page(printable(f"Detections of {path}", 180), head, _sections(table, sources, told, found))


def sections_of_run(run: Path, predictions: Path) -> list[Section]:
    """Return what is told of a run's predictions; the truth and the videos are those of its recipe.

    Args:
        run: the run's folder.
        predictions: the file of detections in it.

    Raises:
        TensorkeepError: the detections cannot be read.
    """
    sources, told = _sources(run)
    table = read_detections(predictions)
    lacking: list[str] = []
    if sources is not None:  # `predict` was given some videos: what it has not seen is not missed
        lacking = sorted(set(sources.annotations.videos) - set(table.video_names))
    found, why = _analysed(table, sources, lacking)
    parts = _sections(table, sources, told or why, found)
    if lacking and found and parts[0].body:
        count = len(table.video_names)
        said = frame.note(f"Of the {count} videos in the file of predictions alone; others are not counted.")
        parts[0] = Section(parts[0].title, said + parts[0].body)
    return parts


def _analysed(
    table: DetectionTable, sources: Sources | None, blocked: Sequence[str] = ()
) -> tuple[dict[str, Any] | None, str]:
    """Return the document of an error analysis without the `blocked` videos, or None and why there is none."""
    if sources is None:
        return None, ""
    try:
        return analyse_errors(sources.annotations, table, blocked=blocked).document(), ""
    except TensorkeepError as error:
        return None, f"without an error analysis: {error.line}"


def _sections(table: DetectionTable, sources: Sources | None, told: str, found: dict[str, Any] | None) -> list[Section]:
    """Return the error analysis, where there is one, and the timelines."""
    parts = errors.sections(found) if found else []
    return [*parts, Section("Timelines", _timelines(table, sources, told))]


def _timelines(table: DetectionTable, sources: Sources | None, told: str) -> str:
    """Draw the first videos."""
    names = table.video_names[:VIDEOS]
    parts = [frame.note(told)] if told else []
    parts.append(key(sources is not None and any(name in sources.annotations.videos for name in names)))
    left = _PICTURES
    for number, name in enumerate(names):
        shown, used = _one(name, _rows(table, number), sources, left)
        parts.append(shown)
        left -= used
    more = len(table.video_names) - VIDEOS
    return "".join(parts) + (frame.note(f"{more} more videos are not drawn") if more > 0 else "")


def _sources(run: Path) -> tuple[Sources | None, str]:
    """Return what the run's recipe names, or why that cannot be had; nothing for a run without a recipe."""
    if not (run / _RECIPE).is_file():
        return None, ""
    try:
        from tensorkeep.detection.recipe.text import read_recipe  # imports torch; a page without a recipe does not

        data = read_recipe(run / _RECIPE).data
        return Sources(read_annotations(data.test.annotations), Path(data.test.folders[0]), data.file_pattern), ""
    except (TensorkeepError, ImportError) as error:
        return None, f"without true segments and pictures: {getattr(error, 'line', error)}"


def _one(name: str, rows: list[NamedDetection], sources: Sources | None, left: int) -> tuple[str, int]:
    """Draw one video with at most so many pictures; returns how many it has, too."""
    video = None if sources is None else sources.annotations.videos.get(name)
    true = _true(video) if video else []
    # a file of detections has no lengths: without annotations a picture ends with the last one
    end = video.duration if video and video.duration else max((row.end for row in (*rows, *true)), default=0.0)
    pictures, told = _pictures(name, end, sources, left) if video else ([], "")
    shown = best_rows(rows, _MIN_SCORE, _TOP)
    if rows and not shown:
        shown = best_rows(rows, 0.0, max(len(true), _FEW))
        told = f"{told}; " if told else ""
        told += f"nothing scores {_MIN_SCORE:g} or more: the best {len(shown)} are drawn"
    parts = [f"<h3>{frame.text(name, 200)}</h3>"]
    if shown or true:
        parts.append(film(name, end, shown, true, pictures))
    parts += [frame.note(told)] if told else []
    parts += [] if shown else [frame.note("nothing was found")]
    return "".join(parts), len(pictures)


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


def _pictures(name: str, end: float, sources: Sources | None, left: int) -> tuple[list[tuple[float, bytes]], str]:
    """Return small pictures at their seconds, or why there are none."""
    if sources is None or sources.folder is None:
        return [], ""
    wanted = picture_times(end)
    if len(wanted) > left:
        return [], f"without pictures: the page has {_PICTURES - left} already"
    try:
        from tensorkeep.detection.data.video import decode

        found, lacking = find_files(sources.folder, [name], sources.pattern, VIDEO_SUFFIXES)
        if lacking:
            return [], f"without pictures: {lacking[name]}"
        path = found[name]
        info = probe(path)
        times = [seconds for seconds in wanted if seconds < info.duration]
        shown = frame_table(path).seconds
        frames = np.clip(np.searchsorted(shown, times, side="right") - 1, 0, info.frames - 1)
        pictures = decode(path, frames, size=STRIP, broken="keep", problems=[])
        return [(seconds, jpeg(picture.numpy())) for seconds, picture in zip(times, pictures)], ""
    except (TensorkeepError, ImportError) as error:
        return [], f"without pictures: {getattr(error, 'line', error)}"
