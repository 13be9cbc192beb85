"""Run as one process or as many under torchrun, with the same code.

Nothing here launches or schedules. Small facts (counts, a request to stop, random states) travel between CPUs through
gloo, so that no step waits for a GPU to tell them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tensorkeep.errors import TensorkeepError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Args:
        rank: from 0.
        size: how many processes there are.
        device: the device that this one computes on.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0


def start(device: str | None = None) -> World:
    """Join the group that torchrun describes (RANK, WORLD_SIZE, LOCAL_RANK), or be the only process.

    Args:
        device: `cpu`, `cuda` or `cuda:N` (None: a GPU where there is one).

    Returns:
        This process among its peers, with the device it computes on.

    Raises:
        TensorkeepError: there is no such device.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise TensorkeepError("no CUDA device is here", where="device", hint="--device cpu")
    size, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    place = torch.device(kind if ":" in kind or kind != "cuda" else f"cuda:{local}")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    return World(rank, size, place)


def stop() -> None:
    """Leave the group that `start` joined, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(world: World, *values: float) -> list[float]:
    """Sum numbers over all ranks, in float64 on the CPU.

    Args:
        world: every rank must call this, with equally many values.
        values: this rank's numbers.

    Returns:
        The sums, in the same order.
    """
    if world.size == 1:
        return [float(v) for v in values]
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return [float(v) for v in sums]


def gathered(world: World, value: Any) -> list[Any]:
    """Collect a value from every rank.

    Args:
        world: every rank must call this.
        value: this rank's value, which must be picklable.

    Returns:
        The values in the order of the ranks, the same list on each.
    """
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def together(world: World, work: Callable[[], T]) -> T:
    """Do this rank's work, and raise an error of any rank on all of them, so that none waits for one that left.

    Args:
        world: every rank must call this.
        work: what this rank does.

    Returns:
        What `work` returned here.

    Raises:
        TensorkeepError: `work` raised it on this rank or another.
    """
    result: T | None = None
    error: TensorkeepError | None = None
    try:
        result = work()
    except TensorkeepError as caught:
        error = caught
    for told in gathered(world, error):
        if told is not None:
            raise error or told
    return result  # type: ignore[return-value]


def from_first(world: World, work: Callable[[], T]) -> T:
    """Do work on the first rank, and give what it returned, or raise what it raised, on all.

    Args:
        world: every rank must call this.
        work: what the first rank does; its result must be picklable.

    Returns:
        What `work` returned on the first rank.

    Raises:
        TensorkeepError: `work` raised it.
    """
    found: T | TensorkeepError | None = None
    if world.first:
        try:
            found = work()
        except TensorkeepError as error:
            found = error
    told = gathered(world, found)[0]
    if isinstance(told, TensorkeepError):
        raise told
    return told  # type: ignore[no-any-return]


def same_start(world: World, tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with the first rank's values, as DDP does when it is made."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def add_up(world: World, tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all ranks in place, in one exchange; all have one dtype and the same order on each rank."""
    if world.size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def parallel(model: nn.Module, world: World, deterministic: bool = False) -> nn.Module:
    """Put a model under DDP where there are several ranks.

    Every rank starts from the same buffers, but DDP does not exchange them in a forward: frozen codes need no trip, and
    what a loss keeps in a buffer it must reduce itself.

    Args:
        model: to be trained.
        world: this process among its peers.
        deterministic: give gradients memory of their own. As pieces of buckets they lie at other addresses in the first
            update of a start than later, and a GPU's libraries may choose a kernel by the address.
    """
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 has renamed it
    alone: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=not deterministic, **alone)
