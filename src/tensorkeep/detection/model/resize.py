"""Resize linearly along the last axis by fixed gathers, so that the backward is deterministic on every device.

`torch.nn.functional.interpolate(mode="linear")` adds gradients with atomics on CUDA and refuses to run under
`torch.use_deterministic_algorithms(True)`. Both directions of the same linear map are gathers here: the
forward reads two inputs for each output, the backward reads the few outputs that each input fed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def linear_resize(x: Tensor, length: int) -> Tensor:
    """Resample `x [..., T]` to `[..., length]`, linearly, pixel centres aligned (`align_corners=False`).

    Equal to `F.interpolate(x, length, mode="linear", align_corners=False)` to rounding, for growing and
    shrinking; first derivatives only.

    Example:
        >>> linear_resize(torch.tensor([[0.0, 1.0]]), 4)
        tensor([[0.0000, 0.2500, 0.7500, 1.0000]])
    """
    if x.shape[-1] == length:
        return x
    resized: Tensor = _LinearResize.apply(x, length)  # type: ignore[no-untyped-call]
    return resized


class _LinearResize(torch.autograd.Function):
    """The resize as one operation of autograd, both directions by gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int) -> Tensor:
        ctx.sizes = (x.shape[-1], length)
        return _gather(x, *_tables(*ctx.sizes, x.device)[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], *_tables(*ctx.sizes, grads[0].device)[2:]), None


def _gather(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Return `y[..., j] = sum_k weight[k, j] * x[..., index[k, j]]`, summed in the fixed order of k."""
    rows = [x[..., i] * w.to(x.dtype) for i, w in zip(index, weight)]
    total: Tensor = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


@lru_cache(maxsize=64)
def _tables(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return index and weight `[2, target]` of the forward, `[K, source]` of its transpose (padded with weight 0)."""
    position = ((torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5).clamp_(min=0)
    low = position.floor().long().clamp_(max=source - 1)
    high = (low + 1).clamp_(max=source - 1)
    part = position - low
    index, weight = torch.stack([low, high]), torch.stack([1 - part, part])
    fed: list[list[tuple[int, float]]] = [[] for _ in range(source)]
    for j in range(target):
        for k in range(2):
            fed[int(index[k, j])].append((j, float(weight[k, j])))
    most = max(1, *(len(pairs) for pairs in fed))
    padded = [pairs + [(0, 0.0)] * (most - len(pairs)) for pairs in fed]
    back_index = torch.tensor([[pair[0] for pair in pairs] for pairs in padded]).T.contiguous()
    back_weight = torch.tensor([[pair[1] for pair in pairs] for pairs in padded]).T.contiguous()
    tables = index, weight.float(), back_index, back_weight.float()
    a, b, c, d = (table.to(device) for table in tables)
    return a, b, c, d
