"""Measure how a tensor relates to another, and whether it looks freshly initialised.

Large tensors are judged by a sample of whole rows, evenly spread and the same on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Floats = np.ndarray[Any, np.dtype[np.float64]]
_SAMPLE = 1 << 16  # elements: the error of a correlation is then 0.004
# An element this many times larger than the largest of the other side says nothing of the rest (a flipped exponent).
_OUTLIER = 1e3


@dataclass(frozen=True)
class Relation:
    """How a tensor a relates to another b, measured on a sample of `count` elements.

    `correlation` is Pearson's r. `scale` is the factor that brings b nearest to a, and `residual` the part of a's norm
    that remains then. `relative` is the norm of a - b over that of b.
    """

    correlation: float
    scale: float
    residual: float
    relative: float
    count: int

    @property
    def unrelated(self) -> bool:
        """Whether |r| is below 0.05, or below 4 standard errors for small tensors."""
        return abs(self.correlation) < max(0.05, 4 / math.sqrt(max(self.count, 1)))

    def to_json(self) -> dict[str, float]:
        """Return the figures as evidence of a finding."""
        return {
            "correlation": rounded(self.correlation),
            "scale": rounded(self.scale),
            "relative_difference": rounded(self.relative),
        }


def rows_of(a: Array) -> Array:
    """Return any tensor as a matrix: its first dimension by all the others; a vector as one column.

    [d0, d1, ...] -> [d0, d1 * ...]
    """
    return a.reshape(a.shape[0], -1) if a.ndim > 1 else a.reshape(-1, 1)


def pieces_of(a: Array, count: int = 1 << 22) -> Iterator[Array]:
    """Yield the elements in order, a few million at a time, so that what is computed of them stays small."""
    flat = a.reshape(-1)
    yield from (flat[at : at + count] for at in range(0, flat.size, count))


def largest(a: Array) -> float:
    """Return the largest finite magnitude; 0 where there is none."""
    found = 0.0
    for piece in pieces_of(a):
        values = np.abs(piece.astype(np.float32))
        found = max(found, float(np.where(np.isfinite(values), values, 0).max(initial=0.0)))
    return found


def sampled(a: Array, most: int = _SAMPLE) -> Array:
    """Pick whole rows, evenly spread, with about `most` elements in all; everything of a small tensor."""
    if a.size <= most:
        return rows_of(a) if a.ndim else a.reshape(1, 1)
    matrix = rows_of(a)
    count = max(min(most // max(matrix.shape[1], 1), matrix.shape[0]), 2)
    picked = matrix[np.linspace(0, matrix.shape[0] - 1, count).astype(np.int64)]
    return picked[:, :: max(picked.size // most, 1)]


def relation(a: Array, b: Array) -> Relation:
    """Measure how a tensor relates to another of the same shape.

    Args:
        a: The checkpoint's values.
        b: The reference's values, of the same shape.

    Returns:
        The figures over a sample. Elements that are not finite on either side are left out, and those of `a` that are
        a thousand times larger than anything in `b`: a flipped exponent bit says nothing of the rest.
    """
    x, y = (sampled(v).astype(np.float64).ravel() for v in (a, b))
    kept = np.isfinite(x) & np.isfinite(y)
    if kept.any():
        limit = _OUTLIER * max(float(np.abs(y[kept]).max()), 1e-30)
        kept &= np.abs(x) <= limit
    x, y = x[kept], y[kept]
    if x.size == 0:
        return Relation(0.0, 0.0, 1.0, math.inf, 0)
    xx, yy, xy = float(x @ x), float(y @ y), float(x @ y)
    scale = xy / yy if yy > 0 else 0.0
    residual = math.sqrt(max(xx - scale * xy, 0.0) / xx) if xx > 0 else 0.0
    difference = x - y
    relative = math.sqrt(float(difference @ difference) / yy) if yy > 0 else (0.0 if xx == 0 else math.inf)
    return Relation(correlation(x, y), scale, residual, relative, x.size)


def correlation(x: Floats, y: Floats) -> float:
    """Return Pearson's r; 1 for equal constants, 0 where only one side is constant."""
    u, v = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(u @ u) * float(v @ v))
    if norm <= 1e-300:
        return 1.0 if np.array_equal(x, y) else 0.0
    return float(u @ v) / norm


@dataclass(frozen=True)
class Spread:
    """How the values of a tensor spread, which tells an initialiser's random numbers from trained weights.

    `kurtosis` is 3 for a normal and 1.8 for a uniform distribution. `row_spread` and `column_spread` say how much the
    norms of rows and columns vary, over what independent elements would give: sqrt((kurtosis - 1) / 4n). On the
    matrices of SmolLM2 (135 M) they are 1.23 and more; on freshly initialised ones of the same shapes 0.88 to 1.07.
    """

    mean: float
    std: float
    kurtosis: float
    row_spread: float
    column_spread: float
    count: int

    @property
    def fresh(self) -> bool:
        """Whether elements look drawn one by one from a normal, truncated normal or uniform around zero.

        On the 211 matrices of SmolLM2 (135 M) kurtosis is 3.12 and more, on freshly initialised ones 2.98 to 3.03;
        the allowances are five standard errors of the sample.
        """
        if self.count < 64 or self.std == 0:
            return False
        error = 5 * math.sqrt(24 / self.count)
        shape = 1.8 - error <= self.kurtosis <= 3.06 + error
        return (
            shape
            and self.row_spread < 1.2 + error
            and self.column_spread < 1.2 + error
            and abs(self.mean) < 0.05 * self.std + 5 * self.std / math.sqrt(self.count)
        )

    def to_json(self) -> dict[str, float]:
        """Return the figures as evidence of a finding."""
        return {
            "std": rounded(self.std),
            "kurtosis": rounded(self.kurtosis),
            "row_spread": rounded(self.row_spread),
            "column_spread": rounded(self.column_spread),
        }


def spread(a: Array) -> Spread:
    """Measure how the values of a tensor spread, on a sample."""
    x = sampled(a).astype(np.float64)
    x = np.where(np.isfinite(x), x, 0.0)
    mean, std = float(x.mean()), float(x.std())
    if std == 0:
        return Spread(mean, 0.0, 0.0, 0.0, 0.0, x.size)
    kurtosis = float(np.mean(np.square(np.square((x - mean) / std))))
    return Spread(mean, std, kurtosis, _variation(x, 1, kurtosis), _variation(x, 0, kurtosis), x.size)


def _variation(x: Floats, axis: int, kurtosis: float) -> float:
    """Return how much the norms along `axis` vary, over what independent elements would give."""
    norms = np.sqrt(np.square(x).sum(axis=axis))
    count = x.shape[axis]
    if norms.size < 4 or count < 4 or norms.mean() == 0:
        return 1.0
    expected = math.sqrt(max(kurtosis - 1, 1e-3) / (4 * count))
    return float(norms.std() / norms.mean() / expected)


def rounded(value: float) -> float:
    """Round to four significant digits: evidence is for reading.

    >>> rounded(0.0123456)
    0.01235
    """
    return float(f"{value:.4g}")
