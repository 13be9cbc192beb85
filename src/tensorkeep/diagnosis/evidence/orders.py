"""Find which row of the reference each row of a tensor holds, and the simplest rule that describes it."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from tensorkeep.diagnosis.evidence.statistics import Array, rows_of

Index = np.ndarray[Any, np.dtype[np.int64]]
_SEARCHED = 4096  # rows of a matrix up to which each is looked for among all
_NEAR = 0.5  # cosine of a row with itself after rounding or training: every other row is twice as far or further
_MATCHED = 0.9  # part of the rows that must be found in the reference; a shift by one loses a row


@dataclass(frozen=True)
class Order:
    """An order of rows (columns: `axis` 1): row i holds the reference's row `index[i]`, or none where that is -1."""

    axis: int
    index: Index

    @property
    def unmatched(self) -> int:
        """The number of rows that are no row of the reference."""
        return int(np.count_nonzero(self.index < 0))

    @property
    def moved(self) -> int:
        """The number of rows that are another row of the reference than their own."""
        known = self.index >= 0
        return int(np.count_nonzero(known & (self.index != np.arange(self.index.size))))

    @property
    def invertible(self) -> bool:
        """Whether every row of the reference is there once, so that the order can be undone exactly."""
        return self.unmatched == 0 and bool(np.array_equal(np.sort(self.index), np.arange(self.index.size)))

    @property
    def inverse(self) -> Index:
        """The row in which each row of the reference lies, for an invertible order."""
        return np.argsort(self.index, kind="stable")


def row_digests(a: Array) -> list[int]:
    """Return the xxh3_64 digest of each row's bytes."""
    matrix = np.ascontiguousarray(rows_of(a))
    data, width = matrix.view(np.uint8).reshape(-1).data, matrix.shape[1] * matrix.itemsize
    return [xxhash.xxh3_64_intdigest(data[at : at + width]) for at in range(0, len(data), width)] if width else []


def find_order(mine: Array, theirs: Array, axis: int = 0) -> Order | None:
    """Find the rows of one tensor among those of another, by their bytes.

    Equal rows are interchangeable: a row stays where it is if it can, and twins are given out in order.

    Args:
        mine: The checkpoint's values.
        theirs: The reference's values.
        axis: 0 for rows, 1 for columns.

    Returns:
        The order; None where more than a tenth of the rows is not found, or no row has moved.
    """
    a, b = (rows_of(v).T if axis else v for v in (mine, theirs))
    ours, wanted = row_digests(a), row_digests(b)
    places: dict[int, list[int]] = defaultdict(list)
    for at, digest in enumerate(wanted):
        if at >= len(ours) or ours[at] != digest:
            places[digest].append(at)
    index = np.full(len(ours), -1, np.int64)
    given: dict[int, int] = defaultdict(int)
    known = set(wanted)
    for at, digest in enumerate(ours):
        if at < len(wanted) and wanted[at] == digest:
            index[at] = at
        elif places[digest]:
            turn = given[digest]
            index[at] = places[digest][min(turn, len(places[digest]) - 1)]
            given[digest] += 1
        elif digest in known:
            index[at] = wanted.index(digest)
    order = Order(axis, index)
    return order if order.moved and order.unmatched <= (1 - _MATCHED) * len(ours) else None


