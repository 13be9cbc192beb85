"""Quantized weights in a checkpoint: which stored tensors make up one, and its values.

One quantized weight is several tensors: packed codes under the weight's own name, and beside them the scales without
which the codes mean nothing. Read here, without the libraries that wrote them:

nf4, fp4 (bitsandbytes)
    codes: bytes [ceil(n/2), 1], also typed as bf16, fp16 or fp32
    beside: `.absmax`, `.quant_map`, `.quant_state.bitsandbytes__KIND`; `.nested_absmax`, `.nested_quant_map`
    values: map[code] · absmax[block]
int8 (bitsandbytes)
    codes: int8 [N, K]
    beside: `SCB` [N], `weight_format`
    values: code · SCB[row] / 127
int8, fp8 (compressed-tensors, fbgemm, torchao)
    codes: int8 or fp8 [N, K]
    beside: `weight_scale` or `.scale`
    values: code · scale, per tensor, row or group of columns
fp8 in blocks (DeepSeek, transformers)
    codes: fp8 [N, K], or [E, N, K] of stacked experts, whose names end in `_proj` and `_proj_scale_inv`
    beside: `weight_scale_inv` [ceil(N/b), ceil(K/b)], floats or (MX) exponents plus 127 in bytes
    values: code · scale[block]
mxfp4, nvfp4, gptq, awq, pack-quantized
    the files in `kinds`

4-bit codes lie flat over the row-major weight, high half of the byte first, and a block is `blocksize` consecutive
elements of that flat order: it may straddle two rows. Sources: QLoRA (arXiv 2305.14314, section 3 and appendix E),
bitsandbytes' functional.py (QuantState), the model cards of the formats; all six bitsandbytes layouts were compared
with bitsandbytes 0.50.2, bit for bit.

What a state lacks (Q01) or contradicts (Q06) is kept as a problem of the weight and never raised: a reader who only
lists tensors must not stumble over it. `dequantize` refuses such a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.formats.arrays import np_frombuffer
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import kinds
from tensorkeep.quantization.description import (
    EXPONENTS,
    FLOAT8,
    FOUR_BITS,
    NEEDED_ROLES,
    NESTED_ROLES,
    QUANT_STATE,
    SCALES,
    TORCHAO,
    ZEROS,
    QuantizedWeight,
    by_scale,
    float_name,
    four_bit,
)
from tensorkeep.storage.record import TensorRecord

if TYPE_CHECKING:
    from tensorkeep.quantization.codes import Array

__all__ = [
    "FLOAT8",
    "TORCHAO",
    "QuantizedWeight",
    "dequantize",
    "find_quantized",
    "float_name",
    "four_bit_state",
    "members",
    "packed_bytes",
    "refuse",
    "row_scales",
    "stream_values",
]

_STACKED = {"scale_inv": "weight_scale_inv", "scale": "weight_scale"}  # beside a parameter that is no `.weight`
_READ_AT_ONCE, _DECODED_AT_ONCE = 1 << 22, 1 << 17  # elements of 8-bit codes


def find_quantized(view: StateView, names: Mapping[str, str] | None = None) -> dict[str, QuantizedWeight]:
    """Find the quantized weights of a checkpoint; headers and the small states are read.

    Args:
        view: the checkpoint.
        names: restricts the search to these stored names (its keys), e.g. the model's own tensors.

    Returns:
        Stored name of the codes -> description of the weight.

    Example:
        >>> {w.kind for w in find_quantized(read("model-nf4")).values()}              # doctest: +SKIP
        {'nf4'}
    """
    inside = view.records if names is None else {n: view[n] for n in names if n in view}
    groups = _four_bit_groups(inside)
    out = {name: four_bit(view, name, parts) for name, parts in groups.items()}
    for module in kinds.modules(inside):
        for weight in module.find(view, inside):
            if inside[weight.name].encoding == "plain" and inside[weight.name].elements:
                out.setdefault(weight.name, weight)
    for name, record in inside.items():
        if name in out or record.encoding != "plain" or not record.elements:
            continue
        made = by_scale(view, name, record, parts) if (parts := _beside(name, record, inside)) is not None else None
        if made is not None:
            out[name] = made
    return out


def _beside(name: str, record: TensorRecord, records: Mapping[str, TensorRecord]) -> dict[str, str] | None:
    """Return the scales beside a tensor by role; None where its name is not that of codes."""
    module, _, last = name.rpartition(".")
    if last in ("weight", "_weight_qdata"):
        prefix = f"{module}." if module else ""
        return {role: prefix + role for role in ("SCB", "weight_format", *SCALES, *ZEROS) if prefix + role in records}
    if record.dtype not in FLOAT8:
        return None
    return next(({role: f"{name}_{end}"} for end, role in _STACKED.items() if f"{name}_{end}" in records), None)


def members(weights: Mapping[str, QuantizedWeight]) -> dict[str, str]:
    """Map every scale, map and state to the codes that it belongs to.

    Args:
        weights: from `find_quantized`.

    Returns:
        Stored name -> stored name of the codes; also for the digest that our own files keep beside the codes
        (`NAME_digest`), whether it is there or not.
    """
    found = {part: weight.name for weight in weights.values() for part in weight.parts.values()}
    return found | {f"{weight.name}_digest": weight.name for weight in weights.values()}


def _four_bit_groups(records: Mapping[str, TensorRecord]) -> dict[str, dict[str, str]]:
    """Group tensors that carry a 4-bit role: codes' name -> role -> stored name; the codes may be missing."""
    groups: dict[str, dict[str, str]] = {}
    for name in records:
        stem, found, kind = name.rpartition(QUANT_STATE)
        if found:
            groups.setdefault(stem, {})[f"state:{kind}"] = name
            continue
        stem, _, role = name.rpartition(".")
        if role in NEEDED_ROLES + NESTED_ROLES and (stem in records or stem.endswith("weight")):
            groups.setdefault(stem, {})[role] = name
    for name, record in records.items():
        # packed bytes without any state: nothing else is a column of bytes called weight
        if name not in groups and name.endswith(".weight") and record.dtype == "U8" and record.shape[1:] == (1,):
            groups[name] = {}
    return groups


