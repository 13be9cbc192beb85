"""List a live model's tensors by name, and read the stored bytes that each should equal.

Names lose the wrappers of DDP, torch.compile, activation checkpointing and PEFT. Of a sharded tensor (DTensor) only
this process's own rectangle is looked at: nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tensorkeep.conversion.plan import Part
from tensorkeep.conversion.streams import pieces
from tensorkeep.formats.names import unwrap
from tensorkeep.formats.view import StateView
from tensorkeep.storage.record import DTYPES, nbytes


class Held(NamedTuple):
    """One tensor of a live model.

    Args:
        name: its name without wrappers.
        module: the module that holds it.
        tensor: the tensor.
        aliases: other names of the same tensor (tied weights).
    """

    name: str
    module: nn.Module
    tensor: Tensor
    aliases: tuple[str, ...] = ()


def clean(name: str) -> str:
    """Remove wrappers from a parameter's name, and the segments that PEFT puts before a wrapped layer's own.

    Args:
        name: as `named_parameters` gives it.

    Returns:
        The name that a file would have.

    Example:
        >>> clean("base_model.model.layers.0.q_proj.base_layer.weight")
        'layers.0.q_proj.weight'
    """
    bare = unwrap(name)[0].replace(".token_adapter.base_layer.", ".base_layer.")
    return ".".join(s for s in bare.split(".") if s not in ("base_layer", "original_module"))


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    """Yield every tensor slot as (raw name, module, key, tensor, whether a state_dict would have it)."""
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield (
                    f"{path}.{key}" if path else key,
                    module,
                    key,
                    tensor,
                    key not in module._non_persistent_buffers_set,
                )


def held(model: nn.Module) -> list[Held]:
    """List a model's parameters and persistent buffers, each once; a tied tensor lists its other names.

    Args:
        model: a live model.

    Returns:
        The tensors, in the order of the modules.

    Example:
        >>> [item.name for item in held(nn.Linear(2, 2))]
        ['weight', 'bias']
    """
    found: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
    for raw, module, _, tensor, stored in slots(model):
        if stored:
            found.setdefault(id(tensor), []).append((clean(raw), module, tensor))
    out = []
    for same in found.values():
        names = list(dict.fromkeys(name for name, _, _ in same))
        out.append(Held(names[0], same[0][1], same[0][2], tuple(names[1:])))
    return out


def local(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this process's rectangle of a tensor, and its offsets in the whole.

    Args:
        tensor: a tensor or DTensor.

    Returns:
        The local part and the index of its first element; the tensor itself and zeros where it is not sharded.
    """
    if hasattr(tensor, "to_local"):
        chunk = tensor.__create_chunk_list__()[0]  # type: ignore[attr-defined]
        return tensor.to_local(), tuple(chunk.offsets)
    return tensor, (0,) * tensor.ndim


def expected(parts: tuple[Part, ...], view: StateView, shape: tuple[int, ...], rows: tuple[int, int]) -> Tensor | None:
    """Read the stored values that rows of a model's tensor should equal.

    Args:
        parts: what the whole tensor is made of, from `CounterpartFinder.parts`.
        view: the checkpoint.
        shape: of the whole tensor.
        rows: the first row to read, and the one after the last.

    Returns:
        A tensor of the stored dtype, (rows[1] - rows[0], *shape[1:]); None where the parts have another size.
    """
    dtype = view[parts[0].name].dtype
    spelled = DTYPES[dtype].torch
    sizes = [part_bytes(p, view) for p in parts]
    if spelled is None or not hasattr(torch, spelled) or sum(sizes) != nbytes(dtype, shape):
        return None
    row = nbytes(dtype, shape[1:]) if shape else sizes[0]
    first, last = (rows[0] * row, rows[1] * row) if shape else (0, row)
    out, at = bytearray(), 0
    for part, size in zip(parts, sizes):
        low, high = max(first - at, 0), min(last - at, size)
        if low < high:
            out += _cut(part, view, low, high)
        at += size
    whole = (rows[1] - rows[0], *shape[1:]) if shape else shape
    if not out:
        return torch.empty(whole, dtype=getattr(torch, spelled))
    return torch.frombuffer(out, dtype=getattr(torch, spelled)).reshape(whole)


def part_bytes(part: Part, view: StateView) -> int:
    """Return the number of bytes of a part.

    Args:
        part: rows of a stored tensor.
        view: the checkpoint.
    """
    record = view[part.name]
    if part.rows is None or not record.shape:
        return record.nbytes
    if part.inner is not None:
        return nbytes(record.dtype, (part.inner[1] - part.inner[0], *record.shape[2:]))
    return nbytes(record.dtype, (part.rows[1] - part.rows[0], *record.shape[1:]))


def _cut(part: Part, view: StateView, low: int, high: int) -> bytearray:
    """Read a part's bytes from `low` to `high`; whole rows are read by number, so that a shard reads its own alone."""
    record = view[part.name]
    row = nbytes(record.dtype, record.shape[1:]) if record.shape else 0
    if row and part.plain and part.inner is None and low % row == 0 and high % row == 0:
        start = part.rows[0] if part.rows else 0
        part, low, high = part._replace(rows=(start + low // row, start + high // row)), 0, high - low
    out, at = bytearray(), 0
    for piece in pieces(part, view):
        out += piece[max(low - at, 0) : max(high - at, 0)]
        at += len(piece)
    return out
