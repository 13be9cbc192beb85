"""Make a sharded model with FSDP2, whole or still without values, before anything is trained.

A model on the meta device is sharded without memory; `materialise` then gives each rank room for its own shards alone,
and whoever knows the checkpoint fills them. What the run computes in 16 bits is gathered in 16 bits: matrices, which
autocast would round to the same numbers. What autocast leaves in float32 (norms, tables, a state-space model's A) stays
whole on every rank, and its gradients are averaged beside the shards'. Gradients are reduced in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import fill
from tensorkeep.formats.view import StateView

if TYPE_CHECKING:
    from tensorkeep.training.distributed import World

_MATRICES = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")
_MOST = 0.02  # share of a unit's parameters that may stay whole on every rank, so that the rest is gathered in 16 bits


def blocks(model: nn.Module) -> list[nn.Module]:
    """Find the repeated blocks of a model: the children of every outermost list whose children are of one class.

    Args:
        model: on any device.

    Returns:
        The blocks, in the model's order.

    >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    >>> len(blocks(model))
    3
    """
    found: list[nn.Module] = []
    for child in model.children():
        inner = list(child.children())
        repeated = isinstance(child, (nn.ModuleList, nn.Sequential)) and len(inner) > 1
        if repeated and len({type(module) for module in inner}) == 1:
            found += inner
        else:
            found += blocks(child)
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_modules` has been at a model.

    Args:
        model: any model.

    Returns:
        Whether it is.
    """
    return hasattr(model, "set_requires_gradient_sync")


def shard_modules(
    model: nn.Module,
    units: Iterable[nn.Module],
    world: World,
    gathered: torch.dtype | None = None,
    replicas: int = 1,
) -> None:
    """Shard a model in place, unit by unit and the rest as one; parameters on the meta device stay there.

    Args:
        model: its parameters that are not on meta are moved to the rank's device.
        units: the modules whose parameters are gathered together.
        world: this process among its peers.
        gathered: the dtype of 16 bits that forwards are computed in, in which units are gathered; None: their own.
        replicas: groups of ranks that hold all shards each (HSDP).

    Raises:
        TensorkeepError: torch is older than 2.6 (2.7 for parameters that stay whole), or the ranks do not make so many
            groups.
    """
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError:
        raise TensorkeepError("fsdp needs torch 2.6 or newer", where="training.parallel", hint="use ddp") from None
    mesh = _mesh(world, replicas)
    for module in model.modules():  # codes and scales of quantized weights become parameters, which can be sharded
        spread = getattr(module, "spread", None)
        if spread is not None:
            spread()
    # FSDP refuses scalars (a detection head has some): each rank keeps them, and `clipped` takes their gradients' mean
    kept = {p for p in model.parameters() if p.dim() == 0}
    chosen = list(units)
    half = [] if gathered is None else [unit for unit in chosen if _may_round(unit)]
    for unit in half:
        kept |= _wide(unit)
    if kept and "ignored_params" not in inspect.signature(fully_shard).parameters:
        what = "fsdp of a model with parameters that every rank keeps whole needs torch 2.7 or newer"
        raise TensorkeepError(what, where="training.parallel", hint="use ddp")
    how: dict[str, Any] = {"mesh": mesh, **({"ignored_params": kept} if kept else {})}
    placement = partial(_placement, world.size // replicas)
    if any(placement(p) is not None for p in model.parameters()):
        how["shard_placement_fn"] = placement
    rounding = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in chosen:
        mine: dict[str, Any] = {"mp_policy": rounding} if any(unit is one for one in half) else {}
        fully_shard(unit, **how, **mine)
    fully_shard(model, **how)
    for parameter in kept:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(world.device)


def _mesh(world: World, replicas: int) -> Any:
    """Return the mesh of all ranks: a line, or groups of replicas."""
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,))
    if replicas < 1 or world.size % replicas:
        what = f"{world.size} ranks make no {replicas} groups of one size"
        raise TensorkeepError(what, where="training.replicas", hint="a divisor of the number of ranks")
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _placement(ranks: int, parameter: nn.Parameter) -> Any:
    """Cut stacked experts by their rows where there are not as many for each rank; None: by the first dimension."""
    from torch.distributed.tensor import Shard

    stacked = parameter.dim() == 3 and parameter.shape[0] % ranks and parameter.shape[1] % ranks == 0
    return Shard(1) if stacked and parameter.numel() > 1 << 10 else None


def _may_round(unit: nn.Module) -> bool:
    """Whether a unit may be gathered in 16 bits: nearly all of it is what autocast rounds as well."""
    codes = any(p.element_size() == 1 for p in unit.parameters())
    if codes and tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
        return False  # an older torch would make 16 bits of codes as well
    total = sum(p.numel() for p in unit.parameters())
    return sum(p.numel() for p in _wide(unit)) <= _MOST * total


