"""Spread work over the machine's cores: how many threads there are, and many small jobs handed out as few."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_MOST = 16  # threads: each holds a few buffers of 4 MiB, and a disk is kept busy by fewer
_BATCH_BYTES, _BATCH = 8 << 20, 128  # of one job: bytes, and items however small they are
Item = TypeVar("Item")
Found = TypeVar("Found")


def cores() -> int:
    """Return how many cores this process may use, at most 16."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST, count))


def batches(items: Sequence[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Gather neighbours into jobs: a thread is handed megabytes, not one small tensor after the other.

    Args:
        items: in order.
        size: gives the bytes of one.

    Yields:
        The items, in order; a large one alone.

    Example:
        >>> [len(batch) for batch in batches([1, 1, 1 << 30, 1], lambda size: size)]
        [2, 1, 1]
    """
    batch: list[Item] = []
    held = 0
    for item in items:
        own = size(item)
        if batch and (held + own > _BATCH_BYTES or len(batch) == _BATCH):
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += own
    if batch:
        yield batch


def in_threads(work: Callable[[Item], Found], items: Sequence[Item], size: Callable[[Item], int]) -> Iterator[Found]:
    """Do some work for every item in threads.

    Args:
        work: what is done for one.
        items: what it is done for.
        size: gives the bytes of one, by which work is shared out.

    Yields:
        What it gave, in the order of the items.
    """
    with ThreadPoolExecutor(cores()) as pool:
        for found in pool.map(lambda batch: [work(item) for item in batch], batches(items, size)):
            yield from found
