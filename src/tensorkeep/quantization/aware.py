"""A linear over the weight that a 4-bit file will hold: base and update are summed and rounded at every use.

The sum is taken in float64 and rounded once to float32, as a merge of files does: another machine may add in another
order, which changes about one float32 in 10^8 by its last bit. Every scale is made anew from the sum: nf4 has the
largest magnitude of each 64 flat elements as float32, not quantized again; q4_0 (ggml's) has float16 scales for 32
elements of a row. The gradient passes the rounding as if it were not there (straight-through, arXiv 1308.3432), so A
and B get what a plain LoRA gives them at the rounded weight. Codes are kept for the backward, 4.5 bits a weight; the
sum is not.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.frozen import compute_dtype, dense_weight, frozen_state
from tensorkeep.quantization.packed import Layout, Packed, pack
from tensorkeep.quantization.unpacking import unpack

Aware = Literal["nf4", "q4_0"]
ROW_BLOCK = 32  # elements of a row that share a scale in q4_0
_AT_ONCE = 1 << 15  # elements of a sum at a time, in float64: 256 KiB stay in a core's cache


class Codes(NamedTuple):
    """A weight as a 4-bit file holds it.

    Attributes:
        kind: "nf4" or "q4_0".
        shape: the weight's, [out, in].
        codes: nf4: two flat elements a byte, uint8 [ceil(n/2), 1]; q4_0: the codes of each block as ggml has them,
            uint8 [n/32, 16].
        scales: nf4: float32 [ceil(n/64)]; q4_0: float16 [n/32, 1].
    """

    kind: Aware
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that a reader of the file computes with, [out, in], rounded once to `dtype`."""
        if self.kind == "nf4":
            packed = self.packed()
            return unpack(packed.layout, packed.tensors, dtype)
        found = torch.cat([self.codes & 15, self.codes >> 4], 1).view(torch.int8).sub_(8)
        return torch.mul(found, self.scales.float()).to(dtype).view(self.shape)

    def packed(self) -> Packed:
        """Return nf4 codes as bitsandbytes stores them, for values in float32."""
        from tensorkeep.quantization.codes import NF4

        table = torch.from_numpy(NF4 + 0).to(self.codes.device)
        return Packed(Layout("nf4", self.shape), {"weight": self.codes, "absmax": self.scales, "quant_map": table})

    def blocks(self) -> Tensor:
        """Return q4_0 blocks as a GGUF file stores them, uint8 [blocks, 18]: the scale, then the codes."""
        return torch.cat([self.scales.contiguous().view(torch.uint8), self.codes], 1)


