"""Stream the bytes of one output tensor from its parts: rows permuted, values cast, checksums taken on the way.

Nothing here holds more than a chunk: a permutation moves rows within a head, so a chunk of whole heads is enough.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from tensorkeep.conversion.plan import Part, Plan, RowPermutation, Step, row_bytes
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


def pieces(
    part: Part, view: StateView, source: Any = None, whole_rows: bool = False, shifted: bool = True
) -> Iterator[memoryview]:
    """Read the bytes of one part in chunks of whole elements (of whole heads where rows are permuted).

    Args:
        part: which rows of which stored tensor, and how they are permuted.
        view: the checkpoint that holds it.
        source: a running digest that is fed the bytes as they are stored; None for none.
        whole_rows: whether chunks end where rows end.
        shifted: whether what the part adds to its values is added here, in the tensor's own dtype.

    Returns:
        The chunks in order; each is valid until the next is asked for.
    """
    plus = part.plus if shifted else 0
    for piece in _moved(part, view, source, whole_rows):
        yield _cast(piece, view[part.name].dtype, view[part.name].dtype, Cast(), plus) if plus else piece


def _moved(part: Part, view: StateView, source: Any, whole_rows: bool) -> Iterator[memoryview]:
    """Yield the bytes of one part with its rows where they belong."""
    record = view[part.name]
    row = nbytes(record.dtype, record.shape[1:]) if record.shape else record.nbytes
    element = row if whole_rows else max(DTYPES[record.dtype].bits // 8, 1)
    if part.turned:
        yield from _turned(part, view, source)
        return
    moved = row_bytes(record)
    stored = view.stream(part.name, part.rows, max((p.block * moved for p in part.permutes), default=element))
    if part.inner is not None:
        row = nbytes(record.dtype, record.shape[2:])
        stored = _within(view.stream(part.name, part.rows, element), part.inner[0] * row, part.inner[1] * row)
        if part.permutes:
            stored = iter([memoryview(b"".join(stored))])
    for piece in stored:
        if source is not None:
            source.update(piece)
        for permute in part.permutes:
            piece = permuted(piece, permute, moved)
        yield piece


def _turned(part: Part, view: StateView, source: Any) -> Iterator[memoryview]:
    """Yield matrices with rows and columns in each other's place, one matrix of a stack at a time."""
    import numpy as np

    record = view[part.name]
    rows = part.rows or (0, record.shape[0])
    shape = record.shape[1:] if len(record.shape) > 2 else (rows[1] - rows[0], record.shape[-1])
    size = max(DTYPES[record.dtype].bits // 8, 1)
    for piece in view.stream(part.name, rows, math.prod(shape) * size):
        if source is not None:
            source.update(piece)
        stack = np.frombuffer(piece, dtype=f"u{size}").reshape(-1, *shape)
        for matrix in stack:
            yield np.ascontiguousarray(matrix.T).view(np.uint8).reshape(-1).data


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
    kept = as_stored(step, sources)
    if kept is not None:
        for raw, decoded in kept:
            crc = zlib.crc32(raw, crc) if crc_wanted else 0
            state.update(decoded)
            write(raw)
        return Sums(crc, state.hexdigest(), {(p.source, p.key): state.hexdigest() for p in step.parts}, cast)
    for part in step.parts:
        dtype = sources[part.source][part.name].dtype
        same = dtype == step.sink.dtype and part.plain and len(step.parts) == 1 and encoding == "plain"
        source = xxhash.xxh3_128()
        for piece in pieces(part, sources[part.source], None if same else source, encoding != "plain", shifted=False):
            alike = dtype == step.sink.dtype and not part.plus
            made = piece if alike else _cast(piece, dtype, step.sink.dtype, cast, part.plus)
            if encoding != "plain":
                made, decoded = encoded(made, encoding)
            crc = zlib.crc32(made, crc) if crc_wanted else 0
            state.update(made if encoding == "plain" else decoded)
            write(made)
        digests[part.source, part.key] = (state if same else source).hexdigest()
    return Sums(crc, state.hexdigest(), digests, cast)


def as_stored(step: Step, sources: Sequence[StateView]) -> Iterator[tuple[memoryview, memoryview]] | None:
    """Return the blocks of a tensor that is written as it lies, with what they decode to.

    Args:
        step: what the tensor is made of, and its type.
        sources: the plan's views.

    Returns:
        Pieces in order; None where rows or the type of its blocks change, or it has no blocks.
    """
    if step.sink is None or len(step.parts) != 1:
        return None
    part, view = step.parts[0], sources[step.parts[0].source]
    record = view[part.name]
    same = record.encoding == step.sink.encoding != "plain" and record.shape == step.sink.shape
    return view.as_stored(part.name) if same and part.plain and part.rows is None else None


def rows_apart(step: Step, sources: Sequence[StateView], size: int) -> list[tuple[int, int]] | None:
    """Cut the rows of an output tensor into ranges that can be read, made and written each by itself.

    Args:
        step: what the tensor is made of.
        sources: the plan's views.
        size: bytes of a range, about.

    Returns:
        First row and the one after the last of each; None where the tensor must be made in one go: it is put together
        of several parts, computed or encoded, is not stored in order, or its file keeps a checksum of all its bytes.
    """
    part, sink = step.parts[0], step.sink
    view = sources[part.source]
    record = view[part.name]
    if len(step.parts) > 1 or part.inner is not None or type(view) is not StateView or sink is None:
        return None
    if record.encoding != "plain" or sink.encoding != "plain" or len(record.shape) < 2:
        return None
    first, last = part.rows or (0, record.shape[0])
    if sink.shape != (last - first, *record.shape[1:]) or DTYPES[record.dtype].bits % 8 or DTYPES[sink.dtype].bits % 8:
        return None
    spans = view.spans(part.name)
    if spans is None or any(crc is not None for *_, crc in spans):
        return None
    block = math.lcm(*(p.block for p in part.permutes)) if part.permutes else 1
    block //= math.gcd(
        block, nbytes(record.dtype, record.shape[1:]) // max(row_bytes(record), 1)
    )  # an expert holds whole ones
    count = last - first
    rows = max(size // max(nbytes(record.dtype, record.shape[1:]) * block, 1), 1) * block
    return [(at, min(at + rows, count)) for at in range(0, count, rows)] if rows < count else None


class _Kept:
    """Keeps the bytes that it is fed, in place of a running digest: they are digested when it is their turn."""

    last = b""

    def update(self, data: memoryview) -> None:
        self.last = bytes(data)


class Pieces:
    """The checksums of a tensor that several threads make piece by piece, put together in the order of its rows.

    Args:
        step: what the tensor is made of.
        sources: the plan's views.
        crc_wanted: whether to take the CRC-32.
        count: number of pieces.
    """

    def __init__(self, step: Step, sources: Sequence[StateView], crc_wanted: bool, count: int) -> None:
        assert step.sink is not None
        self.step, self.sink, self.sources, self.crc_wanted = step, step.sink, sources, crc_wanted
        self.part = step.parts[0]
        self.dtype = sources[self.part.source][self.part.name].dtype
        self.row = nbytes(self.sink.dtype, self.sink.shape[1:])
        self._same = self.dtype == self.sink.dtype and not self.part.permutes
        self._left, self._next = count, 0
        self._turn = threading.Condition()
        self._crc, self._state, self._source = 0, xxhash.xxh3_128(), xxhash.xxh3_128()
        self._cast = Cast()

    def write(
        self, rows: tuple[int, int], write: Callable[[memoryview], None], stopped: Callable[[], bool]
    ) -> Sums | None:
        """Make and write some rows.

        Args:
            rows: one of the ranges that `rows_apart` gave.
            write: called with each chunk of bytes, in order.
            stopped: tells whether another thread failed, so that an earlier piece may never come.

        Returns:
            The checksums of the whole tensor where this was its last piece; else None.
        """
        first = self.part.rows[0] if self.part.rows else 0
        part, cast = self.part._replace(rows=(first + rows[0], first + rows[1])), Cast()
        made: list[tuple[memoryview, memoryview]] = []
        source = _Kept()
        for piece in pieces(part, self.sources[part.source], source):
            new = piece if self.part.permutes else memoryview(source.last)  # the stream uses its buffer again
            new = new if self.dtype == self.sink.dtype else _cast(new, self.dtype, self.sink.dtype, cast)
            write(new)
            made.append((memoryview(source.last), new))
        with self._turn:
            while self._next != rows[0]:
                if not self._turn.wait(1) and stopped():
                    return None
            self._sum(made, cast)
            self._next = rows[1]
            self._left -= 1
            self._turn.notify_all()
            return self._whole() if not self._left else None

    def _sum(self, made: list[tuple[memoryview, memoryview]], cast: Cast) -> None:
        """Add a piece to the running checksums; it is the next in order."""
        for own, new in made:
            self._crc = zlib.crc32(new, self._crc) if self.crc_wanted else 0
            self._state.update(new)
            if not self._same:
                self._source.update(own)
        self._cast.overflowed += cast.overflowed
        self._cast.vanished += cast.vanished

    def _whole(self) -> Sums:
        source = (self._state if self._same else self._source).hexdigest()
        return Sums(self._crc, self._state.hexdigest(), {(self.part.source, self.part.key): source}, self._cast)


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


def _cast(data: memoryview, source: str, target: str, lost: Cast, plus: int = 0) -> memoryview:
    """Round to nearest even, as torch and numpy do, and count in `lost` what overflows or vanishes.

    What is to be added is added before, in float32 or wider.
    """
    import numpy as np

    values: Any = np.frombuffer(data, dtype=np_dtype(source))
    if plus:
        values = values.astype(np.float64 if source == "F64" else np.float32) + np.float32(plus)
    with np.errstate(over="ignore", invalid="ignore"):
        made: np.ndarray[Any, Any] = values.astype(np_dtype(target))
        if np_dtype(target).itemsize < np_dtype(source).itemsize or target == "F16":
            lost.overflowed += int(np.count_nonzero(np.isfinite(values) & ~np.isfinite(made)))
            lost.vanished += int(np.count_nonzero((values != 0) & (made == 0)))
    return made.view(np.uint8).reshape(-1).data
