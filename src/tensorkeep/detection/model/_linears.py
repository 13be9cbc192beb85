"""Frozen linears made ready for one pass through a block: in the dtype of their input, or with products in float8.

In float8 both factors are rounded to e4m3: the weight by its rows for the output, by its columns for the input's
gradient, and the other factor by its rows. A weight's two forms take half of its bfloat16 bytes each and live as long
as the block's pass does. The bias is added before the product is rounded to bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.quantization import float8
from tensorkeep.quantization.frozen import FOUR_BIT_ROLES, float8_weight, frozen_state
from tensorkeep.quantization.linear import QuantLinear


class Narrow(NamedTuple):
    """Rows rounded to e4m3.

    Attributes:
        codes: the rounded numbers, `[..., C]`.
        scale: of each row, `[rows, 1]`.
    """

    codes: Tensor
    scale: Tensor


Rows = Tensor | Narrow


def narrow(x: Rows) -> Narrow:
    """Round the rows of `x [..., C]` to e4m3, unless they are."""
    if isinstance(x, Narrow):
        return x
    codes, scale = float8.narrowed(x.flatten(0, -2))
    return Narrow(codes.view(x.shape), scale)


class Linear(Protocol):
    """A frozen linear from K to M channels."""

    def forward(self, x: Rows) -> Tensor:
        """Return the output `[..., M]` for `x [..., K]`."""

    def back(self, grad: Rows) -> Tensor:
        """Return the input's gradient `[..., K]` for that of the output, `[..., M]`."""


@dataclass(frozen=True)
class PlainLinear:
    """A linear computed in its weight's dtype.

    Attributes:
        weight: `[M, K]`.
        bias: `[M]`.
    """

    weight: Tensor
    bias: Tensor

    def forward(self, x: Rows) -> Tensor:
        """Return the output, as `Linear.forward` says."""
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight, self.bias)

    def back(self, grad: Rows) -> Tensor:
        """Return the input's gradient, as `Linear.back` says."""
        assert isinstance(grad, Tensor)
        return grad @ self.weight


@dataclass(frozen=True)
class NarrowLinear:
    """A linear whose products are in float8; inputs, gradients and results are bfloat16.

    Attributes:
        base: has the weight, as numbers or 4-bit codes with the scales of `float8.ROLES`.
        bias: `[M]`, bfloat16.
    """

    base: nn.Module
    bias: Tensor

    @cached_property
    def by_rows(self) -> Narrow:
        """The weight `[M, K]`, rounded by its rows; the scales are `[M]`."""
        return _weight(self.base, False)

    @cached_property
    def by_columns(self) -> Narrow:
        """The weight turned, `[K, M]`, rounded by its columns; the scales are `[K]`."""
        return _weight(self.base, True)

    def forward(self, x: Rows) -> Tensor:
        """Return the output, as `Linear.forward` says."""
        return _product(narrow(x), self.by_rows, self.bias)

    def back(self, grad: Rows) -> Tensor:
        """Return the input's gradient, as `Linear.back` says."""
        return _product(narrow(grad), self.by_columns, None)


def _weight(base: nn.Module, turned: bool) -> Narrow:
    """Round a weight to e4m3 by its rows or, `turned`, by its columns."""
    if isinstance(base, QuantLinear):
        how, state = frozen_state(base)
        return Narrow(float8_weight(how, state, turned), state[len(FOUR_BIT_ROLES) + turned])
    weight = base.get_parameter("weight").detach()
    codes, scale = float8.narrowed(weight.T.contiguous() if turned else weight)
    return Narrow(codes, scale[:, 0])


def _product(left: Narrow, right: Narrow, bias: Tensor | None) -> Tensor:
    """Multiply rows `[..., K]` with a rounded weight `[M, K]` and add a bias: `[..., M]`, bfloat16."""
    rows = left.codes.flatten(0, -2)
    made = float8.product(rows, right.codes.T, left.scale, right.scale, torch.bfloat16, None, bias)
    return made.view(*left.codes.shape[:-1], -1)


def opened(base: nn.Module, bias: Tensor, dtype: torch.dtype, in_float8: bool) -> Linear:
    """Make a frozen linear ready for a pass; one whose products are in float8 is rounded when it is first used.

    Args:
        base: has the weight, as numbers of `dtype` or codes, which are dequantized to it.
        bias: `[M]`.
        dtype: to compute in.
        in_float8: whether its products are in float8; `dtype` is bfloat16 then.
    """
    if in_float8:
        return NarrowLinear(base, bias)
    weight = base.dequantize(dtype) if isinstance(base, QuantLinear) else base.get_parameter("weight")
    return PlainLinear(weight, bias)
