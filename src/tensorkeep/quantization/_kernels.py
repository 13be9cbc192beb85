# mypy: ignore-errors
"""A Triton kernel that dequantizes nf4 and fp4, doubly quantized scales included, in one pass over memory.

Each byte is read once and gives two neighbouring values; bytes are all that is moved: n/2 in, 2 n (bfloat16) out.
Products and sums are rounded one by one, as on the CPU, so that equal codes give equal bits on both.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024  # of codes a program reads


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
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    BYTES: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < (count + 1) // 2
    byte = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    block = at * 2 // BLOCK
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED, mask=inside, other=0.0)
        scale = tl.load(nested_quant_map + code) * outer + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    high = tl.load(quant_map + (byte >> 4)) * scale
    low = tl.load(quant_map + (byte & 15)) * scale
    both = tl.interleave(high, low)
    place = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + place, both.to(out.dtype.element_ty), mask=place < count)


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
) -> Tensor:
    """Compute `quant_map[code] · scale[block]` as [rows, columns] in `dtype`, on the GPU that holds the codes.

    The arguments are those of `unpacking.dequantize_4bit`.
    """
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    count = rows * columns
    here = codes.device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(codes.device):
        # a fused multiply-add would round the doubly quantized scales once instead of twice
        _dequantize[(triton.cdiv(count, 2 * BYTES),)](
            codes,
            absmax,
            quant_map,
            nested_absmax,
            nested_quant_map,
            nested_offset,
            out,
            count,
            BLOCK=block,
            NESTED=nested,
            BYTES=BYTES,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
