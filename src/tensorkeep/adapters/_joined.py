"""Rows of a float base that went through 4 or 8 bits together with others: joined, stacked or turned in memory.

What is quantized while a model is loaded is the matrix in memory, [out, in]. A file may hold it in several tensors (the
gate and up projections of one expert), in one with the other experts', or turned (Conv1D). So the whole matrix is made
of the file's rows, sent through the quantization, and the rows that are wanted are taken out of it again. One matrix is
held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tensorkeep.formats.arrays import np_frombuffer
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import encoding as quant_encoding
from tensorkeep.quantization.codes import Array, scaled
from tensorkeep.quantization.encoding import LEVELS, Encoding

if TYPE_CHECKING:
    from tensorkeep.adapters.terms import Piece


class Matrix(NamedTuple):
    """One matrix in memory that was quantized.

    Args:
        shape: as it lies in memory.
        inward: it lies as [in, out], and its transpose was quantized.
        pieces: the stored rows that it is made of, by names as stored.
        encoding: how it was quantized.
    """

    shape: tuple[int, int]
    inward: bool
    pieces: tuple[Piece, ...]
    encoding: Encoding


class Joined(NamedTuple):
    """Rows of a stored tensor that are a piece of a matrix in memory."""

    piece: Piece
    matrix: Matrix

    @property
    def rows(self) -> tuple[int, int]:
        """The first of these rows in the stored tensor, and the one after the last."""
        return self.piece.first, self.piece.first + _count(self.piece, self.matrix)


def _count(piece: Piece, matrix: Matrix) -> int:
    """How many rows of the stored tensor a piece has; turned ones are columns of the matrix."""
    return matrix.shape[1] if piece.turned else len(piece.rows)


def sent_rows(
    base: StateView, shares: Sequence[Joined], rows: tuple[int, int], step: int
) -> Iterator[tuple[int, Array, Array]]:
    """Yield rows of a stored tensor as they come back from the quantization of their matrices.

    Args:
        base: the checkpoint.
        shares: all rows of the tensor, in order.
        rows: the first row that is wanted, and the one after the last.
        step: how many rows at a time.

    Yields:
        The first row's number, the values [n, width], and the values as they were before.
    """
    for share in shares:
        first, end = share.rows
        low, high = max(first, rows[0]), min(end, rows[1])
        if low >= high:
            continue
        before = _made(base, share.matrix)
        after = sent(before.T, share.matrix.encoding).T if share.matrix.inward else sent(before, share.matrix.encoding)
        at = _numbers(share.piece.rows)
        mine, old = (v[at].T if share.piece.turned else v[at] for v in (after, before))
        for row in range(low, high, step):
            some = slice(row - first, min(row + step, high) - first)
            yield row, np.ascontiguousarray(mine[some]), np.ascontiguousarray(old[some])


def sent(values: Array, kind: Encoding) -> Array:
    """Return what a matrix is once it was quantized and dequantized.

    Args:
        values: [out, in].
        kind: how.
    """
    values = np.ascontiguousarray(values, np.float32)
    if kind.kind not in LEVELS:
        return np.asarray(quant_encoding.int8_values(values))
    flat = values.reshape(-1)
    absmax = quant_encoding.absolute_maxima(flat, kind.block)
    scales = quant_encoding.stored_scales(absmax, kind.double)
    codes = quant_encoding.four_bit_codes(flat, absmax, kind.kind, kind.block)
    return np.asarray(scaled(LEVELS[kind.kind][codes], scales, kind.block).reshape(values.shape))


def _made(base: StateView, matrix: Matrix) -> Array:
    """Return a matrix as it lies in memory."""
    out = np.empty(matrix.shape, np.float32)
    for piece in matrix.pieces:
        values = _stored(base, piece, _count(piece, matrix))
        out[_numbers(piece.rows)] = values.T if piece.turned else values
    return out


def _numbers(lines: Any) -> Array:
    return np.fromiter(lines, np.int64, len(lines))


def _stored(base: StateView, piece: Piece, count: int) -> Array:
    """Return a piece's `count` stored rows as float32."""
    record = base[piece.stored]
    deep = math.prod(record.shape[1:-1])
    outer = (piece.first // deep, -(-(piece.first + count) // deep))
    raw = bytearray().join(bytes(p) for p in base.stream(piece.stored, outer))
    found = np_frombuffer(raw, record.dtype).reshape(-1, record.shape[-1]).astype(np.float32)
    start = piece.first - outer[0] * deep
    return np.asarray(found[start : start + count])
