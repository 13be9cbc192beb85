"""Tell codes that no quantization gives: every code equally often, or codes that leave the range of their scale empty.

Weights of a trained model are many small ones and few large ones, so the codes near zero are common and those at the
ends of the range rare, whatever the kind: the commonest of 16 codes is at least half again as common as the rarest.
Random bytes, codes read in a wrong order of bits, or encrypted ones have all codes equally often. And a scale is chosen
so that the largest of its values gets (nearly) the largest code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tensorkeep.diagnosis.evidence.case import Array
from tensorkeep.formats.arrays import np_dtype, np_frombuffer
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization import kinds
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.stored import FLOAT8, QuantizedWeight

_FEWEST = 4096  # codes that say anything
_LOOKED_AT = 1 << 20
# how far the share of a code may lie from its equal part, beside what chance explains; some writers of 8 bits leave the
# lowest code out
_EVEN, _EVEN_8BIT = 0.03, 0.08
_LEAST_REACH = 1 / 16  # of the largest code, that the largest code of a block has


@dataclass(frozen=True)
class Codes:
    """How the codes of one weight are spread.

    Attributes:
        looked_at: how many were counted.
        uneven: the largest distance of a code's share from its equal part, over that part.
        full: the share of groups that hold both the lowest and the highest code; None where groups are not known.
        even: whether all are equally often there, as in noise.
    """

    looked_at: int
    uneven: float
    full: float | None
    even: bool


def spread(view: StateView, weight: QuantizedWeight) -> Codes | None:
    """Count the codes of a weight; None where there are too few.

    Args:
        view: the checkpoint.
        weight: a quantized weight in it, without problems.
    """
    bits = weight.bits or (4 if weight.kind in quant_codes.TABLES else 8)
    bins = 1 << min(bits, 4)
    counts, full, groups = np.zeros(bins, np.int64), 0, 0
    group = _group(view, weight)
    for piece in _codes(view, weight):
        top = piece >> max(bits - 4, 0)
        counts += np.bincount(top, minlength=bins)[:bins]
        if group:
            some = piece[: piece.size // group * group].reshape(-1, group)
            full += int(((some.min(1) == 0) & (some.max(1) == (1 << bits) - 1)).sum())
            groups += len(some)
    total = int(counts.sum())
    if total < _FEWEST:
        return None
    uneven = float(np.abs(counts * (bins / total) - 1).max())
    share = full / groups if groups else None
    even = uneven < (_EVEN_8BIT if bits == 8 else _EVEN) + 3 * math.sqrt(bins / total)
    # evenly spread values (a fresh layer's) that are rounded group by group give even codes too, each group the whole
    # range of them; random codes of groups as small as this do not
    chance = 1 - 2 * (1 - 1 / (1 << bits)) ** group if group else 1.0
    ranged = share is not None and share > 0.98 and chance < 0.95
    return Codes(total, uneven, share, even and not ranged)


def _group(view: StateView, weight: QuantizedWeight) -> int:
    """Return the length of groups of integers that lie one after the other in a row of the weight; 0 for none."""
    if weight.kind not in ("gptq", "awq", "pack-quantized") or weight.shape is None:
        return 0
    found = weight.block[1] if isinstance(weight.block, tuple) else 0
    if not found or weight.shape[-1] % found:
        return 0
    said = next((weight.parts[role] for role in ("g_idx", "weight_g_idx") if role in weight.parts), None)
    if said is None:
        return found
    order = view.array(said).reshape(-1)
    return found if np.array_equal(order, np.arange(order.size) // found) else 0


def _codes(view: StateView, weight: QuantizedWeight) -> Iterator[Array]:
    """Yield codes of one weight as bytes, the signed ones counted from their lowest."""
    module = kinds.module(weight.kind)
    if module is not None:
        yield from module.codes(view, weight)
        return
    if weight.kind in quant_codes.TABLES:
        packed = quantized.packed_bytes(view, weight)[: _LOOKED_AT // 2]
        yield quant_codes.nibbles(packed, min(2 * packed.size, weight.elements))
        return
    for raw in _raw(view, weight):
        yield raw ^ np.uint8(128) if view[weight.name].dtype == "I8" else raw


def _raw(view: StateView, weight: QuantizedWeight) -> Iterator[Array]:
    """Yield the bytes of 8-bit codes, about `_LOOKED_AT` of them."""
    seen = 0
    for piece in view.stream(weight.name):
        yield np_frombuffer(bytes(piece), "U8")
        seen += len(piece)
        if seen >= _LOOKED_AT:
            return


def reach(view: StateView, weight: QuantizedWeight) -> float | None:
    """Return how much of the range of its codes the middle block of an 8-bit weight fills, between 0 and 1.

    Args:
        view: the checkpoint.
        weight: an int8 or fp8 weight without problems.

    Returns:
        The median over blocks that are not zero throughout of the largest code over the largest that there is; None
        for other kinds and for weights without such a block.
    """
    dtype = view[weight.name].dtype
    if dtype not in (*FLOAT8, "I8") or not isinstance(weight.block, tuple) or "zero_point" in weight.parts:
        return None
    columns = weight.matrix[1]
    rows = max(min(weight.matrix[0], _LOOKED_AT // max(columns, 1)) // weight.block[0], 1) * weight.block[0]
    need, data = min(rows, weight.matrix[0]) * columns, bytearray()
    for piece in view.stream(weight.name):
        data += piece
        if len(data) >= need:
            break
    values = np.abs(np_frombuffer(data[:need], dtype).astype(np.float32)).reshape(-1, columns)
    tops = np.maximum.reduceat(values, np.arange(0, len(values), weight.block[0]), 0)
    tops = np.maximum.reduceat(tops, np.arange(0, columns, max(weight.block[1], 1)), 1)
    largest = 127.0 if dtype == "I8" else _largest(dtype)
    held = tops[np.isfinite(tops) & (tops > 0)]
    return float(np.median(held)) / largest if held.size else None


def _largest(dtype: str) -> float:
    """Return the largest finite number of an 8-bit float."""
    import ml_dtypes

    return float(ml_dtypes.finfo(np_dtype(dtype)).max)


def too_short(reached: float | None) -> bool:
    """Say whether codes leave so much of their range empty that this scale was not chosen for them."""
    return reached is not None and reached < _LEAST_REACH
