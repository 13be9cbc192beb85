"""Tell codes of quantized weights that were read as floats, and packed codes that nothing here can decode."""

from __future__ import annotations

import math

import numpy as np

from tensorkeep.diagnosis.evidence.case import Array, Case, np_dtype_known
from tensorkeep.diagnosis.evidence.quantized import weights
from tensorkeep.formats.arrays import np_dtype, np_frombuffer
from tensorkeep.quantization.stored import members
from tensorkeep.storage.record import DTYPES

_SAMPLE = 1 << 16  # elements that are looked at first
_FEWEST = 1024  # elements that say anything
# grid -> (numpy's name of the dtype, least largest magnitude): scales are chosen so that codes fill their range
_FLOAT8 = {"fp8 (E4M3)": ("F8_E4M3", 224.0), "fp8 (E5M2)": ("F8_E5M2", 14336.0)}
_INTEGERS = {"4-bit": (-8, 15, 6), "8-bit": (-128, 127, 64)}  # least and largest code, least number of different ones


def grid_of(values: Array) -> str | None:
    """Return the codes that float values are, with no scale applied: all on the grid of one code and filling its range.

    >>> grid_of(np.arange(-127, 128, dtype=np.float32).repeat(8))
    '8-bit'
    """
    values = values.reshape(-1)
    if values.size < _FEWEST or not np.isfinite(values).all():
        return None
    top = float(np.abs(values).max())
    if (values == np.rint(values)).all():
        kinds = len(np.unique(values))
        for name, (low, high, least) in _INTEGERS.items():
            if low <= values.min() and values.max() <= high and kinds >= least and top >= min(-low, high) - 1:
                return name
    for name, (dtype, least_top) in _FLOAT8.items():
        made = np_dtype(dtype)
        if least_top <= top <= float(np.finfo(np.float32).max) and _on_grid(values, made):
            return name
    return None


def _on_grid(values: Array, dtype: np.dtype) -> bool:
    """Say whether a cast to `dtype` and back changes nothing."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((values.astype(dtype).astype(np.float32) == values).all())


def codes_as_floats(case: Case) -> dict[str, str]:
    """Find weights of a wide float dtype that hold codes: name in the model -> what kind of codes."""
    assert case.view is not None
    found: dict[str, str] = {}
    for name, tensor in case.tensors.items():
        record = case.view[tensor.parts[0].name]
        wide = tensor.dtype in ("F32", "F16", "BF16", "F64") and len(tensor.shape) > 1 and record.encoding == "plain"
        if not wide or name in case.packed or tensor.parts[0].rows is not None or not np_dtype_known(tensor.dtype):
            continue
        row = math.prod(tensor.shape[1:])
        some = max(min(tensor.shape[0], _SAMPLE // max(row, 1)), 1)
        if case.comparisons.get(name) is not None and not case.changed(name):
            continue  # the reference's own values
        if grid_of(_rows(case, record.name, (0, some), tensor.dtype)) and (
            kind := grid_of(_rows(case, record.name, None, tensor.dtype))
        ):
            found[name] = kind
    return found


def _rows(case: Case, stored: str, rows: tuple[int, int] | None, dtype: str) -> Array:
    """Read rows of a stored tensor as float32; None for all of it."""
    assert case.view is not None
    data = bytearray().join(bytes(piece) for piece in case.view.stream(stored, rows))
    return np_frombuffer(data, dtype).astype(np.float32)


def undecoded(case: Case) -> list[str]:
    """Find packed codes that nothing here can turn into values and that are not the reference's, byte by byte."""
    assert case.view is not None
    described = weights(case)
    known = {*described, *members(described)}
    out = []
    for name in sorted(case.packed & set(case.tensors)):
        mine, other = case.tensors[name], case.reference_tensors.get(name)
        codes = not DTYPES[mine.dtype].floating or DTYPES[mine.dtype].bits < 8
        if mine.parts[0].name in known or not codes or len(mine.shape) < 2:
            continue
        if (
            other is None
            or (other.dtype, other.shape) != (mine.dtype, mine.shape)
            or case.views[1].digest(other.parts[0].name) != case.view.digest(mine.parts[0].name)
        ):
            out.append(name)
    return out
