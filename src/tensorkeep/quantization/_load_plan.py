"""What one load of a checkpoint is to do, step by step, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import unwrap
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization.packed import Kind, Layout, Packed, offset_of

Repair = Callable[[nn.Module], Sequence[str]]


@dataclass
class Loaded:
    """What a load did.

    Attributes:
        quantized: names of the linears that are quantized now.
        copied: names of the tensors that were copied as they are.
        unproven: quantized weights whose file has no digest that ties codes to scales.
        base_digest: digest of every tensor of the file, as `tensorkeep.json` has it; None where some were not read.
    """

    quantized: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    base_digest: str | None = None  # of every tensor of the file, as `tensorkeep.json` has it


class Settings(NamedTuple):
    """How float weights are quantized on the way.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        double: quantize the scales as well.
        block: number of flat elements that share a scale.
        include: patterns of the linears to quantize.
        exclude: patterns of those to leave.
    """

    kind: Kind
    double: bool
    block: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]


class Step(NamedTuple):
    """One tensor (or one quantized weight) of the file, and where it goes."""

    name: str
    stored: str
    # copy: a float tensor; take: a quantized weight as it is; pack: a float weight to be quantized
    # stack: floats of experts to be quantized; join: codes of experts as they are
    how: str
    places: tuple[tuple[nn.Module, str], ...]


def joined(parts: Sequence[Packed], name: str) -> Packed:
    """Join quantized matrices one below the other: codes bit for bit, doubly quantized scales as floats.

    Args:
        parts: of one kind, block size and width; no block reaches over an edge.
        name: what messages call the result.

    Returns:
        The whole.

    Raises:
        TensorkeepError: Q06 where they are not of one form.
    """
    first = parts[0].layout
    if len(parts) == 1:
        return parts[0]
    shape = (sum(p.layout.shape[0] for p in parts), first.shape[1])
    forms = {(p.layout.kind, p.layout.block, p.layout.shape[1]) for p in parts}
    cut = first.block and any(p.layout.shape[0] * p.layout.shape[1] % first.block for p in parts[:-1])
    if len(forms) > 1 or cut:
        raise TensorkeepError("its pieces are quantized in different forms", where=name, code="Q06")
    tensors = {"weight": torch.cat([p.tensors["weight"] for p in parts])}
    if first.kind == "int8":
        return Packed(first._replace(shape=shape), tensors | {"SCB": torch.cat([p.tensors["SCB"] for p in parts])})
    tensors["absmax"] = torch.cat([_scales(p) for p in parts])
    return Packed(
        Layout(first.kind, shape, first.block, 0, first.dtype), tensors | {"quant_map": parts[0].tensors["quant_map"]}
    )


def _scales(packed: Packed) -> Tensor:
    """Return the scales of a 4-bit weight as float32."""
    if not packed.layout.nested:
        return packed.tensors["absmax"]
    codes, table, outer = (packed.tensors[r].cpu().numpy() for r in ("absmax", "nested_quant_map", "nested_absmax"))
    made = quant_codes.nested_scales(codes, table, outer, packed.layout.nested, offset_of(packed))
    return torch.from_numpy(np.ascontiguousarray(made)).to(packed.tensors["absmax"].device)


def meta_buffers(model: nn.Module) -> list[str]:
    """List the non-persistent buffers that are on the meta device: no file holds them.

    Args:
        model: the model.
    """
    return [
        unwrap(f"{path}.{key}" if path else key)[0]
        for path, module in model.named_modules()
        for key, tensor in module._buffers.items()
        if tensor is not None and tensor.is_meta and key in module._non_persistent_buffers_set
    ]


def repair_all(model: nn.Module, empty: Sequence[str], repair: Repair | None, device: torch.device | None) -> None:
    """Let `repair` recompute the buffers on meta.

    Args:
        model: the model.
        empty: what `meta_buffers` lists.
        repair: recomputes buffers, and says which.
        device: where they go.

    Raises:
        TensorkeepError: B01 where one is left.
    """
    if not empty or repair is None:
        return
    left = set(empty)
    for whole in (0, 1):  # an integer that is right by chance is not repaired: what is left of them is tried anew
        for path, module in model.named_modules():
            for key in module._non_persistent_buffers_set:
                tensor = module._buffers.get(key)
                if tensor is not None and unwrap(f"{path}.{key}" if path else key)[0] in left:
                    filler = (
                        float("nan") if tensor.is_floating_point() else whole
                    )  # memory garbage might pass for a value
                    module._buffers[key] = torch.full(tensor.shape, filler, dtype=tensor.dtype, device=device or "cpu")
        left -= {unwrap(name)[0] for name in repair(model)}
        if not left:
            return
    raise TensorkeepError(
        f"{min(left)} is in no file and cannot be recomputed ({len(left)} buffers)",
        where="load_quantizing",
        code="B01",
        hint="build the model with real buffers: only its parameters need be on meta",
    )
