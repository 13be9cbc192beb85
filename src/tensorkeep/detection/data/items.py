"""Videos or feature files of an annotated subset, found by name in a folder and checked before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorkeep.detection.data.annotations import Annotations, Video, number_segments
from tensorkeep.detection.data.clips import FeatureReader, Item, VideoReader
from tensorkeep.detection.data.containers import VIDEO_SUFFIXES, probe
from tensorkeep.detection.data.features import SUFFIXES, count_features
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.video_checks import check_video
from tensorkeep.errors import TensorkeepError


def find_items(
    annotations: Annotations,
    subset: str,
    folder: str | Path,
    reader: VideoReader | FeatureReader,
    classes: Sequence[str] | None = None,
) -> tuple[list[Item], list[Problem]]:
    """Find the videos (or feature files) of a subset in `folder` by name, and check them.

    Args:
        annotations: the ground truth.
        subset: name of the subset.
        folder: holds one file for each video, called as the video is.
        reader: with `broken="error"` a missing, unreadable or truncated file is an error; with "skip" such files are
            left out; with "keep" truncated ones stay. Each of them is a problem.
        classes: class names in label order; None: those of the annotations.

    Returns:
        The items in file order, and what is odd about them.

    Raises:
        TensorkeepError: A file cannot be used and the reader does not allow it, or none can be used.

    Example:
        >>> items, problems = find_items(annotations, "training", "videos", VideoReader())  # doctest: +SKIP
    """
    classes = annotations.classes if classes is None else classes
    items, problems = [], []
    for video in annotations.of_subset(subset):
        found, odd = _find_item(video, Path(folder), reader, classes)
        problems += odd
        if found is not None:
            items.append(found)
    errors = [problem for problem in problems if problem.severity == "error" and problem.kind != "duration"]
    if errors and reader.broken == "error":
        more = f", and {len(errors) - 3} more" if len(errors) > 3 else ""
        what = "; ".join(f"{problem.video}: {problem.message}" for problem in errors[:3])
        hint = "mend or remove them, or leave them out: broken: skip"
        raise TensorkeepError(f"{what}{more}", where=folder, hint=hint)
    if not items:
        raise TensorkeepError(f"none of the videos of subset {subset!r} can be read", where=folder)
    return items, problems


def _find_item(
    video: Video, folder: Path, reader: VideoReader | FeatureReader, classes: Sequence[str]
) -> tuple[Item | None, list[Problem]]:
    """Find and check the file of one video; no item where it cannot be used."""
    suffixes = SUFFIXES if isinstance(reader, FeatureReader) else VIDEO_SUFFIXES
    path = next(
        (folder / (video.name + suffix) for suffix in suffixes if (folder / (video.name + suffix)).exists()), None
    )
    if path is None:
        return None, [Problem("error", "no file", video.name, f"no {video.name} with one of {', '.join(suffixes)}")]
    segments, labels = number_segments(video, classes)
    steps, problems = 0, []
    if isinstance(reader, FeatureReader):
        try:
            steps = count_features(path, reader.channels, channels_first=reader.channels_first)
        except TensorkeepError as error:
            return None, [Problem("error", "unreadable features", video.name, error.line)]
        frames, duration = video.frames or 0, video.duration or 0.0
        if not frames and duration and video.fps:
            frames = round(duration * video.fps)
        if not frames or not duration:
            message = "features need the annotation's 'duration' and 'frame' (or 'fps')"
            return None, [Problem("error", "no duration", video.name, message)]
    else:
        problems = check_video(path, video)
        lost = [p for p in problems if p.kind in ("unreadable video", "truncated video")]
        if any(p.kind == "unreadable video" for p in lost) or (lost and reader.broken != "keep"):
            return None, problems
        info = probe(path)
        frames, duration = info.frames, info.duration
    return Item(video.name, str(path), frames, duration, path.stat().st_size, steps, segments, labels), problems
