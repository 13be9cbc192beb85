# mypy: ignore-errors
"""Triton kernels of the selective scan: its states stay in registers, one pass forward, two backward.

A program takes some channels of one sequence through all of its time. Forward it keeps the states in front of every
`CHUNK` steps; backward it goes through the chunks from the end, each once more from its kept states and then in
reverse. What several programs add to is added up by torch, in one order: equal inputs give equal bits. Imported by
`causaltad` only where there is a GPU.

Floor for B sequences of T steps and D channels with N states: 12 B T D bytes forward and 28 backward; at 4.3 TB/s and
B T D = 3.1 million 9 and 20 us. A program's steps come one after the other, though: some hundred cycles each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # steps between two kept states
_CHANNELS = 32  # of a program


@triton.jit
def _forward(
    x, step, decay, into, out_of, y, kept, steps, chunks, D, CHUNK: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n, inside = tl.arange(0, N), d < D
    both = inside[:, None] & (n >= 0)[None, :]
    a = tl.load(decay + d[:, None] * N + n[None, :], mask=both, other=0.0)
    state = tl.zeros((BLOCK, N), tl.float32)
    for t in range(steps):
        if t % CHUNK == 0:
            place = (b * chunks + t // CHUNK) * D
            tl.store(kept + (place + d)[:, None] * N + n[None, :], state, mask=both)
        row = b * steps + t
        s = tl.load(step + row * D + d, mask=inside, other=0.0)
        v = tl.load(x + row * D + d, mask=inside, other=0.0)
        i, o = tl.load(into + row * N + n), tl.load(out_of + row * N + n)
        state = tl.exp(s[:, None] * a) * state + (s * v)[:, None] * i[None, :]
        tl.store(y + row * D + d, tl.sum(state * o[None, :], 1), mask=inside)


@triton.jit
def _backward(
    x,
    step,
    decay,
    into,
    out_of,
    kept,
    grad,
    before,
    d_x,
    d_step,
    d_decay,
    d_into,
    d_out,
    steps,
    chunks,
    D,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, n = p * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    inside = d < D
    both = inside[:, None] & (n >= 0)[None, :]
    a = tl.load(decay + d[:, None] * N + n[None, :], mask=both, other=0.0)
    own = before + ((b * tl.num_programs(1) + p) * CHUNK) * BLOCK * N + tl.arange(0, BLOCK)[:, None] * N + n[None, :]
    part = (p * tl.num_programs(0) + b) * steps
    # `back`: the gradient of the state after the step at hand
    back, of_decay = tl.zeros((BLOCK, N), tl.float32), tl.zeros((BLOCK, N), tl.float32)
    for reverse in range(chunks):
        chunk = chunks - 1 - reverse
        first, count = chunk * CHUNK, tl.minimum(CHUNK, steps - chunk * CHUNK)
        state = tl.load(kept + (b * chunks + chunk) * D * N + d[:, None] * N + n[None, :], mask=both, other=0.0)
        for j in range(count):
            tl.store(own + j * BLOCK * N, state)
            row = b * steps + first + j
            s, v = tl.load(step + row * D + d, mask=inside, other=0.0), tl.load(x + row * D + d, mask=inside, other=0.0)
            state = tl.exp(s[:, None] * a) * state + (s * v)[:, None] * tl.load(into + row * N + n)[None, :]
        tl.debug_barrier()
        for k in range(count):
            j = count - 1 - k
            row = b * steps + first + j
            s, v = tl.load(step + row * D + d, mask=inside, other=0.0), tl.load(x + row * D + d, mask=inside, other=0.0)
            g = tl.load(grad + row * D + d, mask=inside, other=0.0)
            i, o = tl.load(into + row * N + n), tl.load(out_of + row * N + n)
            earlier = tl.load(own + j * BLOCK * N)
            factor = tl.exp(s[:, None] * a)
            now = factor * earlier + (s * v)[:, None] * i[None, :]
            back += g[:, None] * o[None, :]
            tl.store(d_out + (part + first + j) * N + n, tl.sum(g[:, None] * now, 0))
            tl.store(d_into + (part + first + j) * N + n, tl.sum(back * (s * v)[:, None], 0))
            added = tl.sum(back * i[None, :], 1)
            slope = back * earlier * factor  # of step times decay
            tl.store(d_x + row * D + d, added * s, mask=inside)
            tl.store(d_step + row * D + d, added * v + tl.sum(slope * a, 1), mask=inside)
            of_decay += slope * s[:, None]
            back *= factor
        tl.debug_barrier()
    tl.store(d_decay + (b * D + d)[:, None] * N + n[None, :], of_decay, mask=both)


def scan(x: Tensor, step: Tensor, decay: Tensor, into: Tensor, out_of: Tensor) -> tuple[Tensor, Tensor]:
    """Scan along time.

    Args:
        x: `[B, T, D]`, contiguous as the others.
        step: `[B, T, D]`.
        decay: `[D, N]`, N a power of two.
        into: `[B, T, N]`.
        out_of: `[B, T, N]`.

    Returns:
        The output `[B, T, D]`, and the states in front of every chunk `[B, chunks, D, N]`.
    """
    batch, steps, channels = x.shape
    chunks, states = triton.cdiv(steps, CHUNK), decay.shape[1]
    y, kept = torch.empty_like(x), x.new_empty(batch, chunks, channels, states)
    grid = (batch, triton.cdiv(channels, _CHANNELS))
    _forward[grid](
        x, step, decay, into, out_of, y, kept, steps, chunks, channels, CHUNK, states, _CHANNELS, num_warps=1
    )
    return y, kept


def scan_backward(
    grad: Tensor, x: Tensor, step: Tensor, decay: Tensor, into: Tensor, out_of: Tensor, kept: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of `x`, `step`, `decay`, `into` and `out_of`, from `grad [B, T, D]` at the output."""
    batch, steps, channels = x.shape
    chunks, states = kept.shape[1], decay.shape[1]
    parts = triton.cdiv(channels, _CHANNELS)
    before = x.new_empty(batch, parts, CHUNK, _CHANNELS, states)
    d_x, d_step = torch.empty_like(x), torch.empty_like(x)
    d_decay = x.new_empty(batch, channels, states)
    d_into, d_out = x.new_empty(parts, batch, steps, states), x.new_empty(parts, batch, steps, states)
    tensors = (x, step, decay, into, out_of, kept, grad, before, d_x, d_step, d_decay, d_into, d_out)
    _backward[(batch, parts)](*tensors, steps, chunks, channels, CHUNK, states, _CHANNELS, num_warps=1)
    return d_x, d_step, d_decay.sum(0), d_into.sum(0), d_out.sum(0)
