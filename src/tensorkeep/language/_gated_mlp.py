"""A gated MLP over frozen weights with low-rank updates as one operation: down(act(gate(x)) · up(x)).

Most of a decoder layer's work is here, so its products are arranged for it. An update rides inside its product: the
input gets the columns x A^T, the weight the columns B, and one product makes both, where adding the update afterwards
reads and writes the output once more. Gate and up are one product, forward and back; a weight is dequantized once for
recomputation and gradient. Tokens go in chunks, so gate and up of a long row are never whole in memory. Kept for the
backward: the input, and gate and up where `keep` says so; else these two are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tensorkeep.quantization import float8
from tensorkeep.quantization.frozen import FOUR_BIT_ROLES, How, dense_weight

CHUNK_BYTES = 256 << 20  # of gate and up at a time
_TILE = 256  # tokens: chunks are multiples of it
ROLES = len(FOUR_BIT_ROLES) + len(float8.ROLES)  # tensors of a quantized weight
_Unary = Callable[[Tensor], Tensor]
_Binary = Callable[[Tensor, Tensor], Tensor]
aten = torch.ops.aten
# name -> value, and its gradient from that of the output and the input
ACTIVATIONS: dict[str, tuple[_Unary, _Binary]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")),
    "gelu": (F.gelu, aten.gelu_backward),
    "relu": (F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0.0)),
}


class Plan(NamedTuple):
    """The three linears, unpacked from the flat arguments of the operations."""

    states: Sequence[Tensor | None]
    lora: Sequence[Tensor | None]
    kinds: str
    numbers: Sequence[int]
    scales: Sequence[float]
    act: str

    def rank(self, which: int) -> int:
        a = self.lora[2 * which]
        return 0 if a is None else a.shape[0]

    def a(self, which: int, dtype: torch.dtype) -> Tensor | None:
        """A with its scale, rounded once."""
        a = self.lora[2 * which]
        return None if a is None else (a * self.scales[which]).to(dtype)

    def b(self, which: int) -> Tensor | None:
        return self.lora[2 * which + 1]

    def weight(self, which: int, out: Tensor) -> None:
        """Write the weight of a linear into `out` [rows, columns]."""
        dense_weight(self.how(which), self.state(which), out.dtype, out)

    def how(self, which: int) -> How:
        """How the weight of a linear lies."""
        rows, columns, block, nested = self.numbers[4 * which : 4 * which + 4]
        return self.kinds.split(",")[which], rows, columns, block, nested

    def state(self, which: int) -> Sequence[Tensor | None]:
        """The tensors of a linear's weight."""
        return self.states[ROLES * which : ROLES * (which + 1)]

    @property
    def width(self) -> int:
        """Outputs of gate and of up."""
        return self.numbers[0]