def find_order_loosely(mine: Array, theirs: Array, axis: int = 0) -> Order | None:
    """Find rows that were also rounded or trained among those of the reference, each by its nearest direction.

    All rows of small matrices; of large ones a sample, which can only show that all moved by one and the same number.
    """
    a, b = (rows_of(v).T if axis else rows_of(v) for v in (mine, theirs))
    rows = len(b)
    if a.shape != b.shape or a.shape[1] < 32 or rows < 8:
        return None
    asked = np.arange(rows) if rows <= _SEARCHED else np.linspace(0, rows - 1, 128).astype(np.int64)
    wanted = _directions(a[asked])
    best, nearest = np.full(len(asked), -1.0, np.float32), np.zeros(len(asked), np.int64)
    second = best.copy()
    for at in range(0, rows, 4096):
        alike = wanted @ _directions(b[at : at + 4096]).T
        found = alike.argmax(axis=1)
        value = alike[np.arange(len(asked)), found]
        alike[np.arange(len(asked)), found] = -1
        second = np.maximum(np.maximum(second, alike.max(axis=1)), np.minimum(value, best))
        nearest, best = np.where(value > best, found + at, nearest), np.maximum(value, best)
    sure = (best > _NEAR) & (1 - best < 0.5 * (1 - second))
    if np.mean(sure) < _MATCHED:
        return None
    if rows <= _SEARCHED:
        order = Order(axis, np.where(sure, nearest, -1))
        return order if order.moved > 0.5 * rows or (order.moved and order.invertible) else None
    offsets, times = np.unique((asked - nearest) % rows, return_counts=True)
    by = int(offsets[times.argmax()])
    if times.max() < _MATCHED * len(asked) or by == 0:
        return None
    return Order(axis, (np.arange(rows) - by) % rows)


def _directions(rows: Array) -> Array:
    """Return the rows scaled to length 1, in float32."""
    some = np.nan_to_num(rows.astype(np.float32))
    made: Array = some / np.maximum(np.linalg.norm(some, axis=1, keepdims=True), 1e-20)
    return made


def describe(order: Order, unit: int = 0) -> tuple[str, dict[str, Any]]:
    """Describe an order in words and numbers. `unit`: the rows of a head, where rows make up heads."""
    index, count = order.index, order.index.size
    known = index >= 0
    here = np.arange(count)
    what = "columns" if order.axis else "rows"
    offsets = (here - index)[known & (index != here)]
    values, times = np.unique(offsets, return_counts=True)
    common, often = int(values[times.argmax()]), int(times.max())
    evidence: dict[str, Any] = {"axis": what, "moved": order.moved, "unmatched": order.unmatched, "of": count}
    rolled = np.unique((here - index)[known] % count)
    if order.unmatched == 0 and rolled.size == 1:
        by = int(rolled[0]) if rolled[0] <= count // 2 else int(rolled[0]) - count
        return f"{what} rolled by {_in_units(by, unit, what)}", evidence | {"rule": "roll", "by": by}
    if often >= 0.9 * offsets.size and offsets.size >= 0.5 * count:
        return f"{what} shifted by {common}", evidence | {"rule": "shift", "by": common}
    if np.array_equal(index, count - 1 - here):
        return f"{what} reversed", evidence | {"rule": "reversed"}
    return _blocks(order, unit, what, evidence)


def _blocks(order: Order, unit: int, what: str, evidence: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Describe an order that is neither a roll, a shift nor a reversal."""
    index, count = order.index, order.index.size
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    block = math.gcd(count, *(int(b) for b in breaks[:100_000])) if breaks.size else count
    if order.unmatched == 0 and 1 < block < count and not (index[::block] % block).any():
        sequence = [int(v) for v in index[::block] // block]
        name = "heads" if unit and block == unit else f"blocks of {block} {what}"
        return f"{len(sequence)} {name} in another order", evidence | {
            "rule": "blocks",
            "block": block,
            "order": sequence[:64],
        }
    for across in (n for n in range(2, min(count, 4096)) if count % n == 0):
        if np.array_equal(index, np.arange(count).reshape(across, -1).T.ravel()):
            return f"{what} regrouped ({across} x {count // across} read as {count // across} x {across})", evidence | {
                "rule": "regrouped",
                "across": across,
            }
    if order.moved <= 8:
        pairs = {int(i): int(index[i]) for i in np.flatnonzero((index >= 0) & (index != np.arange(count)))}
        return f"{order.moved} {what} changed places", evidence | {"rule": "swap", "rows": pairs}
    return f"{order.moved} of {count} {what} in another order", evidence | {"rule": "permutation"}


def _in_units(by: int, unit: int, what: str) -> str:
    """Say a distance in heads where it is whole heads."""
    return f"{by // unit} heads" if unit and by % unit == 0 else f"{by} {what}"
