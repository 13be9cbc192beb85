"""Say of a tensor which rows of which other tensors it is made of (`conversion.rows` cuts stored parts accordingly).

A row is what lies along the last dimension: a stack of experts [experts, rows, columns] has experts * rows of them, a
vector one for each element. Files and live models differ by little else: rows are stacked, joined, split, reordered; a
few matrices are turned, so that rows of one are columns of the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorkeep.conversion.plan import RowPermutation
from tensorkeep.conversion.rows import Run as Run
from tensorkeep.conversion.rows import row_count as row_count
from tensorkeep.conversion.rows import taken as taken

Codes = np.ndarray[Any, np.dtype[np.int64]]
_SHIFT = 40  # bits for the row; the tensor's number stands above them
_MOST = 4096  # runs that a tensor may be made of before it counts as one that is reordered in a way nobody here knows


def numbered(number: int, shape: Sequence[int]) -> Codes:
    """Return a tensor of the same rows, one column wide, that holds for each row where it is from.

    Args:
        number: of the tensor.
        shape: its shape.
    """
    thin = tuple(shape) if len(shape) < 2 else (*shape[:-1], 1)
    return (np.arange(row_count(shape), dtype=np.int64) + (number << _SHIFT)).reshape(thin)


def runs(codes: Codes, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> tuple[Run, ...] | None:
    """Describe where a tensor's rows are from.

    Args:
        codes: one for each of its rows, from `numbered`.
        names: of the numbered tensors.
        shapes: theirs.

    Returns:
        The runs in the order of the rows; None where the rows are shuffled in a way that is not described here.
    """
    codes = codes.reshape(-1)
    numbers, rows = codes >> _SHIFT, codes & ((1 << _SHIFT) - 1)
    if numbers[0] == numbers[-1] and np.array_equal(codes, np.arange(codes[0], codes[0] + len(codes))):
        span = (int(rows[0]), int(rows[-1]) + 1)
        return (Run(names[numbers[0]], None if span == (0, row_count(shapes[numbers[0]])) else span),)
    out: list[Run] = []
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for low, high in itertools.pairwise(edges):
        number, piece = int(numbers[low]), rows[low:high]
        first = int(piece.min())
        found: list[tuple[tuple[int, int], RowPermutation | None]] | None = None
        if np.array_equal(np.sort(piece), np.arange(first, first + len(piece))):
            order = piece - first
            if np.array_equal(order, np.arange(len(order))):
                found = [((first, first + len(piece)), None)]
            elif (turn := _permutation(order)) is not None:
                found = [((first, first + len(piece)), turn)]
        if found is None:
            cuts = [0, *(np.flatnonzero(np.diff(piece) != 1) + 1).tolist(), len(piece)]
            found = [((int(piece[a]), int(piece[a]) + b - a), None) for a, b in itertools.pairwise(cuts)]
        whole = (0, row_count(shapes[number]))
        out += [Run(names[number], None if span == whole else span, turn) for span, turn in found]
        if len(out) > _MOST:
            return None
    return tuple(out)


def turned_round(pieces: Sequence[tuple[int, int, Run]], rows: int) -> tuple[Run, ...] | None:
    """Return the runs that make up a tensor, from those that say where its rows went.

    Args:
        pieces: first row and the one after the last, and where these are now.
        rows: of the tensor.

    Returns:
        The runs in the order of its rows; None where rows are missing, or they lie in too many places.
    """
    out: list[Run] = []
    at = 0
    for first, last, run in sorted(pieces, key=lambda piece: piece[0]):
        if first < at:
            continue  # saved twice
        if first > at:
            return None
        before = out[-1] if out else None
        joins = before is not None and before.name == run.name and before.permute is run.permute is None
        if joins and before and before.rows and run.rows and before.rows[1] == run.rows[0]:
            out[-1] = Run(run.name, (before.rows[0], run.rows[1]))
        else:
            out.append(run)
        at = last
    return tuple(out) if at == rows and len(out) <= _MOST else None


def _permutation(order: Codes) -> RowPermutation | None:
    """Return the permutation between RoPE's layouts (or of interleaved gates) that gives this order of rows."""
    count = len(order)
    moved = np.flatnonzero(order != np.arange(count))
    for block in (b for b in range(4, count + 1, 2) if count % b == 0 and moved[0] < b):
        one = order[:block]
        if not np.array_equal(np.sort(one), np.arange(block)):
            continue
        if not np.array_equal(order, (np.arange(0, count, block)[:, None] + one).ravel()):
            continue
        for to in ("half", "pairs"):
            turn = RowPermutation(block, block, to)
            if np.array_equal(one, turn.order()):
                return turn
    return None
