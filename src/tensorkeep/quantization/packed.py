"""Quantize float weights to 4- and 8-bit codes in torch: bitsandbytes' formats, computed here on every device.

Codes, scales and their layout are those of `stored`. Results are equal to bitsandbytes 0.50.2's on the CPU bit for
bit, which fixes details that its kernels do not share: whole blocks are scaled by the reciprocal of absmax and a last,
shorter one by division; the 8-bit map of double quantization is looked up on a grid of 65,536 points; int8 goes
through float16. Block sizes need not divide a row, nor elements be even in number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.formats.memory import digest_of
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization.codes import NESTED_BLOCK, SMALLEST_SCALE

Kind = Literal["nf4", "fp4", "int8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_BITS: dict[int, Kind] = {4: "nf4", 8: "int8"}
_CELLS = 4096  # of the grid that finds a code; no two borders of NF4 or FP4 lie in one cell
_GRID = 65535  # steps of bitsandbytes' lookup for the 8-bit map
# beside the weight, not under `weight.`: bitsandbytes' readers take every `weight.*` as theirs
WEIGHT_DIGEST = "weight_digest"


class Layout(NamedTuple):
    """How the codes of one weight lie.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        shape: the weight's, [out, in].
        block: number of flat elements that share a scale (nf4, fp4).
        nested: number of scales that share one of their own; 0 where the scales are floats.
        dtype: torch's name of the dtype that the weight had.
    """

    kind: Kind
    shape: tuple[int, int]
    block: int = 64
    nested: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Packed:
    """One quantized weight: its layout and its tensors by role.

    nf4, fp4: `weight` uint8 [ceil(n/2), 1], `absmax` float32 [blocks] (uint8 where nested), `quant_map` [16];
    nested: `nested_absmax` [ceil(blocks/256)], `nested_quant_map` [256], `nested_offset` [1].
    int8: `weight` int8 [out, in], `SCB` float32 [out].

    Attributes:
        layout: how the codes lie.
        tensors: role -> tensor.
    """

    layout: Layout
    tensors: dict[str, Tensor]


def kind_of(word: str | int) -> Kind:
    """Return the kind that a name or a number of bits means: 4 bits are nf4, 8 are int8.

    Args:
        word: "nf4", "fp4", "int8", 4 or 8.

    Raises:
        TensorkeepError: it is none of these.

    Example:
        >>> kind_of(4), kind_of("fp4")
        ('nf4', 'fp4')
    """
    if isinstance(word, int) and word in _BITS:
        return _BITS[word]
    if word in KINDS:
        return word
    raise TensorkeepError(
        f"cannot quantize to {word!r}",
        where="quantize",
        hint=near_misses(str(word), KINDS) or f"choose among {', '.join(KINDS)}, or 4 and 8 bits",
    )


# -- quantizing ---------------------------------------------------------------------------------------------------


def pack(weight: Tensor, kind: Kind = "nf4", double: bool = True, block: int = 64, name: str = "weight") -> Packed:
    """Quantize a weight on its device; beside the result, memory for about 2^20 elements is needed.

    Args:
        weight: [out, in] in float32, bfloat16 or float16.
        kind: "nf4", "fp4" or "int8".
        double: quantize the scales as well (nf4, fp4).
        block: number of flat elements that share a scale (nf4, fp4), a power of two from 32 on.
        name: what messages call the weight.

    Returns:
        The codes and scales, on the weight's device, and their layout.

    Raises:
        TensorkeepError: V01 for NaN and infinity; without a code for other shapes, dtypes and block sizes.

    Example:
        >>> from tensorkeep.quantization.unpacking import unpack
        >>> packed = pack(torch.eye(4), "nf4", double=False)
        >>> unpack(packed.layout, packed.tensors).equal(torch.eye(4))
        True
    """
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not weight.numel():
        what = f"{weight.dtype} {list(weight.shape)} cannot be quantized"
        raise TensorkeepError(what, where=name, hint="a linear weight [out, in] in float32, bfloat16 or float16 can")
    if block < 32 or block & (block - 1):
        raise TensorkeepError(f"block size {block}", where=name, hint="a power of two from 32 on, 64 by default")
    shape, dtype = (weight.shape[0], weight.shape[1]), str(weight.dtype).removeprefix("torch.")
    with torch.no_grad():
        if kind == "int8":
            return Packed(Layout(kind, shape, 0, 0, dtype), _pack_rows(weight.detach(), name))
        codes, absmax = _pack_blocks(weight.detach(), kind, block, name)
        quant_map = torch.from_numpy(quant_codes.TABLES[kind] + 0).to(weight.device)  # + 0: the map's -0 is 0 in files
        tensors = {"weight": codes, "absmax": absmax, "quant_map": quant_map}
        tensors |= pack_scales(absmax) if double else {}
    return Packed(Layout(kind, shape, block, NESTED_BLOCK if double else 0, dtype), tensors)


def _pack_blocks(weight: Tensor, kind: Kind, block: int, name: str) -> tuple[Tensor, Tensor]:
    """Return 4-bit codes [ceil(n/2), 1] and absmax [blocks], made a stretch of flat elements at a time."""
    flat = weight.reshape(-1)
    count = flat.numel()
    codes = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // block), dtype=torch.float32, device=flat.device)
    step = max(quant_codes.ELEMENTS_AT_ONCE * (16 if flat.is_cuda else 1) // (2 * block), 1) * 2 * block
    for at in range(0, count, step):
        some = flat[at : at + step].float()
        whole = some.numel() // block
        blocks = some[: whole * block].view(whole, block)
        scales = absmax[at // block : at // block + whole]
        torch.amax(blocks.abs(), 1, out=scales)
        unit = torch.mul(blocks, (1.0 / scales.clamp(min=float(SMALLEST_SCALE)))[:, None]).view(-1)
        if whole * block < some.numel():
            rest = some[whole * block :]
            absmax[-1] = rest.abs().max().clamp(min=float(SMALLEST_SCALE))
            unit = torch.cat([unit, rest / absmax[-1]])
        _refuse_infinite(absmax[at // block : -(-(at + some.numel()) // block)], name)
        bits = _nearest(unit.clamp_(-1, 1), kind)
        if bits.numel() % 2:
            bits = torch.cat([bits, _nearest(unit.new_zeros(1), kind)])
        codes[at // 2 : at // 2 + bits.numel() // 2, 0] = bits[0::2] << 4 | bits[1::2]
    return codes, absmax


def _nearest(unit: Tensor, kind: Kind) -> Tensor:
    """Find the code of each value in [-1, 1]: one lookup, and one comparison in the cells that a border cuts."""
    below, border, order = _grid(kind, unit.device)
    cell = ((unit + 1) * (_CELLS / 2)).to(torch.int32)
    rank = below.index_select(0, cell) + (unit > border.index_select(0, cell)).view(torch.uint8)
    return rank if kind == "nf4" else order.index_select(0, rank.to(torch.int32))


@lru_cache(maxsize=8)
def _grid(kind: Kind, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Make the tables of `_nearest`.

    Per cell of [-1, 1]: how many borders between codes lie below it, and the border inside it; and the codes by rank of
    their value.
    """
    table = torch.from_numpy(quant_codes.TABLES[kind] + 0)
    order = torch.argsort(table, stable=True)
    borders = (table[order[:-1]] + table[order[1:]]) / 2
    below, inside = torch.zeros(_CELLS + 1, dtype=torch.uint8), torch.full((_CELLS + 1,), math.inf)
    for border, cell in zip(borders, ((borders + 1) * (_CELLS / 2)).to(torch.int64).tolist()):
        below[cell + 1 :] += 1
        inside[cell] = border
    return below.to(device), inside.to(device), order.to(device, torch.uint8)


