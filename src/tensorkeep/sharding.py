"""FSDP2: parameters, moments and averages in shards over the ranks while training, whole tensors in the files.

A checkpoint of a sharded run is the ordinary one: tensors are gathered one at a time, the first rank keeps them in main
memory and writes them. So any number of ranks, one process or DDP goes on from it, its digests are those of the
tensors, and `verify`, `diff` and `convert` need not know. The price: the first rank's main memory holds the whole
state while it is saved (16 bytes a parameter with AdamW and an average), and ranks wait for the gathering.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tensorkeep.distributed import World
from tensorkeep.errors import TensorkeepError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the children of every outermost list whose children are of one class.

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


def shard(
    model: nn.Module, optimizer: Optimizer, averages: dict[str, Tensor], units: Iterable[nn.Module], world: World
) -> None:
    """Shard a model in place, unit by unit and the rest as one; optimizer groups and averages follow by name.

    The optimizer must be new: it holds no state yet. Raises TensorkeepError where it is not, or torch is older than 2.6.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise TensorkeepError("fsdp needs torch 2.6 or newer", where="training.parallel", hint="use ddp") from None
    from torch.distributed.device_mesh import init_device_mesh

    if optimizer.state:
        raise TensorkeepError("the optimizer holds state before the model is sharded", where="training.parallel")
    names = {id(p): n for n, p in model.named_parameters()}
    lost = [i for g in optimizer.param_groups for i, p in enumerate(g["params"]) if id(p) not in names]
    if lost:
        raise TensorkeepError(f"{len(lost)} parameters of the optimizer are not the model's", where="training.parallel")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    now = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[names[id(p)]] for p in group["params"]]
    for name, average in averages.items():
        averages[name] = like(average.to(world.device), now[name])


def exchange(model: nn.Module, last: bool) -> None:
    """Reduce gradients in the last backward of an update only. Nothing for a model that is not sharded."""
    reduce = getattr(model, "set_requires_gradient_sync", None)
    if reduce is not None:
        reduce(last)


def forget_whole(model: nn.Module) -> None:
    """Let go of parameters gathered for a forward. FSDP keeps those of the root until a backward, so that after an
    evaluation under the average the next forward would take the average's. Nothing for a model that is not sharded."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None and hasattr(module, "set_requires_gradient_sync"):
            reshard()


def sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any of them is spread over ranks."""
    return any(hasattr(t, "full_tensor") for t in tensors)


def whole(tensor: Tensor, keep: bool) -> Tensor:
    """A sharded tensor in one piece in main memory on ranks that `keep` it; others take part and get an empty one.
    Any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    full: Tensor = gather()
    return full.cpu() if keep else torch.empty(0, dtype=full.dtype)


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """`value`, whole and the same on every rank, as `pattern` is spread: this rank's shard is cut from it."""
    if not hasattr(pattern, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    spread: DTensor = pattern  # type: ignore[assignment]
    return distribute_tensor(value.to(spread.to_local().device), spread.device_mesh, spread.placements)
