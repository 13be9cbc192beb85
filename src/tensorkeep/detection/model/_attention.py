"""Attention as a forward and a backward function, so that a backward written by hand need not run the forward again.

Floors for n chunks of L tokens and width C: 4 n L^2 C FLOPs forward and 10 n L^2 C backward, at 790 TFLOP/s.
Kernels: flash everywhere it can run, cuDNN's on Hopper unless deterministic algorithms are asked for; where neither
can (float32 on a GPU), torch's own choice, which keeps nothing and is run again in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ATEN = torch.ops.aten


class Attended(NamedTuple):
    """The result of attention, with what the kernel's backward reads.

    Attributes:
        kernel: as `choose_kernel` names it.
        out: `[n, heads, L, d]`.
        rest: what else the kernel gave for its backward.
    """

    kernel: str
    out: Tensor
    rest: tuple[Any, ...]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that must be kept for the backward."""
        return [self.out, *(x for x in self.rest if isinstance(x, Tensor))]


def choose_kernel(q: Tensor) -> str:
    """Choose the kernel for `q [n, heads, L, d]`: "cudnn", "flash", "cpu" or "any"."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64, torch.bfloat16):
        return "cpu"
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return "any"
    hopper = torch.version.cuda is not None and torch.cuda.get_device_capability(q.device)[0] >= 9
    return "cudnn" if hopper and not torch.are_deterministic_algorithms_enabled() else "flash"


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Attended:
    """Compute attention without tracking gradients; `q, k, v [n, heads, L, d]`, any strides."""
    if kernel == "cpu":
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return Attended(kernel, out, (lse,))
    if kernel == "flash":
        out, *rest = _ATEN._scaled_dot_product_flash_attention(q, k, v)
        return Attended(kernel, out, tuple(rest[:7]))
    if kernel == "cudnn":
        out, *rest = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return Attended(kernel, out, tuple(rest[:7]))
    return Attended(kernel, F.scaled_dot_product_attention(q, k, v), ())


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, done: Attended) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each `[n, heads, L, d]`, from `grad` at the output."""
    if done.kernel == "cpu":
        found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, done.out, done.rest[0], 0.0, False
        )
    elif done.kernel == "flash":
        lse, cum_q, cum_k, max_q, max_k, seed, offset = done.rest
        found = _ATEN._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, done.out, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
        )
    elif done.kernel == "cudnn":
        lse, cum_q, cum_k, max_q, max_k, seed, offset = done.rest
        found = _ATEN._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, done.out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False
        )
    else:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            found = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)
    dq, dk, dv = found
    return dq, dk, dv
