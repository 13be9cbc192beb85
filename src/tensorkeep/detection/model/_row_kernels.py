# mypy: ignore-errors
"""Triton kernels over the rows of `[rows, C]`: residual add with layer norm, and the backward of both.

Each program holds some whole rows in registers and reads and writes every element once, with sums in float32 in a
fixed order: equal inputs give equal bits. Imported by `_frozen` only where there is a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_TILE = 4096  # elements a program holds of each operand


@triton.jit
def _add_norm(
    x,
    branch,
    kept,
    weight,
    bias,
    total,
    normed,
    rows,
    length,
    eps,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    SCALE: tl.constexpr,
    NORM: tl.constexpr,
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
        tl.store(normed + at, out.to(normed.dtype.element_ty), mask=inside)


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
) -> None:
    """Write `x + kept * branch` to `total` and `norm(total)` to `normed`, all `[n, L, C]`, `kept [n, 1, 1]`.

    None leaves out the branch, its factor, or the norm.
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
            rows,
            x.shape[-2],
            eps,
            **sizes,
            ADD=branch is not None,
            SCALE=kept is not None,
            NORM=norm is not None,
        )


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
