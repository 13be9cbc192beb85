# mypy: ignore-errors
"""Triton kernels over the rows of `[rows, C]`: residual add with layer norm, GELU, and the backward of each.

Each program holds some whole rows in registers and reads and writes every element once, with sums in float32 in a
fixed order: equal inputs give equal bits. Where a result is rounded to e4m3 it is first rounded to the dtype that it
would have been stored in, and then as `quantization.float8` rounds rows: the same bits as in two passes. Imported by
`_frozen` only where there is a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from tensorkeep.quantization.float8 import FLOAT8, SMALLEST_TOP

_TILE = 4096  # elements a program holds of each operand
WIDEST = 16384  # elements of a row that `gelu` takes


@triton.jit
def _scales(tops, smallest):
    """Return the scales of rows by their largest magnitudes, as `float8.scale_of` does, and one over each."""
    scale = tl.math.div_rn(tl.maximum(tops, smallest), 448.0)
    return scale, tl.math.div_rn(1.0, scale)


@triton.jit
def _add_norm(
    x,
    branch,
    kept,
    weight,
    bias,
    total,
    normed,
    scales,
    rows,
    length,
    eps,
    smallest,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    SCALE: tl.constexpr,
    NORM: tl.constexpr,
    NARROW: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            more *= tl.load(kept + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        rounded = (value + more).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if NORM:
        mean = tl.sum(value, 1) / C
        centred = tl.where(inside, value - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        w = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
        b = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
        out = centred * scale[:, None] * w[None, :] + b[None, :]
        if NARROW:
            out = tl.where(inside, out.to(x.dtype.element_ty).to(tl.float32), 0.0)
            unit, inverse = _scales(tl.max(tl.abs(out), 1), smallest)
            tl.store(scales + row, unit, mask=row < rows)
            out = out * inverse[:, None]
        tl.store(normed + at, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(x, grad, codes, scales, columns, smallest, BACK: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    at = row * columns + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.math.erf(value * 0.7071067811865476))
    if BACK:
        density = tl.exp(-0.5 * value * value) * 0.3989422804014327
        out = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * (below + value * density)
    else:
        out = value * below
    out = out.to(x.dtype.element_ty).to(tl.float32)
    scale, inverse = _scales(tl.max(tl.abs(out), 0), smallest)
    tl.store(scales + row, scale)
    tl.store(codes + at, (out * inverse).to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    grad,
    x,
    weight,
    residual,
    kept,
    out,
    rows,
    length,
    eps,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
    mean = tl.sum(value, 1) / C
    centred = tl.where(inside, value - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    unit = centred * scale[:, None]
    flat = tl.sum(g, 1) / C
    slope = tl.sum(g * unit, 1) / C
    back = (g - flat[:, None] - unit * slope[:, None]) * scale[:, None]
    if SCALE:
        back *= tl.load(kept + row // length, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    back += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, back.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _join(
    q,
    k,
    v,
    codes,
    scales,
    length,
    by_chunk,
    by_head,
    by_token,
    smallest,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < C
    at = (row // length) * by_chunk + (row % length) * by_token + (column // SIZE) * by_head + column % SIZE
    a = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    top = tl.max(tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.abs(c)), 0)
    scale, inverse = _scales(top, smallest)
    tl.store(scales + row, scale)
    out = codes + row * (3 * C) + column
    tl.store(out, (a * inverse).to(codes.dtype.element_ty), mask=inside)
    tl.store(out + C, (b * inverse).to(codes.dtype.element_ty), mask=inside)
    tl.store(out + 2 * C, (c * inverse).to(codes.dtype.element_ty), mask=inside)


def _grid(x: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Return the grid of programs, the number of rows, and the kernel's constants for `x [.., C]`."""
    width = x.shape[-1]
    columns = triton.next_power_of_2(width)
    rows = x.numel() // width
    many = max(1, _TILE // columns)
    return (triton.cdiv(rows, many),), rows, {"C": width, "COLUMNS": columns, "ROWS": many, "num_warps": 4}


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    kept: Tensor | None,
    norm: nn.LayerNorm | None,
    total: Tensor | None,
    normed: Tensor | None,
    scales: Tensor | None = None,
) -> None:
    """Write `x + kept * branch` to `total` and `norm(total)` to `normed`, all `[n, L, C]`, `kept [n, 1, 1]`.

    None leaves out the branch, its factor, or the norm. With `scales [n * L, 1]` the norm's rows are rounded to e4m3,
    which `normed` is of then.
    """
    grid, rows, sizes = _grid(x)
    weight, bias, eps = (x, x, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    with torch.cuda.device(x.device):
        _add_norm[grid](
            x,
            x if branch is None else branch,
            x if kept is None else kept,
            weight,
            bias,
            x if total is None else total,
            x if normed is None else normed,
            x if scales is None else scales,
            rows,
            x.shape[-2],
            eps,
            SMALLEST_TOP,
            **sizes,
            ADD=branch is not None,
            SCALE=kept is not None,
            NORM=norm is not None,
            NARROW=scales is not None,
        )


def gelu(x: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round GELU of `x [n, L, m]`, or its gradient from `grad`, to e4m3 by rows: the numbers and the scales `[n L, 1]`.

    `m` is at most `WIDEST`.
    """
    width = x.shape[-1]
    codes = torch.empty_like(x, dtype=FLOAT8)
    scales = torch.empty(x.numel() // width, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device(x.device):
        _gelu[(len(scales),)](
            x,
            x if grad is None else grad,
            codes,
            scales,
            width,
            SMALLEST_TOP,
            BACK=grad is not None,
            COLUMNS=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    return codes, scales


def norm_backward(
    grad: Tensor, x: Tensor, norm: nn.LayerNorm, residual: Tensor, kept: Tensor | None, out: Tensor
) -> None:
    """Write `residual + kept * (gradient of norm at x, from grad)` to `out`, all `[n, L, C]`."""
    grid, rows, sizes = _grid(x)
    with torch.cuda.device(x.device):
        _norm_backward[grid](
            grad,
            x,
            norm.weight,
            residual,
            x if kept is None else kept,
            out,
            rows,
            x.shape[-2],
            norm.eps,
            **sizes,
            SCALE=kept is not None,
        )


def join(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Round q, k and v `[n, heads, L, d]`, side by side, to e4m3 by rows: numbers `[n, L, 3C]` and scales `[n L, 1]`.

    All three lie alike, the numbers of a head in one piece.
    """
    chunks, heads, length, size = q.shape
    width = heads * size
    codes = torch.empty(chunks, length, 3 * width, dtype=FLOAT8, device=q.device)
    scales = torch.empty(chunks * length, 1, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device):
        _join[(len(scales),)](
            q,
            k,
            v,
            codes,
            scales,
            length,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            SMALLEST_TOP,
            C=width,
            SIZE=size,
            COLUMNS=triton.next_power_of_2(width),
            num_warps=4,
        )
    return codes, scales
