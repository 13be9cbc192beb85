"""Let the first process do long work while the others wait, none of them in a collective.

A collective ends with its group's time-out (10 minutes with NCCL), and takes the job with it. Reading back a large
checkpoint to digest it takes longer.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from tensorkeep.errors import TensorkeepError
from tensorkeep.training._board import Board
from tensorkeep.training.distributed import World

T = TypeVar("T")
LONGEST = 12 * 3600.0  # seconds
_meetings = itertools.count()


def first_works(world: World, work: Callable[[], T], longest: float = LONGEST) -> T:
    """Do work on the first rank once all have come here, and give what it returned, or raise what it raised, on all.

    Args:
        world: every rank must call this.
        work: what the first rank does; its result must be picklable.
        longest: seconds that one waits for another; where a process of the same host has ended, none waits for it.

    Returns:
        What `work` returned on the first rank.

    Raises:
        TensorkeepError: `work` raised it, or failed otherwise; or a rank did not come, or ended.
    """
    if world.size == 1:
        return work()
    board = Board(f"work/{next(_meetings)}", world.rank, world.size, longest)
    board.gather(b"")
    if not world.first:
        found = pickle.loads(board.tell(None))  # noqa: S301  from a process of this job, as in any collective
        if isinstance(found, TensorkeepError):
            raise found
        return found  # type: ignore[no-any-return]
    note: Any = None
    try:
        note = made = work()
        return made
    except TensorkeepError as error:
        note = error
        raise
    except BaseException as error:
        note = TensorkeepError(f"the first process failed: {error!r}", where="several processes", hint="see its output")
        raise
    finally:
        board.tell(pickle.dumps(note))
