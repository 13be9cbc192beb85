"""Find the narrower dtype, or the quantization, that a tensor's values went through before they were stored again."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from tensorkeep.diagnosis.evidence.bytewise import bits_equal
from tensorkeep.diagnosis.evidence.statistics import Array, largest, pieces_of, relation, sampled

# the narrow formats by the words that findings use
GRIDS: dict[str, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp8 e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8 e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "fp8 e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "fp8 e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
BY_ROW = "8-bit integers by row"
SCALED = {"fp8 e4m3": 448.0, "fp8 e5m2": 57344.0}  # largest values, which per-tensor scaling maps the largest weight to
_BLOCKS = (32, 64, 128)  # sides of blocks with a factor of their own: smaller ones hold too few values to tell
_RESEMBLES = 0.9  # r that 4-bit quantization keeps with its source: 0.99 and more (8-bit: 0.9999)


class Cast(NamedTuple):
    """What a tensor's values went through: a narrower dtype or a form of quantization, in words.

    `overflowed` values became infinite or NaN, `vanished` ones zero. `exact`: casting the reference gives every value,
    so that the reference holds all that the tensor holds and more.
    """

    grid: str
    overflowed: int
    vanished: int
    exact: bool


def find_cast(mine: Array, theirs: Array) -> Cast | None:
    """Find the cast that makes the reference into the tensor.

    Args:
        mine: The checkpoint's values, as stored.
        theirs: The reference's, of the same shape, in the same dtype.

    Returns:
        The cast, proven value by value for plain casts and by the grid of values for others; None where none fits.
    """
    for name, dtype in GRIDS.items():
        if dtype.itemsize > mine.dtype.itemsize or dtype == mine.dtype:
            continue
        few = slice(0, 4)
        with np.errstate(over="ignore", invalid="ignore"):
            if mine.ndim and not bits_equal(mine[few], theirs[few].astype(dtype).astype(mine.dtype)):
                continue
            lost = _through(mine, theirs, dtype)
        if lost is not None:
            return Cast(name, *lost, True)
    narrow = _narrow(mine, theirs)
    return Cast(narrow, 0, 0, False) if narrow else _quantized(mine, theirs)


def lies_on(values: Array, grid: str) -> bool:
    """Say whether all values lie on the grid of a dtype that is narrower than their own.

    Args:
        values: A tensor's values, as stored.
        grid: A word of GRIDS, or BY_ROW.

    Returns:
        Whether a cast to that dtype and back gives every bit, and the values are not the same few ones.
    """
    if grid == BY_ROW:
        return values.ndim > 1 and _on_row_grid(np.nan_to_num(values.reshape(len(values), -1).astype(np.float32)))
    dtype = GRIDS[grid]
    if dtype.itemsize >= values.dtype.itemsize or np.unique(sampled(values).astype(np.float32)).size < 8:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return all(bits_equal(part.astype(dtype).astype(part.dtype), part) for part in pieces_of(values))


def _narrow(mine: Array, theirs: Array) -> str | None:
    """Return the 8-bit float on whose grid all of a tensor lies and the reference does not: it was rounded there."""
    if mine.size < 1024 or mine.ndim < 2:
        return None
    grid = on_grid(mine)
    return grid if grid is not None and on_grid(theirs) is None else None


def _through(mine: Array, theirs: Array, dtype: np.dtype) -> tuple[int, int] | None:
    """Count the values that overflowed and vanished in a cast; None where the cast does not explain every value."""
    overflowed = vanished = 0
    for a, b in zip(pieces_of(mine), pieces_of(theirs)):
        made = b.astype(dtype).astype(a.dtype)
        if not bits_equal(a, made):
            return None
        overflowed += int(np.count_nonzero(np.isfinite(b) & ~np.isfinite(made)))
        vanished += int(np.count_nonzero((b != 0) & (made == 0)))
    return overflowed, vanished


def _quantized(mine: Array, theirs: Array) -> Cast | None:
    """Find a scaled 8- or 4-bit grid: few distinct values a tensor, row or block of 32 where the reference has many."""
    if mine.size < 1024 or mine.ndim < 2 or relation(mine, theirs).correlation < _RESEMBLES:
        return None
    zeros = int(np.count_nonzero((sampled(theirs) != 0) & (sampled(mine) == 0)))
    a, b = (np.nan_to_num(sampled(v).astype(np.float32)) for v in (mine, theirs))
    top = largest(theirs)
    for name, dtype in GRIDS.items():
        limit = SCALED.get(name)
        if limit and top > 0:
            scale = np.float32(top / limit)
            made = (b / scale).astype(dtype).astype(np.float32) * scale
            if (
                np.abs(made - a).max() <= 2.0**-7 * np.abs(a).max()
                and np.mean(np.abs(made - a) <= 2.0**-8 * np.abs(made)) > 0.99
            ):
                return Cast(f"{name}, scaled by tensor", 0, zeros, False)
    for bits, per in ((4, "block"), (8, "row")):
        lines = [v.reshape(len(v), -1) for v in (a, b)]
        if per == "block":
            lines = [v[:, : v.shape[1] // 32 * 32].reshape(-1, 32) for v in lines]
        ours, wanted = (_distinct(v) for v in lines)
        if lines[0].shape[1] >= 32 and _fits(bits, ours, wanted, lines):
            return Cast(BY_ROW if per == "row" else f"{bits}-bit integers by {per}", 0, zeros, False)
    return Cast("8-bit codes by block", 0, zeros, False) if _few_values(mine, theirs) else None


def _few_values(mine: Array, theirs: Array) -> bool:
    """Say whether square blocks hold no more values than 8 bits can tell apart, where the reference's hold more."""
    for side in _BLOCKS:
        squares = [(slice(at, at + side), slice(at, at + side)) for at in range(0, 4 * side, side)]
        squares = [s for s in squares if s[0].stop <= min(mine.shape)] if mine.ndim == 2 else []
        counts = [tuple(np.unique(v[s].astype(np.float32)).size for v in (mine, theirs)) for s in squares]
        if counts and all(ours <= 256 and wanted > 1.5 * ours for ours, wanted in counts):
            return True
    return False


