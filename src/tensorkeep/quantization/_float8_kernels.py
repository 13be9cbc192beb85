# mypy: ignore-errors
"""Triton kernels that round to e4m3: rows by their largest number, and 4-bit codes by scales that are given.

Codes become the weight as it lies, or turned, in one pass: half a byte in, one out. Products are rounded one by one,
as on the CPU, so that the same numbers give the same bits on both; the cast saturates, and keeps NaN.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDEST = 16384  # numbers of a row that a program holds; wider rows are read twice
_UNIT = 32  # values that share a scale, at most


@triton.jit
def _rows(x, codes, scales, columns, stride, smallest, ONE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if ONE:
        values = tl.load(x + row * stride + at, mask=at < columns, other=0.0).to(tl.float32)
        top = tl.max(tl.abs(values), 0)
    else:
        tops = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            inside = start + at < columns
            values = tl.load(x + row * stride + start + at, mask=inside, other=0.0).to(tl.float32)
            tops = tl.maximum(tops, tl.abs(values))
        top = tl.max(tops, 0)
    scale = tl.math.div_rn(tl.maximum(top, smallest), 448.0)
    inverse = tl.math.div_rn(1.0, scale)
    tl.store(scales + row, scale)
    if ONE:
        tl.store(codes + row * columns + at, (values * inverse).to(tl.float8e4nv), mask=at < columns)
    else:
        for start in range(0, columns, BLOCK):
            inside = start + at < columns
            values = tl.load(x + row * stride + start + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(codes + row * columns + start + at, (values * inverse).to(tl.float8e4nv), mask=inside)


def rows(x: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Round each row of x [n, k] to e4m3 by its largest number; return the numbers and the scales [n, 1].

    Args:
        x: of a GPU, in any float dtype that Triton reads.
        smallest: what the largest number is taken for, at the least.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    count, columns = x.shape
    codes = torch.empty(count, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    if x.numel():
        block = min(triton.next_power_of_2(columns), _WIDEST)
        warps = min(max(block // 512, 1), 16)
        with _on(x):
            _rows[(count,)](x, codes, scales, columns, x.stride(0), smallest, columns <= block, block, num_warps=warps)
    return codes, scales


@triton.jit
def _weight(
    codes,
    absmax,
    quant_map,
    nested_absmax,
    nested_quant_map,
    nested_offset,
    scales,
    out,
    rows,
    columns,
    stride,
    UNITS_A_SCALE: tl.constexpr,
    NESTED: tl.constexpr,
    TURNED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    known = (row < rows)[:, None] & (unit * UNIT < columns)[None, :]
    flat = row[:, None] * (columns // UNIT) + unit[None, :]
    block = flat // UNITS_A_SCALE
    if NESTED:
        code = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED, mask=known, other=0.0)
        scale = tl.load(nested_quant_map + code) * outer + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=known, other=0.0)
    at = flat[:, :, None] * (UNIT // 2) + tl.arange(0, UNIT // 2)[None, None, :]
    byte = tl.load(codes + at, mask=known[:, :, None], other=0).to(tl.int32)
    high = tl.load(quant_map + (byte >> 4)) * scale[:, :, None]
    low = tl.load(quant_map + (byte & 15)) * scale[:, :, None]
    values = tl.reshape(tl.interleave(high, low), [ROWS, UNITS * UNIT])
    column = tl.program_id(1) * (UNITS * UNIT) + tl.arange(0, UNITS * UNIT)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if TURNED:
        inverse = tl.math.div_rn(1.0, tl.load(scales + column, mask=column < columns, other=1.0))
        made = tl.trans((values * inverse[None, :]).to(tl.float8e4nv))
        tl.store(out + column.to(tl.int64)[:, None] * stride + row[None, :], made, mask=tl.trans(inside))
    else:
        inverse = tl.math.div_rn(1.0, tl.load(scales + row, mask=row < rows, other=1.0))
        made = (values * inverse[:, None]).to(tl.float8e4nv)
        tl.store(out + row[:, None] * stride + column[None, :], made, mask=inside)


def can_narrow(block: int, columns: int) -> bool:
    """Whether the kernel takes codes in such blocks.

    Args:
        block: values that share a scale.
        columns: of the weight.
    """
    return block >= 2 and block & (block - 1) == 0 and columns % min(block, _UNIT) == 0


def weight(
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    scales: Tensor,
    block: int,
    nested: int,
    rows: int,
    columns: int,
    turned: bool,
    out: Tensor,
) -> Tensor:
    """Write the weight that codes stand for into `out`, divided by `scales` and rounded to e4m3.

    Args:
        codes: of a GPU; this and the next five as in `Packed`.
        absmax: likewise.
        quant_map: likewise.
        nested_absmax: likewise.
        nested_quant_map: likewise.
        nested_offset: likewise.
        scales: of the rows, or of the columns where it is turned.
        block: values that share a scale.
        nested: scales that share one of their own.
        rows: of the weight.
        columns: of the weight.
        turned: whether `out` is [columns, rows].
        out: its rows may lie apart.
    """
    unit = min(block, _UNIT)
    tall, units = (128, max(64 // unit, 1)) if turned else (16, max(256 // unit, 1))
    with _on(codes):
        # a fused multiply-add would round the doubly quantized scales once instead of twice
        _weight[(triton.cdiv(rows, tall), triton.cdiv(columns, unit * units))](
            codes,
            absmax,
            quant_map,
            nested_absmax,
            nested_quant_map,
            nested_offset,
            scales,
            out,
            rows,
            columns,
            out.stride(0),
            UNITS_A_SCALE=block // unit,
            NESTED=nested,
            TURNED=turned,
            UNIT=unit,
            ROWS=tall,
            UNITS=units,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def _on(tensor: Tensor):
    here = tensor.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(tensor.device)
