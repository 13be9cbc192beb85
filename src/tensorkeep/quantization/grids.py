"""The grids that weights are rounded to: which numbers codes stand for, and what a file keeps of scales beside them.

A code stands for `level · scale + offset`. Scales and offsets follow from a few tensors, called numbers here:

nf4, fp4: `absmax` float32, one for each block of flat elements
int8: `SCB` float32 [out], the scale times 127
mxfp4: `exponents` uint8 [out, in/32], of powers of two, plus 127
q4_k: float16 `d` and `dmin` [out, in/256], 6-bit `scales` and `mins` [out, in/32]: d · scale · code - dmin · min
q4_1: float16 `d` and `m` [out, in/32]: d · code + m, for rows that are no whole blocks of 256 in a GGUF file

Sources: bitsandbytes' layouts as in `stored`; OCP Microscaling Formats 1.0, section 6.3, for exponents; ggml-quants.c
(`make_qkx2_quants`, `quantize_row_q4_K_ref`, `quantize_row_q4_1_ref`) for scales and minima of Q4_K and Q4_1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorkeep.quantization.codes import PER_127, SMALLEST_SCALE, TABLES

Bits = Literal["nf4", "fp4", "int8", "mxfp4", "q4_k"]
Form = Literal["nf4", "fp4", "int8", "mxfp4", "q4_k", "q4_1"]
Numbers = Mapping[str, Tensor]
# the numbers that may be trained, where they are no small integers
TRAINED: dict[Form, tuple[str, ...]] = {
    "nf4": ("absmax",),
    "fp4": ("absmax",),
    "int8": ("SCB",),
    "mxfp4": (),
    "q4_k": ("d", "dmin"),
    "q4_1": ("d", "m"),
}
BLOCK = 64  # flat elements of nf4 and fp4 that share a scale
_BITS: dict[Form, float] = {"nf4": 4 + 32 / BLOCK, "fp4": 4 + 32 / BLOCK, "mxfp4": 4.25, "q4_k": 4.5, "q4_1": 5}
ROW_BLOCK = 32  # elements of a row that share a scale in mxfp4, Q4_1 and Q4_K
_SUPER = 256  # of Q4_K's super-blocks
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a block's largest magnitude
_TRIED = 21  # scales of a block of Q4_K, as llama.cpp tries them
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Levels(NamedTuple):
    """The levels of a form.

    Attributes:
        table: by code.
        order: codes by level, none twice.
        borders: between levels that lie beside each other.
    """

    table: Tensor
    order: Tensor
    borders: Tensor


def form_of(bits: Bits, columns: int) -> Form | None:
    """Return the form that a weight with such rows gets; None where blocks do not divide them.

    Args:
        bits: what was asked for.
        columns: elements of a row.

    Example:
        >>> form_of("q4_k", 512), form_of("q4_k", 576), form_of("mxfp4", 100)
        ('q4_k', 'q4_1', None)
    """
    if bits in ("mxfp4", "q4_k") and columns % ROW_BLOCK:
        return None
    return "q4_1" if bits == "q4_k" and columns % _SUPER else bits


def bits_of(form: Form, columns: int) -> float:
    """Return what a number of a weight takes in the file, scales included.

    Args:
        form: of the weight.
        columns: elements of a row.
    """
    return 8 + 32 / columns if form == "int8" else _BITS[form]


@lru_cache(maxsize=16)
def levels(form: Form, device: torch.device) -> Levels:
    """Return the levels of a form on a device.

    Args:
        form: of codes.
        device: where to.
    """
    if form in ("nf4", "fp4"):
        table = torch.from_numpy(TABLES[form] + 0)
    elif form == "int8":
        table = torch.arange(-127.0, 128.0)
    elif form == "mxfp4":
        table = torch.tensor([*_E2M1, *(-level for level in _E2M1)])
    else:
        table = torch.arange(16.0)
    order = torch.argsort(table, stable=True)
    if form == "mxfp4":
        order = order[order != 8]  # minus zero
    borders = (table[order[1:]] + table[order[:-1]]) / 2
    return Levels(table.to(device), order.to(device), borders.to(device))


def nearest(unit: Tensor, form: Form) -> Tensor:
    """Return the code of the level nearest to each number.

    Args:
        unit: numbers less their offsets, over their scales.
        form: of the codes.
    """
    found = levels(form, unit.device)
    codes: Tensor = found.order[torch.bucketize(unit.contiguous(), found.borders)]
    return codes


def level_of(unit: Tensor, form: Form) -> Tensor:
    """Return the level nearest to each number.

    Args:
        unit: numbers less their offsets, over their scales.
        form: of the codes.
    """
    return levels(form, unit.device).table[nearest(unit, form)]


def exponents_near(top: Tensor) -> Tensor:
    """Return the exponents of mxfp4 that blocks may have: that of OCP's rule, one more and one less.

    Args:
        top: the largest magnitude of each block, any shape.

    Returns:
        uint8 [3, ...].
    """
    plain = _exponents(top).int()
    return torch.stack([plain, plain + 1, plain - 1]).clamp(0, 254).to(torch.uint8)


def powers(exponents: Tensor) -> Tensor:
    """Return the scales that exponents of mxfp4 stand for, float32.

    Args:
        exponents: uint8, plus 127.

    Example:
        >>> powers(torch.tensor([126, 130], dtype=torch.uint8)).tolist()
        [0.5, 8.0]
    """
    return torch.tensor([2.0 ** (e - 127) for e in range(255)], device=exponents.device)[exponents.int()]


def width_of(unit: Tensor, form: Form) -> Tensor:
    """Return how far the levels around each number lie from each other.

    Args:
        unit: numbers less their offsets, over their scales.
        form: of the codes.

    Example:
        >>> width_of(torch.tensor([0.3, -2.5, 9.0]), "mxfp4").tolist()
        [0.5, 1.0, 2.0]
    """
    found = levels(form, unit.device)
    sorted_levels = found.table[found.order]
    above = torch.bucketize(unit.contiguous(), sorted_levels).clamp(1, len(sorted_levels) - 1)
    return sorted_levels[above] - sorted_levels[above - 1]


def spread(form: Form, numbers: Numbers, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Give each element of a weight its scale and its offset; gradients flow through the numbers.

    Args:
        form: of the codes.
        numbers: what a file keeps.
        shape: of the weight.

    Returns:
        Scales that broadcast over the shape, and offsets that do; None where there are none.
    """
    if form in ("nf4", "fp4"):
        return numbers["absmax"].repeat_interleave(BLOCK)[: math.prod(shape)].view(shape), None
    if form == "int8":
        return numbers["SCB"][:, None] * float(PER_127), None
    if form == "mxfp4":
        return powers(numbers["exponents"]).repeat_interleave(ROW_BLOCK, 1), None
    if form == "q4_1":
        return tuple(numbers[name].float().repeat_interleave(ROW_BLOCK, 1) for name in ("d", "m"))  # type: ignore[return-value]
    made = []
    for whole, small in (("d", "scales"), ("dmin", "mins")):
        wide = numbers[whole].float().repeat_interleave(_SUPER // ROW_BLOCK, 1)
        made.append((wide * numbers[small].float()).repeat_interleave(ROW_BLOCK, 1))
    return made[0], -made[1]


def values(form: Form, codes: Tensor, numbers: Numbers) -> Tensor:
    """Return the numbers that codes stand for, float32, as a reader of the file computes them.

    Args:
        form: of the codes.
        codes: [out, in], int64.
        numbers: what a file keeps.
    """
    table = levels(form, codes.device).table
    if form == "int8":
        return (table[codes] * numbers["SCB"][:, None]) * float(PER_127)
    scale, offset = spread(form, numbers, (codes.shape[0], codes.shape[1]))
    return table[codes] * scale if offset is None else table[codes] * scale + offset


def plain_numbers(form: Form, weight: Tensor) -> dict[str, Tensor]:
    """Return the numbers that each format's own plain rounding takes.

    Args:
        form: of the codes.
        weight: [out, in], float32.
    """
    if form in ("nf4", "fp4"):
        return {"absmax": _blocks(weight).abs().amax(1).clamp(min=float(SMALLEST_SCALE))}
    if form == "int8":
        return {"SCB": weight.abs().amax(1)}
    small = weight.reshape(len(weight), -1, ROW_BLOCK)
    if form == "mxfp4":
        return {"exponents": _exponents(small.abs().amax(2))}
    if form == "q4_1":
        low, high = small.amin(2), small.amax(2)
        return kept(form, {"d": (high - low) / 15, "m": low})
    return _super_blocks(small, small.square().mean(2, keepdim=True).sqrt() + small.abs())


def tried_numbers(form: Form, weight: Tensor, importance: Tensor) -> list[dict[str, Tensor]]:
    """Return the numbers to choose codes with: the plain ones, and those of the least error weighted by the inputs.

    Args:
        form: of the codes.
        weight: [out, in], float32.
        importance: [in], the mean of the inputs' squares.
    """
    plain = plain_numbers(form, weight)
    heavy = importance.expand(weight.shape)
    if form in ("nf4", "fp4"):
        blocks = _blocks(weight)
        return [plain, {"absmax": _shrunk(form, blocks, _blocks(heavy), plain["absmax"])}]
    if form == "int8":
        scales = _shrunk(form, weight, heavy, plain["SCB"] * float(PER_127))
        return [plain, {"SCB": scales / float(PER_127)}]
    small, weights = (t.reshape(len(weight), -1, ROW_BLOCK) for t in (weight, heavy))
    if form == "q4_1":
        scale, low = _fitted(small, weights + 1e-12, False)
        return [plain, kept(form, {"d": scale, "m": low})]
    return [plain, _super_blocks(small, weights + 1e-12)]


def kept(form: Form, numbers: Numbers) -> dict[str, Tensor]:
    """Round numbers to what a file keeps of them.

    Args:
        form: of the codes.
        numbers: as they were computed.

    Returns:
        The same names; float16 where the file keeps no more.
    """
    half = TRAINED[form] if form in ("q4_k", "q4_1") else ()
    largest = torch.finfo(torch.float16).max
    return {n: t.clamp(-largest, largest).half() if n in half else t for n, t in numbers.items()}


def peaks(form: Form, weight: Tensor) -> Tensor | None:
    """Return the codes that a sound file has at the largest element of each block: of nf4 and fp4 1 or -1.

    Readers tell by them that codes were not averaged or altered.

    Args:
        form: of the codes.
        weight: [out, in], float32.

    Returns:
        [out, in], int64, -1 where the code is free; None where no form of the kind is looked at so.
    """
    if form not in ("nf4", "fp4"):
        return None
    blocks = _blocks(weight)
    table = levels(form, weight.device).table
    ends = torch.where(blocks < 0, int(torch.argmin(table)), int(torch.argmax(table)))
    place = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, blocks.abs().argmax(1, keepdim=True), True)
    return torch.where(place, ends, -1).view(-1)[: weight.numel()].view(weight.shape)


