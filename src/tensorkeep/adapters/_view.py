"""A view of base weights with adapters added in, computed while it streams; a merge plans and writes from it.

    W' = round(W + sum_i weight_i · change_i(W))      change: by the adapter's kind, see `kinds`

Everything is float64 until the one rounding to the output's dtype, so the result does not depend on chunks, threads
or the order of adapters (a product of two float32 is exact in float64). The sum of several DoRA updates is against
the base, as PEFT's forward has it. Rows are those of the base's own file; an adapter's rows are permuted to them.

A chunk of rows is held, never a tensor: peak memory is the factors of the tensors in flight and a few chunks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from tensorkeep.adapters._joined import Joined, sent_rows
from tensorkeep.adapters.shares import Share
from tensorkeep.adapters.terms import Term, load_tokens, whole
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.arrays import np_dtype, np_frombuffer
from tensorkeep.formats.view import STREAM_BYTES, StateView
from tensorkeep.quantization import encoding as quant_encoding
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.codes import Array, scaled
from tensorkeep.quantization.encoding import LEVELS, Encoding
from tensorkeep.quantization.stored import QuantizedWeight
from tensorkeep.storage.record import DTYPES, TensorRecord

_ELEMENTS = 1 << 17  # held at a time: 1 MB in float64, a few times over
_ROUNDED = ("F64", "F32", "F16", "BF16")  # the dtypes a merged weight is rounded to


@dataclass
class ComputedTensor:
    """A tensor that is computed: its rows [count, width] come from `source` and change by `terms`.

    Args:
        source: stored name in the base.
        count: number of rows.
        width: elements of a row.
        terms: what the adapters do to it.
        weight: describes the source where it is quantized.
        through: the quantization that a float source is sent through, since the adapter was trained on its result.
        steps: rows that make one step of the first dimension.
        held: rows of the source, where the adapter's whole tensor has more or fewer; None where it has as many.
        joined: of which matrices in memory its rows are pieces, where those were sent through a quantization and lie
            otherwise in the file; `through` is None then.
    """

    source: str
    count: int
    width: int
    terms: list[Term] = field(default_factory=list)
    weight: QuantizedWeight | None = None
    through: Encoding | None = None
    steps: int = 1
    held: int | None = None
    joined: list[Joined] = field(default_factory=list)

    @property
    def requantized(self) -> Encoding | None:
        """The quantization that a merge into the quantized file would send the result through."""
        if self.through is not None or self.weight is None:
            return self.through
        if self.weight.kind in LEVELS and isinstance(self.weight.block, int):
            return Encoding(self.weight.kind, self.weight.block, self.weight.nested is not None)
        return Encoding("int8") if "SCB" in self.weight.parts else None


@dataclass
class Moved:
    """Sums over one merged tensor, for the report: of W², of (W' - W)², of the update with W and with itself."""

    weight: float = 0.0
    change: float = 0.0
    along: float = 0.0  # <W, dW>
    square: float = 0.0  # <dW, dW>
    kept: float = 0.0  # <Q(W + dW), dW>
    original: float = 0.0  # (W trained on - W original)²
    size: int = 0
    spoiled: int = 0  # values that became infinite or NaN
    added: float = 0.0  # (W + dW - W)² before it is rounded
    shares: dict[int, list[float]] = field(default_factory=dict)  # adapter -> <W, sBA>, <sBA, sBA>
    blocks: list[tuple[Array, Array]] = field(default_factory=list)  # absmax and <level, dW> a block, for double scales

    def share(self, index: int, module: str) -> Share | None:
        """Return how much of an adapter's update the base held before the merge; None where the update is zero."""
        dot, square = self.shares.get(index, [0.0, 0.0])
        if square <= 0 or self.weight <= 0:
            return None
        noise = math.sqrt(self.weight / (self.size * square))
        return Share(module, dot / square, noise, math.sqrt(square / self.weight))


@dataclass(eq=False)
class MergedView(StateView):
    """The base as it is after the merge: the tensors in `made` are computed, all others stream as they are stored."""

    base: StateView | None = None
    made: dict[str, ComputedTensor] = field(default_factory=dict)
    moved: dict[str, Moved] | None = None  # filled while it streams, where not None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stream(
        self, name: str, rows: tuple[int, int] | None = None, granule: int = 1, chunk: int = STREAM_BYTES
    ) -> Iterator[memoryview]:
        """Yield a tensor's bytes in chunks, computed where the merge changes it; arguments as of `StateView.stream`."""
        made, record = self.made.get(name), self.records[name]
        assert self.base is not None
        if made is None:
            yield from self.base.stream(name, rows, granule, chunk)
            return
        row_bytes = max(made.width * DTYPES[record.dtype].bits // 8, 1)
        unit = granule // row_bytes if granule > row_bytes and granule % row_bytes == 0 else 1
        first, last = (rows[0] * made.steps, rows[1] * made.steps) if rows else (0, made.count)
        moved = Moved() if self.moved is not None else None
        for piece in _merged_rows(self.base, made, record.dtype, (first, last), unit, moved):
            yield piece.view(np.uint8).reshape(-1).data
        if moved is not None and self.moved is not None:
            _close(moved, made)
            with self.lock:
                self.moved[name] = moved

    def as_stored(self, name: str, chunk: int = STREAM_BYTES) -> Iterator[tuple[memoryview, memoryview]] | None:
        """Give an encoded tensor of the base as it lies, where the merge leaves it; as of `StateView.as_stored`."""
        return None if name in self.made or self.base is None else self.base.as_stored(name, chunk)


def _merged_rows(
    base: StateView, made: ComputedTensor, dtype: str, rows: tuple[int, int], unit: int = 1, moved: Moved | None = None
) -> Iterator[Array]:
    """Yield rows of a merged tensor in `dtype`, some [n, width] at a time, n a multiple of `unit`."""
    kind = made.requantized if moved is not None else None
    aligned = math.lcm(unit, _rows_of_whole_blocks(made, kind), _rows_of_whole_blocks(made, made.through))
    parts = [(t, _loaded(base, made, t)) for t in made.terms]
    sole = len({t.number for t in made.terms}) == 1
    for at, values in _resized_rows(base, made, rows, aligned, moved):
        weights = values.astype(np.float64)
        total, own = weights.copy(), dict.fromkeys([t.number for t in made.terms], weights)
        for term, loaded in parts:
            low, high = max(term.first, at), min(term.first + term.length, at + len(values))
            if low >= high:
                continue
            here, mine = slice(low - at, high - at), slice(low - term.first, high - term.first)
            if term.kind in ("saved", "tokens"):
                before = own[term.number]
                after = own[term.number] = _replaced(term, loaded, before, here, mine)
                total = after.copy() if sole and term.weight == 1 else total + term.weight * (after - before)
                continue
            plug = term.adapter.plug
            change = plug.change(term, loaded, own[term.number][here], mine)
            if moved is not None and hasattr(plug, "fixed") and plug.fixed(term):
                _count_share(moved, term.number, weights[here], change)
            total[here] += change if term.weight == 1 else term.weight * change
        made_rows = round_to(total, dtype)
        if moved is not None:
            _count(moved, weights, total, made_rows, kind if made.terms else None)
        yield made_rows


def _replaced(term: Term, loaded: Any, before: Array, here: slice, mine: slice) -> Array:
    """Return some rows of a weight with an adapter's own rows in the place of the base's."""
    after = before.copy()
    if term.kind == "saved":
        after[here] = loaded[mine]
        return after
    rows, values = loaded
    inside = (rows >= mine.start) & (rows < mine.stop)
    after[rows[inside] - mine.start + here.start] = values[inside]
    return after


def _resized_rows(
    base: StateView, made: ComputedTensor, rows: tuple[int, int], unit: int, moved: Moved | None
) -> Iterator[tuple[int, Array]]:
    """Yield the base's rows, and zeros in the place of those that it does not have."""
    if made.held is None:
        yield from _base_rows(base, made, rows, unit, moved)
        return
    last, at = max(min(rows[1], made.held), rows[0]), rows[0]
    waiting = np.empty((0, made.width), np.float32)
    step = max(_ELEMENTS // max(made.width, 1) // unit, 1) * unit
    absent = (np.zeros((min(step, rows[1] - n), made.width), np.float32) for n in range(last, rows[1], step))
    held = _base_rows(base, made, (rows[0], last), unit, moved) if rows[0] < last else iter(())
    for values in chain((v for _, v in held), absent):  # regrouped into multiples of `unit`
        waiting = np.concatenate([waiting, values])
        whole_units = len(waiting) // unit * unit
        if whole_units:
            yield at, waiting[:whole_units]
            waiting, at = waiting[whole_units:], at + whole_units
    if len(waiting):
        yield at, waiting


def _loaded(base: StateView, made: ComputedTensor, term: Term) -> Any:
    """Read what a term needs to change rows of its tensor."""

    def base_rows() -> Iterator[tuple[int, Array]]:
        """A pass of its own over all rows of the base's tensor."""
        return _base_rows(base, made, (0, made.count), _rows_of_whole_blocks(made, made.through))

    if term.kind == "saved":
        return whole(term, term.adapter.saved[term.name])
    if term.kind == "tokens":
        return load_tokens(term)
    return term.adapter.plug.load(term, base_rows)


def round_to(values: Array, dtype: str) -> Array:
    """Round float64 values to `dtype`, to nearest even, once.

    numpy rounds float64 to bfloat16 by way of float32, which errs where the float32 lies between two bfloat16 and
    the float64 does not: those few are moved off the middle first.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return np.asarray(values.astype(np_dtype(dtype)))
        near = values.astype(np.float32)
        middle = np.flatnonzero((near.view(np.uint32) & 0xFFFF) == 0x8000)
        if middle.size:
            exact, between = values.reshape(-1)[middle], near.reshape(-1)[middle]
            toward = np.where(exact > between, np.float32(np.inf), np.float32(-np.inf))
            near.reshape(-1)[middle] = np.where(exact == between, between, np.nextafter(between, toward))
        return np.asarray(near.astype(np_dtype(dtype)))


# -- the base's values ------------------------------------------------------------------------------------------------


def _base_rows(
    base: StateView, made: ComputedTensor, rows: tuple[int, int], unit: int, moved: Moved | None = None
) -> Iterator[tuple[int, Array]]:
    """Yield rows [n, width] of what the adapter was trained on, as floats.

    They are stored floats, dequantized codes, or floats sent through a quantization.
    """
    step = max(_ELEMENTS // max(made.width, 1) // unit, 1) * unit
    if made.weight is not None:
        yield from _dequantized(base, made, rows, step)
        return
    if made.joined:
        for at, sent, before in sent_rows(base, made.joined, rows, step):
            if moved is not None:
                moved.original += _square(sent.astype(np.float64) - before)
            yield at, sent
        return
    if made.through is None:
        yield from _plain(base, made, rows, step)
        return
    kind, scales = made.through, None
    if kind.kind in LEVELS:
        tops = [
            quant_encoding.absolute_maxima(np.ascontiguousarray(v, np.float32).reshape(-1), kind.block)
            for _, v in _plain(base, made, (0, made.count), step)
        ]
        absmax = np.concatenate(tops)
        scales = quant_encoding.stored_scales(absmax, kind.double)
    for at, stored in _plain(base, made, rows, step):
        values = np.ascontiguousarray(stored, np.float32)
        if scales is None:
            sent = quant_encoding.int8_values(values)
        else:
            begin = at * made.width // kind.block
            some = slice(begin, begin + -(-values.size // kind.block))
            codes = quant_encoding.four_bit_codes(values.reshape(-1), absmax[some], kind.kind, kind.block)
            sent = scaled(LEVELS[kind.kind][codes], scales[some], kind.block).reshape(values.shape)
        if moved is not None:
            moved.original += _square(sent.astype(np.float64) - values)
        yield at, sent


def _plain(base: StateView, made: ComputedTensor, rows: tuple[int, int], step: int) -> Iterator[tuple[int, Array]]:
    """Yield stored float rows and the number of the first one."""
    record = base[made.source]
    size = max(made.width * DTYPES[record.dtype].bits // 8, 1)
    outer = rows[0] // made.steps, -(-rows[1] // made.steps)
    at = outer[0] * made.steps
    for piece in base.stream(made.source, outer if record.shape else None, step * size, step * size):
        values = np_frombuffer(piece, record.dtype).reshape(-1, made.width)
        if record.dtype in ("BF16", "F8_E4M3", "F8_E5M2"):
            values = values.astype(np.float32)
        yield at, values
        at += len(values)


def _dequantized(
    base: StateView, made: ComputedTensor, rows: tuple[int, int], step: int
) -> Iterator[tuple[int, Array]]:
    """Yield the values of quantized codes, regrouped into whole rows of [rows[0], rows[1])."""
    assert made.weight is not None
    waiting, at = np.empty(0, np.float32), 0
    for _, values in quantized.stream_values(base, made.weight):
        waiting = np.concatenate([waiting, values])
        while waiting.size >= step * made.width:
            yield from _within(at, waiting[: step * made.width].reshape(-1, made.width), rows)
            waiting, at = waiting[step * made.width :], at + step
    if waiting.size:
        yield from _within(at, waiting.reshape(-1, made.width), rows)


def _within(at: int, values: Array, rows: tuple[int, int]) -> Iterator[tuple[int, Array]]:
    """Yield the part of a run of rows that lies in the range asked for."""
    low, high = max(rows[0], at), min(rows[1], at + len(values))
    if low < high:
        yield low, values[low - at : high - at]


def _rows_of_whole_blocks(made: ComputedTensor, kind: Encoding | None) -> int:
    """Return how many rows hold whole blocks of a 4-bit quantization, whose blocks lie flat over rows."""
    return kind.block // math.gcd(kind.block, made.width) if kind is not None and kind.kind in LEVELS else 1


# -- figures for the report -------------------------------------------------------------------------------------------


def _square(values: Array) -> float:
    """Return the sum of squares."""
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused, by name
        return float(np.dot(flat, flat))


def _count_share(moved: Moved, index: int, weights: Array, change: Array) -> None:
    """Add the products that tell how much of an adapter's update the base held before."""
    sums = moved.shares.setdefault(index, [0.0, 0.0])
    sums[0] += float(np.dot(weights.reshape(-1), change.reshape(-1)))
    sums[1] += _square(change)


def _count(moved: Moved, weights: Array, total: Array, made_rows: Array, kind: Encoding | None) -> None:
    """Add some rows to the sums of the report."""
    update = total - weights
    moved.size += weights.size
    moved.added += _square(update)
    moved.weight += _square(weights)
    moved.change += _square(made_rows.astype(np.float64) - weights)
    moved.spoiled += int(np.count_nonzero(np.isfinite(weights) & ~np.isfinite(made_rows.astype(np.float32))))
    if kind is None:
        return
    moved.along += float(np.dot(weights.reshape(-1), update.reshape(-1)))
    moved.square += _square(update)
    values = np.ascontiguousarray(total, np.float32)
    if kind.kind not in LEVELS:
        moved.kept += float(np.sum(quant_encoding.int8_values(values) * update))
        return
    flat = values.reshape(-1)
    absmax = quant_encoding.absolute_maxima(flat, kind.block)
    levels = LEVELS[kind.kind][quant_encoding.four_bit_codes(flat, absmax, kind.kind, kind.block)]
    products = levels * update.reshape(-1)
    moved.blocks.append((absmax, np.add.reduceat(products, np.arange(0, flat.size, kind.block))))


def _close(moved: Moved, made: ComputedTensor) -> None:
    """Add what double quantization keeps, which needs the scales of the whole tensor."""
    kind = made.requantized
    if moved.blocks and kind is not None:
        scales = quant_encoding.stored_scales(np.concatenate([a for a, _ in moved.blocks]), kind.double)
        moved.kept += float(np.dot(scales.astype(np.float64), np.concatenate([p for _, p in moved.blocks])))
        moved.blocks = []


def checked_dtype(record: TensorRecord, dtype: str) -> str:
    """Return `dtype` if weights can be rounded to it, or stop."""
    if dtype not in _ROUNDED:
        raise TensorkeepError(
            f"{record.name} would be merged into {dtype}, which needs scales",
            hint="--dtype bf16, and quantize afterwards",
        )
    return dtype
