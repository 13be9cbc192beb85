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
