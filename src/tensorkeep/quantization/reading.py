"""One quantized weight out of stored tensors: found among their names, checked, and given as codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import tensor_of, view_of
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.description import QuantizedWeight
from tensorkeep.quantization.packed import WEIGHT_DIGEST, Kind, Layout, Packed, packed_digest


def read_packed(
    tensors: Mapping[str, Tensor] | StateView, shape: tuple[int, int] | None, name: str = "layer"
) -> Packed:
    """Read one quantized weight from stored tensors (`name.weight`, `name.weight.absmax`, ...), checked throughout.

    Where no digest is stored, nothing can be said about whether codes and scales belong together.

    Args:
        tensors: by name, or a view of a checkpoint.
        shape: [out, in] that it must have; None for any.
        name: what the names begin with.

    Raises:
        TensorkeepError: Q01 or Q06 where the state is missing or contradicts itself, S01 for another shape, Q02 where
            the digest says that codes and scales do not belong together.
    """
    view = tensors if isinstance(tensors, StateView) else view_of(tensors)
    stored = f"{name}.weight"
    weight = quantized.find_quantized(
        view, {n: n for n in view if n == stored or n.startswith((f"{stored}.", f"{name}."))}
    ).get(stored)
    if weight is None:
        found = f"{view[stored].dtype} {list(view[stored].shape)}" if stored in view else "nothing"
        raise TensorkeepError(
            f"holds {found}, no quantized weight",
            where=stored,
            code="Q01",
            hint="quantize float weights while loading: load_quantizing",
        )
    packed = take(view, weight)
    if shape is not None and packed.layout.shape != shape:
        raise TensorkeepError(
            f"stands for {list(packed.layout.shape)}, the layer is {list(shape)}", where=stored, code="S01"
        )
    digest = f"{name}.{WEIGHT_DIGEST}"
    if digest in view and bytes(view.bytes(digest)) != packed_digest(packed):
        raise TensorkeepError(
            "codes and scales do not belong together: the digest beside them says otherwise",
            where=stored,
            code="Q02",
            hint="take both from the same save",
        )
    return packed


def take(view: StateView, weight: QuantizedWeight) -> Packed:
    """Read the tensors of a described weight, codes as bytes whatever dtype they are stored under.

    Args:
        view: the checkpoint.
        weight: the weight's description.

    Returns:
        The weight's tensors by role, and their layout.

    Raises:
        TensorkeepError: Q01 or Q06 where the description has a problem, S01 where the weight is no matrix, without a
            code for a kind that cannot be trained on.
    """
    quantized.refuse(weight, view.path)
    if (
        weight.kind not in ("nf4", "fp4", "int8")
        or weight.shape is None
        or (weight.kind == "int8" and "SCB" not in weight.parts)
    ):
        raise TensorkeepError(
            f"{weight.kind} weights cannot be trained on here", where=weight.name, hint="convert it first"
        )
    kind, shape = cast(Kind, weight.kind), (weight.shape[0], weight.shape[-1])
    if kind == "int8":
        tensors = {"weight": tensor_of(view, weight.name), "SCB": tensor_of(view, weight.parts["SCB"])}
        return Packed(Layout(kind, shape, 0, 0, "float32"), tensors)
    assert isinstance(weight.block, int)
    if len(weight.shape) != 2:
        raise TensorkeepError(f"stands for {list(weight.shape)}, no matrix", where=weight.name, code="S01")
    count = (shape[0] * shape[1] + 1) // 2
    codes = tensor_of(view, weight.name).view(-1).view(torch.uint8)[:count].view(-1, 1)
    tensors = {"weight": codes} | {r: tensor_of(view, n) for r, n in weight.parts.items() if r != "state"}
    nested = 0
    if weight.nested is not None:
        nested = weight.nested.blocksize
        tensors["nested_offset"] = torch.tensor([weight.nested.offset], dtype=torch.float32)
    return Packed(Layout(kind, shape, weight.block, nested, weight.dtype or "float32"), tensors)
