"""Codes and values of quantized weights as numpy arrays: unpack, scale, and find the codes of float values.

Everything is float32 with one rounding per operation, in the order in which bitsandbytes computes, so that results are
equal bit for bit. NF4: QLoRA (arXiv 2305.14314), appendix E. FP4: bitsandbytes' e2m1 table, scaled to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
ELEMENTS_AT_ONCE = 1 << 20  # elements encoded or decoded at a time
NESTED_BLOCK = 256  # scales that share one scale of their own, as bitsandbytes writes it
SMALLEST_SCALE = np.float32(1e-38)  # what bitsandbytes divides a block of zeros by

_NF4_LEVELS = """
-1.0                 -0.6961928009986877  -0.5250730514526367  -0.39491748809814453
-0.28444138169288635 -0.18477343022823334 -0.09105003625154495  0.0
 0.07958029955625534  0.16093020141124725  0.24611230194568634  0.33791524171829224
 0.44070982933044434  0.5626170039176941   0.7229568362236023   1.0
"""
NF4 = np.array([float(level) for level in _NF4_LEVELS.split()], np.float32)
_E2M1 = [0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25]
FP4 = np.array([*_E2M1, *(-v for v in _E2M1)], np.float32)
TABLES = {"nf4": NF4, "fp4": FP4}
PER_127 = np.float32(7.874015718698502e-3)  # bitsandbytes multiplies by 1/127, which is not the same as dividing


def nibbles(packed: Array, count: int) -> Array:
    """Unpack the first `count` 4-bit codes of packed bytes, high half first.

    Args:
        packed: bytes with two codes each, uint8 [ceil(count / 2)] or longer.
        count: number of codes.

    Returns:
        The codes, uint8 [count].

    Example:
        >>> nibbles(np.array([0x1F, 0x20], np.uint8), 3).tolist()
        [1, 15, 2]
    """
    out = np.empty(2 * packed.size, np.uint8)
    out[0::2] = packed >> 4
    out[1::2] = packed & 15
    return out[:count]


def pack_nibbles(codes: Array) -> Array:
    """Pack 4-bit codes into bytes, the inverse of `nibbles`; an odd last code is followed by 0.

    Args:
        codes: numbers 0 to 15, uint8 [n].

    Returns:
        uint8 [ceil(n / 2)].

    Example:
        >>> pack_nibbles(np.array([1, 15, 2], np.uint8)).tolist()
        [31, 32]
    """
    even = np.append(codes, np.uint8(0)) if codes.size % 2 else codes
    return np.asarray(even[0::2] << 4 | even[1::2], np.uint8)


def scaled(values: Array, scales: Array, block: int) -> Array:
    """Multiply flat values by one scale for every `block` of them; the last block may be shorter.

    Args:
        values: float32 [n].
        scales: float32 [ceil(n / block)].
        block: number of values that share a scale.

    Returns:
        float32 [n].

    Example:
        >>> scaled(np.ones(3, np.float32), np.array([2, 3], np.float32), 2).tolist()
        [2.0, 2.0, 3.0]
    """
    whole = values.size // block
    out = np.empty(values.size, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale gives NaN or infinity, as in any other reader
        np.multiply(
            values[: whole * block].reshape(whole, block),
            scales[:whole, None],
            out=out[: whole * block].reshape(whole, block),
        )
        if whole * block < values.size:
            out[whole * block :] = values[whole * block :] * scales[whole]
    return out


def four_bit_values(codes: Array, table: Array, scales: Array, count: int, block: int) -> Iterator[tuple[int, Array]]:
    """Decode packed 4-bit codes piece by piece.

    Args:
        codes: shape (bytes,), uint8: two codes a byte.
        table: shape (16,), the values of the codes.
        scales: shape (blocks,), one a block in flat order.
        count: elements in all.
        block: elements of a block.

    Yields:
        The first element's place and the float32 values of each piece.
    """
    step = max(ELEMENTS_AT_ONCE // (2 * block), 1) * 2 * block
    for at in range(0, count, step):
        some = min(step, count - at)
        bits = nibbles(codes[at // 2 : at // 2 + (some + 1) // 2], some)
        yield at, scaled(table[bits], scales[at // block : at // block + -(-some // block)], block)


def nested_scales(codes: Array, table: Array, absmax: Array, block: int, offset: float) -> Array:
    """Return the scales that double quantization stands for: table[code] · absmax[block] + offset.

    Args:
        codes: shape (scales,), uint8.
        table: shape (256,), the values of the codes.
        absmax: shape (blocks,), one a block of scales.
        block: scales of a block.
        offset: the mean that was taken off.
    """
    return np.asarray(scaled(table[codes], absmax, block) + np.float32(offset), np.float32)


def block_maxima(values: Array, block: int) -> Array:
    """Return the largest magnitude of every block of values: what absmax should hold.

    Args:
        values: an array of any shape, taken in row-major order.
        block: number of values per block; the last block may be shorter.

    Returns:
        float32 [ceil(n / block)].
    """
    flat = values.reshape(-1)
    out = np.empty(-(-flat.size // block), np.float32)
    step = max(ELEMENTS_AT_ONCE // block, 1) * block
    for at in range(0, flat.size, step):
        piece = np.abs(flat[at : at + step])
        out[at // block : -(-(at + piece.size) // block)] = np.maximum.reduceat(piece, np.arange(0, piece.size, block))
    return out


def nearest_codes(values: Array, scales: Array, block: int, table: Array) -> tuple[Array, Array]:
    """Find the code that each value gets with these scales, and how sure that is.

    A value nearer to a border than rounding explains (another float dtype on the way) may have got either code.

    Args:
        values: float32 [n].
        scales: float32 [ceil(n / block)].
        block: number of values that share a scale.
        table: the value of each code, float32 [16].

    Returns:
        The codes, uint8 [n]; and each value's distance, relative to its scale, from the border to the next code, [n].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = scaled(values, np.where(scales > 0, 1 / scales, 0).astype(np.float32), block)
    order = np.argsort(table, kind="stable")
    levels = table[order]
    borders = (levels[1:] + levels[:-1]) / 2
    at = np.searchsorted(borders, unit)
    low = unit - borders[np.maximum(at - 1, 0)]
    high = borders[np.minimum(at, borders.size - 1)] - unit
    margin = np.minimum(np.where(at > 0, low, np.inf), np.where(at < borders.size, high, np.inf))
    return order[at].astype(np.uint8), np.abs(margin)


