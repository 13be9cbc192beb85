"""Score detections: mean average precision (mAP) of temporal action detection, as each data set publishes it.

Two rules, which the protocols (see `protocols`) share:

- Detections choose, by falling score, the free annotated segment of the highest IoU if IoU >= threshold; AP is the area
  under the precision-recall curve after the running maximum from the right (VOC 2010). The ActivityNet evaluator's
  rule, which EPIC-Kitchens, Ego4D, OpenTAD, mmaction and ActionFormer took over. OpenTAD drops annotated segments of no
  length and repetitions (same class, both ends within 1 ms) first; the data sets' own scripts count each.
- The THUMOS'14 kit (TH14evalDet of 2015-09-30): annotated segments, in file order, choose the free detection of the
  highest IoU if IoU > threshold; detections that touch an `Ambiguous` segment are no false positives; AP is the sum of
  the precision at each true positive over the number of segments, not interpolated.

The two give numbers several points apart for the same file. Sorting is stable (file order decides between equal
scores), so a result is the same on every machine. Numpy only: no torch, no pandas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.data.truth import Annotations, unique_segments
from tensorkeep.detection.results.columns import Columns, align_names, gather_columns, guess_subset
from tensorkeep.detection.results.matching import Floats, Ints, Pairs, match_greedily, overlaps
from tensorkeep.detection.results.protocols import PROTOCOLS, Protocol
from tensorkeep.detection.results.results import DetectionTable
from tensorkeep.errors import TensorkeepError, near_misses


@dataclass(frozen=True)
class Evaluation:
    """Mean average precision and what it is made of; every figure is a fraction of 1.

    Attributes:
        protocol: a name of `protocols.PROTOCOLS`.
        subset: the subset that was scored.
        thresholds: T temporal IoUs.
        classes: C names.
        ap: [C, T], average precision by class and threshold.
        segments: number of annotated segments of each class.
        detections: number of detections.
        recall: k -> [T], recall when each video may give k detections for each annotated segment of a class; the mean
            over classes, or over all segments at once where the protocol says so.
        notes: sentences on what has no counterpart.
    """

    protocol: str
    subset: str
    thresholds: tuple[float, ...]
    classes: tuple[str, ...]
    ap: Floats
    segments: tuple[int, ...]
    detections: int
    recall: dict[int, Floats] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def map(self) -> Floats:
        """Mean of `ap` over classes, [T]."""
        mean: Floats = self.ap.mean(axis=0)
        return mean

    @property
    def average(self) -> float:
        """Mean of `ap` over thresholds and classes."""
        return float(self.map.mean())

    def document(self) -> dict[str, object]:
        """Return the same as plain lists and dicts, for JSON."""
        return {
            "protocol": self.protocol,
            "subset": self.subset,
            "tiou": list(self.thresholds),
            "mAP": self.map.tolist(),
            "average_mAP": self.average,
            "AP": {name: row.tolist() for name, row in zip(self.classes, self.ap, strict=True)},
            "segments": dict(zip(self.classes, self.segments, strict=True)),
            "detections": self.detections,
            "recall": {str(k): values.tolist() for k, values in self.recall.items()},
            "notes": list(self.notes),
        }

    def table(self) -> list[list[str]]:
        """Return rows of text: a header, one row a class, the mean; figures in percent."""
        header = ["class", "segments", *(f"AP@{threshold:g}" for threshold in self.thresholds), "mean"]
        rows = [
            [name, str(count), *(f"{100 * value:.2f}" for value in row), f"{100 * row.mean():.2f}"]
            for name, count, row in zip(self.classes, self.segments, self.ap, strict=True)
        ]
        mean = [
            "mAP",
            str(sum(self.segments)),
            *(f"{100 * value:.2f}" for value in self.map),
            f"{100 * self.average:.2f}",
        ]
        recalls = [
            [f"recall {k}x", "", *(f"{100 * value:.2f}" for value in values), f"{100 * values.mean():.2f}"]
            for k, values in self.recall.items()
        ]
        return [header, *rows, mean, *recalls]


def evaluate(
    annotations: Annotations,
    detections: DetectionTable,
    *,
    protocol: str = "activitynet",
    thresholds: Sequence[float] | None = None,
    subset: str | None = None,
    blocked: Sequence[str] = (),
    recall_at: Sequence[int] = (),
) -> Evaluation:
    """Score detections against one subset of the annotations by mean average precision.

    Classes are those with an annotated segment. Detections of other classes are ignored; detections in videos without
    annotation count as false positives (the result's `notes` tell how many).

    Args:
        annotations: the ground truth.
        detections: what was found.
        protocol: a name of `protocols.PROTOCOLS`.
        thresholds: temporal IoUs in (0, 1]; None: those of the protocol.
        subset: name of the subset; None: the one that most of the detections' videos belong to.
        blocked: names of videos to leave out on both sides.
        recall_at: each k of "recall at k x"; IoU strictly above the threshold, as in ActionFormer.

    Returns:
        Average precision by class and threshold, and their means.

    Raises:
        TensorkeepError: Protocol or subset are unknown, a threshold is out of range, or there is nothing to score
            against.

    Example:
        >>> evaluate(read_annotations("gt.json"), read_detections("pred.json")).average  # doctest: +SKIP
        0.61
    """
    limits = _limits(protocol, thresholds)
    rules = PROTOCOLS[protocol]
    notes: list[str] = []
    annotations, detections = align_names(annotations, detections, notes)
    subset = subset if subset is not None else guess_subset(annotations, detections)
    columns = gather_columns(annotations, detections, subset, blocked, clean=rules.clean, notes=notes)
    groups, true_groups = columns.groups(), columns.true_groups()
    order = np.lexsort((-columns.scores, groups))  # stable: by group, falling score, file order
    pairs = overlaps(columns.segments[order], groups[order], columns.true_segments, true_groups, float(limits.min()))
    score = _score_thumos14 if rules.kit else _score_activitynet
    hit, counted = score(columns, order, groups[order], pairs, limits)
    ap = _average_precision(columns, hit, counted, interpolate=not rules.kit)
    _note_ties(columns, limits, rules, float(ap.mean()), notes)
    _note_odd_segments(columns, rules, notes)
    return Evaluation(
        protocol=protocol,
        subset=subset,
        thresholds=tuple(limits.tolist()),
        classes=columns.classes,
        ap=ap,
        segments=tuple(np.bincount(columns.true_labels, minlength=len(columns.classes)).tolist()),
        detections=len(columns.scores),
        recall=_recall(columns, groups[order], pairs, limits, recall_at, rules.pooled),
        notes=tuple(notes),
    )


def _note_ties(columns: Columns, limits: Floats, rules: Protocol, average: float, notes: list[str]) -> None:
    """Say between which figures the mAP lies where equal scores leave an order open.

    The published scripts sort by `argsort()[::-1]`, no stable sort: between equal scores their order depends on numpy
    and on the number of rows. The ends of the range are the mAP with the equal ones ordered by their best IoU, and the
    true positives last or first among them.
    """
    keys = np.lexsort((columns.scores, columns.labels))
    scores, labels = columns.scores[keys], columns.labels[keys]
    equal = (scores[1:] == scores[:-1]) & (labels[1:] == labels[:-1]) & (labels[1:] >= 0)
    if rules.kit or not equal.any():
        return
    groups, least = columns.groups(), float(limits.min())
    every = overlaps(columns.segments, groups, columns.true_segments, columns.true_groups(), least)
    best = np.zeros(len(groups))
    np.maximum.at(best, every.left, every.iou)
    ends = []
    for sign in (1, -1):
        order = np.lexsort((sign * best, -columns.scores, groups))
        pairs = overlaps(columns.segments[order], groups[order], columns.true_segments, columns.true_groups(), least)
        hit, counted = _score_activitynet(columns, order, groups[order], pairs, limits)
        ends.append(float(_average_precision(columns, hit, counted, interpolate=True, hits=sign).mean()))
    if ends[1] - ends[0] >= 5e-5:
        notes.append(
            f"{int(equal.sum())} detections have the score of another of their class; the file's order gives "
            f"{100 * average:.2f}, others {100 * ends[0]:.2f} to {100 * ends[1]:.2f}: published scripts leave it open"
        )


def _note_odd_segments(columns: Columns, rules: Protocol, notes: list[str]) -> None:
    """Say how many annotated segments OpenTAD would drop, where they count."""
    if rules.clean:
        return
    proper = np.flatnonzero(columns.true_segments[:, 1] > columns.true_segments[:, 0])
    groups = columns.true_groups()[proper].tolist()
    repeated = len(proper) - len(unique_segments(columns.true_segments[proper], groups))
    empty = len(columns.true_segments) - len(proper)
    if repeated or empty:
        notes.append(
            f"{repeated} repeated and {empty} empty annotated segments count, as in the data set's own script; "
            "--protocol opentad drops them"
        )


def _limits(protocol: str, thresholds: Sequence[float] | None) -> NDArray[np.float64]:
    """Return the temporal IoUs to score at, in (0, 1]: those given, or the protocol's."""
    if protocol not in PROTOCOLS:
        hint = near_misses(protocol, PROTOCOLS) or f"one of {', '.join(PROTOCOLS)}"
        raise TensorkeepError(f"unknown protocol {protocol!r}", hint=hint)
    limits = np.array(PROTOCOLS[protocol].thresholds if thresholds is None else thresholds, dtype=np.float64)
    if limits.ndim != 1 or not limits.size or not np.all((limits > 0) & (limits <= 1)):
        raise TensorkeepError(f"temporal IoU thresholds must lie in (0, 1], got {limits.tolist()}")
    return limits


def _score_activitynet(
    columns: Columns, order: Ints, groups: Ints, pairs: Pairs, limits: Floats
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Let detections choose segments; gives true positives [N, T] and which detections count [N, T], in file order."""
    chosen = match_greedily(pairs.left, pairs.right, pairs.iou, groups, limits, len(columns.true_segments), above=False)
    hit = np.zeros(chosen.shape, dtype=bool)
    hit[order] = chosen >= 0
    return hit, np.ones(hit.shape, dtype=bool)


def _score_thumos14(
    columns: Columns, order: Ints, groups: Ints, pairs: Pairs, limits: Floats
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Let annotated segments choose detections; returns as `_score_activitynet`.

    Detections that touch an `Ambiguous` segment and are no true positives do not count.
    """
    late_first = np.lexsort((-pairs.left, pairs.right))  # of equal IoUs the earlier detection wins: it is listed last
    chosen = match_greedily(
        pairs.right[late_first],
        pairs.left[late_first],
        pairs.iou[late_first],
        columns.true_groups(),
        limits,
        len(groups),
        above=True,
    )
    sorted_hit = np.zeros((len(groups), len(limits)), dtype=bool)
    rows, thresholds = np.nonzero(chosen >= 0)
    sorted_hit[chosen[rows, thresholds], thresholds] = True
    hit = np.zeros_like(sorted_hit)
    hit[order] = sorted_hit
    touching = overlaps(columns.segments, columns.videos, columns.ambiguous_segments, columns.ambiguous_videos, 0.0)
    forgiven = np.zeros(len(groups), dtype=bool)
    forgiven[touching.left] = True
    return hit, hit | ~forgiven[:, None]


def _average_precision(
    columns: Columns, hit: NDArray[np.bool_], counted: NDArray[np.bool_], *, interpolate: bool, hits: int = 0
) -> Floats:
    """Return [C, T]: precision at each true positive, summed and divided by the number of annotated segments.

    With `interpolate` the precision is the highest at this recall or beyond. Between equal scores file order decides;
    without `interpolate` the video's name first, since the kit goes through the videos by name. With `hits` true
    positives come last (1) or first (-1) between equal scores instead.
    """
    total = np.bincount(columns.true_labels, minlength=len(columns.classes))
    ap = np.zeros((len(columns.classes), hit.shape[1]))
    by_class = np.argsort(columns.labels, kind="stable")
    bounds = np.searchsorted(columns.labels[by_class], np.arange(len(columns.classes) + 1))
    for number in range(len(columns.classes)):
        own = by_class[bounds[number] : bounds[number + 1]]
        if not len(own):
            continue
        between_equals = np.zeros(len(own)) if interpolate else columns.videos[own]
        own = own[np.lexsort((between_equals, -columns.scores[own]))]  # stable
        for threshold in range(hit.shape[1]):
            if hits:
                own = own[np.lexsort((hits * hit[own, threshold], -columns.scores[own]))]
            found, counts = hit[own, threshold], counted[own, threshold]
            precision = np.cumsum(found) / np.maximum(np.cumsum(counts), 1)
            if interpolate:
                precision = np.maximum.accumulate(precision[::-1])[::-1]
            ap[number, threshold] = precision[found].sum() / total[number]
    return ap


def _recall(
    columns: Columns, groups: Ints, pairs: Pairs, limits: Floats, ks: Sequence[int], pooled: bool
) -> dict[int, Floats]:
    """Return for each k the recall [T], as mean over classes, or of all segments at once where they are `pooled`.

    Counted are segments met by the k x G best detections of their video and class, where G segments are annotated.
    """
    total = np.bincount(columns.true_labels, minlength=len(columns.classes))
    sizes = np.unique(columns.true_groups(), return_counts=True)
    rank = np.arange(len(groups)) - np.searchsorted(groups, groups)  # groups is sorted
    allowed = (
        sizes[1][np.searchsorted(sizes[0], groups[pairs.left])] if len(pairs.left) else np.zeros(0, dtype=np.int64)
    )
    recall = {}
    for k in ks:
        if k < 1:
            raise TensorkeepError(f"recall at {k}: k must be at least 1")
        inside = rank[pairs.left] < k * allowed
        values = []
        for limit in limits:
            met = np.unique(pairs.right[inside & (pairs.iou > limit)])
            count = np.bincount(columns.true_labels[met], minlength=len(total))
            values.append(count.sum() / total.sum() if pooled else (count / total).mean())
        recall[k] = np.array(values)
    return recall
