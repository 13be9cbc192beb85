# mypy: ignore-errors
"""A Triton kernel that dequantizes nf4 and fp4, doubly quantized scales included, in one pass over memory.

Each byte is read once and gives two neighbouring values; bytes are all that is moved: n/2 in, 2 n (bfloat16) out.
Products and sums are rounded one by one, as on the CPU, so that equal codes give equal bits on both. A program takes
UNITS runs of up to 32 values that share a scale, which is then fetched once for them.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 4096  # a program writes
UNIT = 32  # of them that share a scale, at most


@triton.jit
def _dequantize(
    codes,
    absmax,
    quant_map,
    nested_absmax,
    nested_quant_map,
    nested_offset,
    out,
    count,
    row_units,
    gap,
    UNITS_A_SCALE: tl.constexpr,
    NESTED: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    GAP: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    known = unit * UNIT < count
    block = unit // UNITS_A_SCALE
    if NESTED:
        code = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED, mask=known, other=0.0)
        scale = tl.load(nested_quant_map + code) * outer + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=known, other=0.0)
    at = unit[:, None] * (UNIT // 2) + tl.arange(0, UNIT // 2)[None, :]
    byte = tl.load(codes + at, mask=at < (count + 1) // 2, other=0).to(tl.int32)
    high = tl.load(quant_map + (byte >> 4)) * scale[:, None]
    low = tl.load(quant_map + (byte & 15)) * scale[:, None]
    place = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    inside = place < count
    if GAP:  # rows lie apart; a unit lies in one row
        place += (unit // row_units * gap)[:, None]
    tl.store(out + place, tl.interleave(high, low).to(out.dtype.element_ty), mask=inside)


def can_dequantize(block: int, columns: int, out: Tensor | None) -> bool:
    """Whether the kernel takes such blocks, and writes such rows.

    Args:
        block: values that share a scale.
        columns: of the weight.
        out: where the result goes (None: into memory of its own).
    """
    unit = min(block, UNIT)
    sound = block >= 2 and block & (block - 1) == 0
    return sound and (out is None or out.is_contiguous() or (columns % unit == 0 and out.stride(1) == 1))


def launch_dequantize(
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    block: int,
    nested: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Compute `quant_map[code] · scale[block]` as [rows, columns] in `dtype`, on the GPU that holds the codes.

    The arguments are those of `unpacking.dequantize_4bit`; `out`, where given, is written and returned.
    """
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    count, unit = rows * columns, min(block, UNIT)
    units = VALUES // unit
    here = codes.device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(codes.device):
        # a fused multiply-add would round the doubly quantized scales once instead of twice
        _dequantize[(triton.cdiv(count, unit * units),)](
            codes,
            absmax,
            quant_map,
            nested_absmax,
            nested_quant_map,
            nested_offset,
            out,
            count,
            max(columns // unit, 1),
            out.stride(0) - columns,
            UNITS_A_SCALE=block // unit,
            NESTED=nested,
            UNIT=unit,
            UNITS=units,
            GAP=not out.is_contiguous(),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
