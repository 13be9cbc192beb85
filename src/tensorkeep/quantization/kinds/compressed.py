"""compressed-tensors' pack-quantized: 1- to 8-bit integers packed along the inputs.

codes: `X.weight_packed` int32 [N, K·bits/32], each code plus 2^(bits-1)
beside: `X.weight_scale` [N, groups], [N, 1] or [1]; `X.weight_shape` [2]; perhaps `X.weight_zero_point` int32
    [N·bits/32, groups], `X.weight_g_idx` [K]
values: (code - zero) · scale

Compared with compressed-tensors 0.20.1 (`PackedQuantizationCompressor.decompress`), bit for bit. Weights of stacked
experts have one more dimension in front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tensorkeep.formats.view import StateView
from tensorkeep.quantization.codes import Array
from tensorkeep.quantization.description import QuantizedWeight, WeightProblem
from tensorkeep.quantization.kinds import packing
from tensorkeep.storage.record import TensorRecord, checked_shape

ROLES = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def find(view: StateView, records: Mapping[str, TensorRecord]) -> Iterator[QuantizedWeight]:
    """Describe every weight called weight_packed whose codes lie in 32-bit words."""
    for name, record in records.items():
        stem = name.removesuffix(".weight_packed")
        if stem != name and record.dtype in packing.WORDS and len(record.shape) in (2, 3):
            parts = {r: f"{stem}.{r}" for r in ROLES if f"{stem}.{r}" in records}
            yield _described(view, name, record, parts)


def _described(view: StateView, name: str, record: TensorRecord, parts: Mapping[str, str]) -> QuantizedWeight:
    if "weight_scale" not in parts:
        problem = WeightProblem("Q01", "packed codes without weight_scale")
        return QuantizedWeight(name, "pack-quantized", None, parts, problems=(problem,))
    shape = _shape(view, record, parts)
    scale, wrong, bits = view[parts["weight_scale"]], "", None
    if shape is None:
        what = "Q06" if "weight_shape" in parts else "Q01"
        problem = WeightProblem(what, f"weight_shape is missing or does not fit codes {list(record.shape)}")
        return QuantizedWeight(name, "pack-quantized", None, parts, problems=(problem,))
    told = _bits_told(packing.settings(view))
    bits = told if told and packing.words_for(shape[-1], told) == record.shape[-1] else None
    bits = bits or packing.bits_of(shape[-1], record.shape[-1])
    groups = scale.shape[-1] if scale.shape else 1
    down = math.prod(shape[:-1])
    if bits is None:
        wrong = f"{record.shape[-1]} words a row fit no number of bits for {shape[-1]} columns"
    elif not packing.floating(scale) or scale.elements not in (1, down * groups) or not groups:
        wrong = f"weight_scale {scale.dtype}{list(scale.shape)} does not fit a weight of {list(shape)}"
    elif "weight_zero_point" in parts and "weight_g_idx" in parts and groups == 1:
        wrong = "weight_g_idx with one group"
    elif "weight_zero_point" in parts and not _zeros_fit(view[parts["weight_zero_point"]], shape, groups, bits):
        wrong = f"weight_zero_point {list(view[parts['weight_zero_point']].shape)} does not fit {list(shape)}"
    elif "weight_g_idx" in parts and view[parts["weight_g_idx"]].elements != shape[-1]:
        wrong = f"weight_g_idx of {view[parts['weight_g_idx']].elements} does not fit {shape[-1]} columns"
    group = -(-shape[-1] // max(groups, 1))
    problems = (WeightProblem("Q06", wrong),) if wrong else ()
    return QuantizedWeight(
        name, "pack-quantized", shape, parts, (1, group), bits=bits or 0, problems=problems, stacked=len(shape) == 3
    )


def _shape(view: StateView, record: TensorRecord, parts: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the weight's shape as `weight_shape` says it, where it fits the codes."""
    if "weight_shape" not in parts or view[parts["weight_shape"]].elements not in (2, 3):
        return None
    told = checked_shape([int(n) for n in view.array(parts["weight_shape"]).reshape(-1)])
    if told is None or not math.prod(told):
        return None
    shape = (*record.shape[:-2], *told[-2:])
    fits = shape[:-1] == record.shape[:-1] and record.shape[-1] * 32 >= shape[-1]
    return shape if fits and record.shape[-1] * 4 <= shape[-1] + 31 else None