# -- values -------------------------------------------------------------------------------------------------------


def dequantize(view: StateView, name: str, weight: QuantizedWeight | None = None) -> Array:
    """Return the float32 values of one quantized weight, in its own shape; nothing else of the checkpoint is read.

    Args:
        view: the checkpoint.
        name: stored name of the codes.
        weight: its description; saves the search where `find_quantized` was called already.

    Raises:
        TensorkeepError: Q01 or Q06 where the state is missing or contradicts itself, K01 where `name` is no quantized
            weight.

    Example:
        >>> dequantize(read("model-nf4"), "model.layers.0.mlp.up_proj.weight").shape          # doctest: +SKIP
        (1536, 576)
    """
    import numpy as np

    weight = weight or find_quantized(view).get(name)
    if weight is None:
        raise TensorkeepError(
            f"{name} is no quantized weight",
            where=view.path,
            code="K01",
            hint=near_misses(name, find_quantized(view)) or None,
        )
    refuse(weight, view.path)
    assert weight.shape is not None
    out = np.empty(weight.elements, np.float32)
    for at, values in stream_values(view, weight):
        out[at : at + values.size] = values
    return out.reshape(weight.shape)


def stream_values(
    view: StateView, weight: QuantizedWeight, rows: tuple[int, int] | None = None
) -> Iterator[tuple[int, Array]]:
    """Give the values of one quantized weight piece by piece; the codes may be held, the values are not.

    Args:
        view: the checkpoint.
        weight: the weight's description, without problems.
        rows: (first, last) takes that slice of the first dimension.

    Yields:
        (first element in flat order of the whole weight, float32 values).
    """
    from tensorkeep.quantization import codes as quant_codes

    assert weight.shape is not None
    row = math.prod(weight.shape[1:])
    first, last = rows or (0, weight.shape[0])
    if weight.kind in FOUR_BITS:
        assert isinstance(weight.block, int)
        table, scales = four_bit_state(view, weight)
        found = quant_codes.four_bit_values(packed_bytes(view, weight), table, scales, weight.elements, weight.block)
        for at, values in found:
            low, high = max(at, first * row), min(at + values.size, last * row)
            if low < high:
                yield low, values[low - at : high - at]
        return
    module, at = kinds.module(weight.kind), first * row
    for values in (
        _scaled(view, weight, (first, last)) if module is None else module.values(view, weight, (first, last))
    ):
        yield at, values
        at += values.size


