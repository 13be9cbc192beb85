"""Fill a live model from a checkpoint's tensors, sharded or not: every rank reads the bytes of its own shards alone.

A tensor of the model is made of rows of stored ones (`names.to_live`), whatever format they lie in; rows are permuted
and values cast on the way. Of a weight that is to be quantized each rank reads, and encodes, the blocks it keeps; only
scales are exchanged, since those of the whole weight decide how they are coded themselves. Memory beside the shards: a
few megabytes, or one weight's share where it is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.conversion.plan import HfTensor, Part, row_bytes
from tensorkeep.conversion.streams import permuted
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import torch_dtype
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization.linear import HELD, QuantLinear
from tensorkeep.quantization.packed import pack, pack_scales
from tensorkeep.quantization.spreading import ROLES, rows_of
from tensorkeep.storage.record import DTYPES
from tensorkeep.training.fsdp import own_runs


@torch.no_grad()
def read_into(
    model: nn.Module, names: Sequence[str], tensors: Mapping[str, HfTensor], sources: Sequence[StateView]
) -> None:
    """Read tensors of a model from checkpoints; of a quantized layer, the weight it is to encode.

    Args:
        model: has room for them (`training.fsdp.materialise`); every rank must call this.
        names: parameters and persistent buffers to fill; the scales of a quantized layer come with its weight.
        tensors: what each is made of, by its name in the model or another name of the same tensor.
        sources: the checkpoints that the parts are in.

    Raises:
        TensorkeepError: on the rank that cannot read its part, at the end: a file is shorter than its header says
            (F02), torch lacks a stored dtype, or a weight to be quantized is not finite (V01).
    """
    problem: TensorkeepError | None = None
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        try:
            if isinstance(module, QuantLinear) and key in HELD:
                if key == "weight":
                    encode(module, tensors[name], sources, name, problem)
            elif problem is None:
                target: Any = module._parameters[key] if key in module._parameters else module._buffers[key]
                for first, out in own_runs(target):
                    read_elements(out, tensors[name], sources, first)
        except TensorkeepError as error:  # the others wait for this rank's scales: it goes on to the end
            problem = problem or error
    if problem is not None:
        raise problem


def read_elements(out: Tensor, tensor: HfTensor, sources: Sequence[StateView], first: int) -> None:
    """Read elements of a tensor, numbered in row-major order, and cast them to the dtype of `out`.

    Args:
        out: flat, on any device; as many elements as it has are read.
        tensor: what it is made of.
        sources: the checkpoints that the parts are in.
        first: number of the first element.
    """
    at, last = 0, first + out.numel()
    for part in tensor.parts:
        view = sources[part.source]
        count, dtype = elements_of(part, view), torch_dtype(view, part.name)
        low, high = max(first - at, 0), min(last - at, count)
        done = at + low - first
        for piece in _elements(part, view, low, high) if low < high else ():
            some = torch.frombuffer(piece, dtype=dtype)
            out[done : done + some.numel()].copy_(some)
            done += some.numel()
        at += count


def elements_of(part: Part, view: StateView) -> int:
    """Return the number of elements of a part.

    Args:
        part: rows of a stored tensor.
        view: the checkpoint.
    """
    shape = view[part.name].shape
    rows = 1 if not shape else shape[0] if part.rows is None else part.rows[1] - part.rows[0]
    if part.inner is not None:
        return rows * (part.inner[1] - part.inner[0]) * math.prod(shape[2:])
    return rows * math.prod(shape[1:])


def _elements(part: Part, view: StateView, low: int, high: int) -> Iterator[memoryview]:
    """Read the bytes of a part's elements `low` to `high`; where rows are permuted, of the heads that hold them."""
    record = view[part.name]
    row = math.prod(record.shape[1:] if part.inner is None else record.shape[2:])
    begun = (part.rows[0] if part.rows else 0) * math.prod(record.shape[1:])
    begun += part.inner[0] * row if part.inner else 0
    width = DTYPES[record.dtype].bits // 8
    moved = row_bytes(record)
    unit = max((permute.block for permute in part.permutes), default=0) * moved // width
    if not unit:
        yield from view.elements(part.name, begun + low, begun + high, width)
        return
    first, last = low // unit * unit, -(-high // unit) * unit
    at = first
    for piece in view.elements(part.name, begun + first, begun + last, unit * width):
        for permute in part.permutes:
            piece = permuted(piece, permute, moved)
        count = len(piece) // width
        mine = piece[max(low - at, 0) * width : max(high - at, 0) * width]
        at += count
        if len(mine):
            yield mine


