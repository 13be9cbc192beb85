"""Decide which samples make up which global batch, and fetch them.

The position of a run is a number of samples. Sample p of the stream is entry p % N of epoch p // N, N being the data's
length, and a global batch is `batch` consecutive samples, over the end of an epoch where it falls there: every sample
comes once an epoch, whatever the world size, the split into micro-batches or the number of workers. Of W ranks, rank r
takes every W-th sample of a batch, from the r-th on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tensorkeep.errors import TensorkeepError
from tensorkeep.training.interruption import leave_to_the_parent
from tensorkeep.training.randomness import generator, order

Key = tuple[int, int]  # epoch, index
Orders = Mapping[int, Sequence[int]]  # epoch -> its permutation, where it is not ours (a run begun elsewhere)


class Data(Protocol):
    """What a job trains on: so many samples, each by its number."""

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: torch.Generator) -> Any:
        """Make sample `index`; random numbers must come from the generator and from nothing else."""
        ...

    def fingerprint(self) -> str:
        """Give a text that changes when the data does."""
        ...


@dataclass(frozen=True)
class Positions:
    """The places in the stream of samples whose samples one rank takes, update by update.

    Args:
        start: samples before the first update.
        updates: for so many updates.
        batch: samples of a global batch.
        rank: whose they are.
        world: how many ranks there are.

    >>> list(Positions(10, 2, 4, 1, 2))
    [11, 13, 15, 17]
    """

    start: int
    updates: int
    batch: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[int]:
        for update in range(self.updates):
            first = self.start + update * self.batch
            yield from range(first + self.rank, first + self.batch, self.world)


class Flow(Protocol):
    """Data that is read in order, whose position is more than a number; its length is not known (0)."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Give a text that changes with the way samples are made."""
        ...

    def rows(self, positions: Positions, workers: int) -> Iterator[Any]:
        """Give one rank's samples in order; every rank's together are the stream, whatever the number of ranks."""
        ...

    def note(self, samples: int) -> None:
        """Keep where the data stands, now that `samples` have been given over all ranks."""
        ...

    def state_at(self, samples: int) -> dict[str, Any]:
        """Give what was kept for `samples`, as plain JSON; every rank calls it."""
        ...

    def go_to(self, state: Mapping[str, Any]) -> None:
        """Stand where `state_at` was called, on any number of ranks."""
        ...


@dataclass(frozen=True)
class Stream:
    """The endless stream of samples, epoch after epoch.

    Args:
        seed: of the epochs' orders.
        length: samples of an epoch.
        orders: the order of those epochs whose order comes from outside.
    """

    seed: int
    length: int
    orders: Orders = field(default_factory=dict)

    def keys(self, start: int, count: int) -> list[Key]:
        """List (epoch, index) of `count` samples from position `start`.

        >>> stream = Stream(seed=0, length=3)
        >>> sorted(index for _, index in stream.keys(3, 3))
        [0, 1, 2]
        """
        if self.length < 1:
            raise TensorkeepError(
                "the data is empty", where="data", hint="check the paths of the recipe's data section"
            )
        out: list[Key] = []
        while len(out) < count:
            epoch, at = divmod(start + len(out), self.length)
            part = self._epoch(epoch)[at : at + count - len(out)]
            out += [(epoch, int(i)) for i in part]
        return out

    def _epoch(self, epoch: int) -> Any:
        """The order of an epoch."""
        return self.orders[epoch] if epoch in self.orders else _order(self.seed, epoch, self.length)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`randomness.order`, kept for the epochs in use."""
    return order(seed, epoch, length)


def micro_batches(keys: Sequence[Key], rank: int, world: int, micro: int) -> list[list[Key]]:
    """Cut one rank's part of a global batch into micro-batches; every rank gets equally many.

    They differ by one sample at most; empty ones, where there are some, come first, since the last one carries the
    exchange of gradients.

    Args:
        keys: the global batch.
        rank: whose part is cut.
        world: how many ranks there are.
        micro: at most so many samples a micro-batch.

    Raises:
        TensorkeepError: a rank would get no sample at all.

    >>> [len(part) for part in micro_batches([(0, i) for i in range(8)], rank=2, world=3, micro=1)]
    [0, 1, 1]
    """
    if len(keys) < world:
        raise TensorkeepError(
            f"a global batch of {len(keys)} cannot be split over {world} ranks",
            where="training.batch_size",
            hint="use fewer processes or a larger batch",
        )
    own = list(keys[rank::world])
    parts = parts_of(len(keys), world, micro)
    cuts = [len(own) * i // parts for i in range(parts + 1)]
    return sorted((own[a:b] for a, b in pairwise(cuts)), key=len)


def parts_of(batch: int, world: int, micro: int) -> int:
    """Return how many forward passes a rank makes in one update.

    Args:
        batch: samples of a global batch.
        world: how many ranks there are.
        micro: at most so many samples a forward.

    >>> parts_of(8, world=3, micro=1), parts_of(8, world=1, micro=4)
    (3, 2)
    """
    return math.ceil(math.ceil(batch / world) / micro)


class _Keyed(Dataset[Any]):
    """The data as torch's loader wants it: a sample by (epoch, index), made with a generator of its own."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: Key) -> Any:
        return self.data.sample(key[1], generator(self.seed, *key))