def _wide(unit: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a unit that autocast leaves in float32."""
    out = set()
    for module in unit.modules():
        matrix = any(kind.__name__ in _MATRICES for kind in type(module).__mro__)
        for name, parameter in module.named_parameters(recurse=False):
            rounds = matrix or parameter.dim() >= 3 or name in ("lora_A", "lora_B")
            if not rounds and parameter.is_floating_point():
                out.add(parameter)
    return out


def forget_whole(model: nn.Module) -> None:
    """Drop the whole parameters that a sharded model gathered for a forward; else do nothing.

    FSDP keeps those of the root until a backward, so that after an evaluation under the average the next forward would
    take the average's. After a forward without gradients the next backward would also lose theirs.

    Args:
        model: any model.
    """
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None and hasattr(module, "set_requires_gradient_sync"):
            reshard()


def materialise(model: nn.Module, device: torch.device) -> list[str]:
    """Give room to every parameter and persistent buffer on the meta device: of a sharded one, to the rank's shard.

    Args:
        model: sharded or not; changed in place.
        device: where to.

    Returns:
        The names that have room now and no values yet, a shared parameter under its first name.
    """
    made: dict[int, nn.Parameter] = {}
    names: list[str] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(_room(parameter, device), parameter.requires_grad)
                names.append(prefix + key)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and key not in module._non_persistent_buffers_set:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                names.append(prefix + key)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in made:
                module._parameters[key] = made[id(parameter)]
    return names


def _room(parameter: Any, device: torch.device) -> Tensor:
    """Return a tensor without values, spread as a parameter on meta is."""
    if not hasattr(parameter, "to_local"):
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    from torch.distributed.tensor import DTensor

    local = torch.empty(parameter.to_local().shape, dtype=parameter.dtype, device=device)
    made: Tensor = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return made


def own_runs(tensor: Tensor) -> Iterable[tuple[int, Tensor]]:
    """Cut this rank's part of a tensor into runs of elements that lie together in the whole one.

    Args:
        tensor: sharded or whole, with room.

    Returns:
        For each run the row-major number of its first element in the whole tensor, and its part of the rank's memory,
        flat. A tensor sharded by rows (all that FSDP2 makes) has one run.
    """
    spread: Any = tensor.detach()
    if not hasattr(spread, "to_local"):
        return [(0, spread.view(-1))] if spread.numel() else []
    local = spread.to_local()
    if not local.numel():
        return []
    (chunk,) = spread.__create_chunk_list__()
    whole = [a == b for a, b in zip(local.shape, spread.shape)]
    inner = next((i for i in range(local.dim()) if all(whole[i + 1 :])), local.dim())  # dims from here are one run
    steps = torch.empty(spread.shape, device="meta").stride()
    size = int(torch.Size(local.shape[inner:]).numel())
    flat = local.view(-1)
    out = []
    for number in range(local.numel() // size):
        rest, at = number, sum(o * step for o, step in zip(chunk.offsets[inner:], steps[inner:]))
        for dim in reversed(range(inner)):
            rest, index = divmod(rest, local.shape[dim])
            at += (chunk.offsets[dim] + index) * steps[dim]
        out.append((at, flat[number * size : (number + 1) * size]))
    return out


def read_into(tensors: dict[str, Tensor], view: StateView, stored: dict[str, str] | None = None) -> None:
    """Fill tensors from a checkpoint: every rank reads the bytes of its own shards and no others.

    Args:
        tensors: by name, sharded or whole, each with room; cast to their dtypes.
        view: a checkpoint of any format.
        stored: name -> name in the checkpoint, where that is another.

    Raises:
        TensorkeepError: the checkpoint lacks a tensor (K01) or has another shape for it (S01); nothing is read then.
    """
    names = {name: (stored or {}).get(name, name) for name in tensors}
    absent = [n for n in names.values() if n not in view]
    if absent:
        what = f"missing: {', '.join(absent[:4])} ({len(absent)})"
        raise TensorkeepError(what, where=view.path, code="K01", tensors=absent)
    for name, tensor in tensors.items():
        if view[names[name]].shape != tuple(tensor.shape):
            what = f"{names[name]} is {list(view[names[name]].shape)}, {list(tensor.shape)} is wanted"
            raise TensorkeepError(what, where=view.path, code="S01", tensors=[names[name]])
    for name, tensor in tensors.items():
        for first, out in own_runs(tensor):
            fill(out, view, names[name], first)