def _blocks(weight: Tensor) -> Tensor:
    return F.pad(weight.reshape(-1), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)


def _shrunk(form: Form, blocks: Tensor, heavy: Tensor, top: Tensor) -> Tensor:
    """Return for each block the share of its scale that leaves the least error, weighted by the inputs."""
    table = levels(form, blocks.device).table
    best, chosen = torch.full_like(top, math.inf), top.clone()
    for share in _SHRUNK:
        scales = (top * share)[:, None]
        made = table[nearest(_over(blocks, scales), form)] * scales
        error = ((made - blocks).square() * heavy).sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scales[:, 0], chosen)
    return chosen


def _over(values: Tensor, scales: Tensor) -> Tensor:
    """Divide, where a scale of zero gives zero."""
    return torch.where(scales == 0, 0.0, values / torch.where(scales == 0, 1.0, scales))


def _exponents(top: Tensor) -> Tensor:
    """Return the exponents that OCP's rule gives to blocks with such largest magnitudes, plus 127."""
    found = torch.frexp(top).exponent - 1 - 2 + 127  # of the largest magnitude, less that of e2m1's largest, 4
    return torch.where(top == 0, 0, found).clamp(0, 254).to(torch.uint8)


def _fitted(small: Tensor, weights: Tensor, below: bool) -> tuple[Tensor, Tensor]:
    """Return scale and lowest number of each block, fitted to codes 0 to 15; `below`: the lowest is at most 0."""
    low, high = small.amin(2), small.amax(2)
    low = low.clamp(max=0) if below else low
    width = high - low
    sum_w, sum_x = weights.sum(2), (weights * small).sum(2)
    scale, least = width / 15, low
    best = _misfit(small, weights, scale, least)
    for step in range(_TRIED):
        codes = (_over((14 + 0.1 * step) * (small - low[..., None]), width[..., None])).round().clamp(0, 15)
        sum_l, sum_l2 = (weights * codes).sum(2), (weights * codes * codes).sum(2)
        sum_xl = (weights * codes * small).sum(2)
        part = sum_w * sum_l2 - sum_l * sum_l
        tried = _over(sum_w * sum_xl - sum_x * sum_l, part)
        lowest = _over(sum_l2 * sum_x - sum_l * sum_xl, part)
        if below:
            tried = torch.where(lowest > 0, _over(sum_xl, sum_l2), tried)
            lowest = lowest.clamp(max=0)
        error = (weights * (codes * tried[..., None] + lowest[..., None] - small).square()).sum(2)
        better = (part > 0) & (tried > 0) & (error < best)
        best, scale, least = (torch.where(better, a, b) for a, b in ((error, best), (tried, scale), (lowest, least)))
    return scale, least


def _misfit(small: Tensor, weights: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    codes = _over(small - low[..., None], scale[..., None]).round().clamp(0, 15)
    return (weights * (codes * scale[..., None] + low[..., None] - small).square()).sum(2)


def _super_blocks(small: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return the numbers of Q4_K: scales and minima of blocks of 32 in six bits, eight with one factor each."""
    scale, low = _fitted(small, weights, True)
    made: dict[str, Tensor] = {}
    for whole, part, found in (("d", "scales", scale), ("dmin", "mins", -low)):
        groups = found.reshape(len(found), -1, _SUPER // ROW_BLOCK)
        factor = (groups.amax(2) / 63).clamp(max=torch.finfo(torch.float16).max).half()
        made[whole] = factor
        six = _over(groups, factor.float()[..., None]).round().clamp(0, 63)
        made[part] = six.reshape(found.shape).to(torch.uint8)
    return made
