"""Check the numbers in feature files, which their shapes do not show."""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.detection.data.clips import Clips
from tensorkeep.detection.data.features import read_side_by_side
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.readers import FeatureReader
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import Progress


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
        paths = (item.path, *item.beside)
        try:
            found = read_side_by_side(paths, reader.channels, item.steps, **reader.stored)
        except TensorkeepError as error:
            yield Problem("error", "unusable features", item.name, error.line)
            continue
        low, high = (float(value) for value in found.aminmax())
        if low == high and found.numel() > 1:
            message = f"{', '.join(paths)}: all {found.numel()} numbers are {low:g}, features differ from step to step"
            yield Problem("warning", "constant features", item.name, message)
