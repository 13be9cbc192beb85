# mypy: ignore-errors
"""A Triton kernel for cross-entropy: a chunk of logits becomes its own gradient, in place.

The logits are read twice (the second time mostly out of the cache) and written once; in torch's own operations they
are copied to float32 and moved eight times, which took a tenth of a training step of an 8B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096  # logits of a row at a time


@triton.jit
def _cross_entropy(
    logits, labels, losses, width, stride, IGNORED: tl.constexpr, SLOPE: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counts = label != IGNORED
    start = logits + row * stride
    columns = tl.arange(0, WIDTH)
    top = tl.full((WIDTH,), float("-inf"), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for at in range(0, width, WIDTH):  # each lane for itself; they are joined at the end
        value = tl.load(start + at + columns, mask=at + columns < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(value - safe)
        top = higher
    highest = tl.max(top, 0)
    norm = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    wanted = tl.load(start + tl.where(counts, label, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counts, norm - wanted, 0.0))
    if SLOPE:
        tl.debug_barrier()  # the wanted logit is read before another lane overwrites it
        for at in range(0, width, WIDTH):
            place = at + columns
            value = tl.load(start + place, mask=place < width, other=0.0).to(tl.float32)
            slope = tl.exp(value - norm) - tl.where(place == label, 1.0, 0.0)
            slope = tl.where(counts, slope, 0.0)
            tl.store(start + place, slope.to(logits.dtype.element_ty), mask=place < width)


def cross_entropy_(logits: Tensor, labels: Tensor, ignored: int, slope: bool) -> Tensor:
    """Return each row's -log softmax(logits)[label], float32 `[n]`, 0 where it is ignored.

    Args:
        logits: `[n, V]` on a GPU, rows without gaps inside; with `slope` they become the gradient of the sum.
        labels: `[n]`, int64.
        ignored: the label that does not count.
        slope: whether the gradient is wanted.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _cross_entropy[(len(logits),)](
            logits,
            labels,
            losses,
            logits.shape[1],
            logits.stride(0),
            IGNORED=ignored,
            SLOPE=slope,
            WIDTH=WIDTH,
            num_warps=8,
        )
    return losses