def _bits_told(said: Mapping[str, Any]) -> int | None:
    """Return the number of bits, where every group of the config says the same."""
    groups = said.get("config_groups")
    found = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        found.add(packing.number(weights, "num_bits") if isinstance(weights, Mapping) else None)
    (bits,) = found if len(found) == 1 else (None,)
    return bits if bits in range(1, 9) else None


def _zeros_fit(zeros: TensorRecord, shape: tuple[int, ...], groups: int, bits: int) -> bool:
    """Say whether packed zero points are one for each scale."""
    wanted = (*shape[:-2], packing.words_for(shape[-2], bits), groups)
    return zeros.dtype in packing.WORDS and zeros.shape == wanted


def _flat(view: StateView, weight: QuantizedWeight) -> tuple[Array, Array | None, Array | None]:
    """Return scales and zero points [rows, groups], and the group of each column where columns are out of order."""
    assert weight.shape is not None
    down = math.prod(weight.shape[:-1])
    scales = packing.wide(view, weight.parts["weight_scale"]).reshape(-1, view[weight.parts["weight_scale"]].shape[-1])
    scales = np.broadcast_to(scales, (down, scales.shape[1])) if len(scales) != down else scales
    zeros = order = None
    if "weight_zero_point" in weight.parts:
        packed = view.array(weight.parts["weight_zero_point"])
        packed = packed.reshape(-1, *packed.shape[-2:])
        inner = weight.shape[-2]
        zeros = np.concatenate([packing.unpack(p.T, weight.bits, inner).T for p in packed]).astype(np.float32)
    if "weight_g_idx" in weight.parts:
        found = view.array(weight.parts["weight_g_idx"]).reshape(-1).astype(np.int64)
        order = np.clip(found, 0, scales.shape[1] - 1) if (found >= 0).all() else None
    return scales, zeros, order


def values(view: StateView, weight: QuantizedWeight, rows: tuple[int, int]) -> Iterator[Array]:
    """Yield (code - zero) · scale of rows of the weight."""
    assert weight.shape is not None and isinstance(weight.block, tuple)
    columns, inner = weight.shape[-1], math.prod(weight.shape[1:-1])
    scales, zeros, order = _flat(view, weight)
    offset = np.float32(1 << (weight.bits - 1))

    def spread(grid: Array) -> Array:
        if grid.shape[1] == 1:
            return grid
        if order is not None:
            return grid.take(order, axis=1)
        return np.repeat(grid, weight.block[1], axis=1)[:, :columns]  # type: ignore[index]

    for first, last in packing.rows_at_once(columns * max(inner, 1), rows):
        words = packing.some_rows(view, weight.name, (first, last)).reshape(-1, view[weight.name].shape[-1])
        made = packing.unpack(words, weight.bits, columns).astype(np.float32)
        here = slice(first * inner, last * inner)
        made -= spread(zeros[here]) if zeros is not None else offset
        packing.times(made, spread(scales[here]))
        yield made.reshape(-1)


def scales(view: StateView, weight: QuantizedWeight) -> Array:
    """Return the scales."""
    return packing.wide(view, weight.parts["weight_scale"])


def codes(view: StateView, weight: QuantizedWeight) -> Iterator[Array]:
    """Yield codes of rows spread over the weight."""
    assert weight.shape is not None
    inner = math.prod(weight.shape[1:])
    for at, end in packing.sampled(weight.shape[0], inner):
        words = packing.some_rows(view, weight.name, (at, end)).reshape(-1, view[weight.name].shape[-1])
        yield packing.unpack(words, weight.bits, weight.shape[-1]).reshape(-1)
