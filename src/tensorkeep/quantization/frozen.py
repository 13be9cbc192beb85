"""A frozen linear with a low-rank update, over a dense weight or codes that are dequantized at use.

The weight is dequantized in the forward and again in the backward, and is never kept: training and evaluation compute
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization import float8
from tensorkeep.quantization.packed import Layout
from tensorkeep.quantization.unpacking import unpack

FOUR_BIT_ROLES = ("weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")
INT8_ROLES = ("weight", "SCB")
How = tuple[str, int, int, int, int]  # kind ("dense" for floats), rows, columns, block and nested of a frozen weight


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: autocast's where it is on (it leaves float64 alone), else that of `x`.

    Args:
        x: the input of a layer.
    """
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def frozen_linear(
    x: Tensor, base: nn.Module, lora_A: Tensor | None = None, lora_B: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Compute `x W^T + bias + scale · (x A^T) B^T` over a frozen dense or quantized W.

    Kept for the backward: x and x A^T; never the dequantized weight. With B = 0 the result is bitwise that of the base.

    Args:
        x: [..., in].
        base: a `QuantLinear`, an `nn.Linear` or a module with its `matrix` [out, in]; it gets no gradient.
        lora_A: [r, in], or None without an update.
        lora_B: [out, r], or None without an update.
        scale: factor of the update.

    Returns:
        [..., out].

    Raises:
        TensorkeepError: x and a dense weight have different dtypes, and autocast is off.
    """
    how, state = frozen_state(base)
    dtype = compute_dtype(x)
    if not in_float8(dtype):
        state = state[: len(FOUR_BIT_ROLES)]
    if how[0] == "dense" and x.dtype != state[0].dtype and not torch.is_autocast_enabled(x.device.type):
        what = f"input {x.dtype} on a weight of {state[0].dtype}"
        raise TensorkeepError(what, where="linear", hint="cast one, or use autocast")
    run: Any = _FrozenLinear.apply
    out: Tensor = run(x, base.bias, lora_A, lora_B, scale, dtype, *how, *state)
    return out


def frozen_state(base: nn.Module) -> tuple[How, list[Any]]:
    """Return what a frozen linear's weight is made of: how its codes lie, and the tensors, for `dense_weight`.

    Args:
        base: a `QuantLinear` or what keeps codes like one, an `nn.Linear`, or a module with its `matrix` [out, in].

    Returns:
        How it lies, and one tensor (or None) a role; with the scales of `float8.ROLES` behind them where it has some.
    """
    if hasattr(base, "_plain"):
        quantized: Any = base
        layout, held = quantized._plain()
        roles: tuple[str, ...] = INT8_ROLES if layout.kind == "int8" else FOUR_BIT_ROLES
        roles += float8.ROLES if float8.ROLES[0] in held else ()
        return (layout.kind, *layout.shape, layout.block, layout.nested), [held.get(role) for role in roles]
    kept: Any = base
    matrix: Tensor = getattr(kept, "matrix", kept.weight)  # Conv1D keeps it transposed
    return ("dense", *matrix.shape, 0, 0), [matrix.detach()]


def dense_weight(how: How, state: Sequence[Any], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return a frozen linear's weight [rows, columns], dequantized where it is quantized.

    Args:
        how: as `frozen_state` gives it.
        state: likewise.
        dtype: of the result.
        out: is written and returned, where given; its rows may lie apart.
    """
    kind, rows, columns, block, nested = how
    if kind == "dense":
        return cast(Tensor, state[0].to(dtype)) if out is None else out.copy_(state[0])
    roles = INT8_ROLES if kind == "int8" else FOUR_BIT_ROLES
    spelled: Any = kind
    layout = Layout(spelled, (rows, columns), block, nested)
    return unpack(layout, {role: tensor for role, tensor in zip(roles, state) if tensor is not None}, dtype, out)


def in_float8(dtype: torch.dtype) -> bool:
    """Whether products that may be in float8 are: in training under bfloat16; evaluation uses the weight as it is.

    Args:
        dtype: that is computed in.

    Returns:
        Whether they are, here and now.
    """
    return dtype == torch.bfloat16 and torch.is_grad_enabled()


def float8_weight(
    how: How, state: Sequence[Any], turned: bool, scale: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return a 4-bit weight rounded to e4m3, [rows, columns] by rows or, `turned`, [columns, rows] by columns.

    Args:
        how: as `frozen_state` gives it.
        state: likewise, with the scales of `float8.ROLES`.
        turned: whether it is for the backward.
        scale: of rows or columns instead of its own.
        out: is written and returned, where given; its rows may lie apart. Not under torch.compile.
    """
    scale = state[len(FOUR_BIT_ROLES) + turned] if scale is None else scale
    given = (*state[: len(FOUR_BIT_ROLES)], scale, how[3], how[4], how[1], how[2], how[0], turned)
    how_made: Any = _float8_weight_op if torch.compiler.is_compiling() else partial(_float8_weight, out=out)
    made: Tensor = how_made(*given)
    return made


def _float8_weight(
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    scale: Tensor,
    block: int,
    nested: int,
    rows: int,
    columns: int,
    kind: str,
    turned: bool,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty((columns, rows) if turned else (rows, columns), dtype=float8.FLOAT8, device=codes.device)
    state = (codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset)
    if codes.is_cuda and codes.is_contiguous() and float8.has_triton():
        from tensorkeep.quantization import _float8_kernels

        if _float8_kernels.can_narrow(block, columns):
            made: Tensor = _float8_kernels.weight(*state, scale, block, nested, rows, columns, turned, out)
            return made
    wide = dense_weight((kind, rows, columns, block, nested), state, torch.float32)
    return out.copy_(float8.rounded(wide.T if turned else wide, scale[:, None]))


_float8_weight_op = torch.library.custom_op(
    "tensorkeep::float8_weight",
    lambda *given: _float8_weight(*given),
    mutates_args=(),
    schema=(
        "(Tensor codes, Tensor absmax, Tensor quant_map, Tensor? nested_absmax, Tensor? nested_quant_map, "
        "Tensor? nested_offset, Tensor scale, int block, int nested, int rows, int columns, str kind, bool turned) "
        "-> Tensor"
    ),
)


@_float8_weight_op.register_fake
def _(codes: Tensor, *given: Any) -> Tensor:
    rows, columns, _kind, turned = given[-4:]
    return codes.new_empty((columns, rows) if turned else (rows, columns), dtype=float8.FLOAT8)


def products(left: Tensor, right: Tensor, low: Tensor, up: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Compute `left right + scale · low up (+ bias)`, the second product added in the place of the first.

    `left [n, k]`, `right [k, m]`, `low [n, r]`, `up [r, m]`. Written out, a compiler would copy the first product
    before adding to it: a tenth of a training step's time on a large layer, so it sees one operation.
    """
    how = _products_op if torch.compiler.is_compiling() else _products
    out: Tensor = how(left, right, low, up, scale, bias)
    return out


def _products(left: Tensor, right: Tensor, low: Tensor, up: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    out = left @ right if bias is None else torch.addmm(bias, left, right)
    return out.addmm_(low, up, alpha=scale)


_products_op = torch.library.custom_op(
    "tensorkeep::products",
    _products,
    mutates_args=(),
    schema="(Tensor left, Tensor right, Tensor low, Tensor up, float scale, Tensor? bias=None) -> Tensor",
)


@_products_op.register_fake
def _(left: Tensor, right: Tensor, low: Tensor, up: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


def _narrow_products(
    left: Tensor,
    how: How,
    state: Sequence[Any],
    turned: bool,
    low: Tensor | None,
    up: Tensor | None,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute `products` of `left` with a 4-bit weight, the first of them in float8."""
    codes, tops = float8.narrowed(left)
    weight = float8_weight(how, state, turned)
    return float8.products(codes, weight.T, tops, state[len(FOUR_BIT_ROLES) + turned], low, up, scale, bias)


class _FrozenLinear(torch.autograd.Function):
    """The linear of `frozen_linear`: W gets no gradient and is dequantized again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        kind: str,
        rows: int,
        columns: int,
        block: int,
        nested: int,
        *state: Tensor | None,
    ) -> Tensor:
        ctx.x_dtype, x = x.dtype, x.to(dtype)
        how, own = (kind, rows, columns, block, nested), None if bias is None else bias.to(dtype)
        low = a_cast = b_cast = None
        narrow = len(state) > len(FOUR_BIT_ROLES)
        if not narrow and (a is None or b is None):
            out = F.linear(x, dense_weight(how, state, dtype), own)  # [..., out]
        else:
            flat = x.reshape(-1, columns)
            if a is not None and b is not None:
                a_cast, b_cast = a.to(dtype), b.to(dtype)
                low = flat @ a_cast.T  # [n, r]
            up = None if b_cast is None else b_cast.T
            if narrow:
                made = _narrow_products(flat, how, state, False, low, up, scale, own)
            else:
                assert low is not None and up is not None
                made = products(flat, dense_weight(how, state, dtype).T, low, up, scale, own)
            # a plain view could not be changed in place, as Llama 4 does
            out = torch.ops.aten._unsafe_view.default(made, [*x.shape[:-1], rows])
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[2] else None, low if needs[3] else None, a_cast, b_cast, *state)
        ctx.scale, ctx.how = scale, how
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, a, b)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, low, a, b, *state = ctx.saved_tensors
        rows, columns = ctx.how[1:3]
        bias_dtype, a_dtype, b_dtype = ctx.dtypes
        need_x, need_bias, need_a, need_b = ctx.needs_input_grad[:4]
        flat = grad.reshape(-1, rows)  # [n, out]
        grad_x = grad_bias = grad_a = grad_b = down = None
        if b is not None and (need_x or need_a):
            down = (flat @ b).mul_(ctx.scale)  # [n, r]
        if need_x:
            if len(state) > len(FOUR_BIT_ROLES):
                grad_x = _narrow_products(flat, ctx.how, state, True, down, a)
            else:
                weight = dense_weight(ctx.how, state, flat.dtype)
                grad_x = flat @ weight if down is None else products(flat, weight, down, a, 1.0)  # [n, in]
            grad_x = grad_x.view(*grad.shape[:-1], columns).to(ctx.x_dtype)
        if need_bias:
            grad_bias = flat.sum(0).to(bias_dtype)
        if need_a:
            grad_a = (down.T @ x.reshape(-1, columns)).to(a_dtype)  # type: ignore[union-attr]
        if need_b:
            grad_b = (flat.T @ low).mul_(ctx.scale).to(b_dtype)
        return (grad_x, grad_bias, grad_a, grad_b, *([None] * (7 + len(state))))