class _Collate:
    """The job's collate, but None for an empty part; a class of the module, so that workers can be spawned too."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        return self.collate(samples) if samples else None


def batches(
    data: Data,
    collate: Callable[[list[Any]], Any],
    stream: Stream,
    start: int,
    updates: int,
    batch: int,
    micro: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[list[Any]]:
    """Fetch one rank's micro-batches, update by update; an empty one is None.

    Neither making the loader nor its workers touches the process's global random generators.

    Args:
        data: gives samples.
        collate: makes a batch of a list of samples.
        stream: the order of samples.
        start: the position of the first update, in samples.
        updates: for so many updates.
        batch: samples of a global batch.
        micro: at most so many samples a micro-batch.
        rank: whose micro-batches are fetched.
        world: how many ranks there are.
        workers: processes that prefetch (0: none).
        pin: put tensors into page-locked memory.
    """

    def keys() -> Iterator[list[Key]]:
        for update in range(updates):
            yield from micro_batches(stream.keys(start + update * batch, batch), rank, world, micro)

    loader = DataLoader(
        _Keyed(data, stream.seed),
        batch_sampler=_Sampler(keys),
        collate_fn=_Collate(collate),
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),
        prefetch_factor=4 if workers else None,
        worker_init_fn=_alone,
    )
    parts = parts_of(batch, world, micro)
    held: list[Any] = []
    for one in loader:
        held.append(one)
        if len(held) == parts:
            yield held
            held = []


def is_flow(data: Data | Flow) -> TypeGuard[Flow]:
    """Whether data is read in order.

    Args:
        data: a job's.
    """
    return hasattr(data, "state_at")


def streamed(
    data: Flow,
    collate: Callable[[list[Any]], Any],
    positions: Positions,
    micro: int,
    workers: int = 0,
) -> Generator[list[Any], None, None]:
    """Fetch one rank's micro-batches of data that is read in order, as `batches` does.

    Args:
        data: gives samples.
        collate: makes a batch of a list of samples.
        positions: which samples.
        micro: at most so many samples a micro-batch.
        workers: processes that make samples ahead (0: none).
    """
    at, rows = positions.start, data.rows(positions, workers)
    together = _Collate(collate)
    for _ in range(positions.updates):
        keys = [(0, p) for p in range(at, at + positions.batch)]
        parts = micro_batches(keys, positions.rank, positions.world, micro)
        own = {place: next(rows) for place in range(at + positions.rank, at + positions.batch, positions.world)}
        at += positions.batch
        data.note(at)
        yield [together([own[place] for _, place in part]) for part in parts]


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch (in dicts, lists and tuples) to a device.

    Args:
        batch: nested values; what is no tensor stays as it is.
        device: where to.

    Returns:
        A batch of the same form.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _alone(_worker: int) -> None:
    """Called in each worker as it starts."""
    leave_to_the_parent()


class _Sampler:
    """A batch sampler over a generator function, since DataLoader wants one that can be iterated anew."""

    def __init__(self, keys: Callable[[], Iterator[list[Key]]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[list[Key]]:
        return self.keys()
