"""Score a file of detections against a file of annotations; the rules are those of `scoring`. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorkeep.detection.data.annotations import CLASS_LIST, Annotations, read_annotations, read_class_ids
from tensorkeep.detection.results.columns import read_blocked
from tensorkeep.detection.results.results import DetectionTable, read_detections
from tensorkeep.detection.results.scoring import Evaluation as Evaluation
from tensorkeep.detection.results.scoring import evaluate as evaluate


def evaluate_files(
    annotations: str | Path,
    detections: str | Path,
    *,
    protocol: str = "activitynet",
    thresholds: Sequence[float] | None = None,
    subset: str | None = None,
    blocked: str | Path | None = None,
    recall_at: Sequence[int] = (),
) -> Evaluation:
    """Score a file of detections against a file of annotations, as `evaluate` does.

    Args:
        annotations: a file or folder that `read_annotations` can read.
        detections: JSON, or the text of the THUMOS kit.
        protocol: a name of `protocols.PROTOCOLS`.
        thresholds: temporal IoUs in (0, 1]; None: those of the protocol.
        subset: name of the subset; None: the one that most of the detections' videos belong to.
        blocked: file with the names of videos to leave out, a JSON list or one a line.
        recall_at: each k of "recall at k x".

    Returns:
        What `evaluate` returns.

    Raises:
        TensorkeepError: A file cannot be read, or as `evaluate` does.

    Example:
        >>> evaluate_files("thumos_14_anno.json", "result.json", thresholds=[0.3, 0.5, 0.7]).average  # doctest: +SKIP
    """
    truth, found = read_files(annotations, detections)
    return evaluate(
        truth,
        found,
        protocol=protocol,
        thresholds=thresholds,
        subset=subset,
        blocked=read_blocked(blocked) if blocked else (),
        recall_at=recall_at,
    )


def read_files(annotations: str | Path, detections: str | Path) -> tuple[Annotations, DetectionTable]:
    """Read annotations and detections.

    Class ids in a THUMOS text file of detections are those of the `detclasslist.txt` beside the annotations.

    Args:
        annotations: a file or folder that `read_annotations` can read.
        detections: JSON, or the text of the THUMOS kit.

    Returns:
        Ground truth and detections.

    Raises:
        TensorkeepError: A file cannot be read.
    """
    listed = Path(annotations) / CLASS_LIST
    ids = read_class_ids(listed) if listed.is_file() else None
    return read_annotations(annotations), read_detections(detections, ids)
