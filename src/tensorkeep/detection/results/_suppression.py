"""The turns of non-maximum suppression on padded matrices: one row a group, one column a detection (see `nms`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_EPSILON = np.float32(1e-6)  # added to every length, so that a segment of no length can be divided by
_EMPTY = np.float32(-1)  # score of a padded column: below every real one


@dataclass
class Rows:
    """G groups of at most W detections: float32 matrices [G, W], `index` [G, W] their positions, `count` [G]."""

    start: Floats
    end: Floats
    length: Floats
    score: Floats
    index: Ints
    count: Ints

    def matrices(self) -> list[NDArray[np.float32] | NDArray[np.int64]]:
        """The five [G, W] matrices."""
        return [self.start, self.end, self.length, self.score, self.index]

    def keep_rows(self, rows: NDArray[np.bool_]) -> Rows:
        """The chosen rows alone."""
        return Rows(
            self.start[rows], self.end[rows], self.length[rows], self.score[rows], self.index[rows], self.count[rows]
        )


def pad_groups(segments: Floats, scores: Floats, members: Ints, starts: Ints, sizes: Ints) -> Rows:
    """Groups `members[starts[g] : starts[g] + sizes[g]]` as rows; padding has score -1 and meets nothing."""
    columns = np.arange(sizes.max())
    real = columns < sizes[:, None]
    index = members[np.where(real, starts[:, None] + columns, 0)]
    start, end = segments[index, 0], segments[index, 1]
    length = end - start + _EPSILON
    for matrix, filler in ((start, np.inf), (end, -np.inf), (length, 1)):
        matrix[~real] = filler
    return Rows(start, end, length, np.where(real, scores[index], _EMPTY), index, sizes.copy())


def run_soft(
    rows: Rows, method: str, shape: tuple[float, float, float, float], min_score: float, limit: int
) -> tuple[Ints, Floats]:
    """Soft-NMS of every row: indices and scores of what is kept, row by row in the order taken.

    shape: (sigma, iou, t1, t2). As in the C loops in use, the taken detection changes places with the one whose turn
    it is and a dropped one with the last, since that order decides between equal scores.
    """
    turns = min(rows.start.shape[1], limit)
    taken = np.full((len(rows.count), turns), -1, dtype=np.int64)
    scores = np.zeros((len(rows.count), turns), dtype=np.float32)
    place = np.arange(len(rows.count))  # where each remaining row's results go
    scratch = np.empty((2, *rows.start.shape), dtype=np.float32)
    for turn in range(turns):
        live = rows.count > turn
        if live.sum() < 0.8 * len(live):
            rows, place = rows.keep_rows(live), place[live]
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


def run_greedy(rows: Rows, iou: float, min_score: float, limit: int) -> tuple[Ints, Floats]:
    """Classical NMS of every row: indices and (unchanged) scores of what is kept, row by row, highest first."""
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


def _take_best(rows: Rows, turn: int) -> tuple[Floats, Floats, Floats, Floats, Ints]:
    """The best remaining detection of every row ([G, 1] start, end, length; [G] score, index); its place is refilled."""
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
    """What the remaining scores are multiplied with; `overlap` is overwritten."""
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


def _drop(rows: Rows, first: int, width: int, min_score: np.float32) -> None:
    """Drop scores below `min_score` from columns first..width: survivors from the row's end fill the holes, in place."""
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