def summed(base: nn.Module, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute `W + scale · B A` over a frozen dense or quantized W.

    Args:
        base: a `QuantLinear`, an `nn.Linear`, or a module with its `matrix`.
        a: [r, in].
        b: [out, r].
        scale: factor of the update.

    Returns:
        float32 [out, in], a tensor of its own; summed in float64.
    """
    how, state = frozen_state(base)
    return _sum(how, state, a, b, scale)


def rounded(weight: Tensor, kind: Aware, name: str = "weight") -> Codes:
    """Round a weight as the format rounds it.

    Args:
        weight: float32 [out, in], contiguous.
        kind: "nf4" or "q4_0".
        name: what messages call the weight.

    Returns:
        Codes and scales.

    Raises:
        TensorkeepError: V01 where the weight holds NaN or infinity, or a number too large for a float16 scale.

    Example:
        >>> weight = torch.linspace(-1, 1, 128).view(2, 64)
        >>> again = rounded(rounded(weight, "q4_0").values(), "q4_0")
        >>> torch.equal(again.values(), rounded(weight, "q4_0").values())
        True
    """
    shape = (weight.shape[0], weight.shape[1])
    if kind == "nf4":
        made = pack(weight, "nf4", double=False, name=name)
        return Codes(kind, shape, made.tensors["weight"], made.tensors["absmax"])
    return _row_blocks(weight.reshape(-1, ROW_BLOCK).clone(), shape, name)[0]


def _rounded_and_values(weight: Tensor, kind: Aware, name: str, dtype: torch.dtype) -> tuple[Codes, Tensor]:
    """Return codes and what a reader computes with; the weight is spent, its memory used again."""
    if kind == "nf4":
        held = rounded(weight, kind, name)
        return held, held.values(dtype)
    blocks = weight.view(-1, ROW_BLOCK)
    held, apart = _row_blocks(blocks, (weight.shape[0], weight.shape[1]), name)
    torch.mul(apart.view(torch.int8).sub_(8), held.scales.float(), out=blocks)
    return held, weight.to(dtype)


def _row_blocks(blocks: Tensor, shape: tuple[int, int], name: str) -> tuple[Codes, Tensor]:
    """Return q4_0 of blocks [n, 32], and the codes unpacked, uint8 [n, 32]; the blocks are spent."""
    step = _largest(blocks) / -8
    scales = step.half()
    if not bool(torch.isfinite(scales).all()):
        what = "holds NaN, infinity, or a number beyond a float16 scale"
        raise TensorkeepError(what, where=name, code="V01", hint="a lower optimizer.lr, or quantize_aware: nf4")
    inverse = torch.where(step == 0, torch.zeros_like(step), 1 / step)
    codes = blocks.mul_(inverse).add_(8.5).to(torch.uint8).clamp_(max=15)
    half = ROW_BLOCK // 2
    return Codes("q4_0", shape, codes[:, :half] | codes[:, half:] << 4, scales), codes


def _largest(blocks: Tensor) -> Tensor:
    """Return the first of each block's largest magnitudes with its sign, [blocks, 1]; NaN where a block holds NaN."""
    high, low = blocks.amax(1, keepdim=True), blocks.amin(1, keepdim=True)  # argmax takes five times as long
    top = torch.where(high > -low, high, low)
    tied = (high == -low).flatten()
    if bool(tied.any()):
        some = blocks[tied]
        top[tied] = some.gather(1, some.abs().argmax(1, keepdim=True))
    return top


def aware_linear(x: Tensor, base: nn.Module, a: Tensor, b: Tensor, scale: float, kind: Aware, name: str) -> Tensor:
    """Compute `x Q(W + scale · B A)^T + bias`, Q being the format's rounding.

    Args:
        x: [..., in].
        base: its weight is frozen.
        a: [r, in].
        b: [out, r].
        scale: factor of the update.
        kind: the format.
        name: what messages call the layer.

    Returns:
        [..., out], in the dtype of computation: bit for bit what a plain linear over `Codes.values` gives.
    """
    how, state = frozen_state(base)
    run: Any = _AwareLinear.apply
    out: Tensor = run(x, base.bias, a, b, scale, compute_dtype(x), kind, name, how, *state)
    return out


def _sum(how: Any, state: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return base and update as one float32 weight, rows at a time."""
    _, rows, columns, _, _ = how
    out = dense_weight(how, state, torch.float32, torch.empty(rows, columns, device=a.device))
    left, right = b.detach().double().mul_(scale), a.detach().double()
    step = max(_AT_ONCE * (512 if a.is_cuda else 1) // columns, 1)
    for at in range(0, rows, step):
        some = out[at : at + step]
        some.copy_(some.double().addmm_(left[at : at + step], right))
    return out


class _AwareLinear(torch.autograd.Function):
    """The linear of `aware_linear`: the backward has the rounded weight for x, and plain LoRA's for A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dtype: torch.dtype,
        kind: Aware,
        name: str,
        how: Any,
        *state: Tensor | None,
    ) -> Tensor:
        ctx.x_dtype, x = x.dtype, x.to(dtype)
        held, weight = _rounded_and_values(_sum(how, state, a, b, scale), kind, name, dtype)
        out = F.linear(x, weight, None if bias is None else bias.to(dtype))
        trains = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if trains else None, a, b, held.codes, held.scales)
        ctx.scale, ctx.kind, ctx.shape = scale, kind, held.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, a, b, codes, scales = ctx.saved_tensors
        rows, columns = ctx.shape
        need_x, need_bias, need_a, need_b = ctx.needs_input_grad[:4]
        flat = grad.reshape(-1, rows)  # [n, out]
        grad_x = grad_bias = grad_a = grad_b = None
        if need_x:
            weight = Codes(ctx.kind, ctx.shape, codes, scales).values(flat.dtype)
            grad_x = (flat @ weight).view(*grad.shape[:-1], columns).to(ctx.x_dtype)
        if need_bias:
            grad_bias = flat.sum(0).to(cast(torch.dtype, ctx.bias_dtype))
        if need_a:
            down = (flat @ b.to(flat.dtype)).mul_(ctx.scale)  # [n, r]
            grad_a = (down.T @ x.reshape(-1, columns)).to(a.dtype)
        if need_b:
            low = x.reshape(-1, columns) @ a.to(flat.dtype).T  # [n, r]
            grad_b = (flat.T @ low).mul_(ctx.scale).to(b.dtype)
        return (grad_x, grad_bias, grad_a, grad_b, *([None] * (len(ctx.needs_input_grad) - 4)))
