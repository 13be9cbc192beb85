"""Match detections with annotated segments: overlaps as a sparse list, and the greedy one-to-one matching.

Both evaluation protocols match greedily inside each (video, class) group. What one of them calls the *picker* (the
detection in the ActivityNet protocol, the annotated segment in the THUMOS'14 kit) takes, in turn, the best still free
*candidate*. All groups take their next turn together, so the work is a few array operations a turn. Numpy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 20  # candidate pairs held at once: bounds memory where one video has thousands of both

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Pairs(NamedTuple):
    """Overlapping segments as three columns of one length, ordered by left, then right.

    Attributes:
        left: indices of the segments on one side.
        right: indices of the segments on the other side.
        iou: temporal IoU of the two.
    """

    left: Ints
    right: Ints
    iou: Floats


def overlaps(
    left: Floats, left_keys: Ints, right: Floats, right_keys: Ints, at_least: float, floor: float = 1e-8
) -> Pairs:
    """Find all pairs of segments of equal key whose temporal IoU is above 0 and at least `at_least`.

    IoU = intersection / max(length + length - intersection, floor), in float64 and in this order of operations, which
    the published evaluators share; the order decides cases that lie on a threshold.

    Args:
        left: [N, 2], start and end.
        left_keys: [N] numbers; only segments of equal key may meet (one key a video, or a video and class).
        right: [M, 2].
        right_keys: [M].
        at_least: least IoU.
        floor: least union, so that segments of no length can be divided by it.

    Returns:
        The pairs, K in all: indices into both sides, and IoUs.

    Example:
        >>> overlaps(np.array([[0., 2.]]), np.array([0]), np.array([[1., 2.], [5., 6.]]), np.array([0, 0]), 0.1).iou
        array([0.5])
    """
    order = np.argsort(right_keys, kind="stable")
    keys = right_keys[order]
    first = np.searchsorted(keys, left_keys, side="left")
    count = np.searchsorted(keys, left_keys, side="right") - first
    ends = np.cumsum(count)
    found = []
    start = 0
    while start < len(left_keys):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
        here = np.repeat(np.arange(start, stop), count[start:stop])
        inside = np.arange(len(here)) - np.repeat(ends[start:stop] - count[start:stop] - before, count[start:stop])
        there = order[first[here] + inside]
        shared = np.minimum(left[here, 1], right[there, 1]) - np.maximum(left[here, 0], right[there, 0])
        near = shared > 0
        here, there, shared = here[near], there[near], shared[near]
        union = (left[here, 1] - left[here, 0]) + (right[there, 1] - right[there, 0]) - shared
        iou = shared / np.maximum(union, floor)
        enough = iou >= at_least
        found.append((here[enough], there[enough], iou[enough]))
        start = stop
    if not found:
        empty = np.zeros(0, dtype=np.int64)
        return Pairs(empty, empty, np.zeros(0))
    return Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))


def match_greedily(
    picker: Ints,
    candidate: Ints,
    iou: Floats,
    groups: Ints,
    thresholds: Floats,
    candidates: int,
    *,
    above: bool,
) -> NDArray[np.int64]:
    """Let each picker take the free candidate of the highest IoU, one after the other, at each of T thresholds.

    Equal IoUs go to the candidate listed last among the picker's pairs.

    Args:
        picker: [K], of each overlapping pair the one that chooses.
        candidate: [K], the one that may be chosen.
        iou: [K], their temporal IoU.
        groups: [P], group of every picker; inside a group pickers choose in the order of their numbers.
        thresholds: [T] least IoUs.
        candidates: number of candidates.
        above: whether an IoU must lie above the threshold; else it may equal it.

    Returns:
        [P, T], the candidate taken, -1 for none.
    """
    taken = np.full((len(groups), len(thresholds)), -1, dtype=np.int64)
    if not len(picker):
        return taken
    order = np.argsort(picker, kind="stable")
    picker, candidate, iou = picker[order], candidate[order], iou[order]
    choosers, lengths = np.unique(picker, return_counts=True)
    turn_of = _turns(groups[choosers])
    by_turn = np.argsort(np.repeat(turn_of, lengths), kind="stable")  # pairs of one turn lie together, by chooser
    picker, candidate, iou = picker[by_turn], candidate[by_turn], iou[by_turn]
    ends = np.cumsum(np.bincount(np.repeat(turn_of, lengths)))
    free = np.ones((candidates, len(thresholds)), dtype=bool)
    columns = np.arange(len(thresholds))[None, :]
    for start, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
        who, whom = picker[start:end], candidate[start:end]
        heads = np.flatnonzero(np.diff(who, prepend=-1))
        value = np.where(free[whom], iou[start:end, None], -1.0)
        best = np.maximum.reduceat(value, heads, axis=0)
        sizes = np.diff(heads, append=len(who))
        is_best = value == np.repeat(best, sizes, axis=0)
        place = np.maximum.reduceat(np.where(is_best, np.arange(len(who))[:, None], -1), heads, axis=0)
        enough = best > thresholds if above else best >= thresholds
        chosen = np.where(enough, whom[place], -1)
        taken[who[heads]] = chosen
        free[chosen[enough], np.broadcast_to(columns, chosen.shape)[enough]] = False
    return taken


def _turns(groups: Ints) -> Ints:
    """Number the members of each group 0, 1, 2, ... in the order given."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    heads = np.flatnonzero(np.diff(ordered, prepend=-1))
    sizes = np.diff(heads, append=len(ordered))
    turns = np.empty(len(groups), dtype=np.int64)
    turns[order] = np.arange(len(ordered)) - np.repeat(heads, sizes)
    return turns
