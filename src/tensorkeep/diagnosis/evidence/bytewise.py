"""Stream tensors in Hugging Face layout, cut two streams alike, and say how two tensors compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tensorkeep.conversion.plan import HfTensor
from tensorkeep.conversion.streams import pieces
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.view import StateView
from tensorkeep.storage.record import DTYPES

SAME = ("equal", "cast")  # statuses of a Comparison in which no value needs an explanation


class Comparison(NamedTuple):
    """How a tensor compares with the reference's of its name.

    `status` is "equal" (in every byte), "cast" (equal once cast to the other dtype), "values" (some differ) or
    "shape". Of a cast: `rounded` values changed by it, `overflowed` became infinite or NaN, `vanished` became zero.
    """

    status: str
    rounded: int = 0
    overflowed: int = 0
    vanished: int = 0


def width(dtype: str) -> int:
    """Return the bytes of one element; 1 for dtypes that pack several elements into a byte."""
    return max(DTYPES[dtype].bits // 8, 1)


def elements(hub: HfTensor) -> int:
    """Return the number of elements of a tensor."""
    count = 1
    for side in hub.shape:
        count *= side
    return count


def size_of(hub: HfTensor) -> int:
    """Return the bytes of a tensor."""
    return elements(hub) * DTYPES[hub.dtype].bits // 8


def hf_bytes(hub: HfTensor, views: Sequence[StateView]) -> Iterator[memoryview]:
    """Stream the bytes of a tensor in Hugging Face layout.

    Args:
        hub: The tensor, with the stored parts that make it up.
        views: The checkpoints; a part's `source` is an index into them.

    Returns:
        Pieces that hold whole elements. A piece is valid until the next one is asked for.

    Raises:
        TensorkeepError: Where a file is damaged.
    """
    for part in hub.parts:
        yield from pieces(part, views[part.source])


def aligned(
    a: Iterator[memoryview], b: Iterator[memoryview], width_a: int, width_b: int
) -> Iterator[tuple[memoryview, memoryview]]:
    """Cut two streams so that each pair of pieces holds the same elements.

    Args:
        a: Bytes of one tensor, in pieces.
        b: Bytes of another with as many elements, in pieces of any other length.
        width_a: Bytes of one element of `a`.
        width_b: Bytes of one element of `b`.

    Returns:
        Pairs of pieces, valid until the next pair is asked for. Ends with the shorter stream.
    """
    x, y = memoryview(b""), memoryview(b"")
    while True:
        x = x if len(x) else next(a, x)
        y = y if len(y) else next(b, y)
        count = min(len(x) // width_a, len(y) // width_b)
        if not count:
            return
        yield x[: count * width_a], y[: count * width_b]
        x, y = x[count * width_a :], y[count * width_b :]


def as_float(data: memoryview, dtype: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return values as float64, complex numbers as pairs; exact but for 64-bit integers beyond 2^53."""
    values = np.frombuffer(data, np_dtype(dtype))
    if dtype in ("C64", "C128"):
        values = values.view(np.float32 if dtype == "C64" else np.float64)
    return values.astype(np.float64)


def bits_equal(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Say whether two arrays are equal, NaN counting as equal to NaN (a cast may choose its own NaN)."""
    same = a == b
    return bool(same.all()) or bool((same | (np.isnan(a) & np.isnan(b))).all())
