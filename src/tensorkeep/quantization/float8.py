"""Products in float8 over frozen weights: numbers rounded to e4m3 with one scale a row, multiplied, scaled back.

On NVIDIA GPUs that have such units a product is `torch._scaled_mm`; elsewhere the same rounded numbers are multiplied
in float32. What is rounded has the same bits on both. e4m3 keeps four significant bits from 2^-6 to 448 times a row's
scale, so a row's largest number sets what its smallest can be. Not a number and infinity stay what they are: a row
that holds one gives NaN.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_TOP = 1e-30  # a row of zeros is scaled as if this were its largest number
ROLES = ("float8_rows", "float8_columns")  # scales of a weight's rows, for the forward, and columns, for the backward
_MULTIPLE = 16  # of sizes that the product takes
_NEAR = 0.08  # of the product that is tried first; e4m3's own rounding gives 0.037 on normal numbers


def scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales of a weight's rows, and of its columns.

    Args:
        weight: [rows, columns], float32.
    """
    tops = weight.abs()
    return scale_of(tops.amax(1)), scale_of(tops.amax(0))


def scale_of(tops: Tensor) -> Tensor:
    """Return the scale by which the largest number of a row becomes e4m3's.

    Args:
        tops: largest magnitudes, float32.
    """
    return tops.clamp(min=SMALLEST_TOP) / LARGEST


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """Divide by a scale and round to e4m3.

    Args:
        values: float32.
        scale: float32, of a shape that fits.
    """
    return (values * (1.0 / scale)).clamp(-LARGEST, LARGEST).to(FLOAT8)


def narrowed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to e4m3 by its largest number.

    Args:
        x: [n, k], in any float dtype.

    Returns:
        The rounded numbers [n, k], and the scales [n, 1].

    Example:
        >>> codes, scale = narrowed(torch.tensor([[2.0, -1.0, 0.3]]))
        >>> (codes.float() * scale).tolist()
        [[2.0, -1.0, 0.2857142984867096]]
    """
    how = _narrowed_op if torch.compiler.is_compiling() else _narrowed
    codes, scale = how(x)
    return codes, scale


def _narrowed(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.is_cuda and has_triton():
        from tensorkeep.quantization import _float8_kernels

        return _float8_kernels.rows(x, SMALLEST_TOP)
    wide = x.float()
    scale = scale_of(wide.abs().amax(1, keepdim=True)) if x.shape[1] else wide.new_ones(len(x), 1)
    return rounded(wide, scale), scale


_narrowed_op = torch.library.custom_op(
    "tensorkeep::float8_rows", _narrowed, mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)"
)


@_narrowed_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FLOAT8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def product(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply two matrices of e4m3 numbers, scale the result back and add a bias; the sum is rounded once.

    Args:
        left: [n, k].
        right: [k, m], whose columns lie in one piece.
        left_scale: [n, 1], float32.
        right_scale: [m], float32.
        dtype: of the result; bfloat16 on a GPU.
        out: [n, m] of that dtype, to be written and returned.
        bias: [m] of that dtype, or None.

    Returns:
        [n, m].
    """
    if left.is_cuda and len(left):
        given = (left, right, left_scale, right_scale[None], bias, None, dtype, True)
        return torch._scaled_mm(*given) if out is None else torch._scaled_mm(*given, out=out)
    with torch.autocast(left.device.type, enabled=False):
        wide = (left.float() @ right.float()).mul_(left_scale).mul_(right_scale)
        made = (wide if bias is None else wide.add_(bias)).to(dtype)
    return made if out is None else out.copy_(made)


def products(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    low: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute a `product` in bfloat16 and add `scale · low up` and a bias, which are not rounded to float8.

    Args:
        left: as in `product`, and so are the next three.
        right: likewise.
        left_scale: likewise.
        right_scale: likewise.
        low: [n, r], bfloat16, or None without an update.
        up: [r, m], bfloat16, or None without an update.
        scale: factor of the update.
        bias: [m], bfloat16.

    Returns:
        [n, m], bfloat16.
    """
    how = _products_op if torch.compiler.is_compiling() else _products
    out: Tensor = how(left, right, left_scale, right_scale, low, up, scale, bias)
    return out


def _products(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    out = product(left, right, left_scale, right_scale, torch.bfloat16)
    if bias is not None:
        out += bias
    return out if low is None or up is None else out.addmm_(low, up, alpha=scale)


_products_op = torch.library.custom_op(
    "tensorkeep::float8_products",
    _products,
    mutates_args=(),
    schema=(
        "(Tensor left, Tensor right, Tensor left_scale, Tensor right_scale, Tensor? low, Tensor? up, float scale, "
        "Tensor? bias) -> Tensor"
    ),
)


@_products_op.register_fake
def _(left: Tensor, right: Tensor, _ls: Tensor, _rs: Tensor, _low: Any, _up: Any, _s: float, _bias: Any) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]), dtype=torch.bfloat16)


def fits(rows: int, columns: int) -> bool:
    """Whether the product takes a weight of these sizes, forward and backward.

    Args:
        rows: of the weight.
        columns: of the weight.

    Returns:
        Whether both are multiples of 16.
    """
    return rows % _MULTIPLE == 0 and columns % _MULTIPLE == 0


@cache
def why_not(device: torch.device) -> str | None:
    """Say why a device has no float8 products; None where it has: on a GPU one is tried.

    Args:
        device: where they would run.

    Returns:
        The reason, or None.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return "float8 products are for NVIDIA GPUs, and the CPU"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if (major, minor) < (8, 9):
        return f"{name} has compute capability {major}.{minor}, float8 products need 8.9"
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=generator) for n in (32, 48))
    bias = torch.linspace(-8, 8, 48, dtype=torch.bfloat16)
    try:
        (left, ls), (right, rs) = (_narrowed(t.to(device, torch.bfloat16)) for t in (x, w))
        found = product(left, right.T, ls, rs[:, 0], torch.bfloat16, None, bias.to(device)).double().cpu()
    except RuntimeError as error:  # torch refuses what its build or the GPU lacks so
        return f"{name} and torch {torch.__version__} refuse a float8 product: {str(error).splitlines()[0]:.160}"
    exact = x.double() @ w.double().T + bias.double()
    off = float((found - exact).norm() / exact.norm())
    return None if off < _NEAR else f"a float8 product tried on {name} is wrong by {off:.2g}"


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
