"""Stream the bytes of one output tensor from its parts: rows permuted, values cast, checksums taken on the way.

Nothing here holds more than a chunk: a permutation moves rows within a head, so a chunk of whole heads is enough.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from tensorkeep.conversion.plan import Part, Plan, RowPermutation, Step
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.formats.gguf import encoded
from tensorkeep.formats.view import StateView
from tensorkeep.storage.record import DTYPES, nbytes


@dataclass
class Cast:
    """What casting one tensor lost.

    Args:
        overflowed: finite values that became infinite or NaN.
        vanished: non-zeros that became zero.
    """

    overflowed: int = 0
    vanished: int = 0


@dataclass
class Sums:
    """The checksums of one written tensor.

    Args:
        crc: CRC-32 of its bytes, for a zip archive; 0 where the format has none.
        digest: xxh3_128 of its bytes in hex, for the certificate.
        sources: xxh3_128 of each part as it was stored, by (index of the source, stored name).
        cast: what a cast lost.
    """

    crc: int
    digest: str
    sources: dict[tuple[int, str], str]
    cast: Cast


def pieces(part: Part, view: StateView, source: Any = None, whole_rows: bool = False) -> Iterator[memoryview]:
    """Read the bytes of one part in chunks of whole elements (of whole heads where rows are permuted).

    Args:
        part: which rows of which stored tensor, and how they are permuted.
        view: the checkpoint that holds it.
        source: a running digest that is fed the bytes as they are stored; None for none.
        whole_rows: whether chunks end where rows end.

    Returns:
        The chunks in order; each is valid until the next is asked for.
    """
    record = view[part.name]
    row = nbytes(record.dtype, record.shape[1:]) if record.shape else record.nbytes
    element = row if whole_rows else max(DTYPES[record.dtype].bits // 8, 1)
    stored = view.stream(part.name, part.rows, max((p.block * row for p in part.permutes), default=element))
    if part.inner is not None:
        row = nbytes(record.dtype, record.shape[2:])
        stored = _within(view.stream(part.name, part.rows, element), part.inner[0] * row, part.inner[1] * row)
        if part.permutes:
            stored = iter([memoryview(b"".join(stored))])
    for piece in stored:
        if source is not None:
            source.update(piece)
        for permute in part.permutes:
            piece = permuted(piece, permute, row)
        yield piece


def _within(stream: Iterator[memoryview], low: int, high: int) -> Iterator[memoryview]:
    """Yield the bytes of a stream from `low` to `high`; what lies before and after is read over."""
    at = 0
    for piece in stream:
        mine = piece[max(low - at, 0) : max(high - at, 0)]
        at += len(piece)
        if len(mine):
            yield mine
        if at >= high:
            return


def write_tensor(
    step: Step, sources: Sequence[StateView], write: Callable[[memoryview], None], crc_wanted: bool = True
) -> Sums:
    """Stream the raw bytes of one output tensor through `write`, a chunk at a time, and sum them up.

    Args:
        step: what the tensor is made of, and its dtype.
        sources: the plan's views.
        write: called with each chunk of bytes, in order.
        crc_wanted: whether to take the CRC-32 too, which is a third of the work of a plain copy.

    Returns:
        The checksums of what was written and of what was read; of a block-quantized tensor the digest is that of the
        values which it decodes to, as a reader of the file sees them.

    Example:
        >>> write_tensor(step, views, lambda piece: out.extend(piece)).digest  # doctest: +SKIP
        '5b1c2d9c1c6a3f0e9d5a3c1f7e2b4a60'
    """
    assert step.sink is not None
    crc, state, cast, encoding = 0, xxhash.xxh3_128(), Cast(), step.sink.encoding
    digests: dict[tuple[int, str], str] = {}
    for part in step.parts:
        dtype = sources[part.source][part.name].dtype
        same = dtype == step.sink.dtype and not part.permutes and len(step.parts) == 1 and encoding == "plain"
        source = xxhash.xxh3_128()
        for piece in pieces(part, sources[part.source], None if same else source, encoding != "plain"):
            made = piece if dtype == step.sink.dtype else _cast(piece, dtype, step.sink.dtype, cast)
            if encoding != "plain":
                made, decoded = encoded(made, encoding)
            crc = zlib.crc32(made, crc) if crc_wanted else 0
            state.update(made if encoding == "plain" else decoded)
            write(made)
        digests[part.source, part.key] = (state if same else source).hexdigest()
    return Sums(crc, state.hexdigest(), digests, cast)


def with_ties(sums: dict[str, Sums], plan: Plan) -> dict[str, Sums]:
    """Add the checksums of tensors that are not written, since they share the bytes of another that is."""
    for tensor in plan.tensors:
        if tensor.name not in sums and tensor.tied_to in sums:
            sums[tensor.name] = sums[tensor.tied_to]
    return sums


def permuted(data: memoryview, rows: RowPermutation, row: int) -> memoryview:
    """Reorder the rows of whole heads.

    Args:
        data: the bytes of the rows.
        rows: how they are reordered.
        row: bytes of one row.

    Returns:
        The bytes in the new order; a copy.
    """
    import numpy as np

    blocks = np.frombuffer(data, dtype=f"V{row}").reshape(-1, rows.block)
    return np.ascontiguousarray(blocks[:, rows.order()]).view(np.uint8).reshape(-1).data


def _cast(data: memoryview, source: str, target: str, lost: Cast) -> memoryview:
    """Round to nearest even, as torch and numpy do, and count in `lost` what overflows or vanishes."""
    import numpy as np

    values = np.frombuffer(data, dtype=np_dtype(source))
    with np.errstate(over="ignore", invalid="ignore"):
        made = values.astype(np_dtype(target))
        if np_dtype(target).itemsize < np_dtype(source).itemsize or target == "F16":
            lost.overflowed += int(np.count_nonzero(np.isfinite(values) & ~np.isfinite(made)))
            lost.vanished += int(np.count_nonzero((values != 0) & (made == 0)))
    return made.view(np.uint8).reshape(-1).data
