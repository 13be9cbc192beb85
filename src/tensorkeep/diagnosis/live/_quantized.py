"""Compare a quantized tensor in memory with the file: with the same codes exactly, with floats within the quantization.

A quantized value lies at most half a step of its grid from the value that it stands for, and a step is a part of the
largest value of its block or row: so every element has a bound, and another tensor breaks it nearly everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorkeep.conversion.plan import Part
from tensorkeep.diagnosis.live._tensors import Mismatch
from tensorkeep.models.buffers import REFUSALS
from tensorkeep.models.counterpart import StoredModel
from tensorkeep.models.tensors import Held, expected
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization.stored import QuantizedWeight, dequantize

Array = np.ndarray[Any, Any]
_STEPS = {"4bit": 0.2, "int8": 0.6 / 127}  # half of the widest step, of the block's largest value, and some room
_NESTED = 0.02  # of the largest scale: what 8-bit codes of the scales may lose
_OTHER = 0.3  # relative error beyond which codes of unknown layouts stand for other weights


def compare(
    item: Held, parts: tuple[Part, ...], source: StoredModel, described: dict[str, QuantizedWeight]
) -> Mismatch | bool:
    """Compare a quantized tensor of a model with the stored one of its name.

    Args:
        item: the tensor in memory.
        parts: the stored rows that it should stand for.
        source: the checkpoint.
        described: its quantized weights, from `find_quantized`.

    Returns:
        What is wrong with it; True where it is right, False where it cannot be compared.
    """
    mine = _values(item)
    if mine is None:
        return False
    weight = described.get(parts[0].name) if len(parts) == 1 else None
    if weight is not None:
        if weight.problems or weight.shape != mine.shape:
            return False
        theirs = dequantize(source.view, weight.name, weight)
        room = np.float32(1e-5) * np.abs(theirs).max(initial=0)
        return _judged(item, mine, theirs, np.broadcast_to(room, mine.shape), "the codes in the file")
    found = expected(parts, source.view, mine.shape, (0, mine.shape[0]))
    if found is None or not found.dtype.is_floating_point:
        return False
    theirs = found.float().numpy()
    return _judged(item, mine, theirs, _room(item, theirs), "the file's weight, quantized")


def _judged(item: Held, mine: Array, theirs: Array, room: Array, what: str) -> Mismatch | bool:
    """Return True where every element is within its bound."""
    apart = np.abs(mine - theirs)
    wrong = int(np.count_nonzero(~(apart <= room)))
    if not wrong:
        return True
    norm = float(np.linalg.norm(theirs))
    evidence = {
        "different": wrong,
        "elements": mine.size,
        "relative": float(np.linalg.norm(apart)) / norm if norm else 0,
    }
    words = f"stands for other values than {what}: {wrong} of {mine.size} elements"
    return Mismatch(item.name, "V06", words, evidence)


def _room(item: Held, theirs: Array) -> Array:
    """Return how far each element may be from the file's, float32 of the weight's shape."""
    state = getattr(item.tensor, "quant_state", None)
    if state is not None:
        block = int(state.blocksize)
        peaks = quant_codes.block_maxima(theirs, block)
        peaks = _STEPS["4bit"] * peaks + (_NESTED * peaks.max(initial=0) if state.nested else 0)
        return np.repeat(peaks, block)[: theirs.size].reshape(theirs.shape) + np.float32(1e-12)
    if _int8_scales(item) is not None:
        peaks = np.abs(theirs).max(axis=1, keepdims=True)
        return np.broadcast_to(_STEPS["int8"] * peaks + np.float32(1e-12), theirs.shape)
    whole = float(np.linalg.norm(theirs)) * _OTHER
    return np.full(theirs.shape, whole, np.float32)


def _values(item: Held) -> Array | None:
    """Return the values that a tensor's codes stand for, as float32; None where nothing says how to decode them."""
    tensor: Any = item.tensor
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        return _four_bit(tensor, state)
    scales = _int8_scales(item)
    if scales is not None:
        return np.asarray(_numpy(tensor.data) * (_numpy(scales)[:, None] * np.float32(1 / 127)), np.float32)
    try:
        made = tensor.dequantize()
    except REFUSALS:
        return None
    return made.float().cpu().numpy() if type(made) is Tensor and made.shape == tensor.shape else None


def _four_bit(tensor: Tensor, state: Any) -> Array | None:
    """Decode a 4-bit tensor of bitsandbytes; None once its CPU kernel has rearranged it."""
    if getattr(state, "packing_format_for_cpu", False) or tensor.is_meta:
        return None
    scales = _numpy(state.absmax)
    if state.nested:
        inner = state.state2
        scales = quant_codes.nested_scales(
            scales, _numpy(inner.code), _numpy(inner.absmax), int(inner.blocksize), float(state.offset)
        )
    packed = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    out = np.empty(int(np.prod(state.shape)), np.float32)
    if scales.size * int(state.blocksize) < out.size or packed.size * 2 < out.size:
        return None
    for at, values in quant_codes.four_bit_values(packed, _numpy(state.code), scales, out.size, int(state.blocksize)):
        out[at : at + values.size] = values
    return out.reshape(tuple(state.shape))


def _int8_scales(item: Held) -> Tensor | None:
    """Return the row scales of an int8 tensor of bitsandbytes: beside the weight, or in the layer once it has run."""
    for place in (item.tensor, getattr(item.module, "state", None)):
        scales = getattr(place, "SCB", None)
        if isinstance(scales, Tensor) and item.tensor.dtype == torch.int8 and item.tensor.ndim == 2:
            return scales
    return None


def _numpy(tensor: Tensor) -> Array:
    """Return a tensor's values as numpy: 8-bit codes as they are, all else as float32."""
    here = tensor.detach().cpu().contiguous()
    made: Array = (here if here.dtype == torch.uint8 else here.float()).numpy()
    return made
