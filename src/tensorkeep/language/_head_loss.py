"""Cross-entropy through a language model's head, a chunk of tokens at a time, without holding all logits.

A batch of 8192 tokens over a vocabulary of 128256 has 4.2 GB of float32 logits, and as much again of their gradient.
Here they are made a chunk of tokens at a time, and the gradient of the hidden states (and of the head, where it
trains) is made in the same pass, so that nothing of vocabulary size outlives its chunk and nothing is computed twice.
The idea is that of Cut Cross-Entropy (arXiv 2411.09009) and Liger's fused linear cross-entropy (arXiv 2410.10989).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tensorkeep.language.data.batches import IGNORED

_CHUNK_BYTES = 256 << 20  # of logits held at a time: float32, or what a GPU's kernel takes
_TILE = 256  # tokens: a chunk is a multiple of it where it can be, since matrix products run in tiles


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, divisor: float, chunk: int | None = None) -> Tensor:
    """Compute the cross-entropy of hidden states under a head: the sum of -log softmax(hidden W^T)[label] / divisor.

    Products are made in the dtype of `hidden` or autocast's, sums in float32.

    Args:
        hidden: last hidden states `[..., C]`.
        weight: the head's matrix `[V, C]`.
        labels: wanted ids, already shifted, `[...]`; -100 does not count.
        divisor: what the sum is divided by.
        chunk: tokens at a time (None: as many as 256 MiB of logits).

    Returns:
        A float32 scalar.

    Example:
        >>> h, w = torch.randn(3, 4), torch.randn(7, 4)
        >>> torch.allclose(head_loss(h, w, torch.tensor([1, -100, 2]), 2.0),
        ...                torch.nn.functional.cross_entropy(h @ w.T, torch.tensor([1, -100, 2])))
        True
    """
    width, kind = hidden.shape[-1], hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    size = chunk or _chunk_of(weight.shape[0], dtype.itemsize if fused(hidden) else 4)
    run: Any = _HeadLoss.apply
    sums = run(hidden.reshape(-1, width), weight, labels.reshape(-1), dtype, size)
    return cast(Tensor, sums) / divisor


def _chunk_of(vocabulary: int, itemsize: int) -> int:
    """How many tokens go at a time."""
    size = max(_CHUNK_BYTES // (itemsize * vocabulary), 1)
    return size // _TILE * _TILE or size


def fused(hidden: Tensor) -> bool:
    """Whether logits on this tensor's device go through the kernel."""
    return hidden.is_cuda and find_spec("triton") is not None


class _HeadLoss(torch.autograd.Function):
    """The sum over labels that count; the forward also makes the gradients, which the backward only scales."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, size: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # float32 across chunks: many small terms of either sign
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        head = weight.to(dtype)
        slope_of = _fused_slope if fused(hidden) else _slope
        for start in range(0, len(labels), size):
            part, wanted = hidden[start : start + size].to(dtype), labels[start : start + size]
            loss, low = slope_of(part @ head.T, wanted, need_hidden or need_weight)
            total += loss
            if low is None:
                continue
            if grad_hidden is not None:
                grad_hidden[start : start + size] = low @ head
            if grad_weight is not None:
                grad_weight += low.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight = ctx.saved_tensors
        return (
            None if hidden is None else hidden * grad.to(hidden.dtype),
            None if weight is None else (weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _slope(made: Tensor, wanted: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of logits `[n, V]` and, where there is need, its gradient."""
    counts, places, logits = wanted != IGNORED, wanted.clamp(min=0)[:, None], made.float()
    norm = logits.logsumexp(-1, keepdim=True)
    loss = ((norm - logits.gather(1, places)).squeeze(1) * counts).sum()
    if not need:
        return loss, None
    slope = logits.sub_(norm).exp_()  # softmax, in the place of the logits
    slope.scatter_add_(1, places, slope.new_full((1, 1), -1.0).expand_as(places))
    return loss, (slope * counts[:, None]).to(made.dtype)


def _fused_slope(made: Tensor, wanted: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    """Do the same by one kernel, in the place of the logits."""
    from tensorkeep.language._head_kernels import cross_entropy_

    return cross_entropy_(made, wanted, IGNORED, need).sum(), made if need else None
