"""Check the numbers in feature files, which their shapes do not show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorkeep.detection.data.clips import Clips
from tensorkeep.detection.data.features import read_side_by_side
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.readers import FeatureReader
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import Progress

_AT_ONCE = 1 << 26  # numbers that are in memory at a time


def check_features(clips: Clips, progress: Progress = lambda what, done, total: None) -> Iterator[Problem]:
    """Read the feature files of a data set whole: numbers that are not finite, and files that hold one number alone.

    Args:
        clips: the data; of videos there is nothing to check here.
        progress: is told how many files were read.

    Yields:
        A problem for each video whose features are odd.
    """
    reader = clips.reader
    if not isinstance(reader, FeatureReader):
        return
    for done, item in enumerate(clips.items):
        progress("read", done, len(clips.items))
        paths, numbers = (item.path, *item.beside), reader.channels * item.steps
        try:
            low, high = _extremes(paths, item.steps, reader)
        except TensorkeepError as error:
            yield Problem("error", "unusable features", item.name, error.line)
            continue
        if low == high and numbers > 1:
            message = f"{', '.join(paths)}: all {numbers} numbers are {low:g}, features differ from step to step"
            yield Problem("warning", "constant features", item.name, message)


def _extremes(paths: Sequence[str], steps: int, reader: FeatureReader) -> tuple[float, float]:
    """Return the least and the largest of a video's numbers, a part of its time steps in memory at a time."""
    low, high, part = float("inf"), float("-inf"), max(1, _AT_ONCE // reader.channels)
    for first in range(0, steps, part):
        rows = (first, min(first + part, steps))
        found = read_side_by_side(paths, reader.channels, steps, rows, **reader.stored).aminmax()
        low, high = min(low, float(found.min)), max(high, float(found.max))
    return low, high
