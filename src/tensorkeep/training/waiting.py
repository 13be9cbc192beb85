"""Wait for work that may take hours: a collective would end with its group's time-out, half an hour by default."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

from tensorkeep.errors import TensorkeepError
from tensorkeep.training._board import Board
from tensorkeep.training.distributed import World, gathered

T = TypeVar("T")
_works = itertools.count()  # which all ranks come to
_MONTH = 30 * 86_400.0  # seconds


def from_first_at_length(world: World, work: Callable[[], T]) -> T:
    """Do as `from_first` does, for work that may take hours: the others wait outside of any collective.

    Args:
        world: every rank must call this.
        work: what the first rank does; its result must be picklable.

    Returns:
        What `work` returned on the first rank.

    Raises:
        TensorkeepError: `work` raised it, or the first rank is gone.
    """
    if world.size == 1:
        return work()
    board = Board(f"first/{next(_works)}", world.rank, world.size, timeout=_MONTH)
    found: T | TensorkeepError | None = None
    if world.first:
        try:
            found = work()
        except TensorkeepError as error:
            found = error
    board.tell(b"")
    told = gathered(world, found)[0]
    if isinstance(told, TensorkeepError):
        raise told
    return told  # type: ignore[no-any-return]
