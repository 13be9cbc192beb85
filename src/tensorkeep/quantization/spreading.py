"""Codes and scales of a quantized weight as parameters that FSDP2 shards: bytes, cut between blocks of the weight.

FSDP2 gathers parameters of any dtype as bytes and frees them after use; buffers it leaves whole on every rank. So a
layer that is to be sharded holds its large tensors as frozen integer parameters: the codes of a block in one row, its
scale in one row of another, so that every rank has whole blocks with their scales. The tables of a layer (4 to 272
numbers, and an offset) stay whole. FSDP2 of torch before 2.13 takes floats alone: there the same bytes are called
floats of eight bits while they are sharded and gathered, and nothing computes with them under that name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.codes import NESTED_BLOCK
from tensorkeep.quantization.packed import Kind, Layout, Packed

ROLES = ("weight", "absmax", "nested_absmax", "SCB")  # what is sharded
OLD_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 13)
_BYTES = torch.float8_e4m3fn  # what an older FSDP2 is told that bytes are


def holds_codes(tensor: Tensor) -> bool:
    """Whether a parameter holds codes or scales that are sharded, whatever this torch's FSDP2 calls them.

    Args:
        tensor: a parameter.

    Returns:
        Whether it does.

    >>> holds_codes(torch.zeros(2, dtype=torch.uint8)), holds_codes(torch.zeros(2))
    (True, False)
    """
    return not tensor.is_floating_point() or tensor.dtype == _BYTES


def as_parameters(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return the large tensors of a quantized weight in the form that is sharded by rows.

    Args:
        layout: how the codes lie.
        tensors: by role, on any device, meta included.

    Returns:
        Parameters of one byte an element: codes `[blocks, block / 2]` (int8: `[out, in]`), scales as one row of bytes
        each. From torch 2.13 on they are integers, before they are called `float8_e4m3fn`.
    """
    return {
        role: nn.Parameter(rows_of(layout, role, tensors[role]), requires_grad=False)
        for role in ROLES
        if role in tensors
    }


def rows_of(layout: Layout, role: str, tensor: Tensor) -> Tensor:
    """Return one tensor of a quantized weight, or whole blocks of it, as the rows that are sharded.

    Args:
        layout: how the codes lie.
        role: what the tensor is.
        tensor: on any device.
    """
    if role == "weight" and layout.kind != "int8":
        width = layout.block // 2
        tensor = F.pad(tensor.reshape(-1), (0, -tensor.numel() % width)).view(-1, width)
    elif tensor.dtype == torch.float32:
        tensor = tensor.contiguous().view(torch.uint8).view(tensor.numel(), 4)
    return tensor.view(_BYTES) if OLD_TORCH else tensor


def as_tensors(layout: Layout, parameters: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return gathered parameters in the form that the layer computes with: views, nothing is copied.

    Args:
        layout: how the codes lie.
        parameters: by role, gathered.

    Raises:
        TensorkeepError: they are not gathered: only FSDP's forward and backward have them whole.
    """
    out = {}
    for role in ROLES:
        held = parameters.get(role)
        if held is None:
            continue
        if hasattr(held, "to_local"):
            hint = "call the model; merge and export read the files"
            raise TensorkeepError("codes are spread over the ranks", where="quantize", hint=hint)
        raw = held.detach()
        if raw.dtype == _BYTES:
            raw = raw.view(torch.int8 if role == "weight" and layout.kind == "int8" else torch.uint8)
        if role == "weight" and layout.kind != "int8":
            raw = raw.reshape(-1)[: (math.prod(layout.shape) + 1) // 2].view(-1, 1)
        elif role != "weight" and raw.dim() == 2:
            raw = raw.view(torch.float32).view(-1)
        out[role] = raw
    return out


def hollow(kind: Kind, shape: tuple[int, int], double: bool, block: int, dtype: str) -> Packed:
    """Return a quantized weight on the meta device.

    Args:
        kind: "nf4", "fp4" or "int8".
        shape: of the weight, [out, in].
        double: whether the scales are quantized as well.
        block: number of flat elements that share a scale.
        dtype: torch's name of the weight's dtype.
    """
    count = math.prod(shape)
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    if kind == "int8":
        layout = Layout(kind, shape, 0, 0, dtype)
        sizes = {"weight": (shape, torch.int8), "SCB": ((shape[0],), torch.float32)}
    else:
        layout = Layout(kind, shape, block, NESTED_BLOCK if double else 0, dtype)
        scales = -(-count // block)
        sizes = {"weight": (((count + 1) // 2, 1), torch.uint8)}
        sizes["absmax"] = ((scales,), torch.uint8 if double else torch.float32)
        sizes["quant_map"] = ((16,), torch.float32)
        if double:
            sizes["nested_absmax"] = ((-(-scales // layout.nested),), torch.float32)
            sizes |= {"nested_quant_map": ((256,), torch.float32), "nested_offset": ((1,), torch.float32)}
    return Packed(layout, {r: torch.empty(s, dtype=d, device="meta") for r, (s, d) in sizes.items()})
