"""Recomputation in segments: keep one tensor per block, and never hold a whole block's activations.

The usual checkpoint of a block recomputes all of it at once, and those activations (a four times wider MLP, q, k, v)
are then the memory peak. Attention and MLP of a chunk of frames do not depend on other chunks, only the adapter
does. So a segment is an adapter with the attention and MLP that *follow* it: its input is all that is kept, and in
the backward the adapter is recomputed once, the rest a few chunks at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Stage = Callable[[Tensor], Tensor]
# elements of a stream `[n, L, C]` recomputed at a time in the last block, where memory peaks
SEGMENT_ELEMENTS = 8 * 2**20
SEGMENT_COPIES = 20  # as many times the recomputed part is alive then, generously


def part_size(x: Tensor, left: int) -> int:
    """Chunks of `x [N, L, C]` recomputed at a time in a block with `left` blocks from it to the end.

    Large parts fill the GPU better. By the backward of an early block what the later ones kept is gone: one `x` each.
    """
    least = SEGMENT_ELEMENTS * len(x) // x.numel()
    return min(len(x), max(1, least + (left - 1) * len(x) // SEGMENT_COPIES))


def run_segment(
    whole: Stage, parts: Stage, x: Tensor, parameters: Iterable[Tensor], part_size: int, random: bool
) -> Tensor:
    """`parts(whole(x))`, keeping nothing but `x [N, L, C]` for the backward.

    `whole` sees all chunks; `parts` must treat the first axis item by item and is run on `part_size` items at a time.
    `parameters` are those of both that may train; `random` says whether either draws random numbers.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or trainable):
        return _in_parts(parts, whole(x), part_size)
    out: Tensor = _Segment.apply(whole, parts, part_size, random, x, *trainable)  # type: ignore[no-untyped-call]
    return out


def _in_parts(stage: Stage, x: Tensor, size: int) -> Tensor:
    pieces = [stage(piece) for piece in torch.split(x, size)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, whole: Stage, parts: Stage, size: int, random: bool, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.stages, ctx.size = (whole, parts), size
        ctx.device = x.device.type
        ctx.autocast = (torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device))
        ctx.random = random_state(x) if random else None
        ctx.save_for_backward(x, *parameters)
        return _in_parts(parts, whole(x), size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        whole, parts = ctx.stages
        x = x.detach().requires_grad_(ctx.needs_input_grad[4])
        enabled, dtype = ctx.autocast
        sums: list[Tensor | None] = [None] * len(parameters)
        with replay(x, ctx.random), torch.enable_grad():
            with torch.autocast(ctx.device, dtype=dtype, enabled=enabled):
                middle = whole(x)
            below = middle.requires_grad
            inner = middle.detach().requires_grad_(below)
            back = torch.empty_like(inner) if below else None
            for start in range(0, len(inner), ctx.size):
                piece = inner[start : start + ctx.size].detach().requires_grad_(below)
                with torch.autocast(ctx.device, dtype=dtype, enabled=enabled):
                    out = parts(piece)
                if out.requires_grad:
                    wanted = ([piece] if below else []) + parameters
                    found = torch.autograd.grad(out, wanted, grads[0][start : start + ctx.size], allow_unused=True)
                    if back is not None:
                        back[start : start + ctx.size] = found[0]
                        found = found[1:]
                    _add(sums, found)
        lead: Tensor | None = None
        if back is not None:
            wanted = ([x] if x.requires_grad else []) + parameters
            found = torch.autograd.grad(middle, wanted, back, allow_unused=True)
            if x.requires_grad:
                lead, found = found[0], found[1:]
            _add(sums, found)
        return (None, None, None, None, lead, *sums)


def _add(sums: list[Tensor | None], found: Iterable[Tensor | None]) -> None:
    for index, grad in enumerate(found):
        if grad is not None:
            known = sums[index]
            sums[index] = grad if known is None else known + grad


RandomState = tuple[Tensor, Tensor | None]


def random_state(x: Tensor) -> RandomState:
    """State of the generators that a computation on `x` draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None


@contextmanager
def replay(x: Tensor, state: RandomState | None) -> Iterator[None]:
    """Within it the generators are at `state` (None: untouched); afterwards where they were."""
    with torch.random.fork_rng([x.device] if x.is_cuda else [], enabled=state is not None):
        if state is not None:
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], x.device)
        yield
