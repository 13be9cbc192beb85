# mypy: ignore-errors
"""Triton kernels of a gated MLP's elementwise part: act(gate) · up, and its gradients in the place of the operands."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
ACTIVATIONS = ("silu", "gelu_tanh")


@triton.jit
def _value_and_slope(x, ACT: tl.constexpr):
    if ACT == 0:
        gate = tl.sigmoid(x)
        return x * gate, gate * (1.0 + x * (1.0 - gate))
    inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # tanh by the sigmoid of twice its argument
    gate = tl.sigmoid(inner)
    return x * gate, gate + x * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def _forward(pair, out, width, pair_stride, out_stride, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(pair + row * pair_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pair + row * pair_stride + width + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, ACT)
    tl.store(out + row * out_stride + at, (value * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(pair, slope, to, width, pair_stride, slope_stride, to_stride, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(pair + row * pair_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pair + row * pair_stride + width + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(slope + row * slope_stride + at, mask=inside, other=0.0).to(tl.float32)
    value, steep = _value_and_slope(gate, ACT)
    kind = to.dtype.element_ty
    tl.store(to + row * to_stride + at, (grad * up * steep).to(kind), mask=inside)
    tl.store(to + row * to_stride + width + at, (grad * value).to(kind), mask=inside)
    tl.store(slope + row * slope_stride + at, (value * up).to(kind), mask=inside)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, BLOCK)


def gated(pair: Tensor, out: Tensor, act: str) -> None:
    """Write act(gate) · up; `pair` holds gate and up side by side `[n, 2 I]`, `out` is `[n, I]`; rows may lie apart."""
    width = out.shape[1]
    _forward[_grid(*out.shape)](
        pair, out, width, pair.stride(0), out.stride(0), ACT=ACTIVATIONS.index(act), BLOCK=BLOCK, num_warps=8
    )


def gated_backward(pair: Tensor, slope: Tensor, to: Tensor, act: str) -> None:
    """Write the gradients of gate and up side by side into `to`, and act(gate) · up over its gradient `slope`.

    `to` may be `pair` itself.
    """
    width = slope.shape[1]
    _backward[_grid(*slope.shape)](
        pair,
        slope,
        to,
        width,
        pair.stride(0),
        slope.stride(0),
        to.stride(0),
        ACT=ACTIVATIONS.index(act),
        BLOCK=BLOCK,
        num_warps=8,
    )


@triton.jit
def _with_update(value, low, up, row, at, rows, width, rank, up_step, up_stride, PAD: tl.constexpr):
    """Add the tile of `low up`: `low` is [rows, rank], `up` has a step a rank and a stride a column."""
    of = tl.arange(0, PAD)
    lows = tl.load(
        low + row[:, None] * rank + of[None, :], mask=(row < rows)[:, None] & (of < rank)[None, :], other=0.0
    )
    inside = (of < rank)[:, None] & (at < width)[None, :]
    ups = tl.load(up + of[:, None] * up_step + at[None, :] * up_stride, mask=inside, other=0.0)
    return tl.dot(lows, ups, value)


@triton.jit
def _forward_low(
    pair, low, up, out, rows, width, rank, ACT: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    place = row[:, None] * (2 * width) + at[None, :]
    gate = tl.load(pair + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(pair + place + width, mask=inside, other=0.0).to(tl.float32)
    gate = _with_update(gate, low, up, row, at, rows, width, rank, 1, rank, PAD)
    other = _with_update(other, low, up + width * rank, row, at, rows, width, rank, 1, rank, PAD)
    value, _ = _value_and_slope(gate, ACT)
    tl.store(out + row[:, None] * width + at[None, :], (value * other).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_low(
    pair,
    low,
    up,
    slope,
    back,
    down,
    to,
    rows,
    width,
    rank,
    rank_down,
    ACT: tl.constexpr,
    PAD: tl.constexpr,
    PAD_DOWN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    place, own = row[:, None] * (2 * width) + at[None, :], row[:, None] * width + at[None, :]
    gate = tl.load(pair + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(pair + place + width, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(slope + own, mask=inside, other=0.0).to(tl.float32)
    if PAD:
        gate = _with_update(gate, low, up, row, at, rows, width, rank, 1, rank, PAD)
        other = _with_update(other, low, up + width * rank, row, at, rows, width, rank, 1, rank, PAD)
    if PAD_DOWN:
        grad = _with_update(grad, back, down, row, at, rows, width, rank_down, width, 1, PAD_DOWN)
    value, steep = _value_and_slope(gate, ACT)
    kind = to.dtype.element_ty
    tl.store(to + place, (grad * other * steep).to(kind), mask=inside)
    tl.store(to + place + width, (grad * value).to(kind), mask=inside)
    tl.store(slope + own, (value * other).to(kind), mask=inside)


WIDEST_RANK = 128  # of an update that is added in a kernel
_TILE_ROWS, _TILE_COLS = 32, 128


def _pad(rank: int) -> int:
    return max(triton.next_power_of_2(rank), 16) if rank else 0


def _tiles(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, _TILE_ROWS), triton.cdiv(width, _TILE_COLS)


def gated_low(pair: Tensor, low: Tensor, up: Tensor, out: Tensor, act: str) -> None:
    """Write act(gate) · up of `pair + low up^T`; all lie in one piece.

    Args:
        pair: gate and up side by side, [n, 2 I].
        low: [n, p], p from 1 to WIDEST_RANK.
        up: [2 I, p].
        out: [n, I].
        act: one of ACTIVATIONS.
    """
    (rows, width), rank = out.shape, low.shape[1]
    how = {"ACT": ACTIVATIONS.index(act), "PAD": _pad(rank), "ROWS": _TILE_ROWS, "COLS": _TILE_COLS, "num_warps": 4}
    _forward_low[_tiles(rows, width)](pair, low, up, out, rows, width, rank, **how)


def gated_low_backward(
    pair: Tensor, low: Tensor, up: Tensor, slope: Tensor, back: Tensor, down: Tensor, to: Tensor, act: str
) -> None:
    """Write what `gated_backward` does, of `pair + low up^T` and the gradient `slope + back down`; `to` may be `pair`.

    Args:
        pair: as in `gated_low`, and so are low and up, but that p may be 0.
        low: likewise.
        up: likewise.
        slope: gradient of act(gate) · up but for its update, [n, I]; act(gate) · up is written over it.
        back: [n, q], q from 0 to WIDEST_RANK.
        down: [q, I].
        to: gradients of gate and up, [n, 2 I].
        act: one of ACTIVATIONS.
    """
    (rows, width), rank, rank_down = slope.shape, low.shape[1], back.shape[1]
    how = {"ACT": ACTIVATIONS.index(act), "PAD": _pad(rank), "PAD_DOWN": _pad(rank_down), "num_warps": 4}
    given = (pair, low, up, slope, back, down, to, rows, width, rank, rank_down)
    _backward_low[_tiles(rows, width)](*given, ROWS=_TILE_ROWS, COLS=_TILE_COLS, **how)
