"""FSDP2: parameters, moments and averages lie in shards over the ranks while training, and in the files.

Each rank writes its own shards and reads its own rows; nothing is gathered. Any number of ranks, one process or DDP
goes on from such a checkpoint, and `inspect`, `verify`, `diff` and `convert` read it as one view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tensorkeep.errors import TensorkeepError
from tensorkeep.training.distributed import World, add_up
from tensorkeep.training.fsdp import blocks as blocks
from tensorkeep.training.fsdp import forget_whole as forget_whole
from tensorkeep.training.fsdp import shard_modules

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(
    model: nn.Module,
    optimizer: Optimizer,
    averages: dict[str, Tensor],
    units: Iterable[nn.Module],
    world: World,
    gathered: torch.dtype | None = None,
    replicas: int = 1,
) -> None:
    """Shard a model in place, unit by unit and the rest as one; optimizer groups and averages follow by name.

    Args:
        model: on the rank's device.
        optimizer: over the model's parameters, without state yet.
        averages: averages by parameter name, replaced in the dict.
        units: the modules whose parameters are gathered together.
        world: this process among its peers.
        gathered: the dtype of 16 bits in which units are gathered; None: their own.
        replicas: groups of ranks that hold all shards each.

    Raises:
        TensorkeepError: the optimizer holds state or other parameters, or `shard_modules` refuses.
    """
    if optimizer.state:
        raise TensorkeepError("the optimizer holds state before the model is sharded", where="training.parallel")
    names = {id(p): n for n, p in model.named_parameters()}
    lost = [i for g in optimizer.param_groups for i, p in enumerate(g["params"]) if id(p) not in names]
    if lost:
        raise TensorkeepError(f"{len(lost)} parameters of the optimizer are not the model's", where="training.parallel")
    shard_modules(model, units, world, gathered, replicas)
    now = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[names[id(p)]] for p in group["params"]]
    for name, average in averages.items():
        averages[name] = like(average.to(world.device), now[name])


def settle(optimizer: Optimizer) -> None:
    """Let an optimizer take a group of shards and whole parameters one by one: torch's many-at-once forms refuse it."""
    for group in optimizer.param_groups:
        if len({sharded([p]) for p in group["params"]}) == 2:
            group["foreach"] = group["fused"] = False


def exchange(model: nn.Module, last: bool) -> None:
    """Let a sharded model exchange gradients in the `last` backward of an update only; else do nothing."""
    reduce = getattr(model, "set_requires_gradient_sync", None)
    if reduce is not None:
        reduce(last)


def clipped(parameters: Sequence[Tensor], limit: float | None, world: World) -> Tensor:
    """Clip the norm of all gradients to `limit` (None: leave them).

    The gradients of whole parameters beside shards are made the mean over ranks first, as FSDP makes the others.

    Returns:
        The norm before clipping, over all shards, the same on every rank.
    """
    beside = [p for p in parameters if not sharded([p])]  # scalars, and what autocast leaves in float32
    if len(beside) in (0, len(parameters)):
        alike = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        return cast("DTensor", alike).full_tensor() if sharded([alike]) else alike
    for parameter in beside:  # every rank takes part, whether its samples reached them or not
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    grads = [p.grad for p in parameters if p.grad is not None]
    own, spread = [g for g in grads if not sharded([g])], [cast("DTensor", g) for g in grads if sharded([g])]
    add_up(world, own)
    torch._foreach_div_(own, world.size)
    parts = [cast("DTensor", torch.nn.utils.get_total_norm(spread)).full_tensor(), torch.nn.utils.get_total_norm(own)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    if limit is not None:
        local = [*own, *(g.to_local() for g in spread)]
        torch._foreach_mul_(local, (limit / (norm + 1e-6)).clamp(max=1.0))  # as `clip_grad_norm_`
    return norm


def sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any of these tensors is spread over ranks."""
    return any(hasattr(t, "full_tensor") for t in tensors)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bytes of memory; of sharded ones this rank's parts are looked at."""
    a, b = (t.to_local() if hasattr(t, "to_local") else t for t in (one, other))
    places = [(t.device, t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return places[0] == places[1] and a.data_ptr() != 0


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """Spread `value`, whole and the same on every rank, as `pattern` is spread; this rank gets its shard.

    What is spread already stays as it is.
    """
    if not hasattr(pattern, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    spread: DTensor = pattern  # type: ignore[assignment]
    return distribute_tensor(value.to(spread.to_local().device), spread.device_mesh, spread.placements)
