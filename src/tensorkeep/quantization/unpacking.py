"""4- and 8-bit codes to float weights, in torch; on NVIDIA GPUs by a Triton kernel of our own.

Values are equal to those of bitsandbytes 0.50.2's CPU code, bit for bit, on every device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tensorkeep.quantization import codes as quant_codes

if TYPE_CHECKING:
    from tensorkeep.quantization.packed import Layout


def unpack(
    layout: Layout, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Return the weight that codes stand for, computed in float32 and rounded once to `dtype`.

    Args:
        layout: how the codes lie.
        tensors: role -> tensor, as in `Packed`; tensors of other roles are not looked at.
        dtype: of the result.
        out: [out, in] of that dtype, to be written and returned; its rows may lie apart. Not under torch.compile.

    Returns:
        [out, in].
    """
    if layout.kind == "int8":
        made = _dequantize_8bit(tensors["weight"], tensors["SCB"], dtype)
        return made if out is None else out.copy_(made)
    state = (tensors["weight"], tensors["absmax"], tensors["quant_map"])
    outer = (tensors.get("nested_absmax"), tensors.get("nested_quant_map"), tensors.get("nested_offset"))
    how = (layout.block, layout.nested, *layout.shape)
    if out is None:
        return dequantize_4bit(*state, *outer, *how, dtype)
    return _dequantize_4bit(*state, *outer, *how, dtype, out)


def _dequantize_8bit(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `code · SCB[row] / 127`, [out, in]; bitsandbytes multiplies by the float32 nearest to 1/127."""
    return (codes.float().mul_(scales[:, None])).mul_(float(quant_codes.PER_127)).to(dtype)


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    block: int,
    nested: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `quant_map[code] · scale[block]` as [rows, columns]; the arguments are those of `Packed` and `Layout`."""
    how = _dequantize_4bit_op if torch.compiler.is_compiling() else _dequantize_4bit  # the op costs 50 us a call
    values: Tensor = how(
        codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset, block, nested, rows, columns, dtype
    )
    return values


def _dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    block: int,
    nested: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    if codes.is_cuda and codes.is_contiguous() and _has_triton():
        from tensorkeep.quantization import _kernels

        if _kernels.can_dequantize(block, columns, out):
            nests = (nested_absmax, nested_quant_map, nested_offset)
            return _kernels.launch_dequantize(
                codes, absmax, quant_map, *nests, block, nested, rows, columns, dtype, out
            )
    if nested:
        assert nested_absmax is not None and nested_quant_map is not None and nested_offset is not None
        absmax = _scale_in_place(nested_quant_map.index_select(0, absmax.to(torch.int32)), nested_absmax, nested)
        absmax += nested_offset
    # both values of a byte are fetched as one 64-bit number: half the lookups
    pairs = quant_map.new_empty(16, 16, 2)
    pairs[..., 0], pairs[..., 1] = quant_map[:, None], quant_map
    both = pairs.view(-1).view(torch.float64).index_select(0, codes.view(-1).to(torch.int32)).view(torch.float32)
    made = _scale_in_place(both[: rows * columns], absmax, block).view(rows, columns)
    return made.to(dtype) if out is None else out.copy_(made)


# one operation to torch.compile, which need not see the kernel or the lookup of pairs
_SCHEMA = (
    "(Tensor codes, Tensor absmax, Tensor quant_map, Tensor? nested_absmax, Tensor? nested_quant_map, "
    "Tensor? nested_offset, int block, int nested, int rows, int columns, ScalarType dtype) -> Tensor"
)
_dequantize_4bit_op = torch.library.custom_op(
    "tensorkeep::dequantize_4bit", lambda *given: _dequantize_4bit(*given), mutates_args=(), schema=_SCHEMA
)


@_dequantize_4bit_op.register_fake
def _(
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    nested_offset: Tensor | None,
    block: int,
    nested: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((rows, columns), dtype=dtype)


def _scale_in_place(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Multiply flat float32 values by one scale per block, in place; the last block may be shorter."""
    whole = values.numel() // block
    values[: whole * block].view(whole, block).mul_(scales[:whole, None])
    if whole * block < values.numel():
        values[whole * block :].mul_(scales[whole])
    return values


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None
