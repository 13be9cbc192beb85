"""Videos or feature files of an annotated subset, found by name in a folder and checked before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tensorkeep.detection.data.containers import frame_table, probe, shown_times
from tensorkeep.detection.data.feature_files import SUFFIXES, file_of
from tensorkeep.detection.data.features import look_side_by_side
from tensorkeep.detection.data.finding import find_files
from tensorkeep.detection.data.item import Item
from tensorkeep.detection.data.opening import VIDEO_SUFFIXES, import_av
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.readers import FeatureReader, VideoReader
from tensorkeep.detection.data.truth import Annotations, Video, number_segments
from tensorkeep.detection.data.video_checks import UNUSABLE, check_video
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import Progress

Grid = Literal["time", "opentad"]
_AXES = ("[time, channels]", "[channels, time]")


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
        folder: holds one file for each video, there or in folders below, or is an HDF5 file with the features of each;
            of several, each holds one feature file for each video, and their channels are put side by side.
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
    files, lacking = _files_of(folders, [video.name for video in videos], pattern, _suffixes(reader))
    items, problems = list[Item](), list[Problem]()
    against: dict[str, bool | None] = {}
    for done, video in enumerate(videos):
        progress("look", done, len(videos))
        if video.name in lacking:
            problems.append(Problem("error", "no file", video.name, lacking[video.name]))
            continue
        if isinstance(reader, FeatureReader):
            found, odd = _features_of(video, files[video.name], reader, classes, against)
        else:
            found, odd = _item_of(video, files[video.name][0], reader, classes, grid)
        problems += odd
        items += [] if found is None else [found]
    if isinstance(reader, FeatureReader):
        items, odd = _of_one_layout(items, reader, against)
        problems += odd
    _refuse(items, problems, reader, ", ".join(map(str, folders)), subsets)
    return items, problems


def _suffixes(reader: VideoReader | FeatureReader) -> tuple[str, ...]:
    """Return what files end in; what is not installed for videos would be said of each of them later."""
    if isinstance(reader, FeatureReader):
        return tuple(SUFFIXES)
    import_av()
    return VIDEO_SUFFIXES


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
        told = f": {errors[0].video}: {errors[0].message}" if errors else ""
        told += f"; and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise TensorkeepError(f"none of the videos of subset {named} can be read{told}", where=where)


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


def _features_of(
    video: Video,
    paths: Sequence[Path],
    reader: FeatureReader,
    classes: Sequence[str],
    against: dict[str, bool | None],
) -> tuple[Item | None, list[Problem]]:
    """Check the feature files of one video; no item where they cannot be used. `against`: see `Looked`."""
    segments, labels = number_segments(video, classes)
    frames, duration = video.frames or 0, video.duration or 0.0
    try:
        looked = look_side_by_side(paths, reader.channels, resized=reader.resized, **reader.stored)
    except TensorkeepError as error:
        return None, [Problem("error", "unreadable features", video.name, error.line)]
    if not frames and duration and video.fps:
        frames = round(duration * video.fps)
    if not frames or not duration:
        message = "features need the annotation's 'duration' and 'frame' (or 'fps')"
        return None, [Problem("error", "no duration", video.name, message)]
    against[video.name] = looked.against
    size, beside = sum(file_of(each).stat().st_size for each in paths), tuple(str(each) for each in paths[1:])
    made = Item(video.name, str(paths[0]), frames, duration, size, looked.steps, segments, labels, beside=beside)
    return made, []


def _of_one_layout(
    items: list[Item], reader: FeatureReader, against: dict[str, bool | None]
) -> tuple[list[Item], list[Problem]]:
    """Tell of files whose axes are not those of the recipe; leave out those whose axes could then be either."""
    said, other = ("[channels, time]", "[time, channels]") if reader.channels_first else _AXES
    found = [item for item in items if against[item.name]]
    if not found:
        return items, []
    key = "feature_layout: tc" if reader.channels_first else "feature_layout: ct"
    message = (
        f"{len(found)} of {len(items)} videos have features {other}, the first {found[0].path}; the recipe says "
        f"{said}. They are read as what they are: {key} in data says so"
    )
    problems = [Problem("warning", "axes", None, message)]
    for item in items:
        if against[item.name] is None:
            what = f"{item.path}: both axes have {reader.channels} entries, and other files are {other}, not {said}"
            problems.append(Problem("error", "axes", item.name, f"{what}: data.feature_layout decides"))
    return [item for item in items if against[item.name] is not None], problems


def _item_of(
    video: Video, path: Path, reader: VideoReader, classes: Sequence[str], grid: Grid
) -> tuple[Item | None, list[Problem]]:
    """Check the file of one video; no item where it cannot be used."""
    segments, labels = number_segments(video, classes)
    size, frames, duration = path.stat().st_size, video.frames or 0, video.duration or 0.0
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