def padded(rank: int) -> int:
    """Columns for updates of a rank: rows of a product start on 16 bytes."""
    return -(-rank // 8) * 8


def chunks(tokens: int, width: int, itemsize: int) -> list[slice]:
    """Cut the tokens into chunks of equal size, as few as the bytes of gate and up allow."""
    most = max(CHUNK_BYTES // (2 * width * itemsize), 1)
    count = -(-tokens // most)
    size = -(-tokens // max(count, 1))
    size = -(-size // _TILE) * _TILE if size > _TILE else size
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, max(size, 1))]


def _gate_and_up(plan: Plan, like: Tensor, below: bool) -> tuple[Tensor, Tensor]:
    """Return the weights [W | B] of gate and up, one above the other, with the rows A under them if `below`; and A.

    A stands for both updates, padded with zeros: [p, in].
    """
    ranks, width, inputs = (plan.rank(0), plan.rank(1)), plan.width, like.shape[1]
    pad = padded(sum(ranks))
    low = like.new_zeros((pad, inputs))
    whole = like.new_empty((2 * width + (pad if below else 0), inputs + pad))
    whole[: 2 * width, inputs:].zero_()
    at = 0
    for which in (0, 1):
        rows = slice(which * width, (which + 1) * width)
        plan.weight(which, whole[rows, :inputs])
        a, b = plan.a(which, like.dtype), plan.b(which)
        if a is not None and b is not None:
            low[at : at + len(a)] = a
            whole[rows, inputs + at : inputs + at + len(a)] = b
            at += len(a)
    if below:
        whole[2 * width :, :inputs] = low
    return whole, low


def with_columns(x: Tensor, low: Tensor) -> Tensor:
    """Return [x | x low^T]; x itself where there is no update."""
    if not len(low):
        return x
    out = x.new_empty((x.shape[0], x.shape[1] + len(low)))
    out[:, : x.shape[1]] = x
    torch.mm(x, low.T, out=out[:, x.shape[1] :])
    return out


def padded_rows(a: Tensor | None, like: Tensor, inputs: int) -> Tensor:
    """Return A with rows of zeros up to a multiple of 8; no rows without an update."""
    if a is None:
        return like.new_zeros((0, inputs))
    return F.pad(a, (0, 0, 0, padded(len(a)) - len(a)))


def fused(x: Tensor, act: str) -> bool:
    return x.is_cuda and act in ("silu", "gelu_tanh") and find_spec("triton") is not None


def gated_into(pair: Tensor, out: Tensor, act: str) -> None:
    """Write act(gate) · up of `pair` [n, 2 I] into `out` [n, I]."""
    if fused(pair, act):
        from tensorkeep.language._gated_kernels import gated

        return gated(pair, out, act)
    gate, up = pair.to(torch.promote_types(pair.dtype, torch.float32)).chunk(2, 1)
    out.copy_(ACTIVATIONS[act][0](gate) * up)
    return None


def gated_backward_into(pair: Tensor, slope: Tensor, to: Tensor, act: str) -> None:
    """Write the gradients of gate and up into `to` [n, 2 I], and act(gate) · up over its gradient `slope`."""
    if fused(pair, act):
        from tensorkeep.language._gated_kernels import gated_backward

        return gated_backward(pair, slope, to, act)
    wide = torch.promote_types(pair.dtype, torch.float32)
    gate, up = pair.to(wide).chunk(2, 1)
    grad, (value, back) = slope.to(wide), ACTIVATIONS[act]
    made = value(gate)
    hidden, of_gate, of_up = made * up, back(grad * up, gate), grad * made  # all before any place is written
    slope.copy_(hidden)
    to[:, : gate.shape[1]], to[:, gate.shape[1] :] = of_gate, of_up
    return None


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
    """Return the output [n, out] of `x` [n, in], and gate and up [n, 2 I] where they are kept (else nothing)."""
    plan = Plan(states, lora, kinds, numbers, scales, act)
    width, outputs = plan.width, numbers[8]
    whole, low = _gate_and_up(plan, x, below=False)
    low_down = padded_rows(plan.a(2, x.dtype), x, width)
    down = x.new_empty((outputs, width + len(low_down)))
    plan.weight(2, down[:, :width])
    b = plan.b(2)
    if b is not None:
        down[:, width:] = F.pad(b, (0, len(low_down) - b.shape[1]))
    out = x.new_empty((len(x), outputs))
    kept = x.new_empty((len(x), 2 * width) if keep else (0,))
    for part in chunks(len(x), width, x.itemsize):
        wide = with_columns(x[part], low)
        pair = kept[part] if keep else x.new_empty((len(wide), 2 * width))
        torch.mm(wide, whole.T, out=pair)
        hidden = x.new_empty((len(wide), width + len(low_down)))
        gated_into(pair, hidden[:, :width], act)
        if len(low_down):
            torch.mm(hidden[:, :width], low_down.T, out=hidden[:, width:])
        torch.mm(hidden, down.T, out=out[part])
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
    """Return the gradients of x (empty where there is no need) and of A and B of the three linears (empty: none)."""
    plan = Plan(states, lora, kinds, numbers, scales, act)
    width, inputs, outputs = plan.width, x.shape[1], numbers[8]
    whole, low = _gate_and_up(plan, x, below=True)
    low_down = padded_rows(plan.a(2, x.dtype), x, width)
    down = x.new_empty((outputs + len(low_down), width))
    plan.weight(2, down[:outputs])
    down[outputs:] = low_down
    b = plan.b(2)
    up_down = x.new_empty((0, outputs)) if b is None else F.pad(b, (0, len(low_down) - b.shape[1])).to(x.dtype).T
    sums = Sums()
    grad_x = x.new_empty(x.shape) if need_x else x.new_empty(0)
    for part in chunks(len(x), width, x.itemsize):
        piece, slope = x[part], grad[part]
        pair = x.new_empty((len(piece), 2 * width + len(low)))
        both = pair[:, : 2 * width]
        if len(kept):
            made, lows = kept[part], piece @ low.T
        else:
            wide = with_columns(piece, low)
            made, lows = torch.mm(wide, whole[: 2 * width].T, out=both), wide[:, inputs:]
        long = with_columns(slope, up_down)
        hidden = long @ down  # the gradient of act(gate) · up
        gated_backward_into(made, hidden, both, act)  # and now that itself
        if len(low_down):
            sums.add("A down", long[:, outputs:].T @ hidden)
            sums.add("B down", slope.T @ (hidden @ low_down.T))
        if len(low):
            torch.mm(both, whole[: 2 * width, inputs:], out=pair[:, 2 * width :])
            sums.add("A", pair[:, 2 * width :].T @ piece)
            sums.add("B", both.T @ lows)
        if need_x:
            torch.mm(pair, whole[:, :inputs], out=grad_x[part])
    return [grad_x, *apart(plan, sums, x)]


class Sums(dict[str, Tensor]):
    """Sums over chunks, in float32 or wider."""

    def add(self, name: str, value: Tensor) -> None:
        """Add a chunk's part."""
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        self[name] = self[name] + wide if name in self else wide


def apart(plan: Plan, sums: Sums, like: Tensor) -> list[Tensor]:
    """Return the gradients of A and B of gate, up and down, in the dtype of the parameters."""
    found: list[Tensor] = []
    at, width = 0, plan.width
    for which in range(3):
        a, b, rank = plan.lora[2 * which], plan.lora[2 * which + 1], plan.rank(which)
        if a is None or b is None:
            found += [like.new_empty(0), like.new_empty(0)]
            continue
        if which == 2:
            grad_a, grad_b = sums["A down"][:rank], sums["B down"][:, :rank]
        else:
            grad_a = sums["A"][at : at + rank]
            grad_b = sums["B"][which * width : (which + 1) * width, at : at + rank]
            at += rank
        found += [(grad_a * plan.scales[which]).to(a.dtype), grad_b.to(b.dtype, copy=True)]
    return found


_ARGUMENTS = "Tensor?[] states, Tensor?[] lora, str kinds, int[] numbers, float[] scales, str act"


def operations(name: str, forward: Any, backward: Any) -> tuple[Any, Any, Any, Any]:
    """Register a forward and its backward for compiled layers.

    Args:
        name: of the operation.
        forward: with the arguments of `_forward`.
        backward: with the arguments of `_backward`.

    Returns:
        The forward as it is and as an operation, and the backward likewise.
    """
    schema = f"(Tensor x, {_ARGUMENTS}, bool keep) -> (Tensor, Tensor)"
    forth = torch.library.custom_op(f"tensorkeep::{name}", forward, mutates_args=(), schema=schema)
    schema = f"(Tensor grad, Tensor x, Tensor kept, {_ARGUMENTS}, bool need_x) -> Tensor[]"
    back = torch.library.custom_op(f"tensorkeep::{name}_backward", backward, mutates_args=(), schema=schema)
    forth.register_fake(_made)
    back.register_fake(_made_back)
    return forward, forth, backward, back


def _made(x: Tensor, states: Any, lora: Any, kinds: str, numbers: Any, scales: Any, act: str, keep: bool) -> Any:
    return x.new_empty((x.shape[0], numbers[8])), x.new_empty((x.shape[0], 2 * numbers[0]) if keep else (0,))


def _made_back(
    grad: Tensor,
    x: Tensor,
    kept: Tensor,
    states: Any,
    lora: Any,
    kinds: str,
    numbers: Any,
    scales: Any,
    act: str,
    need_x: bool,
) -> Any:
    return [
        x.new_empty(x.shape if need_x else (0,)),
        *(x.new_empty(0) if t is None else torch.empty_like(t) for t in lora),
    ]


FORMS = {"": operations("gated_mlp", _forward, _backward)}  # form -> its operations


class GatedMlp(torch.autograd.Function):
    """The operation; its weights get no gradient. See the head of this module."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        form: str,
        dtype: torch.dtype,
        kinds: str,
        numbers: tuple[int, ...],
        scales: tuple[float, ...],
        act: str,
        keep: bool,
        a_gate: Tensor | None,
        b_gate: Tensor | None,
        a_up: Tensor | None,
        b_up: Tensor | None,
        a_down: Tensor | None,
        b_down: Tensor | None,
        *states: Tensor | None,
    ) -> Tensor:
        """Return the output `[..., out]` of `x` `[..., in]`."""
        lora = [a_gate, b_gate, a_up, b_up, a_down, b_down]
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        how = FORMS[form][1 if torch.compiler.is_compiling() else 0]  # before torch 2.12 no compiler takes a bool here
        out, kept = how(flat, list(states), lora, kinds, list(numbers), list(scales), act, keep)
        if not keep:  # another empty tensor: for this one a compiled backward would run the forward again
            kept = flat.new_empty(0)
        ctx.save_for_backward(flat, kept, *lora, *states)
        ctx.how = (form, kinds, numbers, scales, act)
        ctx.form = (x.dtype, x.shape)
        shaped: Tensor = out.view(*x.shape[:-1], out.shape[-1])
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x and of the updates."""
        x, kept, *rest = ctx.saved_tensors
        lora, states = rest[:6], rest[6:]
        form, kinds, numbers, scales, act = ctx.how
        dtype, shape = ctx.form
        flat = grad.reshape(-1, grad.shape[-1])
        how = FORMS[form][2 + torch.compiler.is_compiling()]
        need_x = ctx.needs_input_grad[0]
        found = how(flat, x, kept, states, lora, kinds, list(numbers), list(scales), act, need_x)
        grad_x = found[0].view(shape).to(dtype) if need_x else None
        updates = [None if t is None else g for t, g in zip(lora, found[1:])]
        return (grad_x, *([None] * 7), *updates, *([None] * len(states)))
