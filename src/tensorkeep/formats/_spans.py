"""Where a tensor's bytes lie in its files, in row-major order; stretches of elements, read out of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from tensorkeep.storage.files import Folder
from tensorkeep.storage.record import DTYPES, Block, TensorRecord, nbytes, row_major, same_layout

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


def announce(folder: Folder, spans: list[Span]) -> None:
    """Tell a folder that fetches ahead which ranges are going to be read, the first few.

    Args:
        folder: holds the files.
        spans: the ranges.
    """
    expect: Any = getattr(folder, "expect", None)  # a store has it, a disk needs none
    for file, start, length, _ in spans[:1] if expect is not None else ():
        expect(file, start, length)


def cut(spans: list[Span], first: int, last: int) -> Iterator[Span]:
    """Give the part of consecutive spans between two byte positions of the tensor."""
    at = 0
    for file, start, length, crc in spans:
        low, high = max(first, at), min(last, at + length)
        if low < high:
            yield file, start + low - at, high - low, crc if high - low == length else None
        at += length


def in_order(block: Block) -> bool:
    """Whether a block's elements lie in row-major order.

    Args:
        block: of a plainly stored tensor.
    """
    return block.strides is None or same_layout(block.shape, block.strides)


def stretch(folder: Folder, record: TensorRecord, blocks: Sequence[Block], first: int, last: int) -> memoryview:
    """Return the bytes of elements `first` to `last` of a tensor, numbered in row-major order.

    Of a block that holds some of them, what lies between the first and the last of them is read: for whole rows these
    are just the elements that are asked for.

    Args:
        folder: holds the files.
        record: of the tensor.
        blocks: its blocks, located, with elements `in_order`.
        first: number of the first element.
        last: number behind the last one.
    """
    import numpy as np

    width = DTYPES[record.dtype].bits // 8
    out, at = bytearray((last - first) * width), 0
    for begins, sizes in rectangles(record.shape, first, last):
        size = math.prod(sizes)
        target = np.frombuffer(out, f"V{width}", size, at * width).reshape(sizes)
        for block in blocks:
            _copy(folder, block, begins, sizes, target, width)
        at += size
    return memoryview(out)


def _copy(
    folder: Folder, block: Block, begins: tuple[int, ...], sizes: tuple[int, ...], target: Any, width: int
) -> None:
    """Copy what a block has of a rectangle into `target`, which stands for the rectangle."""
    import numpy as np

    low = [max(b, o) for b, o in zip(begins, block.offsets)]
    high = [min(b + n, o + m) for b, n, o, m in zip(begins, sizes, block.offsets, block.shape)]
    if any(a >= b for a, b in zip(low, high)):
        return
    steps = row_major(block.shape)
    begun = sum((a - o) * step for a, o, step in zip(low, block.offsets, steps))
    end = sum((b - 1 - o) * step for b, o, step in zip(high, block.offsets, steps)) + 1
    raw = bytearray((end - begun) * width)
    folder.read_into(block.file, block.start + begun * width, memoryview(raw))
    shape = tuple(b - a for a, b in zip(low, high))
    part = np.ndarray(shape, f"V{width}", raw, strides=[step * width for step in steps])
    target[tuple(slice(a - b, c - b) for a, c, b in zip(low, high, begins))] = part


def within_rows(
    stream: Iterator[memoryview], record: TensorRecord, at: int, first: int, last: int
) -> Iterator[memoryview]:
    """Give the bytes of some elements out of a stream of whole rows.

    Args:
        stream: the bytes of the rows.
        record: of the tensor.
        at: number of the first element of the stream.
        first: number of the first element to give.
        last: number behind the last one.

    Yields:
        Pieces of the stream.
    """
    bits = DTYPES[record.dtype].bits
    low, high, done = first * bits // 8, (last * bits + 7) // 8, at * bits // 8
    for piece in stream:
        mine = piece[max(low - done, 0) : max(high - done, 0)]
        done += len(piece)
        if len(mine):
            yield mine
