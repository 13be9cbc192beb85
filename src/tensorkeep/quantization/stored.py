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
    codes: fp8 [N, K]
    beside: `weight_scale_inv` [ceil(N/b), ceil(K/b)]
    values: code · scale[block]

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
from tensorkeep.quantization.description import (
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
    "four_bit_state",
    "members",
    "packed_bytes",
    "refuse",
    "row_scales",
    "stream_values",
]


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
    for name, record in inside.items():
        module, _, last = name.rpartition(".")
        if name in out or last not in ("weight", "_weight_qdata") or record.encoding != "plain":
            continue
        prefix = f"{module}." if module else ""
        parts = {role: prefix + role for role in ("SCB", "weight_format", *SCALES, *ZEROS) if prefix + role in inside}
        made = by_scale(view, name, record, parts)
        if made is not None:
            out[name] = made
    return out


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


def stream_values(view: StateView, weight: QuantizedWeight) -> Iterator[tuple[int, Array]]:
    """Give the values of one quantized weight piece by piece; the codes are held, the values are not.

    Args:
        view: the checkpoint.
        weight: the weight's description, without problems.

    Yields:
        (first element in flat order, float32 values).
    """
    from tensorkeep.quantization import codes as quant_codes

    if weight.kind in FOUR_BITS:
        assert isinstance(weight.block, int)
        table, scales = four_bit_state(view, weight)
        yield from quant_codes.four_bit_values(packed_bytes(view, weight), table, scales, weight.elements, weight.block)
        return
    assert isinstance(weight.block, tuple) and weight.shape is not None
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    scales = row_scales(view, weight)
    zero = _scale_grid(view, weight, "zero_point") if "zero_point" in weight.parts else None
    step = max(quant_codes.ELEMENTS_AT_ONCE // max(columns, 1), 1)
    for at in range(0, rows, step):
        raw = bytearray().join(bytes(p) for p in view.stream(weight.name, (at, min(at + step, rows))))
        codes = np_frombuffer(raw, view[weight.name].dtype).reshape(-1, columns).astype("float32")
        down = [row // weight.block[0] for row in range(at, at + len(codes))]
        if zero is not None:
            codes -= _spread(zero[down], columns, weight.block[1])
        codes *= _spread(scales[down], columns, weight.block[1])
        yield at * columns, (codes * quant_codes.PER_127 if "SCB" in weight.parts else codes).reshape(-1)


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
    """Return the scales of an int8 or fp8 weight.

    Args:
        view: the checkpoint.
        weight: the weight's description, without problems.

    Returns:
        float32 [rows of blocks, columns of blocks].
    """
    return _scale_grid(view, weight, "SCB" if "SCB" in weight.parts else "scale")


def _scale_grid(view: StateView, weight: QuantizedWeight, role: str) -> Array:
    """Return the tensor of one role as float32 [rows of blocks, columns of blocks]."""
    import numpy as np

    assert isinstance(weight.block, tuple) and weight.shape is not None
    down = -(-weight.shape[0] // weight.block[0])
    return np.asarray(view.array(weight.parts[role]).astype(np.float32).reshape(down, -1))


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
