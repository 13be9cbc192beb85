"""Convolve tokens over time, `z + sum_k W_k z[t + k - middle] + b`, by matrix products alone.

Steps of time lie S rows apart, so a tap is one product of shifted rows, added in place: no transpose, no windows. With
u the bytes of `z`, forward and backward move about 11 u each; the arithmetic is 2 k r FLOPs an element and direction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def time_mix(z: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Return `z + sum_k taps[k] z[t + k - middle] + bias`, where z is zero before and after the video.

    Args:
        z: `[V, T, S, r]`: videos, time steps, places, channels.
        taps: `[k, r, r]`, k odd: the matrix of each time step.
        bias: `[r]`.

    Returns:
        `[V, T, S, r]`.
    """
    out: Tensor = _TimeMix.apply(z.flatten(1, 2), taps, bias, z.shape[2])  # type: ignore[no-untyped-call]
    return out.view(z.shape)


class _TimeMix(torch.autograd.Function):
    """`time_mix` on `[V, T * S, r]`, with a backward of matrix products in a fixed order."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, taps: Tensor, bias: Tensor, space: int) -> Tensor:
        ctx.save_for_backward(z, taps)
        ctx.space = space
        middle = len(taps) // 2
        out = F.linear(z, taps[middle], bias).add_(z)  # [V, T * S, r]
        for k, here, there in _shifts(taps, z.shape[1], space):
            out[:, here].baddbmm_(z[:, there], taps[k].T.expand(len(z), -1, -1))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        z, taps = ctx.saved_tensors
        grad, middle = grads[0].contiguous(), len(taps) // 2
        back, weights = (grad @ taps[middle]).add_(grad), torch.zeros_like(taps)
        weights[middle] = grad.flatten(0, 1).T @ z.flatten(0, 1)
        for k, here, there in _shifts(taps, z.shape[1], ctx.space):
            back[:, there].baddbmm_(grad[:, here], taps[k].expand(len(z), -1, -1))
            # video by video: a single product splits its long sum over the whole GPU, a batched one does not
            for g, x in zip(grad[:, here], z[:, there]):
                weights[k].addmm_(g.T, x)
        return back, weights, grad.sum((0, 1)), None


def _shifts(taps: Tensor, rows: int, space: int) -> list[tuple[int, slice, slice]]:
    """List for each tap but the middle one its index, the rows that have such a neighbour, and those neighbours."""
    found = []
    for k in range(len(taps)):
        by = (k - len(taps) // 2) * space
        if by and abs(by) < rows:
            found.append((k, slice(max(0, -by), rows - max(0, by)), slice(max(0, by), rows + min(0, by))))
    return found