def _scaled(view: StateView, weight: QuantizedWeight, rows: tuple[int, int]) -> Iterator[Array]:
    """Yield code · scale of rows of an 8-bit weight, less the zero point where it has one."""
    import numpy as np

    from tensorkeep.quantization import codes as quant_codes

    assert isinstance(weight.block, tuple) and weight.shape is not None
    columns, inner = weight.matrix[1], weight.matrix[0] // max(weight.shape[0], 1)
    scales, dtype = row_scales(view, weight), view[weight.name].dtype
    zero = _scale_grid(view, weight, "zero_point") if "zero_point" in weight.parts else None
    table = np_frombuffer(bytes(range(256)), dtype).astype(np.float32)
    height = weight.shape[-2] if weight.stacked else weight.shape[0]  # rows of one matrix
    grid = -(-height // weight.block[0])  # rows of scales that it has
    step = max(_READ_AT_ONCE // max(columns * inner, 1), 1)
    small = max(_DECODED_AT_ONCE // max(columns, 1), 1)
    for start in range(rows[0], rows[1], step):
        end = min(start + step, rows[1])
        raw = bytearray().join(bytes(p) for p in view.stream(weight.name, (start, end)))
        packed = np_frombuffer(raw, "U8").reshape(-1, columns)
        for at in range(0, len(packed), small):
            codes = table.take(packed[at : at + small])
            number = np.arange(start * inner + at, start * inner + at + len(codes))
            down = number // height * grid + number % height // weight.block[0]
            if zero is not None:
                codes -= _spread(zero[down], columns, weight.block[1])
            _multiply(codes, scales[down], weight.block[1])
            yield (codes * quant_codes.PER_127 if "SCB" in weight.parts else codes).reshape(-1)


def _multiply(values: Array, scales: Array, block: int) -> None:
    """Multiply values [n, columns] in place by one scale for every `block` columns."""
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale gives NaN or infinity, as in any other reader
        if scales.shape[1] > 1 and scales.shape[1] * block == values.shape[1]:
            values.reshape(len(values), -1, block).__imul__(scales[:, :, None])
        else:
            values *= _spread(scales, values.shape[1], block)


def packed_bytes(view: StateView, weight: QuantizedWeight) -> Array:
    """Return the codes of a 4-bit weight as uint8, reinterpreted from whatever dtype they are stored under.

    Args:
        view: the checkpoint.
        weight: the weight's description.
    """
    return np_frombuffer(view.bytes(weight.name), "U8")


def four_bit_state(view: StateView, weight: QuantizedWeight) -> tuple[Array, Array]:
    """Return the value of each of the 16 codes, and one scale per block.

    Args:
        view: the checkpoint.
        weight: the description of an nf4 or fp4 weight, without problems.

    Returns:
        float32 [16] and float32 [blocks]; doubly quantized scales are decoded.
    """
    from tensorkeep.quantization import codes as quant_codes

    table, absmax = view.array(weight.parts["quant_map"]), view.array(weight.parts["absmax"])
    if weight.nested is None:
        return table, absmax
    levels, outer = (view.array(weight.parts[role]) for role in ("nested_quant_map", "nested_absmax"))
    return table, quant_codes.nested_scales(absmax, levels, outer, weight.nested.blocksize, weight.nested.offset)


def row_scales(view: StateView, weight: QuantizedWeight) -> Array:
    """Return the scales of a weight of any kind but nf4 and fp4.

    Args:
        view: the checkpoint.
        weight: the weight's description, without problems.

    Returns:
        float32, of int8 and fp8 [rows of blocks, columns of blocks], of other kinds as they are stored.
    """
    module = kinds.module(weight.kind)
    if module is not None:
        found: Array = module.scales(view, weight)
        return found
    return _scale_grid(view, weight, "SCB" if "SCB" in weight.parts else "scale")


def _scale_grid(view: StateView, weight: QuantizedWeight, role: str) -> Array:
    """Return the tensor of one role as float32 [rows of blocks, columns of blocks]."""
    import numpy as np

    assert isinstance(weight.block, tuple) and weight.shape is not None
    height = weight.shape[-2] if weight.stacked else weight.shape[0]
    down = -(-height // weight.block[0]) * (weight.matrix[0] // max(height, 1))
    raw = view.array(weight.parts[role])
    if role == "scale" and view[weight.parts[role]].dtype in EXPONENTS:
        with np.errstate(over="ignore"):
            raw = np.ldexp(np.float32(1), raw.view(np.uint8).astype(np.int32) - 127)
    return np.asarray(raw.astype(np.float32).reshape(down, -1))


def _spread(scales: Array, columns: int, block: int) -> Array:
    """Repeat one scale per block of columns to one per column; a single one stays one and broadcasts."""
    import numpy as np

    return scales if scales.shape[1] == 1 else np.repeat(scales, block, axis=1)[:, :columns]


def refuse(weight: QuantizedWeight, where: object) -> None:
    """Raise the first problem of a weight, if it has one.

    Args:
        weight: the weight's description.
        where: the checkpoint, for messages.

    Raises:
        TensorkeepError: Q01 or Q06.
    """
    if weight.problems:
        code, message = weight.problems[0]
        hint = (
            "get the checkpoint again, with its quantization state"
            if code == "Q01"
            else "save it again, from the float weights"
        )
        raise TensorkeepError(f"{weight.name}: {message}", where=where, code=code, hint=hint)
