"""Repair non-persistent buffers of a live model in place.

Each is compared with what its config gives, and replaced where it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.models.buffers import Buffer, buffers, fresh
from tensorkeep.models.tensors import local

_EXACT = 1e-5  # relative; powers computed on another device differ in the last bits
# of the largest entry, for tables computed on another device: position 1e5 times the last bit of a frequency
_TABLE = 2e-2


def without_dynamic(found: list[Buffer]) -> Iterator[Buffer]:
    """Yield the buffers but for those `inv_freq` that RoPE changes with the length it has seen.

    RoPE of types dynamic and longrope does; it keeps the first values as `original_inv_freq`.

    Args:
        found: from `buffers`.
    """
    for buffer in found:
        dynamic = getattr(buffer.module, "rope_type", None) in ("dynamic", "longrope")
        original = getattr(buffer.module, "original_inv_freq", None)
        known = isinstance(original, Tensor) and not original.is_meta
        if not (dynamic and known) or buffer.key.startswith("original"):
            yield buffer


def judge(live: Tensor, right: Tensor) -> str:
    """Compare a live buffer with its right value; of a sharded buffer, this process's part.

    Args:
        live: the buffer.
        right: the value it should have, whole and on the CPU.

    Returns:
        "equal", "narrowed" (equal once cast to the buffer's own dtype) or "wrong".
    """
    if live.shape != right.shape or live.is_meta:
        return "wrong"
    mine, at = local(live.detach())
    theirs = right
    if any(at) or mine.shape != right.shape:
        theirs = right[tuple(slice(o, o + n) for o, n in zip(at, mine.shape))]
    elsewhere, mine = mine.device.type != "cpu", mine.cpu()
    if mine.dtype == theirs.dtype:
        if _close(mine, theirs, elsewhere):
            return "equal"
        through = [theirs.to(d).to(mine.dtype) for d in (torch.bfloat16, torch.float16) if mine.dtype == torch.float32]
        return "narrowed" if any(_close(mine, t, elsewhere) for t in through) else "wrong"
    if not (mine.is_floating_point() and theirs.is_floating_point()):
        same = mine.dtype.is_complex == theirs.dtype.is_complex and torch.equal(mine, theirs.to(mine.dtype))
        return "equal" if same else "wrong"
    return "narrowed" if _close(mine.double(), theirs.to(mine.dtype).double(), elsewhere) else "wrong"


def _close(a: Tensor, b: Tensor, elsewhere: bool) -> bool:
    """Whether two tensors agree to the last bits, on which powers of another device differ."""
    if not (a.is_floating_point() or a.is_complex()) or torch.equal(a, b):
        return torch.equal(a, b)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(
        torch.nan_to_num(a[~finite].real), torch.nan_to_num(b[~finite].real)
    ):
        return False
    x, y = a[finite], b[finite]
    room = _EXACT * y.abs()
    if y.ndim and b.ndim > 1 and y.numel():
        room = room + (_TABLE if elsewhere else _EXACT) * y.abs().max()
    return bool(((x - y).abs() <= room).all())


@torch.no_grad()
def repaired(model: nn.Module) -> list[str]:
    """Put the right value into every buffer that has not got it; return the names of those changed."""
    right = fresh(model)
    changed = []
    for buffer in without_dynamic(buffers(model)):
        value = right[buffer.name].value
        if value is None or judge(buffer.tensor, value) == "equal":
            continue
        rope = buffer.key.endswith("inv_freq")
        if judge(buffer.tensor, value) == "narrowed" and not rope:
            continue  # a scale or a table in the model's dtype, as from_pretrained leaves it
        _put(model, buffer, value, value.dtype if rope or buffer.tensor.is_meta else buffer.tensor.dtype)
        changed.append(buffer.name)
    return changed


def _put(model: nn.Module, buffer: Buffer, value: Tensor, dtype: torch.dtype) -> None:
    """Write a value into a live buffer, in place where device, dtype and shape allow it."""
    live: Any = buffer.tensor
    if not live.is_meta and live.dtype == dtype and live.shape == value.shape and not hasattr(live, "to_local"):
        live.copy_(value)  # in place: compiled graphs and captured ones keep its address
        return
    device = _device(model) if live.is_meta else live.device
    made = value.to(device=device, dtype=dtype, copy=True)
    if hasattr(live, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        made = distribute_tensor(made, live.device_mesh, live.placements)
    if buffer.plain:
        setattr(buffer.module, buffer.key, made)
    else:
        buffer.module._buffers[buffer.key] = made


def _device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter that is on any."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def repair_buffers(model: nn.Module) -> list[str]:
    """Recompute wrong non-persistent buffers of a model in place, from the model's own config.

    RoPE's frequencies become float32 again; devices stay. Call it after the load (and after any `.to(dtype)`), on every
    process. What cannot be computed is left alone: `check_loaded` names it.

    Args:
        model: a live model, sharded or not.

    Returns:
        The names of the buffers that were changed.

    Example:
        >>> repair_buffers(model)  # doctest: +SKIP
        ['model.rotary_emb.inv_freq']
    """
    return repaired(model)
