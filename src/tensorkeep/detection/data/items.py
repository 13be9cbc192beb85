"""Videos or feature files of an annotated subset, found by name in a folder and checked before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tensorkeep.detection.data.containers import frame_table, probe, shown_times
from tensorkeep.detection.data.features import SUFFIXES, count_side_by_side
from tensorkeep.detection.data.finding import find_files
from tensorkeep.detection.data.item import Item
from tensorkeep.detection.data.opening import VIDEO_SUFFIXES
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.readers import FeatureReader, VideoReader
from tensorkeep.detection.data.truth import Annotations, Video, number_segments
from tensorkeep.detection.data.video_checks import UNUSABLE, check_video
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import Progress

Grid = Literal["time", "opentad"]


def find_items(
    annotations: Annotations,
    subset: str | Sequence[str],
    folder: str | Path | Sequence[str | Path],
    reader: VideoReader | FeatureReader,
    classes: Sequence[str] | None = None,
    *,
    pattern: str = "{video}",
    grid: Grid = "time",
    progress: Progress = lambda what, done, total: None,
) -> tuple[list[Item], list[Problem]]:
    """Find the videos (or feature files) of a subset in `folder` by name, and check them.

    Args:
        annotations: the ground truth.
        subset: name of the subset, or of several.
        folder: holds one file for each video, there or in folders below; of several, each holds one feature file for
            each video, and their channels are put side by side.
        reader: with `broken="error"` a missing, unreadable, damaged or truncated file is an error; with "skip" such
            files are left out; with "keep" damaged and truncated ones stay. Each of them is a problem, which says so.
        classes: class names in label order; None: those of the annotations.
        pattern: what a file is called, see `finding.find_files`.
        grid: "time" puts annotated seconds on the frames shown then, "opentad" on seconds / duration * frames of the
            annotation, whatever the file holds.
        progress: is told how many of the videos were looked at.

    Returns:
        The items in file order, and what is odd about them.

    Raises:
        TensorkeepError: A file cannot be used and the reader does not allow it, or none can be used.

    Example:
        >>> items, problems = find_items(annotations, "training", "videos", VideoReader())  # doctest: +SKIP
    """
    classes = annotations.classes if classes is None else classes
    subsets = (subset,) if isinstance(subset, str) else tuple(subset)
    asked = {video.name for each in subsets for video in annotations.of_subset(each)}
    videos = [video for video in annotations.videos.values() if video.name in asked]
    folders = [folder] if isinstance(folder, str | Path) else list(folder)
    suffixes = SUFFIXES if isinstance(reader, FeatureReader) else VIDEO_SUFFIXES
    files, lacking = _files_of(folders, [video.name for video in videos], pattern, suffixes)
    items, problems = [], []
    for done, video in enumerate(videos):
        progress("look", done, len(videos))
        if video.name in lacking:
            problems.append(Problem("error", "no file", video.name, lacking[video.name]))
            continue
        found, odd = _item_of(video, files[video.name], reader, classes, grid)
        problems += odd
        if found is not None:
            items.append(found)
    _refuse(items, problems, reader, ", ".join(map(str, folders)), subsets)
    return items, problems


def _refuse(
    items: list[Item],
    problems: list[Problem],
    reader: VideoReader | FeatureReader,
    where: str,
    subsets: tuple[str, ...],
) -> None:
    """Refuse files that the reader does not allow, and a subset of which none can be used."""
    errors = [problem for problem in problems if problem.severity == "error" and problem.kind != "duration"]
    if errors and reader.broken == "error":
        more = f", and {len(errors) - 3} more" if len(errors) > 3 else ""
        what = "; ".join(f"{problem.video}: {problem.message}" for problem in errors[:3])
        hint = "mend or remove them, or leave them out: broken: skip"
        raise TensorkeepError(f"{what}{more}", where=where, hint=hint)
    if not items:
        named = ", ".join(map(repr, subsets))
        raise TensorkeepError(f"none of the videos of subset {named} can be read", where=where)


def _files_of(
    folders: Sequence[str | Path], names: Sequence[str], pattern: str, suffixes: Sequence[str]
) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Find the file of each video in every folder, and why a video lacks one, by the first folder that does."""
    found = [find_files(each, names, pattern, suffixes) for each in folders]
    lacking: dict[str, str] = {}
    for place, (_, gone) in zip(folders, found, strict=True):
        for name, why in gone.items():
            lacking.setdefault(name, f"{place}: {why}" if len(folders) > 1 else why)
    return {name: [files[name] for files, _ in found] for name in names if name not in lacking}, lacking


def _item_of(
    video: Video, paths: Sequence[Path], reader: VideoReader | FeatureReader, classes: Sequence[str], grid: Grid
) -> tuple[Item | None, list[Problem]]:
    """Check the file of one video; no item where it cannot be used."""
    segments, labels = number_segments(video, classes)
    path, size = paths[0], sum(each.stat().st_size for each in paths)
    frames, duration = video.frames or 0, video.duration or 0.0
    if isinstance(reader, FeatureReader):
        try:
            first = reader.channels_first
            steps = count_side_by_side(paths, reader.channels, channels_first=first, resized=reader.resized)
        except TensorkeepError as error:
            return None, [Problem("error", "unreadable features", video.name, error.line)]
        if not frames and duration and video.fps:
            frames = round(duration * video.fps)
        if not frames or not duration:
            message = "features need the annotation's 'duration' and 'frame' (or 'fps')"
            return None, [Problem("error", "no duration", video.name, message)]
        beside = tuple(str(each) for each in paths[1:])
        return Item(video.name, str(path), frames, duration, size, steps, segments, labels, beside=beside), []
    problems = check_video(path, video)
    unusable = any(p.kind == "unreadable video" for p in problems)
    faulty = any(p.kind in UNUSABLE for p in problems)
    if unusable or (faulty and reader.broken != "keep"):
        return None, [_with_end(p, "left out") for p in problems]
    problems = [_with_end(p, "kept") for p in problems]
    info = probe(path)
    if grid == "opentad":
        if not frames or not duration:
            message = "grid: opentad needs the annotation's 'duration' and 'frame'"
            return None, [*problems, Problem("error", "no duration", video.name, message)]
        return Item(video.name, str(path), info.frames, duration, size, 0, segments, labels, None, frames), problems
    times = None if info.even else shown_times(frame_table(path), info)
    return Item(video.name, str(path), info.frames, info.duration, size, 0, segments, labels, times), problems


def _with_end(problem: Problem, done: str) -> Problem:
    """Say what was done with a file that is cut short, damaged or unreadable."""
    return problem._replace(message=f"{done}: {problem.message}") if problem.kind in UNUSABLE else problem
