"""Where a tensor's bytes lie in its files, in row-major order; how a run of elements is cut into rectangles."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tensorkeep.storage.record import Block, TensorRecord, nbytes, row_major, same_layout

Span = tuple[str, int, int, int | None]  # file, first byte, bytes, their CRC-32 where known
Rectangle = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def row_spans(record: TensorRecord, blocks: list[Block]) -> list[Span] | None:
    """List the byte ranges that make up the tensor in order, or None where blocks are no runs of elements in order."""
    spans: list[Span] = []
    at, steps = 0, row_major(record.shape)
    for block in blocks:
        if block.strides is not None and not same_layout(block.shape, block.strides):
            return None
        whole = [size == full for size, full in zip(block.shape, record.shape)]
        first = next((i for i, size in enumerate(block.shape) if size != 1), len(block.shape))
        if not all(whole[first + 1 :]) or at != sum(o * step for o, step in zip(block.offsets, steps)):
            return None
        at += math.prod(block.shape)
        spans.append((block.file, block.start, nbytes(record.dtype, block.shape), block.crc))
    return spans


def rectangles(shape: tuple[int, ...], first: int, last: int) -> Iterator[Rectangle]:
    """Cut a run of a tensor's elements in row-major order into rectangles, each of which is a run too.

    Args:
        shape: sizes of the tensor.
        first: number of the first element.
        last: number behind the last one.

    Yields:
        Offsets and sizes of each, in order.

    >>> list(rectangles((3, 4), 2, 9))
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if first >= last:
        return
    if len(shape) < 2:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    while first < last:
        number, begun = divmod(first, row)
        if begun or last - first < row:
            end = min(row, begun + last - first)
            for offsets, sizes in rectangles(shape[1:], begun, end):
                yield (number, *offsets), (1, *sizes)
            first += end - begun
        else:
            rows = (last - first) // row
            yield (number, *(0 for _ in shape[1:])), (rows, *shape[1:])
            first += rows * row


def cut(spans: list[Span], first: int, last: int) -> Iterator[Span]:
    """Give the part of consecutive spans between two byte positions of the tensor."""
    at = 0
    for file, start, length, crc in spans:
        low, high = max(first, at), min(last, at + length)
        if low < high:
            yield file, start + low - at, high - low, crc if high - low == length else None
        at += length
