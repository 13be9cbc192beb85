"""Non-maximum suppression of many groups at once, on padded matrices: a row is a group, a column a detection.

A group holds the detections that may suppress each other: those of one video and class (see `nms`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_EPSILON = np.float32(1e-6)  # added to every length, so that a segment of no length can be divided by
_EMPTY = np.float32(-1)  # score of a padded column: below every real one


@dataclass
class PaddedGroups:
    """G groups of at most W detections as matrices [G, W].

    Attributes:
        start, end, length: float32, in the unit of the segments; `length` is end - start + 1e-6.
        score: float32; -1 where padded.
        index: position of each detection among all that were given.
        count: [G], how many of a row are real.
    """

    start: Floats
    end: Floats
    length: Floats
    score: Floats
    index: Ints
    count: Ints

    def matrices(self) -> list[NDArray[np.float32] | NDArray[np.int64]]:
        """Return the five [G, W] matrices."""
        return [self.start, self.end, self.length, self.score, self.index]

    def of(self, chosen: NDArray[np.bool_]) -> PaddedGroups:
        """Return the chosen groups alone."""
        start, end, length = self.start[chosen], self.end[chosen], self.length[chosen]
        return PaddedGroups(start, end, length, self.score[chosen], self.index[chosen], self.count[chosen])


def pad_groups(segments: Floats, scores: Floats, members: Ints, starts: Ints, sizes: Ints) -> PaddedGroups:
    """Put the groups `members[starts[g] : starts[g] + sizes[g]]` into rows; padding overlaps with nothing."""
    columns = np.arange(sizes.max())
    real = columns < sizes[:, None]
    index = members[np.where(real, starts[:, None] + columns, 0)]
    start, end = segments[index, 0], segments[index, 1]
    length = end - start + _EPSILON
    for matrix, filler in ((start, np.inf), (end, -np.inf), (length, 1)):
        matrix[~real] = filler
    return PaddedGroups(start, end, length, np.where(real, scores[index], _EMPTY), index, sizes.copy())


def run_soft(
    rows: PaddedGroups, method: str, shape: tuple[float, float, float, float], min_score: float, limit: int
) -> tuple[Ints, Floats]:
    """Apply soft-NMS to every group.

    As in the C loops of other libraries, the detection taken changes places with the one whose turn it is and a dropped
    one with the last, since that order decides between equal scores.

    Args:
        rows: the groups, changed in place.
        method: "gaussian", "linear", "hard" or "adaptive".
        shape: (sigma, iou, t1, t2) of the method.
        min_score: scores below it are dropped.
        limit: most detections kept of a group.

    Returns:
        Indices and new scores of what is kept, group by group in the order taken.
    """
    turns = min(rows.start.shape[1], limit)
    taken = np.full((len(rows.count), turns), -1, dtype=np.int64)
    scores = np.zeros((len(rows.count), turns), dtype=np.float32)
    place = np.arange(len(rows.count))  # where each remaining row's results go
    scratch = np.empty((2, *rows.start.shape), dtype=np.float32)
    for turn in range(turns):
        live = rows.count > turn
        if live.sum() < 0.8 * len(live):
            rows, place = rows.of(live), place[live]
            live = live[live]
        if not len(live):
            break
        start, end, length, score, index = _take_best(rows, turn)
        taken[place, turn] = np.where(live, index, -1)
        scores[place, turn] = score
        width = int(rows.count.max())
        if width <= turn + 1:
            continue
        rest = slice(turn + 1, width)
        a, b = (part[: len(live), : width - turn - 1] for part in scratch)
        np.minimum(rows.end[:, rest], end, out=a)
        a -= np.maximum(rows.start[:, rest], start, out=b)
        np.maximum(a, 0, out=a)
        np.add(rows.length[:, rest], length, out=b)
        b -= a
        a /= b  # the overlap
        remaining = rows.score[:, rest]
        remaining *= _weight(a, b, length, method, shape)
        if min_score > 0:
            _drop(rows, turn + 1, width, np.float32(min_score))
    kept = taken >= 0
    return taken[kept], scores[kept]


def run_greedy(rows: PaddedGroups, iou: float, min_score: float, limit: int) -> tuple[Ints, Floats]:
    """Apply classical NMS to every group; gives indices and (unchanged) scores of what is kept, highest first."""
    order = np.argsort(-rows.score, axis=1, kind="stable")
    score, index = np.take_along_axis(rows.score, order, axis=1), np.take_along_axis(rows.index, order, axis=1)
    start, end, length = (np.take_along_axis(part, order, axis=1) for part in (rows.start, rows.end, rows.length))
    alive = score > min_score if min_score > 0 else score >= 0
    found = np.zeros(len(alive), dtype=np.int64)
    for column in range(alive.shape[1]):
        alive[found >= limit, column] = False
        acts = alive[:, column]
        found += acts
        if not acts.any():
            continue
        rest = slice(column + 1, None)
        shared = np.minimum(end[acts, rest], end[acts, column, None])
        shared -= np.maximum(start[acts, rest], start[acts, column, None])
        np.maximum(shared, 0, out=shared)
        overlap = shared / (length[acts, column, None] + length[acts, rest] - shared)
        alive[acts, rest] &= overlap < np.float32(iou)
    return index[alive], score[alive]


def _take_best(rows: PaddedGroups, turn: int) -> tuple[Floats, Floats, Floats, Floats, Ints]:
    """Take the best remaining detection of every group; the one whose turn it is moves to its place.

    Returns:
        Start, end and length [G, 1], score and index [G].
    """
    numbers = np.arange(len(rows.count))
    best = rows.score[:, turn:].argmax(axis=1) + turn
    start, end, length = rows.start[numbers, best], rows.end[numbers, best], rows.length[numbers, best]
    score, index = rows.score[numbers, best], rows.index[numbers, best]
    for matrix in rows.matrices():
        matrix[numbers, best] = matrix[:, turn]
    return start[:, None], end[:, None], length[:, None], score, index


def _weight(
    overlap: Floats, scratch: Floats, length: Floats, method: str, shape: tuple[float, float, float, float]
) -> Floats:
    """Return the factors [G, W'] of the remaining scores; `overlap` and `scratch` are overwritten."""
    sigma, iou, t1, t2 = (np.float32(value) for value in shape)
    if method == "hard":
        return (overlap < iou).astype(np.float32)
    if method == "linear":
        return np.where(overlap >= iou, 1 - overlap, np.float32(1))
    untouched = overlap < t1 + t2 * length if method == "adaptive" else None
    np.multiply(overlap, overlap, out=scratch)
    scratch /= -sigma
    weight: Floats = np.exp(scratch, out=scratch)
    if untouched is not None:
        weight[untouched] = 1
    return weight


def _drop(rows: PaddedGroups, first: int, width: int, min_score: np.float32) -> None:
    """Drop scores below `min_score` in columns first to width, in place; others from the row's end fill the holes."""
    columns = np.arange(first, width)
    dropped = (rows.score[:, first:width] < min_score) & (columns < rows.count[:, None])
    hit = np.flatnonzero(dropped.any(axis=1))
    if not len(hit):
        return
    dropped, old = dropped[hit], rows.count[hit, None]
    new = old - dropped.sum(axis=1)[:, None]
    hole_row, hole = np.nonzero(dropped & (columns < new))
    fill_row, fill = np.nonzero((~dropped & (columns >= new) & (columns < old))[:, ::-1])  # from the end
    fill = len(columns) - 1 - fill
    for matrix in rows.matrices():
        matrix[hit[hole_row], first + hole] = matrix[hit[fill_row], first + fill]
    gone_row, gone = np.nonzero((columns >= new) & (columns < old))
    rows.score[hit[gone_row], first + gone] = _EMPTY
    rows.count[hit] = new[:, 0]
