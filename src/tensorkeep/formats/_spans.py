"""Where the bytes of a tensor lie in its files, in the order of the tensor's rows."""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.storage.record import Block, TensorRecord, nbytes, same_layout

Span = tuple[str, int, int, int | None]  # file, first byte, bytes, their CRC-32 where known


def row_spans(record: TensorRecord, blocks: list[Block]) -> list[Span] | None:
    """List the byte ranges that make up the tensor in order, or None where blocks are not runs of whole rows."""
    spans, row = [], 0
    for block in blocks:
        whole_rows = block.shape[1:] == record.shape[1:] and not any(block.offsets[1:])
        if not whole_rows or (block.strides is not None and not same_layout(block.shape, block.strides)):
            return None
        if record.shape and block.offsets[0] != row:
            return None
        row += block.shape[0] if record.shape else 0
        spans.append((block.file, block.start, nbytes(record.dtype, block.shape), block.crc))
    return spans


def cut(spans: list[Span], first: int, last: int) -> Iterator[Span]:
    """Give the part of consecutive spans between two byte positions of the tensor."""
    at = 0
    for file, start, length, crc in spans:
        low, high = max(first, at), min(last, at + length)
        if low < high:
            yield file, start + low - at, high - low, crc if high - low == length else None
        at += length
