"""Packing: decide which pieces of which documents lie in each row of tokens, from their lengths alone.

A row is a list of segments (pieces of documents). A segment sees itself only, and its first token is no target, so the
loss of a packed row is the sum of the losses of its segments, whatever lies beside them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tensorkeep.errors import TensorkeepError

Packing = Literal["none", "concatenate", "first_fit"]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Which segments of the token stream lie in each row.

    Args:
        starts: first token of each segment, int64 `[segments]`.
        stops: token behind the last one of each segment, int64 `[segments]`.
        first: row r has the segments `first[r] : first[r + 1]`, int64 `[rows + 1]`.
    """

    starts: Ints
    stops: Ints
    first: Ints

    def __len__(self) -> int:
        return len(self.first) - 1

    def segments(self, row: int) -> list[tuple[int, int]]:
        """List (start, stop) of each segment of a row, in tokens of the whole stream."""
        a, b = int(self.first[row]), int(self.first[row + 1])
        return [(int(s), int(e)) for s, e in zip(self.starts[a:b], self.stops[a:b])]


def plan(offsets: Any, length: int, packing: Packing) -> RowPlan:
    """Lay documents out in rows of tokens.

    Args:
        offsets: document d is the tokens `offsets[d] : offsets[d + 1]` of the stream, `[documents + 1]`.
        length: at most so many tokens a row.
        packing: `none`: a row a document (too long ones were cut when they were tokenized). `first_fit`: documents
            whole where they fit, longer ones in pieces, each put where it leaves the least room. `concatenate`: the
            stream cut every `length` tokens; a cut document goes on in the next row, which repeats one token so that
            every token is a target once.

    Raises:
        TensorkeepError: `length` is below 2, or no document has two tokens.

    Example:
        >>> [plan([0, 5, 8, 10], 5, "first_fit").segments(row) for row in range(2)]
        [[(0, 5)], [(5, 8), (8, 10)]]
    """
    if length < 2:
        raise TensorkeepError(f"a row of {length} tokens has no target", where="data.length", hint="at least 2")
    bounds = np.asarray(offsets, np.int64)
    if packing == "none":
        return RowPlan(bounds[:-1], bounds[1:], np.arange(len(bounds), dtype=np.int64))
    return _cut(bounds, length) if packing == "concatenate" else _fitted(bounds, length)


def _cut(bounds: Ints, length: int) -> RowPlan:
    """Cut the stream every `length` tokens, one token in common, and each row at the ends of documents."""
    total = int(bounds[-1])
    at = np.arange(0, max(total - 1, 1), length - 1, dtype=np.int64)
    ends = np.minimum(at + length, total)
    starts, stops, first = [], [], [0]
    inner = np.searchsorted(bounds, at, side="right")  # the first boundary behind each row's start
    for begin, end, next_bound in zip(at.tolist(), ends.tolist(), inner.tolist()):
        place = begin
        while place < end:
            stop = min(int(bounds[next_bound]), end)
            if stop - place > 1:  # a single token has nothing to predict
                starts.append(place)
                stops.append(stop)
            place, next_bound = stop, next_bound + 1
        if len(starts) > first[-1]:
            first.append(len(starts))
    return _rows(starts, stops, first)


def _pieces(bounds: Ints, length: int) -> tuple[Ints, Ints]:
    """Cut documents longer than `length` tokens, one token in common; (starts, stops) of all pieces."""
    lengths = np.diff(bounds)
    if len(lengths) == 0 or int(lengths.max()) <= length:
        return bounds[:-1], bounds[1:]
    starts, stops = [], []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        cuts = list(range(begin, max(end - 1, begin + 1), length - 1))
        starts += cuts
        stops += [min(cut + length, end) for cut in cuts]
    return np.asarray(starts, np.int64), np.asarray(stops, np.int64)


def _fitted(bounds: Ints, length: int) -> RowPlan:
    """Put the longest piece first, each into the row with the least room that is enough (best-fit decreasing)."""
    starts, stops = _pieces(bounds, length)
    sizes = stops - starts
    kept = np.flatnonzero(sizes > 1)
    rows: list[list[int]] = []
    rooms: list[int] = []  # rooms that some row has, sorted
    having: dict[int, list[int]] = {}  # room -> rows
    for piece in kept[np.argsort(-sizes[kept], kind="stable")].tolist():
        size = int(sizes[piece])
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[place]
            row = having[room].pop()
            if not having[room]:
                del having[room], rooms[place]
        rows[row].append(piece)
        left = room - size
        if left > 1:
            if left not in having:
                insort(rooms, left)
            having.setdefault(left, []).append(row)
    flat = [piece for row in rows for piece in sorted(row)]
    first = np.cumsum([0, *(len(row) for row in rows)])
    return _rows(starts[flat], stops[flat], first)


def _rows(starts: Any, stops: Any, first: Any) -> RowPlan:
    """The plan of these arrays, or an error where it has no row."""
    if len(first) < 2:
        raise TensorkeepError("no document has two tokens", where="data.files")
    return RowPlan(np.asarray(starts, np.int64), np.asarray(stops, np.int64), np.asarray(first, np.int64))