def full_scale_missing(bits: Array, table: Array, block: int) -> int:
    """Return how many blocks hold no code of magnitude 1 although they hold something.

    Absmax is the largest magnitude of a block, so that element's code is +-1: every block that is not all zeros has
    one. Bytes that were averaged, moved or repacked lose it.

    Args:
        bits: codes in flat order, uint8 [n].
        table: the value of each code, float32 [16].
        block: number of codes per block.
    """
    peak = block_maxima(table[bits], block)
    return int(np.count_nonzero((peak > 0) & (peak < 1)))


def joint_digest(digests: Mapping[str, str]) -> bytes:
    """Make 16 bytes that prove that the parts of one quantized weight belong together.

    Args:
        digests: role -> xxh3_128 of the part's bytes, in hex. The roles are `weight` (the codes), those that
            `QuantizedWeight.parts` uses (`absmax`, `quant_map`, `SCB`, ...) and `state` for the text of a quant_state;
            `weight_format` is left out.

    Returns:
        The digest; our files keep it beside the weight as `weight_digest`, uint8 [16].

    Example:
        >>> one = joint_digest({"weight": "0a", "SCB": "1b"})
        >>> one == joint_digest({"SCB": "1b", "weight": "0a"}) != joint_digest({"weight": "0a", "SCB": "1c"})
        True
    """
    import xxhash

    return xxhash.xxh3_128_digest("".join(f"{role} {digests[role]}\n" for role in sorted(digests)).encode())
