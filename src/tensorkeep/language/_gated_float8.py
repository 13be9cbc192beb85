"""The gated MLP of `_gated_mlp` with its wide products in float8, forward and for the input's gradient.

An update cannot ride in such a product, whose numbers are rounded: it is added to it in bfloat16, that of gate and up
where the activation is computed. Gate and up are one
product, and so are their gradients, which share a scale a token; each weight is rounded from its codes by its rows for
the forward, by its columns for the backward. The updates' own products and gradients are in bfloat16, of activations
that were not rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorkeep.language._gated_mlp import (
    FORMS,
    Plan,
    Sums,
    apart,
    chunks,
    fused,
    gated_backward_into,
    gated_into,
    operations,
    padded,
    padded_rows,
)
from tensorkeep.quantization import float8
from tensorkeep.quantization.frozen import FOUR_BIT_ROLES, float8_weight

RIDING = True


def _scale(plan: Plan, which: int, turned: bool) -> Tensor:
    found = plan.state(which)[len(FOUR_BIT_ROLES) + turned]
    assert found is not None
    return found


def _weight(plan: Plan, which: int, turned: bool) -> tuple[Tensor, Tensor]:
    """Return a rounded weight [out, in] or, `turned`, [in, out], and the scales of its rows."""
    return float8_weight(plan.how(which), plan.state(which), turned), _scale(plan, which, turned)


def _gate_and_up(plan: Plan, turned: bool) -> tuple[Tensor, Tensor]:
    """Return the rounded weights of gate and up, one above the other or, `turned`, side by side, and their scales."""
    width, inputs = plan.numbers[:2]
    gate, up = _scale(plan, 0, turned), _scale(plan, 1, turned)
    scale = torch.maximum(gate, up) if turned else torch.cat([gate, up])
    whole = gate.new_empty((inputs, 2 * width) if turned else (2 * width, inputs), dtype=float8.FLOAT8)
    for which in (0, 1):
        own = slice(which * width, (which + 1) * width)
        out = whole[:, own] if turned else whole[own]
        float8_weight(plan.how(which), plan.state(which), turned, scale if turned else scale[own], out)
    return whole, scale


def _updates(plan: Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return A of gate and up [p, in], one above the other, and B [2 I, p] for the two, with zeros between."""
    pad, width = padded(plan.rank(0) + plan.rank(1)), plan.width
    low, up, at = like.new_zeros((pad, like.shape[1])), like.new_zeros((2 * width, pad)), 0
    for which in (0, 1):
        a, b = plan.a(which, like.dtype), plan.b(which)
        if a is not None and b is not None:
            low[at : at + len(a)] = a
            up[which * width : (which + 1) * width, at : at + len(a)] = b
            at += len(a)
    return low, up


def _down_update(plan: Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return A of down [p, I], and B [out, p]."""
    low, b = padded_rows(plan.a(2, like.dtype), like, plan.width), plan.b(2)
    return low, like.new_empty((plan.numbers[8], 0)) if b is None else F.pad(b, (0, len(low) - b.shape[1])).to(low)


def _times(x: Tensor, weight: Tensor, scale: Tensor, out: Tensor, low: Tensor, up: Tensor) -> None:
    """Write `x weight^T + low up` into `out`, the first product in float8; no columns of `low`: no update."""
    codes, tops = float8.narrowed(x)
    float8.product(codes, weight.T, tops, scale, out.dtype, out)
    if low.shape[1]:
        out.addmm_(low, up)


def _rides(x: Tensor, act: str, ranks: Sequence[int]) -> bool:
    """Whether updates are added in the kernels of the activation; what is kept of gate and up is then without them."""
    if not RIDING or not fused(x, act) or not any(ranks):
        return False
    from tensorkeep.language._gated_kernels import WIDEST_RANK

    return max(ranks) <= WIDEST_RANK


def _forward(
    x: Tensor,
    states: Sequence[Tensor | None],
    lora: Sequence[Tensor | None],
    kinds: str,
    numbers: Sequence[int],
    scales: Sequence[float],
    act: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return what `_gated_mlp`'s forward does."""
    plan = Plan(states, lora, kinds, numbers, scales, act)
    width = plan.width
    (low, up), (low_down, up_down) = _updates(plan, x), _down_update(plan, x)
    rides = _rides(x, act, (len(low), len(low_down)))
    whole, scale = _gate_and_up(plan, False)
    down, scale_down = _weight(plan, 2, False)
    out = x.new_empty((len(x), numbers[8]))
    kept = x.new_empty((len(x), 2 * width) if keep else (0,))
    for part in chunks(len(x), width, x.itemsize):
        piece = x[part]
        pair, lows = kept[part] if keep else x.new_empty((len(piece), 2 * width)), piece @ low.T
        _times(piece, whole, scale, pair, lows[:, :0] if rides else lows, up.T)
        hidden = x.new_empty((len(piece), width))
        if rides and len(low):
            from tensorkeep.language._gated_kernels import gated_low

            gated_low(pair, lows, up, hidden, act)
        else:
            gated_into(pair, hidden, act)
        _times(hidden, down, scale_down, out[part], hidden @ low_down.T, up_down.T)
    return out, kept


def _backward(
    grad: Tensor,
    x: Tensor,
    kept: Tensor,
    states: Sequence[Tensor | None],
    lora: Sequence[Tensor | None],
    kinds: str,
    numbers: Sequence[int],
    scales: Sequence[float],
    act: str,
    need_x: bool,
) -> list[Tensor]:
    """Return what `_gated_mlp`'s backward does."""
    plan = Plan(states, lora, kinds, numbers, scales, act)
    width = plan.width
    (low, up), (low_down, up_down) = _updates(plan, x), _down_update(plan, x)
    sums, rides = Sums(), _rides(x, act, (len(low), len(low_down)))
    again = None if len(kept) else _gate_and_up(plan, False)
    down, scale_down = _weight(plan, 2, True)
    whole = _gate_and_up(plan, True) if need_x else None
    grad_x = x.new_empty(x.shape) if need_x else x.new_empty(0)
    for part in chunks(len(x), width, x.itemsize):
        piece, slope = x[part], grad[part].contiguous()
        lows, both = piece @ low.T, x.new_empty((len(piece), 2 * width))
        if again is not None:
            _times(piece, *again, both, lows[:, :0] if rides else lows, up.T)
        pair, back, hidden = kept[part] if again is None else both, slope @ up_down, x.new_empty((len(piece), width))
        _times(slope, down, scale_down, hidden, back[:, :0] if rides else back, low_down)
        # from the gradient of act(gate) · up to those of gate and of up; in its place stands act(gate) · up then
        if rides:
            from tensorkeep.language._gated_kernels import gated_low_backward

            gated_low_backward(pair, lows, up, hidden, back, low_down, both, act)
        else:
            gated_backward_into(pair, hidden, both, act)
        if len(low_down):
            sums.add("A down", back.T @ hidden)
            sums.add("B down", slope.T @ (hidden @ low_down.T))
        del hidden
        back = both @ up
        if len(low):
            sums.add("A", back.T @ piece)
            sums.add("B", both.T @ lows)
        if whole is not None:
            _times(both, *whole, grad_x[part], back, low)
    return [grad_x, *apart(plan, sums, x)]


FORMS["float8"] = operations("gated_mlp_float8", _forward, _backward)
