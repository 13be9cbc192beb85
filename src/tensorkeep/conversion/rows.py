"""Cut tensors by rows: which stored parts hold some rows of a tensor that is itself made of stored parts.

A row is what lies along the last dimension: a stack of experts [experts, rows, columns] has experts * rows of them, a
vector one for each element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tensorkeep.conversion.plan import HfTensor, Part, RowPermutation
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView


class Run(NamedTuple):
    """Rows of one tensor that lie together in another.

    Args:
        name: the tensor that they are taken from.
        rows: first row and the one after the last; None for all.
        permute: how they are reordered; None for not at all.
        turned: whether they are the other's columns: of a whole matrix, or of each matrix of a whole stack.
    """

    name: str
    rows: tuple[int, int] | None = None
    permute: RowPermutation | None = None
    turned: bool = False


def row_count(shape: Sequence[int]) -> int:
    """Return the number of rows of a tensor.

    Args:
        shape: its shape.

    Example:
        >>> row_count((4, 8, 16)), row_count((16,)), row_count(())
        (32, 16, 1)
    """
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def taken(run: Run, tensor: HfTensor, sources: Sequence[StateView]) -> tuple[Part, ...]:
    """Return the stored parts of a run of a tensor's rows.

    Args:
        run: rows of `tensor`.
        tensor: which is made of stored parts itself.
        sources: the views that the parts are read from.

    Raises:
        TensorkeepError: S01 where the tensor has fewer rows; K06 where its rows are reordered across the run's edges,
            or turned.
    """
    if run.turned:
        raise TensorkeepError(f"rows of {tensor.name} are columns of what is made of it", code="K06")
    parts: list[Part] = []
    first, last = run.rows or (0, row_count(tensor.shape))
    at = 0
    if (first, last) == (0, row_count(tensor.shape)):  # whatever shape its bytes are stored in
        parts, at = list(tensor.parts), last
    for part in tensor.parts if not parts else ():
        shape = sources[part.source][part.name].shape
        count = _rows_of(part, shape)
        low, high = max(first - at, 0), min(last - at, count)
        if low < high:
            parts += _narrowed(part, shape, low, high, count)
        at += count
    if at < last:
        raise TensorkeepError(f"{tensor.name} has {at} rows, {last} are asked for", code="S01")
    if run.permute is None:
        return tuple(parts)
    if len(parts) != 1:
        raise TensorkeepError(f"{tensor.name} lies in {len(parts)} pieces whose rows must be reordered", code="K06")
    return (parts[0].permuted(run.permute),)


def _rows_of(part: Part, shape: Sequence[int]) -> int:
    """Return how many rows a part has."""
    if part.rows is None:
        return row_count(shape)
    inner = shape[1:-1] if part.inner is None else shape[2:-1]
    deep = 1 if part.inner is None else part.inner[1] - part.inner[0]
    return (part.rows[1] - part.rows[0]) * deep * math.prod(inner)


def _narrowed(part: Part, shape: Sequence[int], low: int, high: int, count: int) -> list[Part]:
    """Return a part's rows from `low` to `high` as parts."""
    if (low, high) == (0, count):
        return [part]
    unit = math.prod(shape[1:-1])  # rows below one index of the first dimension
    across = any(low % p.block or high % p.block or (unit > 1 and unit % p.block) for p in part.permutes)
    if part.turned or across:
        raise TensorkeepError(f"rows {low} to {high} of {part.name} are reordered across their edges", code="K06")
    base = (part.rows[0] if part.rows else 0) * unit
    base += part.inner[0] * math.prod(shape[2:-1]) if part.inner else 0
    out, at = [], base + low
    while at < base + high:
        row, rest = divmod(at, unit)
        end = min(base + high, (row + 1) * unit)
        if rest == 0 and (base + high) // unit > row:  # as many whole ones as there are
            end = (base + high) // unit * unit
            out.append(part._replace(rows=(row, end // unit), inner=None))
        else:
            deep = math.prod(shape[2:-1])
            if rest % deep or (end - row * unit) % deep:
                raise TensorkeepError(f"rows {low} to {high} of {part.name} are no whole rows of it", code="K06")
            out.append(part._replace(rows=(row, row + 1), inner=(rest // deep, (end - row * unit) // deep)))
        at = end
    return out
