"""4-bit floats of one linear: NVFP4 (compressed-tensors, ModelOpt) and compressed-tensors' mxfp4-pack-quantized.

codes: `X.weight_packed` or `X.weight` uint8 [N, K/2], two e2m1 codes a byte, the low half first
beside: `X.weight_scale` fp8 [N, K/16] and `X.weight_global_scale` [1] (divides) or `X.weight_scale_2` [] (multiplies);
    for MXFP4 `X.weight_scale` uint8 [N, K/32], exponents plus 127
values: e2m1[code] · (scale / global scale), or e2m1[code] · (scale · scale_2)

Compared with compressed-tensors 0.20.1 (`NVFP4PackedCompressor`, `MXFP4PackedCompressor`), bit for bit;
`weight_scale_2` after ModelOpt's published formula. Weights of stacked experts have one more dimension in front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from tensorkeep.formats.view import StateView
from tensorkeep.quantization.codes import Array
from tensorkeep.quantization.description import QuantizedWeight, WeightProblem
from tensorkeep.quantization.kinds import packing
from tensorkeep.quantization.kinds.mxfp4 import PAIRS, exponents
from tensorkeep.storage.record import TensorRecord

ROLES = ("weight_scale", "weight_global_scale", "weight_scale_2")


def find(view: StateView, records: Mapping[str, TensorRecord]) -> Iterator[QuantizedWeight]:
    """Describe every weight of bytes with a scale for 16 or 32 of its halves."""
    for name, record in records.items():
        stem, _, last = name.rpartition(".")
        if last not in ("weight_packed", "weight") or record.dtype != "U8" or len(record.shape) not in (2, 3):
            continue
        parts = {r: f"{stem}.{r}" for r in ROLES if f"{stem}.{r}" in records}
        if last == "weight" and "weight_scale_2" not in parts:
            continue  # bytes called weight are bitsandbytes', or nobody's
        yield _described(view, name, record, parts)


def _described(view: StateView, name: str, record: TensorRecord, parts: Mapping[str, str]) -> QuantizedWeight:
    shape = (*record.shape[:-1], record.shape[-1] * 2)
    if "weight_scale" not in parts:
        problem = WeightProblem("Q01", "4-bit floats without weight_scale")
        return QuantizedWeight(name, "nvfp4", shape, parts, bits=4, problems=(problem,))
    scale = view[parts["weight_scale"]]
    kind, block = ("nvfp4", 16) if scale.dtype == "F8_E4M3" else ("mxfp4-packed", 32)
    whole = [r for r in ROLES[1:] if r in parts]
    problems = []
    if kind == "nvfp4" and not whole:
        problems.append(WeightProblem("Q01", "NVFP4 codes without weight_global_scale or weight_scale_2"))
    wanted = (*shape[:-1], -(-shape[-1] // block))
    if scale.dtype not in ("F8_E4M3", "U8", "F8_E8M0") or scale.shape != wanted:
        what = f"weight_scale is {scale.dtype}{list(scale.shape)}, {list(wanted)} is needed"
        problems.append(WeightProblem("Q06", what))
    elif shape[-1] % block:
        problems.append(WeightProblem("Q06", f"blocks of {block} do not divide rows of {shape[-1]}"))
    elif any(not packing.floating(view[parts[r]]) or view[parts[r]].elements not in _alike(shape) for r in whole):
        problems.append(WeightProblem("Q06", f"{whole[0]} is {list(view[parts[whole[0]]].shape)}, not one number"))
    return QuantizedWeight(
        name, kind, shape, parts, (1, block), bits=4, problems=tuple(problems), stacked=len(shape) == 3
    )


def _alike(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many scales of the whole a weight may have: one, or one an expert."""
    return (1, shape[0]) if len(shape) == 3 else (1,)


def scales(view: StateView, weight: QuantizedWeight) -> Array:
    """Return the scale of each block, that of the whole included, float32 [..., K/block]."""
    raw = view.array(weight.parts["weight_scale"])
    if weight.kind == "mxfp4-packed":
        return exponents(raw.view(np.uint8))
    made: Array = raw.astype(np.float32)
    for role in ROLES[1:]:
        if role in weight.parts:
            one = packing.wide(view, weight.parts[role]).reshape(-1, *[1] * (made.ndim - 1))
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                made = np.divide(made, one) if role == "weight_global_scale" else np.multiply(made, one)
    return np.asarray(made, np.float32)


def values(view: StateView, weight: QuantizedWeight, rows: tuple[int, int]) -> Iterator[Array]:
    """Yield e2m1[code] · scale of rows of the weight."""
    assert weight.shape is not None and isinstance(weight.block, tuple)
    grid, inner, block = scales(view, weight), math.prod(weight.shape[1:]), weight.block[1]
    for at, end in packing.rows_at_once(inner, rows):
        raw = packing.some_rows(view, weight.name, (at, end)).reshape(-1)
        made = PAIRS.take(raw).view(np.float32)
        spread = np.repeat(grid[at:end].reshape(-1, grid.shape[-1]), block, axis=1)[:, : weight.shape[-1]]
        packing.times(made, spread.reshape(-1))
        yield made


def codes(view: StateView, weight: QuantizedWeight) -> Iterator[Array]:
    """Yield codes of rows spread over the weight."""
    shape = view[weight.name].shape
    for at, end in packing.sampled(shape[0], 2 * math.prod(shape[1:])):
        raw = packing.some_rows(view, weight.name, (at, end)).reshape(-1)
        yield np.concatenate([raw & 15, raw >> 4])
