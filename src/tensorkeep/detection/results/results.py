"""Read and write detections of a whole data set. Needs numpy only.

Read: the ActivityNet/OpenTAD/mmaction JSON `{"results": {VIDEO: [{"segment", "label", "score"}]}}` (the outer
`results` may be missing, or be `detect_results` as in Ego4D's submissions) and the text of the THUMOS'14 kit, a line of
`video start end class_id score` each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.documents import parse_number, parse_segment, read_json, read_text
from tensorkeep.storage.overwriting import lone_file
from tensorkeep.storage.placement import replacing, write_bytes

# the ids that the THUMOS'14 kit gives its 20 detection classes: their places in the list of UCF101
# what `predict` and `write_detections` write
DETECTIONS = lone_file("a file of detections", r'\{("version": "VERSION 1\.3", )?"results": \{')
THUMOS_CLASS_IDS = {
    7: "BaseballPitch",
    9: "BasketballDunk",
    12: "Billiards",
    21: "CleanAndJerk",
    22: "CliffDiving",
    23: "CricketBowling",
    24: "CricketShot",
    26: "Diving",
    31: "FrisbeeCatch",
    33: "GolfSwing",
    36: "HammerThrow",
    40: "HighJump",
    45: "JavelinThrow",
    51: "LongJump",
    68: "PoleVault",
    79: "Shotput",
    85: "SoccerPenalty",
    92: "TennisSwing",
    93: "ThrowDiscus",
    97: "VolleyballSpiking",
}


@dataclass(frozen=True)
class DetectionTable:
    """N detections of many videos as columns.

    Attributes:
        video_names: names of the videos.
        label_names: names of the classes.
        videos: [N] int64, positions in `video_names`.
        labels: [N] int64, positions in `label_names`.
        segments: [N, 2] float64, seconds.
        scores: [N] float64.
        source: where they come from, for error messages.
    """

    video_names: tuple[str, ...]
    label_names: tuple[str, ...]
    videos: NDArray[np.int64]
    labels: NDArray[np.int64]
    segments: NDArray[np.float64]
    scores: NDArray[np.float64]
    source: str = "detections"

    def __len__(self) -> int:
        return len(self.scores)


def read_detections(path: str | Path, class_ids: Mapping[int, str] | None = None) -> DetectionTable:
    """Read detections from JSON or from the THUMOS kit's text.

    The order in the file is kept: it decides between equal scores.

    Args:
        path: the file.
        class_ids: class names by number for a text file (`annotations.read_class_ids`); without it, or where a number
            is not in it, the kit's own ids are taken if they explain every row.

    Returns:
        One row for each detection, times in seconds.

    Raises:
        TensorkeepError: The file cannot be read or has another layout.

    Example:
        >>> table = read_detections("results_detection.json")  # doctest: +SKIP
    """
    path = Path(path)
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        return parse_detections(read_json(path), source=str(path))
    return _parse_text(text, class_ids or {}, str(path))


def parse_detections(document: object, source: str = "detections") -> DetectionTable:
    """Return the detections of an already parsed JSON document; `source` names it in errors."""
    whole = document if isinstance(document, dict) else {}
    results = whole.get("results", whole.get("detect_results", document))  # Ego4D's submission holds two kinds
    if not isinstance(results, dict) or not all(isinstance(rows, list) for rows in results.values()):
        raise TensorkeepError(
            "no 'results' with a list for each video",
            where=source,
            hint='{"results": {VIDEO: [{"segment": [start, end], "label": name, "score": number}]}}',
        )
    names: dict[str, int] = {}
    rows = [row for found in results.values() for row in found]
    try:  # the quick way; whatever it cannot take is looked at row by row, to say which it is
        numbers = np.array([(*row["segment"], row["score"]) for row in rows], dtype=np.float64).reshape(-1, 3)
        labels = [names.setdefault(str(row["label"]), len(names)) for row in rows]
    except (TypeError, ValueError, KeyError, OverflowError):
        numbers, labels = np.full((len(rows), 3), np.nan), []
    plain = all(type(row["label"]) in (str, int) and type(row["segment"]) is list for row in rows[: len(labels)])
    if not plain or len(numbers) != len(rows) or not np.isfinite(numbers).all():
        numbers, labels, names = _parse_rows(results, source)
    return DetectionTable(
        video_names=tuple(map(str, results)),
        label_names=tuple(names),
        videos=np.repeat(np.arange(len(results)), [len(found) for found in results.values()]),
        labels=np.array(labels, dtype=np.int64),
        segments=numbers[:, :2].copy(),
        scores=numbers[:, 2].copy(),
        source=source,
    )


def write_detections(
    path: str | Path,
    results: Mapping[str, Sequence[tuple[float, float, str, float]]],
    *,
    time_decimals: int = 2,
    score_decimals: int = 4,
    overwrite: bool = False,
) -> None:
    """Write detections as ActivityNet JSON; here, and only here, numbers are rounded.

    The file appears whole or not at all.

    Args:
        path: the file.
        results: video -> rows (start in seconds, end in seconds, class name, score).
        time_decimals: digits kept of times.
        score_decimals: digits kept of scores.
        overwrite: whether a file that exists is replaced.

    Raises:
        TensorkeepError: The file exists and `overwrite` is not set.

    Example:
        >>> write_detections("out.json", {"v": [(0.5, 2.25, "Diving", 0.9)]})  # doctest: +SKIP
    """
    rounded = {
        video: [
            {
                "segment": [round(float(start), time_decimals), round(float(end), time_decimals)],
                "label": label,
                "score": round(float(score), score_decimals),
            }
            for start, end, label, score in rows
        ]
        for video, rows in results.items()
    }
    with replacing(Path(path), overwrite, DETECTIONS) as temporary:
        write_bytes(temporary, json.dumps({"results": rounded}).encode())


def _parse_rows(
    results: Mapping[str, Sequence[object]], source: str
) -> tuple[NDArray[np.float64], list[int], dict[str, int]]:
    """Return start, end and score [N, 3], label numbers and names; the first bad detection is named in an error."""
    names: dict[str, int] = {}
    numbers, labels = [], []
    for video, rows in results.items():
        for position, row in enumerate(rows):
            what = f"detection {position} of video {video!r}"
            if not isinstance(row, dict) or not isinstance(row.get("label"), str | int):
                raise TensorkeepError(f"{what} has no 'label'", where=source)
            segment = parse_segment(row.get("segment"), what, source)
            numbers.append((*segment, parse_number(row.get("score"), f"score of {what}", source)))
            labels.append(names.setdefault(str(row["label"]), len(names)))
    return np.array(numbers, dtype=np.float64).reshape(-1, 3), labels, names


def _parse_text(text: str, class_ids: Mapping[int, str], source: str) -> DetectionTable:
    """Read rows `video start end class_id score` of the THUMOS kit."""
    rows = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise TensorkeepError("no detection in it", where=source)
    videos: dict[str, int] = {}
    numbers = np.empty((len(rows), 4), dtype=np.float64)
    for position, (number, words) in enumerate(rows):
        if len(words) != 5:
            hint = "JSON, or lines 'video start end class_id score'"
            raise TensorkeepError(f"line {number} has {len(words)} words, not 5", where=source, hint=hint)
        numbers[position] = [parse_number(word, f"line {number}", source) for word in words[1:]]
        videos.setdefault(words[0], len(videos))
    ids = numbers[:, 2].astype(np.int64)
    if (ids != numbers[:, 2]).any():
        first = rows[int(np.flatnonzero(ids != numbers[:, 2])[0])][0]
        raise TensorkeepError(f"line {first}: the class id is no whole number", where=source)
    found = sorted(set(ids.tolist()))
    table = class_ids if set(found) <= set(class_ids) else THUMOS_CLASS_IDS
    unknown = [number for number in found if number not in table]
    if unknown:
        raise TensorkeepError(
            f"class ids without a name: {', '.join(map(str, unknown[:10]))}",
            where=source,
            hint="put the kit's detclasslist.txt ('id name' a line) beside the annotations",
        )
    return DetectionTable(
        video_names=tuple(videos),
        label_names=tuple(table[number] for number in found),
        videos=np.array([videos[words[0]] for _, words in rows], dtype=np.int64),
        labels=np.searchsorted(np.array(found), ids),
        segments=numbers[:, :2].copy(),
        scores=numbers[:, 3].copy(),
        source=source,
    )
