"""Residual add, drop path and layer norm in one pass over memory, forward and backward.

The floor of each is its bytes: with u = the bytes of one `[N, L, C]`, `add_norm` moves 4 u, `add_branch` and
`norm_backward` 3 u and 4 u; torch's separate operations move 6 u, 3 u and 6 to 8 u. The GPU kernels are in
`row_kernels`; the plain torch form serves every other device and checks them.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _on_gpu(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: rows side by side, on a GPU that has Triton."""
    present = [t for t in tensors if t is not None]
    return all(t.is_cuda and t.is_contiguous() for t in present) and _has_triton()


def add_norm(x: Tensor, branch: Tensor | None, kept: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """`total = x + kept * branch` and `norm(total)`, each `[n, L, C]`; `kept [n, 1, 1]` or None: all."""
    if _on_gpu(x, branch):
        from tensorkeep.detection.model import _row_kernels as row_kernels

        total = x if branch is None else torch.empty_like(x)
        normed = torch.empty_like(x)
        row_kernels.add_norm(x, branch, kept, norm, total, normed)
        return total, normed
    if branch is not None:
        x = x + branch if kept is None else torch.addcmul(x, branch, kept)
    return x, F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def add_branch(x: Tensor, branch: Tensor, kept: Tensor | None, out: Tensor) -> None:
    """`out = x + kept * branch`, each `[n, L, C]`; `kept [n, 1, 1]` or None: all."""
    if _on_gpu(x, branch, out):
        from tensorkeep.detection.model import _row_kernels as row_kernels

        row_kernels.add_norm(x, branch, kept, None, out, None)
    elif kept is None:
        torch.add(x, branch, out=out)
    else:
        torch.addcmul(x, branch, kept, out=out)


def norm_backward(
    grad: Tensor, x: Tensor, norm: nn.LayerNorm, residual: Tensor, kept: Tensor | None, out: Tensor
) -> None:
    """`out = residual + kept * (gradient of norm at x, from grad)`; the weights of `norm` get none.

    `out` may be `residual`. Drop path's factor stands here, at the end of a branch's backward, which is linear.
    """
    if _on_gpu(grad, x, residual, out):
        from tensorkeep.detection.model import _row_kernels as row_kernels

        row_kernels.norm_backward(grad, x, norm, residual, kept, out)
        return
    shape, weight, bias = list(norm.normalized_shape), norm.weight, norm.bias
    mean, scale = torch.native_layer_norm(x, shape, weight, bias, norm.eps)[1:]
    back = torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, scale, weight, bias, [True, False, False])[0]
    torch.add(residual, back if kept is None else back * kept, out=out)