def encode(
    layer: QuantLinear,
    weight: HfTensor,
    sources: Sequence[StateView],
    name: str,
    problem: TensorkeepError | None = None,
) -> None:
    """Read and quantize the blocks of a weight that this rank keeps, bit by bit as the whole weight would be.

    Args:
        layer: with codes and scales as sharded parameters (`QuantLinear.spread`), which have room.
        weight: what the dense weight is made of.
        sources: the checkpoints that the parts are in.
        name: what errors call the weight.
        problem: why this rank gives up; it takes part for the others' sake.

    Raises:
        TensorkeepError: `problem`, or as `read_into`; only after every rank has given its scales.
    """
    layout, parameters = layer.layout, layer._parameters
    device = parameters["weight"].device  # type: ignore[union-attr]
    try:
        scales = torch.empty(0, device=device) if problem else _own_blocks(layer, weight, sources, name)
    except TensorkeepError as error:
        problem, scales = error, torch.empty(0, device=device)
    if layout.kind == "int8":
        found = {"weight_format": torch.zeros((), dtype=torch.uint8, device=device)}
        for _, out in own_runs(parameters["SCB"]) if problem is None else ():  # type: ignore[arg-type]
            out.copy_(rows_of(layout, "SCB", scales).view(-1))
    else:
        absmax = _gathered(scales, parameters["absmax"])
        found = {"absmax": absmax} | (pack_scales(absmax) if layout.nested else {})
        found["quant_map"] = torch.from_numpy(quant_codes.TABLES[layout.kind] + 0).to(device)
    for role, tensor in found.items():
        if role not in ROLES:
            layer._buffers[role] = tensor
            continue
        flat = rows_of(layout, role, tensor).reshape(-1)
        for at, out in own_runs(parameters[role]):  # type: ignore[arg-type]
            out.copy_(flat[at : at + out.numel()])
    if problem is not None:
        raise problem


def _own_blocks(layer: QuantLinear, weight: HfTensor, sources: Sequence[StateView], name: str) -> Tensor:
    """Read and quantize this rank's blocks of a weight into the layer's codes; return their scales."""
    layout = layer.layout
    codes: Any = layer._parameters["weight"]
    block = layout.shape[1] if layout.kind == "int8" else layout.block
    scales = torch.empty(0, device=codes.device)
    for at, room in own_runs(codes):  # one: whole blocks, or whole rows
        width = codes.shape[1]
        first, last = at // width * block, min((at + room.numel()) // width * block, math.prod(layout.shape))
        dtype = torch_dtype(sources[weight.parts[0].source], weight.parts[0].name)
        dense = torch.empty(last - first, dtype=dtype, device=codes.device)
        read_elements(dense, weight, sources, first)
        shape = (-1, layout.shape[1]) if layout.kind == "int8" else (1, -1)
        packed = pack(dense.view(shape), layout.kind, False, layout.block or 64, name)
        room.copy_(rows_of(layout, "weight", packed.tensors["weight"]).view(-1))
        scales = packed.tensors["SCB" if layout.kind == "int8" else "absmax"]
    return scales


def _gathered(scales: Tensor, pattern: Any) -> Tensor:
    """Return the scales of a whole weight from those of each rank's blocks."""
    if not hasattr(pattern, "to_local"):
        return scales
    from torch.distributed.tensor import DTensor

    count, own = pattern.shape[0], pattern.to_local().shape[0]
    if len(scales) != own:  # this rank could not read them
        scales = torch.full((own,), math.nan, device=scales.device)
    spread = DTensor.from_local(
        scales, pattern.device_mesh, pattern.placements, run_check=False, shape=torch.Size([count]), stride=(1,)
    )
    whole: Tensor = spread.full_tensor()
    return whole
