"""Score detections on EPIC-Kitchens-100: its submission JSON, verbs, nouns and actions apart. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorkeep.detection.data.epic import TASKS, read_epic
from tensorkeep.detection.data.truth import Annotations
from tensorkeep.detection.results.evaluation import Evaluation, evaluate
from tensorkeep.detection.results.results import DetectionTable, parse_detections
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.documents import read_json

_FORM = '{"results": {VIDEO: [{"verb": 3, "noun": 17, "action": "3,17", "score": 0.9, "segment": [start, end]}]}}'


def read_epic_detections(path: str | Path) -> dict[str, DetectionTable]:
    """Read a submission to EPIC-Kitchens' detection challenge.

    A file of one set of labels only (every row has `verb`, none has `noun`) gives that set alone. Where rows have verb
    and noun and no `action`, the action is the pair.

    Args:
        path: the JSON file.

    Returns:
        "verb", "noun" or "action" -> detections, for those that every row has.

    Raises:
        TensorkeepError: The file has another layout, or a set of labels that some rows have and others lack.
    """
    source = str(path)
    document = read_json(Path(path))
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, dict) or not all(isinstance(rows, list) for rows in results.values()):
        raise TensorkeepError("no 'results' with a list for each video", where=source, hint=_FORM)
    rows = [row for found in results.values() for row in found]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise TensorkeepError("a detection is no object" if rows else "no detection in it", where=source, hint=_FORM)
    tables = {}
    for task in TASKS:
        lacking = [place for place, row in enumerate(rows) if _label(row, task) is None]
        if lacking and len(lacking) < len(rows):
            what = f"detection {lacking[0]} has no {task} class, though others have one: {str(rows[lacking[0]])[:80]}"
            raise TensorkeepError(what, where=source, hint=_FORM)
        if not lacking:
            named = {video: [{**row, "label": _label(row, task)} for row in found] for video, found in results.items()}
            tables[task] = parse_detections({"results": named}, source)
    if not tables:
        raise TensorkeepError("rows have neither 'verb' nor 'noun' nor 'action'", where=source, hint=_FORM)
    return tables


def evaluate_epic(
    annotations: str | Path,
    detections: str | Path,
    *,
    protocol: str = "epic",
    thresholds: Sequence[float] | None = None,
    blocked: Sequence[str] = (),
    recall_at: Sequence[int] = (),
) -> dict[str, tuple[Annotations, DetectionTable, Evaluation]]:
    """Score a submission for verbs, nouns and actions, as far as its rows name them.

    Args:
        annotations: EPIC-Kitchens' CSV.
        detections: the submission's JSON.
        protocol: a name of `protocols.PROTOCOLS`.
        thresholds: temporal IoUs in (0, 1]; None: those of the protocol.
        blocked: names of videos to leave out on both sides.
        recall_at: each k of "recall at k x".

    Returns:
        "verb", "noun", "action" -> ground truth, detections and their score.

    Raises:
        TensorkeepError: A file cannot be read, or as `evaluate` does.

    Example:
        >>> evaluate_epic("EPIC_100_validation.csv", "submission.json")["action"][2].average  # doctest: +SKIP
        0.2
    """
    truth = read_epic(annotations)
    done = {}
    for task, table in read_epic_detections(detections).items():
        score = evaluate(
            truth[task],
            table,
            protocol=protocol,
            thresholds=thresholds,
            subset="all",
            blocked=blocked,
            recall_at=recall_at,
        )
        done[task] = truth[task], table, score
    return done


def _label(row: dict[str, Any], task: str) -> str | None:
    """A row's class as `read_epic` calls it; None where the row does not say it."""
    found = row.get(task)
    if found is None and task == "action":
        parts = [_label(row, "verb"), _label(row, "noun")]
        return None if None in parts else f"{parts[0]},{parts[1]}"
    words = str(found).split(",")
    right = type(found) in (int, str) and len(words) == (2 if task == "action" else 1)
    if not right or not all(word.strip().isdecimal() for word in words):
        return None
    return ",".join(str(int(word)) for word in words)