def pack_scales(absmax: Tensor) -> dict[str, Tensor]:
    """Quantize scales: absmax around its mean as 8-bit codes of the dynamic map, in blocks of 256.

    Args:
        absmax: the scales of a whole weight, float32.

    Returns:
        The tensors of doubly quantized scales by role.
    """
    offset = _mean(absmax)
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    outer = padded.abs().amax(1)
    unit = (padded * (1.0 / outer)[:, None]).nan_to_num(nan=-1.0)  # 0 · inf, where all scales are equal: code 0
    levels, nearest = _dynamic(absmax.device)
    point = ((unit.clamp(-1, 1) + 1) * 0.5 * _GRID + 0.5).to(torch.int32)
    codes = nearest.index_select(0, point.view(-1))[: absmax.numel()]
    return {
        "absmax": codes,
        "nested_absmax": outer,
        "nested_quant_map": levels.clone(),
        "nested_offset": offset.view(1),
    }


def _mean(values: Tensor) -> Tensor:
    """Compute the mean as torch does on the CPU in one thread, so that every machine gives the same codes.

    GPUs, and the CPU with more threads, add in another order and end an ulp or two away.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return values.cpu().mean().to(values.device)
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=8)
def _dynamic(device: torch.device) -> tuple[Tensor, Tensor]:
    """Make the signed dynamic 8-bit map [256], and the code nearest to each of 65,536 points of [-1, 1].

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv 1511.04561), section 2: 0, 1 and, for
    every exponent, the middles of equal steps between 0.1 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    levels = torch.tensor(sorted(values), dtype=torch.float32)
    points = (torch.arange(_GRID + 1, dtype=torch.float64) / _GRID * 2 - 1).float()
    nearest = torch.bucketize(points, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return levels.to(device), nearest.to(device)


def _pack_rows(weight: Tensor, name: str) -> dict[str, Tensor]:
    """Return int8 codes [out, in] and the largest magnitude of each row [out]; a row of zeros stays zeros."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(quant_codes.ELEMENTS_AT_ONCE // weight.shape[1], 1)
    for at in range(0, weight.shape[0], step):
        rows = weight[at : at + step].to(torch.float16)
        top = rows.abs().amax(1).float()
        _refuse_infinite(top, name)
        scales[at : at + step] = top
        factor = torch.where(top > 0, 127.0 / top, 0.0)
        codes[at : at + step] = torch.round(rows * factor[:, None]).to(torch.int8)
    return {"weight": codes, "SCB": scales}


def _refuse_infinite(scales: Tensor, name: str) -> None:
    """Raise V01 where a scale shows that the weights hold NaN or infinity."""
    if not bool(torch.isfinite(scales).all()):
        hint = "tensorkeep diagnose names every such tensor; int8 goes through float16, whose largest number is 65504"
        raise TensorkeepError("NaN or infinity among the weights", where=name, code="V01", hint=hint)


# -- what ties codes to their scales ------------------------------------------------------------------------------


def state_text(layout: Layout, offset: float) -> bytes:
    """Write the `quant_state` of a 4-bit weight as bitsandbytes does: JSON, in its order."""
    said: dict[str, Any] = {
        "quant_type": layout.kind,
        "blocksize": layout.block,
        "dtype": layout.dtype,
        "shape": list(layout.shape),
    }
    if layout.nested:
        said |= {"nested_blocksize": layout.nested, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(said).encode()


def packed_digest(packed: Packed, digest: Callable[[Tensor], str] = digest_of) -> bytes:
    """Make 16 bytes over codes, scales and state together, which no other scales give (`codes.joint_digest`).

    Args:
        packed: on any device.
        digest: takes the digest of one tensor.
    """
    parts = {role: digest(tensor) for role, tensor in packed.tensors.items() if role != "nested_offset"}
    if packed.layout.kind != "int8":
        parts["state"] = digest_of(torch.tensor(list(state_text(packed.layout, offset_of(packed))), dtype=torch.uint8))
    return quant_codes.joint_digest(parts)


def averaged_blocks(packed: Packed) -> int:
    """Count the blocks of nf4 or fp4 codes that hold no code of magnitude 1 although they hold something; sound: 0.

    The largest element of a block is +-absmax, so its code is +-1. Averaged, moved or repacked bytes lose it. Without
    a digest this is what a file alone can tell (Q03).
    """
    if packed.layout.kind == "int8":
        return 0
    values = packed.tensors["quant_map"].abs().cpu()
    high, low = values.repeat_interleave(16), values.repeat(16)  # of each byte
    full, empty = (high == 1) | (low == 1), (high == 0) & (low == 0)
    said = (full.to(torch.uint8) * 2 | ~empty).to(torch.uint8)  # 0: zeros, 1: something, 2 and more: full scale
    raw, lost, width = packed.tensors["weight"].view(-1), 0, packed.layout.block // 2
    step = max(quant_codes.ELEMENTS_AT_ONCE // width, 1) * width
    for at in range(0, raw.numel(), step):
        some = said.index_select(0, raw[at : at + step].cpu().to(torch.int32))
        peak = torch.nn.functional.pad(some, (0, -some.numel() % width)).view(-1, width).amax(1)
        lost += int((peak == 1).sum())
    return lost


def offset_of(packed: Packed) -> float:
    """Return the offset of doubly quantized scales; 0 where the scales are floats."""
    return float(packed.tensors["nested_offset"].item()) if packed.layout.nested else 0.0


Mover = Callable[[Tensor], Tensor]


def moved(tensor: Tensor, move: Mover) -> Tensor:
    """Apply `move` to the bytes of a tensor, so that it may change the device and never the numbers.

    Raises:
        TensorkeepError: `move` changes the bytes' dtype all the same (`module.type(...)`).
    """
    raw = move(tensor.view(torch.uint8))
    if raw.dtype != torch.uint8:
        what = f"quantized codes and scales cannot be converted to {raw.dtype}"
        raise TensorkeepError(what, where="quantize", hint="dequantize() gives the weight as numbers")
    return raw.view(tensor.dtype)
