"""Read class probabilities of whole videos, by which an external classifier names what a class-agnostic detector finds.

Two layouts: the ActivityNet classifiers' JSON `{"results": {VIDEO: [p, ...]}, "class": [name, ...]}` (CUHK and others)
and UntrimmedNet's array [videos, 101] for THUMOS (`.npy`), whose rows are the test videos by number and whose columns
are UCF101's classes. Numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.results.results import THUMOS_CLASS_IDS
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.documents import parse_number, read_json


class VideoClasses(NamedTuple):
    """An external classifier's verdicts.

    Attributes:
        classes: K names.
        probabilities: video -> probabilities [K], float64.
    """

    classes: tuple[str, ...]
    probabilities: Mapping[str, NDArray[np.float64]]

    def of(self, video: str) -> NDArray[np.float64]:
        """Return the probabilities [K] of a video; ActivityNet's `v_` before its name makes no difference.

        Raises:
            TensorkeepError: The classifier does not know the video.
        """
        found = self.probabilities.get(video, self.probabilities.get(video.removeprefix("v_")))
        if found is None:
            raise TensorkeepError(f"the external classifier does not know video {video!r}")
        return found


def read_classifier(path: str | Path) -> VideoClasses:
    """Read a classifier's probabilities in either layout.

    Raises:
        TensorkeepError: The file has another layout, or its numbers do not fit the class names.

    Example:
        >>> read_classifier("cuhk_val_simp_share.json").of("v_0dkIbKXXFzI").shape  # doctest: +SKIP
        (200,)
    """
    path = Path(path)
    return _read_untrimmednet(path) if path.suffix == ".npy" else _read_json_classifier(path)


def _read_json_classifier(path: Path) -> VideoClasses:
    """Read the ActivityNet classifiers' JSON."""
    document = read_json(path)
    results = document.get("results") if isinstance(document, dict) else None
    names = document.get("class") if isinstance(document, dict) else None
    if not isinstance(results, dict) or not isinstance(names, list):
        hint = '{"results": {VIDEO: [p, ...]}, "class": [name, ...]}'
        raise TensorkeepError("not the scores of a video classifier", where=path, hint=hint)
    probabilities = {}
    for video, row in results.items():
        if not isinstance(row, list) or len(row) != len(names):
            raise TensorkeepError(f"video {video!r} has no {len(names)} probabilities, one a class", where=path)
        what = f"a probability of video {video!r}"
        probabilities[video] = np.array([parse_number(value, what, str(path)) for value in row])
    return VideoClasses(tuple(map(str, names)), probabilities)


def _read_untrimmednet(path: Path) -> VideoClasses:
    """Read UntrimmedNet's array for THUMOS."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        raise TensorkeepError(f"not a numpy array of numbers: {problem}", where=path) from problem
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != 101:
        raise TensorkeepError(f"shape {getattr(table, 'shape', None)} is not [videos, 101]", where=path)
    columns = [number - 1 for number in THUMOS_CLASS_IDS]  # the kit counts UCF101's classes from 1
    scores = table[:, columns].astype(np.float64)
    names = (f"video_test_{number:07d}" for number in range(1, len(scores) + 1))
    return VideoClasses(tuple(THUMOS_CLASS_IDS.values()), dict(zip(names, scores, strict=True)))
