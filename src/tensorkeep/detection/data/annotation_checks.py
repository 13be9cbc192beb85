"""Check an annotation file and describe each problem so that its author can mend it.

The checks answer what users of detection code bases ask: why mAP is nan (unknown subset, no ground truth), why training
crashes (label not in the class map), why detections stop early (frame count against duration), why two evaluators give
different figures (repeated segments, segments without length). Needs numpy only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.truth import AMBIGUOUS, Annotations, Video, unique_segments
from tensorkeep.errors import near_misses

_END_TOLERANCE = 0.05  # seconds; annotations are commonly given to a tenth of a second
_FRAME_RATES = (5.0, 125.0)  # outside of it a frame count and a duration do not belong together


def check_annotations(
    annotations: Annotations, *, subsets: Sequence[str] = (), class_map: Sequence[str] | None = None
) -> list[Problem]:
    """List everything odd in the annotations, errors first.

    Args:
        annotations: as `read_annotations` gives them.
        subsets: names of the subsets that training or evaluation will ask for.
        class_map: class names that the model knows, in label order; None: the file's own.

    Returns:
        One problem for each thing found; none where the annotations can be used as they are.

    Example:
        >>> check_annotations(read_annotations("anno.json"), subsets=["training", "validation"])  # doctest: +SKIP
        [Problem(severity='error', kind='unknown subset', video=None, message="no video of subset 'validation': ...")]
    """
    known = annotations.classes if class_map is None else tuple(class_map)
    problems = [*_check_subsets(annotations, subsets), *_check_classes(annotations, known)]
    for video in annotations.videos.values():
        problems += [*_check_length(video), *_check_segments(video)]
    rank = {"error": 0, "warning": 1, "info": 2}
    return sorted(problems, key=lambda problem: rank[problem.severity])


def _check_subsets(annotations: Annotations, subsets: Sequence[str]) -> Iterator[Problem]:
    """Look for subsets that are asked for and not there, and for videos without ground truth or subset."""
    there = annotations.subsets()
    for subset in subsets:
        if subset not in there:
            hint = near_misses(subset, there) or f"subsets there: {', '.join(there) or 'none'}"
            yield Problem("error", "unknown subset", None, f"no video of subset {subset!r}: {hint}")
        elif not any(set(video.labels) - {AMBIGUOUS} for video in annotations.of_subset(subset)):
            yield Problem(
                "error", "no ground truth", None, f"no annotated segment in subset {subset!r}: mAP is undefined"
            )
    if not any(video.labels for video in annotations.videos.values()):
        yield Problem("error", "no ground truth", None, "no annotated segment in the whole file")
    if "" in there:
        number = len(annotations.of_subset(""))
        yield Problem("warning", "unknown subset", None, f"{number} videos name no subset and will never be used")


def _check_classes(annotations: Annotations, known: Sequence[str]) -> Iterator[Problem]:
    """Look for labels outside the class map, and for classes without segments, in all or in one subset."""
    used: Counter[str] = Counter()
    where: dict[str, str] = {}
    by_subset: dict[str, set[str]] = {}
    for video in annotations.videos.values():
        used.update(video.labels)
        by_subset.setdefault(video.subset, set()).update(video.labels)
        for label in video.labels:
            where.setdefault(label, video.name)
    for label in sorted(set(used) - set(known) - {AMBIGUOUS}):
        hint = near_misses(label, known) or f"the class map has {len(known)} names"
        message = f"label {label!r} ({used[label]} segments) is not in the class map: {hint}"
        yield Problem("error", "label not in the map", where[label], message)
    for label in sorted(set(known) - set(used)):
        yield Problem("warning", "class without segments", None, f"no segment shows {label!r} of the class map")
    if AMBIGUOUS in used:
        message = (
            f"{used[AMBIGUOUS]} {AMBIGUOUS!r} segments: left out of training; only the thumos14 protocol uses them"
        )
        yield Problem("info", "ambiguous segments", where[AMBIGUOUS], message)
    for subset, labels in sorted(by_subset.items()):
        lacking = sorted(set(used) - labels - {AMBIGUOUS})
        if labels and lacking:
            message = f"subset {subset!r} has no segment of {len(lacking)} classes: {', '.join(lacking[:5])}"
            yield Problem("info", "class absent from subset", None, message)


def _check_length(video: Video) -> Iterator[Problem]:
    """Compare a video's duration, frame count and frame rate."""
    if video.duration is not None and video.duration <= 0:
        yield Problem("error", "no duration", video.name, f"duration is {video.duration:g} s")
        return
    if video.frames is None or video.duration is None:
        return
    if video.frames < 1:
        yield Problem("error", "frame count", video.name, f"{video.frames} frames")
        return
    rate = video.frames / video.duration
    if not _FRAME_RATES[0] <= rate <= _FRAME_RATES[1]:
        message = f"{video.frames} frames in {video.duration:g} s are {rate:.2f} a second: one of the two is wrong"
        yield Problem("error", "frame count", video.name, message)
    elif video.fps and abs(rate - video.fps) > 0.01 * video.fps:
        message = (
            f"{video.frames} frames in {video.duration:g} s are {rate:.3f} a second, the file says fps {video.fps:g}: "
            "segments will drift"
        )
        yield Problem("warning", "frame count", video.name, message)


def _check_segments(video: Video) -> Iterator[Problem]:
    """Look for segments that are reversed, without length, outside the video or given twice."""
    for (start, end), label in zip(video.segments.tolist(), video.labels, strict=True):
        what = f"{label!r} [{start:g}, {end:g}]"
        if end < start:
            yield Problem("error", "ends before it starts", video.name, f"{what} ends before it starts")
        elif end == start:
            yield Problem("warning", "zero length", video.name, f"{what} has no length: the evaluator drops it")
        if start < 0:
            yield Problem("warning", "before the start", video.name, f"{what} starts before the video")
        if video.duration is not None and start >= video.duration > 0:
            message = (
                f"{what} starts at or after the end of the video at {video.duration:g} s: no detection can meet it"
            )
            yield Problem("error", "past the end", video.name, message)
        elif video.duration is not None and end > video.duration + _END_TOLERANCE:
            message = f"{what} ends {end - video.duration:.2f} s past the end of the video at {video.duration:g} s"
            yield Problem("warning", "past the end", video.name, message)
    repeated = np.setdiff1d(np.arange(len(video.labels)), unique_segments(video.segments, video.labels))
    for index in repeated:
        start, end = video.segments[index]
        message = f"{video.labels[index]!r} [{start:g}, {end:g}] comes twice: the evaluator counts it once"
        yield Problem("warning", "duplicate", video.name, message)
