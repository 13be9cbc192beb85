"""MXFP4 as gpt-oss is published: 4-bit floats of stacked experts in blocks of 32 that share an exponent.

codes: `X_blocks` uint8 [E, N, K/32, 16], two e2m1 codes a byte, the low half first
beside: `X_scales` uint8 [E, N, K/32], exponents plus 127
values: e2m1[code] · 2^(scale - 127) as `X` [E, K, N], which is how transformers keeps experts

Compared with transformers' `convert_moe_packed_tensors`, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from tensorkeep.formats.view import StateView
from tensorkeep.quantization.codes import Array
from tensorkeep.quantization.description import QuantizedWeight, WeightProblem
from tensorkeep.quantization.kinds import packing
from tensorkeep.storage.record import TensorRecord

# the two values of each byte, as one 64-bit number: half the lookups
PAIRS = np.stack([np.tile(packing.E2M1, 16), np.repeat(packing.E2M1, 16)], axis=1).reshape(-1).view(np.float64)


def exponents(codes: Array) -> Array:
    """Return 2^(code - 127) as float32; 255, which the format calls no number, becomes infinity as in torch."""
    with np.errstate(over="ignore"):
        return np.ldexp(np.float32(1), codes.astype(np.int32) - 127)


def find(view: StateView, records: Mapping[str, TensorRecord]) -> Iterator[QuantizedWeight]:
    """Describe every pair of `X_blocks` and `X_scales`."""
    for name, record in records.items():
        stem = name.removesuffix("_blocks")
        if stem == name or record.dtype != "U8" or record.shape[-1:] != (16,) or len(record.shape) != 4:
            continue
        experts, outputs, groups, _ = record.shape
        shape = (experts, groups * 32, outputs)
        scales = records.get(f"{stem}_scales")
        if scales is None:
            problem = WeightProblem("Q01", "MXFP4 blocks without their scales")
            yield QuantizedWeight(name, "mxfp4", shape, {}, (1, 32), bits=4, stacked=True, problems=(problem,))
            continue
        problems: tuple[WeightProblem, ...] = ()
        if scales.dtype not in ("U8", "F8_E8M0") or scales.shape != record.shape[:-1]:
            what = f"scales are {scales.dtype}{list(scales.shape)}, U8{list(record.shape[:-1])} is needed"
            problems = (WeightProblem("Q06", what),)
        yield QuantizedWeight(
            name, "mxfp4", shape, {"scales": scales.name}, (1, 32), bits=4, stacked=True, problems=problems
        )


def values(view: StateView, weight: QuantizedWeight, rows: tuple[int, int]) -> Iterator[Array]:
    """Yield the values of experts, 32 rows of the transposed weight at a time; one expert's codes are held."""
    assert weight.shape is not None
    _, inputs, outputs = weight.shape
    low, high = np.tile(packing.E2M1, 16), np.repeat(packing.E2M1, 16)
    for expert in range(*rows):
        blocks = packing.some_rows(view, weight.name, (expert, expert + 1))[0]
        raw = packing.some_rows(view, weight.parts["scales"], (expert, expert + 1))[0]
        scales = np.ascontiguousarray(exponents(raw.view(np.uint8)).T)
        for group in range(inputs // 32):
            # bytes are turned before they are looked up: they are an eighth of what comes of them
            codes = np.ascontiguousarray(blocks[:, group].T)
            made = np.empty((16, 2, outputs), np.float32)
            with np.errstate(invalid="ignore", over="ignore"):
                np.multiply(low.take(codes), scales[group], out=made[:, 0])
                np.multiply(high.take(codes), scales[group], out=made[:, 1])
            yield made.reshape(-1)


def scales(view: StateView, weight: QuantizedWeight) -> Array:
    """Return the scales."""
    return exponents(view.array(weight.parts["scales"]).view(np.uint8))


def codes(view: StateView, weight: QuantizedWeight) -> Iterator[Array]:
    """Yield codes of experts spread over the weight."""
    shape = view[weight.name].shape
    for at, end in packing.sampled(shape[0], 2 * math.prod(shape[1:])):
        raw = packing.some_rows(view, weight.name, (at, end)).reshape(-1)[: 1 << 20]
        yield np.concatenate([raw & 15, raw >> 4])
