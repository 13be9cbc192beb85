"""Bound the work of a test by counting calls, not seconds: a loaded machine makes no call more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def calls_at_most(most: int) -> Iterator[None]:
    """Fail as soon as the block has made more than so many calls, of Python and of C functions, in this thread."""
    made, before = 0, sys.getprofile()

    def count(_frame: FrameType, event: str, _arg: Any) -> None:
        nonlocal made
        if event in ("call", "c_call"):
            made += 1
            if made > most:
                sys.setprofile(before)
                raise AssertionError(f"more than {most} calls")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
