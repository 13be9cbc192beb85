"""Bound the work of a test by counting calls, not seconds: a loaded machine makes no call more."""

from __future__ import annotations

import cProfile
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def calls_at_most(most: int) -> Iterator[None]:
    """Fail where the block has made more than so many calls, of Python and of C functions, in this thread.

    Python's profiler counts them, at a fifth of the price of a function that hears of each; a look at its count twice a
    second of this process ends a block that would never end.
    """
    counter, before = cProfile.Profile(builtins=True), sys.getprofile()

    def look(_number: int, _frame: FrameType | None) -> None:
        counter.disable()
        made = sum(entry.callcount for entry in counter.getstats())
        assert made <= most, f"more than {most} calls"
        counter.enable()

    heard = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, 0.5, 0.5)
    counter.enable()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, heard)
        counter.disable()
        sys.setprofile(before)
    made = sum(entry.callcount for entry in counter.getstats())
    assert made <= most, f"more than {most} calls"
