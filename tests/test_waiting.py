"""While the first process works for long, the others wait outside of any collective, whose time-out ends the job."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from tensorkeep.errors import TEMPORARY, TensorkeepError
from tensorkeep.training import distributed
from tensorkeep.training.distributed import World
from tensorkeep.training.waiting import first_works
from tests.training import ranks

SHORT, LONG = 0.4, 1.0  # seconds: the group's time-out, and the work


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def slow(work: Callable[[World], object]) -> Callable[[World], None]:
    def of_rank(world: World) -> None:
        torch.distributed.barrier()
        _set_pg_timeout(timedelta(seconds=SHORT))
        work(world)

    return of_rank


def test_a_collective_would_end_and_this_does_not() -> None:
    def right(world: World) -> None:
        assert first_works(world, lambda: (time.sleep(LONG), world.rank)[1]) == 0
        with pytest.raises(ZeroDivisionError if world.first else TensorkeepError, match="division by zero"):
            first_works(world, lambda: 1 / 0)

    def wrong(world: World) -> None:
        distributed.together(world, lambda: time.sleep(LONG) if world.first else None)

    assert ranks(2, slow(right)) == [0, 0]
    assert ranks(2, slow(wrong), seconds=20.0) != [0, 0]


def test_a_first_process_that_is_gone_is_not_waited_for() -> None:
    def work(world: World) -> None:
        if not world.first:
            with pytest.raises(
                TensorkeepError, match=r"rank 0 on .* ended before it was done|first rank is gone"
            ) as caught:
                first_works(world, lambda: None)
            assert caught.value.exit_code == TEMPORARY
            os._exit(0)
        first_works(world, lambda: os._exit(0))

    assert ranks(2, work, seconds=30.0) == [0, 0]
