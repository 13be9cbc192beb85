"""Which samples make up which global batch, and a loader that fetches them.

The position of a run is a number of samples. Sample p of the stream is entry p % N of epoch p // N, and a global
batch is `batch` samples in a row, over the end of an epoch where it falls there: every sample comes once an epoch,
whatever the world size, the split into micro-batches or the number of workers. Rank r takes every W-th from its r-th.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

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
    """What a job trains on. `sample` must draw from the generator it is given and from nothing else."""

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: torch.Generator) -> Any: ...

    def fingerprint(self) -> str:
        """A digest that changes when the data does."""
        ...


@dataclass(frozen=True)
class Stream:
    """The endless stream of samples: `seed`, the data's length, and epochs whose order is given from outside."""

    seed: int
    length: int
    orders: Orders = field(default_factory=dict)

    def keys(self, start: int, count: int) -> list[Key]:
        """(epoch, index) of `count` samples from position `start`.

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
        return self.orders[epoch] if epoch in self.orders else _order(self.seed, epoch, self.length)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return order(seed, epoch, length)


def micro_batches(keys: Sequence[Key], rank: int, world: int, micro: int) -> list[list[Key]]:
    """One rank's part of a global batch, cut into at most `micro` samples each; every rank gets equally many parts.

    Parts differ by one sample at most; empty ones, where there are some, come first, since the last one carries the
    exchange of gradients. Raises TensorkeepError where a rank would get nothing at all.

    >>> [len(part) for part in micro_batches([(0, i) for i in range(8)], rank=2, world=3, micro=1)]
    [0, 1, 1]
    """
    if len(keys) < world:
        raise TensorkeepError(
            f"a global batch of {len(keys)} cannot be split over {world} ranks",
            where="training.batch",
            hint="use fewer processes or a larger batch",
        )
    own = list(keys[rank::world])
    parts = parts_of(len(keys), world, micro)
    cuts = [len(own) * i // parts for i in range(parts + 1)]
    return sorted((own[a:b] for a, b in pairwise(cuts)), key=len)


def parts_of(batch: int, world: int, micro: int) -> int:
    """Forward passes of a rank in one update.

    >>> parts_of(8, world=3, micro=1), parts_of(8, world=1, micro=4)
    (3, 2)
    """
    return math.ceil(math.ceil(batch / world) / micro)


class _Keyed(Dataset[Any]):
    """The data by (epoch, index): each sample with the generator that is its own."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: Key) -> Any:
        return self.data.sample(key[1], generator(self.seed, *key))


class _Collate:
    """Empty parts stay None; a module-level class, so that workers can be spawned too."""

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
    """The micro-batches of each update from position `start`, `updates` times; an empty part is None.

    Workers prefetch. Neither making the loader nor its workers touches the process's global generators.
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


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of a batch (in dicts, lists and tuples) on the device; the rest as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _alone(_worker: int) -> None:
    leave_to_the_parent()


class _Sampler:
    """A batch sampler over a generator function, as DataLoader wants one: iterable anew."""

    def __init__(self, keys: Callable[[], Iterator[list[Key]]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[list[Key]]:
        return self.keys()
