"""The bytes of a sink tensor, streamed from its parts: rows permuted, values cast, checksums taken on the way.

Nothing here holds more than a chunk: a permutation moves rows within a head, so a chunk of whole heads is enough.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from tensorkeep.conversion.plan import Part, Plan, RowPermutation, Step
from tensorkeep.formats.view import StateView, np_dtype
from tensorkeep.storage.record import DTYPES, nbytes


@dataclass
class Cast:
    """What a cast lost in one tensor: finite values that became infinite or NaN, and non-zeros that became zero."""

    overflowed: int = 0
    vanished: int = 0


@dataclass
class Sums:
    """Checksums of one written tensor: CRC-32 for the zip, xxh3_128 for the certificate; the source parts' digests."""

    crc: int
    digest: str
    sources: dict[tuple[int, str], str]
    cast: Cast


def pieces(part: Part, view: StateView, source: Any = None) -> Iterator[memoryview]:
    """The bytes of one part in chunks of whole elements (of whole heads where rows are permuted).

    `source`, a running digest, is fed the bytes as they are stored.
    """
    record = view[part.name]
    row = nbytes(record.dtype, record.shape[1:]) if record.shape else record.nbytes
    element = max(DTYPES[record.dtype].bits // 8, 1)
    for piece in view.stream(part.name, part.rows, max((p.block * row for p in part.permutes), default=element)):
        if source is not None:
            source.update(piece)
        for permute in part.permutes:
            piece = _permute(piece, permute, row)
        yield piece


def write_tensor(
    step: Step, sources: Sequence[StateView], write: Callable[[memoryview], None], crc_wanted: bool = True
) -> Sums:
    """Stream the raw bytes that `step` puts into its sink tensor through `write`, a chunk at a time; sum them up.

    The CRC-32, a third of the work of a plain copy, is left at 0 unless the sink's format asks for it.

    Example: `write_tensor(step, views, lambda piece: out.extend(piece)).digest`
    """
    assert step.sink is not None
    crc, state, cast = 0, xxhash.xxh3_128(), Cast()
    digests: dict[tuple[int, str], str] = {}
    for part in step.parts:
        dtype = sources[part.source][part.name].dtype
        same = dtype == step.sink.dtype and not part.permutes and len(step.parts) == 1
        source = xxhash.xxh3_128()
        for piece in pieces(part, sources[part.source], None if same else source):
            made = piece if dtype == step.sink.dtype else _cast(piece, dtype, step.sink.dtype, cast)
            crc = zlib.crc32(made, crc) if crc_wanted else 0
            state.update(made)
            write(made)
        key = part.name if part.rows is None else f"{part.name}[{part.rows[0]}:{part.rows[1]}]"
        digests[part.source, key] = (state if same else source).hexdigest()
    return Sums(crc, state.hexdigest(), digests, cast)


def with_ties(sums: dict[str, Sums], plan: Plan) -> dict[str, Sums]:
    """The sums with those of tensors that were not written, since they share the bytes of another."""
    for tensor in plan.tensors:
        if tensor.name not in sums and tensor.tied_to in sums:
            sums[tensor.name] = sums[tensor.tied_to]
    return sums


def _permute(data: memoryview, rows: RowPermutation, row: int) -> memoryview:
    import numpy as np

    blocks = np.frombuffer(data, dtype=f"V{row}").reshape(-1, rows.block)
    return np.ascontiguousarray(blocks[:, rows.order()]).view(np.uint8).reshape(-1).data


def _cast(data: memoryview, source: str, target: str, lost: Cast) -> memoryview:
    """Round to nearest even, as torch and numpy do; what overflows or vanishes is counted."""
    import numpy as np

    values = np.frombuffer(data, dtype=np_dtype(source))
    with np.errstate(over="ignore", invalid="ignore"):
        made = values.astype(np_dtype(target))
        if np_dtype(target).itemsize < np_dtype(source).itemsize or target == "F16":
            lost.overflowed += int(np.count_nonzero(np.isfinite(values) & ~np.isfinite(made)))
            lost.vanished += int(np.count_nonzero((values != 0) & (made == 0)))
    return made.view(np.uint8).reshape(-1).data