def _fits(bits: int, ours: float, wanted: float, lines: list[Array]) -> bool:
    """Say whether `lines` of the tensor and of the reference fit a quantization to so many bits."""
    if bits == 4:
        return ours <= 16 and wanted > 1.5 * ours
    return _on_row_grid(lines[0]) and not _on_row_grid(lines[1])


def _on_row_grid(rows: Array) -> bool:
    """Say whether each row's values are whole multiples of its largest over 127, up to rounding to a 16-bit float."""
    top = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows[(top > 0).ravel()]
    top = top[top > 0].reshape(-1, 1)
    if not len(rows):
        return False
    steps = rows / (top / 127)
    small = np.abs(steps) < 16  # bf16 rounds larger multiples by more than the test allows
    off = np.abs(steps - np.round(steps))[small]
    return bool(off.size and float(np.mean(off < 0.08)) > 0.98)


def _distinct(lines: Array) -> float:
    """Return the mean number of distinct values in a line."""
    ordered = np.sort(lines[:4096], axis=1)
    return float((np.diff(ordered, axis=1) != 0).sum(axis=1).mean() + 1)


def on_grid(values: Array) -> str | None:
    """Return the 8-bit float format whose grid all values of a wider tensor lie on; None for none.

    Of the values of a tensor trained in bf16 about 8 % lie on the grid of e4m3 by chance.
    """
    some = sampled(values)
    if values.dtype.itemsize < 2 or some.size < 1024 or np.unique(some.astype(np.float32)).size < 8:
        return None
    for name in ("fp8 e4m3", "fp8 e5m2"):
        with np.errstate(over="ignore", invalid="ignore"):
            if bits_equal(some.astype(GRIDS[name]).astype(values.dtype), some):
                return name
    return None
