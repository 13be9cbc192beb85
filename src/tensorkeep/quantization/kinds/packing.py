"""Small integers packed densely into 32-bit words, lowest bits first, and what several kinds read alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensorkeep.formats.arrays import np_frombuffer
from tensorkeep.formats.view import StateView
from tensorkeep.quantization.codes import ELEMENTS_AT_ONCE, Array
from tensorkeep.storage.record import DTYPES, TensorRecord

WORDS = ("I32", "U32")
# e2m1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def unpack(words: Array, bits: int, count: int) -> Array:
    """Return the first `count` integers of each row of packed words; they may straddle two words.

    Args:
        words: 32-bit integers [rows, words of a row].
        bits: of one integer, 1 to 8.
        count: integers of a row, at most `32 * words // bits`.

    Returns:
        uint8 [rows, count].

    Example:
        >>> unpack(np.array([[0x76543210]], np.int32), 4, 8).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    packed = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    rows = packed.shape[0]
    if bits == 8:
        return packed[:, :count]
    if bits in (1, 2, 4):
        parts = 8 // bits
        out = np.empty((rows, packed.shape[1], parts), np.uint8)
        for at in range(parts):
            np.right_shift(packed, at * bits, out=out[:, :, at])
        out &= np.uint8((1 << bits) - 1)
        return out.reshape(rows, -1)[:, :count]
    single = np.unpackbits(packed, axis=1, bitorder="little")[:, : count * bits].reshape(rows, count, bits)
    return np.asarray(np.packbits(single, axis=2, bitorder="little")[:, :, 0])


def words_for(count: int, bits: int) -> int:
    """Return the number of 32-bit words that `count` densely packed integers need."""
    return -(-count * bits // 32)


def bits_of(count: int, words: int) -> int | None:
    """Return how many bits each of `count` integers has in `words` words; None where no number from 1 to 8 fits."""
    return next((b for b in (4, 8, 2, 3, 5, 6, 7, 1) if count and words_for(count, b) == words), None)


def settings(view: StateView) -> Mapping[str, Any]:
    """Return what the config says of quantization: `quantization_config`, also that of the text model within it."""
    config = view.config or {}
    for holder in (config, config.get("text_config")):
        found = holder.get("quantization_config") if isinstance(holder, Mapping) else None
        if isinstance(found, Mapping):
            return found
    return {}


def number(said: Mapping[str, Any], key: str) -> int | None:
    """Return a whole number of the config; None where it has none."""
    value = said.get(key)
    return value if type(value) is int else None


def rows_at_once(columns: int, rows: tuple[int, int], unit: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the ranges of rows to decode at a time, from `rows[0]` to `rows[1]`, in steps of whole `unit` rows."""
    step = max(ELEMENTS_AT_ONCE // 4 // max(columns * unit, 1), 1) * unit
    at = rows[0]
    while at < rows[1]:
        end = min((at // unit) * unit + step, rows[1])
        yield at, end
        at = end


def floating(record: TensorRecord) -> bool:
    """Say whether a tensor holds floats that can be computed with."""
    return DTYPES[record.dtype].floating and DTYPES[record.dtype].numpy is not None


def wide(view: StateView, name: str) -> Array:
    """Return a tensor of scales as float32."""
    return np.asarray(view.array(name).astype(np.float32))


def times(values: Array, scales: Array) -> None:
    """Multiply values in place; a damaged scale gives NaN or infinity, as in any other reader."""
    with np.errstate(invalid="ignore", over="ignore"):
        values *= scales


def some_rows(view: StateView, name: str, rows: tuple[int, int]) -> Array:
    """Read rows of a tensor's first dimension."""
    record = view[name]
    raw = bytearray().join(bytes(piece) for piece in view.stream(name, rows))
    return np_frombuffer(raw, record.dtype).reshape(rows[1] - rows[0], *record.shape[1:])


def sampled(rows: int, columns: int, elements: int = 1 << 20) -> list[tuple[int, int]]:
    """Return ranges of rows spread over a weight, with about `elements` elements in all; every row of a small one."""
    if rows * columns <= elements:
        return [(0, rows)]
    some = max(elements // 16 // max(columns, 1), 1)
    starts = sorted({(rows - some) * i // 15 for i in range(16)} if rows > some else {0})
    return [(at, min(at + some, rows)) for at in starts]
