"""Measure the values of a checkpoint that has no reference: NaN, constants, spread, traces of 8-bit floats."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tensorkeep.diagnosis.evidence.bytewise import size_of
from tensorkeep.diagnosis.evidence.case import Array, Case, np_dtype_known
from tensorkeep.diagnosis.evidence.casts import on_grid
from tensorkeep.diagnosis.evidence.statistics import Spread, pieces_of, sampled, spread
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.record import DTYPES
from tensorkeep.storage.spreading import in_threads

# sign and exponent all ones: infinity or NaN, by the bytes of a float and of its mantissa
_MASKS = {
    "bfloat16": (0x7F80, 0x007F),
    "float16": (0x7C00, 0x03FF),
    "float32": (0x7F800000, 0x007FFFFF),
    "float64": (0x7FF << 52, (1 << 52) - 1),
}


class Scanned(NamedTuple):
    """What the values of one tensor show.

    `nan` and `infinite` are counts. `constant`: the one value that all elements have, if they do; otherwise `spread`
    and `grid` (the 8-bit float format whose grid all values lie on, None for none) are given.
    """

    nan: int
    infinite: int
    constant: float | None
    spread: Spread | None
    grid: str | None


def scan(case: Case) -> dict[str, Scanned]:
    """Measure each floating tensor of the checkpoint, once for all checks.

    Args:
        case: The case; tensors whose data is damaged are put into `case.broken`.

    Returns:
        The figures by Hugging Face name. Parts of quantized weights and a head tied to its embedding are left out.
    """
    known: dict[str, Scanned] | None = case.results.get("scan")
    if known is not None:
        return known
    names = [
        n
        for n, h in case.tensors.items()
        if DTYPES[h.dtype].floating and np_dtype_known(h.dtype) and n not in case.packed and n not in case.tied
    ]
    names = sorted(names, key=lambda n: -size_of(case.tensors[n]))
    total, done, seen = sum(size_of(case.tensors[n]) for n in names), 0, {}
    for name, found in zip(names, in_threads(lambda n: _measure(case, n), names, lambda n: size_of(case.tensors[n]))):
        if isinstance(found, TensorkeepError):
            case.broken[name] = found
        else:
            seen[name] = found
        done += size_of(case.tensors[name])
        if case.progress:
            case.progress("scan", done, total)
    case.results["scan"] = seen
    return seen


def _measure(case: Case, name: str) -> Scanned | TensorkeepError:
    """Measure one tensor; an error of damaged data is returned, not raised."""
    try:
        values = case.values(name)
    except TensorkeepError as error:
        if error.code is None:
            raise
        return error
    if values.size == 0:
        return Scanned(0, 0, None, None, None)
    nan, infinite = not_finite(values)
    first = values.reshape(-1)[0]
    constant = float(first) if not nan and values.size > 1 and bool((values == first).all()) else None
    some = sampled(values)
    return Scanned(
        nan,
        infinite,
        constant,
        spread(some) if constant is None else None,
        on_grid(values) if constant is None else None,
    )


def not_finite(values: Array) -> tuple[int, int]:
    """Count NaN and infinities, by bit pattern, which is quick for every float type."""
    if values.dtype.name not in _MASKS:
        with np.errstate(invalid="ignore"):
            wide = values.astype(np.float32)
        return int(np.count_nonzero(np.isnan(wide))), int(np.count_nonzero(np.isinf(wide)))
    exponent, mantissa = _MASKS[values.dtype.name]
    nan = infinite = 0
    for piece in pieces_of(values):
        bits = piece.view(f"u{values.itemsize}")
        high = (bits & bits.dtype.type(exponent)) == bits.dtype.type(exponent)
        if high.any():
            odd = int(np.count_nonzero(bits[high] & bits.dtype.type(mantissa)))
            nan, infinite = nan + odd, infinite + int(np.count_nonzero(high)) - odd
    return nan, infinite
